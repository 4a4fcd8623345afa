"""Which sample comes when: sources mixed by weight, each visited in a keyed order, once per epoch.

Draws come in windows without end. A window holds a fixed number per source, so where any window starts in any source is
known without replaying what came before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from omniform.data.schema import DataError
from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, keyed_uniform, stream
from omniform.modeling.config import STRICT
from omniform.modeling.sequence import Role
from omniform.modeling.subsets import AnySubset

WINDOW = 4096
INTERLEAVED = "interleaved"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JoinConfig:
    """A folder that completes the samples of another: see `JoinedSource`.

    Attributes:
        by: keys of the samples' metadata whose values have to be equal.
        modalities: the spans of these alone join.
    """

    path: Path
    index_dir: Path | None = None
    by: tuple[str, ...] = Field(min_length=1)
    modalities: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """A folder of indexed shards and what to learn from it.

    Attributes:
        index_dir: where its indexes are, if not beside the shards.
        name: what the stages of a run call it; the name of its folder unless given.
        weight: share of all draws, relative to the other sources; at 0 it waits for a stage that raises it.
        join: folders whose samples complete those of `path`: each is given one of theirs with equal labels.
        tasks: relative weight by task. "X->Y" gives the spans of modality X and learns those of Y, each in the sample's
            order; "X->X" gives the first and learns the last, "X->Y+X" those of Y before that; "W+X->Y+Z" gives and
            learns several, in the order named. "interleaved" gives nothing and learns every span in the sample's
            order, from all that stands before it, and what follows each. "X~NAME" cuts the first span of modality X
            as the model's denoiser NAME says, and learns its gaps. "X+Y~NAME" gives and learns tokens of the first
            spans of several modalities as the model's subset NAME says.
    """

    path: Path
    index_dir: Path | None = None
    name: str | None = None
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    join: tuple[JoinConfig, ...] = ()
    tasks: dict[str, float] = Field(min_length=1)

    @property
    def label(self) -> str:
        """Return what stages call it."""
        return self.path.name if self.name is None else self.name

    @model_validator(mode="after")
    def _check_tasks(self) -> "SourceConfig":
        _check_tasks(self.tasks)
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceChange:
    """What one stage of a run changes of a source; None leaves it as it is in `data.sources`.

    Attributes:
        weight: 0 draws nothing of the source.
        tasks: take the place of all its tasks.
    """

    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    tasks: dict[str, float] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check_tasks(self) -> "SourceChange":
        _check_tasks(self.tasks or {})
        return self


def _check_tasks(tasks: Mapping[str, float]) -> None:
    for task, weight in tasks.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"tasks.{task} has the weight {weight}, expected more than 0: leave out what is unused")
        if task == INTERLEAVED or denoised(task):
            continue
        given, learnt = modalities_of(task)
        if subset_of(task):
            if len(set(learnt)) < len(learnt):
                raise ValueError(f"task {task!r} names a modality twice, of which a subset has each once")
            continue
        if not given or not learnt or not all(name.isidentifier() for name in (*given, *learnt)):
            raise ValueError(
                f"task {task!r}, expected modalities such as text->image or text+image->speech, or a modality and a "
                f"denoiser such as text~NAME, or modalities and a subset such as text+image~NAME, or {INTERLEAVED}"
            )
        if len(set(given)) < len(given) or len(set(learnt)) < len(learnt):
            raise ValueError(f"task {task!r} names a modality twice on one side")
        if set(given) & set(learnt) and (len(given) > 1 or learnt[-1] not in given):
            raise ValueError(
                f"task {task!r} both gives and learns a modality, which only X->X can do, or X->Y+X: one is given, "
                "and learnt last"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What a model learns from.

    Attributes:
        row_length: tokens of a packed row; no document may be longer.
        condition_dropout: fraction of documents that lose everything given, for guidance (arXiv:2207.12598).
    """

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    row_length: int = Field(default=256, ge=2)
    condition_dropout: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check_weights(self) -> "DataConfig":
        if not any(source.weight for source in self.sources):
            raise ValueError("every source has the weight 0: raise the weight of one")
        return self

    def changed(self, changes: Mapping[str, SourceChange]) -> "DataConfig":
        """Return the same data with other weights or tasks of the sources named.

        Raises:
            ValueError: no source, or more than one, has that name; or nothing would be drawn.
        """
        labels = [source.label for source in self.sources]
        for label in changes:
            if labels.count(label) != 1:
                raise ValueError(
                    f"{label}: data.sources has {labels.count(label)} sources of this name, expected 1; there are "
                    f"{', '.join(labels)} (data.sources.N.name renames one)"
                )
        sources = []
        for source in self.sources:
            change = changes.get(source.label, SourceChange())
            weight = source.weight if change.weight is None else change.weight
            sources.append(replace(source, weight=weight, tasks=change.tasks or source.tasks))
        if not any(source.weight for source in sources):
            raise ValueError("every source has the weight 0: raise the weight of one")
        return replace(self, sources=tuple(sources))


@plain_dataclass(frozen=True)
class DataStage:
    """Data from one step of a run on, until the next stage begins."""

    first_step: int
    config: DataConfig


def modalities_of(task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a task gives and what it learns, in order; nothing for one that is about every span.

    A task that denoises a modality, or is about subsets, gives nothing, as far as whole spans go.
    """
    if cut := denoised(task):
        return (), cut[:1]
    if subset := subset_of(task):
        return (), subset[0]
    given, separator, learnt = task.partition("->")
    return (tuple(given.split("+")), tuple(learnt.split("+"))) if separator else ((), ())


def denoised(task: str) -> tuple[str, str] | None:
    """Return the modality and the denoiser's name of a task X~NAME; None for all others."""
    modality, separator, name = task.partition("~")
    return (modality, name) if separator and modality.isidentifier() and name.isidentifier() else None


def subset_of(task: str) -> tuple[tuple[str, ...], str] | None:
    """Return the modalities and the subset's name of a task X+Y~NAME; None for all others."""
    modalities, separator, name = task.partition("~")
    names = tuple(modalities.split("+"))
    well_formed = separator and len(names) > 1 and all(one.isidentifier() for one in (*names, name))
    return (names, name) if well_formed else None


def subset_problem(task: str, subsets: Mapping[str, AnySubset]) -> str | None:
    """Return why a model with these subsets cannot learn a task; None if it can, as far as subsets go."""
    found = subset_of(task)
    if found is None:
        return "is about no subset, beside which a model with model.subsets learns nothing else" if subsets else None
    modalities, name = found
    if name not in subsets:
        return f"needs model.subsets.{name}; there is {', '.join(subsets) or 'none'}: name one, or add it"
    if not subsets[name].learns(modalities):
        return f"has no modality with a concentration above 0 in model.subsets.{name}.target_alpha: give one to one"
    return None


def arrange(task: str, modalities: Sequence[str]) -> list[tuple[int, Role]]:
    """Return which of a sample's spans, by place, a task uses and how; none if the sample does not serve it."""
    if task == INTERLEAVED:
        return [(place, Role.TARGET) for place in range(len(modalities))] if len(modalities) > 1 else []
    if cut := denoised(task):
        return [(place, Role.TARGET) for place in range(len(modalities)) if modalities[place] == cut[0]][:1]
    given, learnt = modalities_of(task)
    places = {name: [place for place, modality in enumerate(modalities) if modality == name] for name in modalities}
    if subset_of(task):
        return [(places[name][0], Role.TARGET) for name in learnt] if set(learnt) <= set(places) else []
    if not set(given) | set(learnt) <= set(places):
        return []
    context = [places[name] for name in given]
    target = [places[name] for name in learnt]
    if learnt[-1] == given[0]:
        if len(places[given[0]]) < 2:
            return []
        context, target[-1] = [places[given[0]][:1]], places[given[0]][-1:]
    sides = ((context, Role.CONTEXT), (target, Role.TARGET))
    return [(place, role) for parts, role in sides for found in parts for place in found]


@plain_dataclass(frozen=True)
class Draws:
    """A window of draws, one element each.

    Attributes:
        source, sample: place of the source in the config, and of the sample in the source.
        epoch: how often the source was gone through before.
        task: place among the source's tasks.
        unconditional: the document loses everything given.
        noise_key: identifies this visit of this sample; keys all its other random numbers.
    """

    source: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int64]
    epoch: npt.NDArray[np.int64]
    task: npt.NDArray[np.int64]
    unconditional: npt.NDArray[np.bool_]
    noise_key: npt.NDArray[np.uint64]


class Mixture:
    """The endless sequence of draws, in windows of WINDOW: a pure function of its arguments.

    Args:
        sizes: number of samples of each source.
        first_window: number of the first window.
        cursors: draws made of each source before that window; none unless given.

    Raises:
        DataError: an empty source, or one whose weight gives it no draw in a window.
    """

    def __init__(
        self,
        config: DataConfig,
        sizes: Sequence[int],
        seed: int,
        *,
        first_window: int = 0,
        cursors: Sequence[int] | None = None,
    ) -> None:
        self.config, self.sizes, self.seed = config, tuple(sizes), seed
        self.first_window = first_window
        self._cursors = np.zeros(len(sizes), dtype=np.int64) if cursors is None else np.array(cursors, dtype=np.int64)
        shares = np.array([source.weight for source in config.sources])
        self.quotas = _largest_remainder(shares / shares.sum(), WINDOW)
        for source, size, quota in zip(config.sources, sizes, self.quotas, strict=True):
            if size == 0:
                raise DataError(f"{source.path} holds no samples: remove it from data.sources")
            if quota == 0 and source.weight:
                raise DataError(
                    f"{source.path} has the weight {source.weight} of {shares.sum()} in all, less than one draw in "
                    f"{WINDOW}: raise its weight or remove it from data.sources"
                )
        self._permutation = lru_cache(maxsize=4 * len(sizes))(self._draw_permutation)

    def cursors(self, number: int) -> npt.NDArray[np.int64]:
        """Return the draws made of each source before window `number`."""
        return self._cursors + (number - self.first_window) * self.quotas

    def window(self, number: int) -> Draws:
        """Return the draws of window `number`, from `first_window` on."""
        sources = np.repeat(np.arange(len(self.sizes)), self.quotas)
        firsts = self.cursors(number)
        cursors = np.concatenate([first + np.arange(n) for first, n in zip(firsts, self.quotas, strict=True)])
        order = keyed_permutation(WINDOW, self.seed, stream("data/mix"), number)
        sizes = np.array(self.sizes)[sources]
        epochs, places = cursors // sizes, cursors % sizes
        samples = np.empty_like(places)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            here = (sources == source) & (epochs == epoch)
            samples[here] = self._permutation(source, epoch)[places[here]]
        # Elements of one source keep their order, so that windows go through each epoch as one sequence.
        sources_in_order = sources[order]
        by_source = np.empty_like(order)
        by_source[np.argsort(sources_in_order, kind="stable")] = np.arange(WINDOW)
        epochs, samples = epochs[by_source], samples[by_source]
        noise_keys = keyed_bits(self.seed, stream("data/visit"), sources_in_order, epochs, samples)
        tasks = np.zeros(WINDOW, dtype=np.int64)
        for number_of_source, source_config in enumerate(self.config.sources):
            here = sources_in_order == number_of_source
            edges = np.cumsum(list(source_config.tasks.values()))
            chosen = keyed_uniform(noise_keys[here], stream("data/task")) * edges[-1]
            tasks[here] = np.searchsorted(edges[:-1], chosen, side="right")
        unconditional = keyed_uniform(noise_keys, stream("data/condition")) < self.config.condition_dropout
        return Draws(sources_in_order, samples, epochs, tasks, unconditional, noise_keys)

    def _draw_permutation(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        return keyed_permutation(self.sizes[source], self.seed, stream("data/order"), source, epoch)


def _largest_remainder(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Return whole numbers in proportion to `shares` that add up to `total`."""
    quotas = np.floor(shares * total).astype(np.int64)
    missing = total - int(quotas.sum())
    quotas[np.argsort(quotas - shares * total, kind="stable")[:missing]] += 1
    return quotas
