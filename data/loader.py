"""The rows of every training step: a pure function of (config, data, seed, step).

There is one endless sequence of rows for all processes. Windows of draws are packed one after the other; step s takes
rows [s * rows_per_step, (s + 1) * rows_per_step), and each process builds only those that it needs. No process holds
state that another could miss, so any number of ranks and workers sees each sample once per epoch.

Where a stage of the run changes the data, its rows begin with a new window: every source goes on after the last window
that the stage before has begun, so no visit of a sample comes twice, and what was left of that window is passed over
until the next epoch.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from pydantic import TypeAdapter
from torch import Tensor

from omniform.data.joined_source import check_tasks, open_sources
from omniform.data.mixture import (
    INTERLEAVED,
    WINDOW,
    DataConfig,
    DataStage,
    Draws,
    Mixture,
    arrange,
    denoised,
    modalities_of,
    subset_of,
    subset_problem,
)
from omniform.data.packing import first_fit
from omniform.data.schema import DataError
from omniform.data.tally import Tally
from omniform.modeling.denoisers import Denoiser
from omniform.modeling.objectives.base import Objective
from omniform.modeling.sequence import MultimodalSequence, Part, Role, document_length
from omniform.modeling.subsets import AnySubset, n_rows_of
from omniform.tokenizers.base import Modality, Tokens
from omniform.tokenizers.vocabulary import Vocabulary


class StageRows:
    """The endless sequence of rows of one stage, numbered from 0.

    Args:
        lengths: of each source, tokens by (task, unconditional, sample); 0 for a hole.
        drawn_length: of a draw, its tokens, where that table only has the most that they can be; else None.
    """

    def __init__(
        self,
        mixture: Mixture,
        lengths: Sequence[npt.NDArray[np.int64]],
        row_length: int,
        drawn_length: Callable[[Draws, int], int] | None = None,
    ) -> None:
        self.mixture, self.lengths, self._row_length = mixture, lengths, row_length
        self._drawn_length = drawn_length
        self._window_starts = [(0, mixture.first_window)]  # ascending (first row, window), as far as known
        self.plan = lru_cache(maxsize=4)(self._plan_window)

    def locate(self, row: int) -> tuple[int, int]:
        """Return the window that holds a row, and the first row of that window."""
        place = bisect.bisect_right(self._window_starts, row, key=lambda start: start[0]) - 1
        while True:
            start, window = self._window_starts[place]
            n_rows = len(self.plan(window)[1])
            if row < start + n_rows:
                return window, start
            place += 1
            if place == len(self._window_starts) or self._window_starts[place][1] != window + 1:
                self._window_starts.insert(place, (start + n_rows, window + 1))

    def note(self, window: int, first_row: int) -> None:
        """Take it as known where a window starts, so that those before it need not be planned."""
        if (first_row, window) not in self._window_starts:
            bisect.insort(self._window_starts, (first_row, window))

    def _plan_window(self, window: int) -> tuple[Draws, list[list[int]]]:
        draws = self.mixture.window(window)
        lengths = np.empty(WINDOW, dtype=np.int64)
        for source, table in enumerate(self.lengths):
            here = draws.source == source
            lengths[here] = table[draws.task[here], draws.unconditional[here].astype(int), draws.sample[here]]
        if self._drawn_length is not None:
            for draw in lengths.nonzero()[0].tolist():
                lengths[draw] = self._drawn_length(draws, draw)
        return draws, first_fit(lengths.tolist(), self._row_length)


class TrainingData:
    """Packed rows of all sources.

    Args:
        config: the data of a run without stages; the sources of one with them.
        tokenizers: by modality; every modality of every task is among them.
        objectives: by modality.
        cache_dir: where tokens are kept.
        encoding_workers: processes that encode what it lacks.
        rows_per_step: rows of one optimizer step over all processes.
        stages: ascending from step 0, with the sources of `config` under other weights and tasks.
        denoisers: by name, those of the tasks X~NAME; their modes are in the vocabulary.
        prefix: what tasks X->Y give is read in both directions, as one block.
        subsets: by name, those of the tasks X+Y~NAME.

    Raises:
        DataError: a source that cannot be read, a task that no sample serves or that is ambiguous, a task of a denoiser
            that is not there or for a modality that is not learnt token by token, a task of a subset that is not there,
            or any other where there are subsets, a weight too small to be drawn in any stage, or a document longer than
            a row.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizers: Mapping[str, Modality],
        vocabulary: Vocabulary,
        objectives: Mapping[str, Objective],
        *,
        seed: int,
        cache_dir: Path,
        encoding_workers: int = 1,
        rows_per_step: int,
        stages: Sequence[DataStage] = (),
        denoisers: Mapping[str, Denoiser] | None = None,
        prefix: bool = False,
        subsets: Mapping[str, AnySubset] | None = None,
    ) -> None:
        self.config, self.rows_per_step, self.seed, self._prefix = config, rows_per_step, seed, prefix
        self.stages = tuple(stages) or (DataStage(0, config),)
        self._vocabulary, self._objectives, self._denoisers = vocabulary, objectives, denoisers or {}
        self._subsets = subsets or {}
        for stage in self.stages:
            for source in stage.config.sources:
                for task in source.tasks:
                    _check_modalities(source.path, task, tokenizers)
                    self._check_denoiser(source.path, task)
                    if (problem := subset_problem(task, self._subsets)) is not None:
                        raise DataError(f"{source.path}: task {task} {problem}")
        self.sources = open_sources(config.sources, tokenizers, cache_dir, encoding_workers)
        for stage in self.stages:
            for opened, source in zip(self.sources, stage.config.sources, strict=True):
                check_tasks(opened, source.tasks)
        self._table = lru_cache(maxsize=None)(self._document_lengths)
        self._lengths = [
            [self._table(place, tuple(source.tasks)) for place, source in enumerate(stage.config.sources)]
            for stage in self.stages
        ]
        for number in range(1, len(self.stages)):
            self._start_stage(number, 0, None)  # what a mixture refuses is refused now, not at the hand-off
        self._stage_rows = {0: self._start_stage(0, 0, None)}
        kinds = {modality: objective.kind for modality, objective in objectives.items()}
        content = [_settings(config), [s.digest for s in self.sources], seed, WINDOW, vocabulary.digest(), kinds]
        if stages:
            content.append([[stage.first_step, _settings(stage.config)] for stage in self.stages])
        if denoisers:
            content.append({name: TypeAdapter(type(d)).dump_python(d, mode="json") for name, d in denoisers.items()})
        if prefix:
            content.append("prefix")
        # How rows take several codes decides how many there are.
        if layouts := {m: o.layout for m, o in objectives.items() if vocabulary.n_codebooks(m) > 1}:
            content.append(layouts)
        if subsets:
            content.append({name: TypeAdapter(AnySubset).dump_python(s, mode="json") for name, s in subsets.items()})
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def holes(self) -> dict[str, Tally]:
        """By source, the samples that cannot be used: each draw of one leaves a hole, and nothing else changes."""
        found = {self._name(place): Tally() for place in range(len(self.sources))}
        for tally, source in zip(found.values(), self.sources, strict=True):
            for failure in source.failures.values():
                tally.add(failure.reason, failure.message)
        return found

    @property
    def unserved(self) -> dict[str, int]:
        """By source and task, how many other samples lack what the task needs: their draws are holes too."""
        found = {}
        for stage, tables in zip(self.stages, self._lengths, strict=True):
            for place, (config, table) in enumerate(zip(stage.config.sources, tables, strict=True)):
                for number, task in enumerate(config.tasks):
                    n_holes = int((table[number, 0] == 0).sum())
                    found[f"{self._name(place)}, {task}"] = n_holes - len(self.sources[place].failures)
        return found

    def _name(self, place: int) -> str:
        # The number tells apart sources of one folder.
        return f"data.sources.{place} ({self.sources[place].folder})"

    def rows(self, step: int, part: slice = slice(None)) -> list[list[MultimodalSequence]]:
        """Return the rows of `step`, from 0, each the sequences that share it; with `part`, only those rows of it."""
        number = self.stage_of(step)
        stage, config = self.stage_rows(number), self.stages[number].config
        first = (step - self.stages[number].first_step) * self.rows_per_step
        found = []
        for row in range(first, first + self.rows_per_step)[part]:
            window, window_start = stage.locate(row)
            draws, rows = stage.plan(window)
            found.append([self._build(config, draws, draw) for draw in rows[row - window_start]])
        return found

    def stage_of(self, step: int) -> int:
        """Return the number of the stage that a step belongs to."""
        return bisect.bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1

    def stage_rows(self, number: int) -> StageRows:
        """Return the rows of a stage, after planning those before it as far as they are not known."""
        if number not in self._stage_rows:
            before, n_steps = self.stage_rows(number - 1), self._n_steps(number - 1)
            window = before.locate(n_steps * self.rows_per_step - 1)[0] + 1
            self._stage_rows[number] = self._start_stage(number, window, before.mixture.cursors(window).tolist())
        return self._stage_rows[number]

    def position(self, step: int) -> dict[str, Any]:
        """Return where the data stands before `step`, as JSON: enough to continue without replaying."""
        number = self.stage_of(step)
        stage = self.stage_rows(number)
        window, window_start = stage.locate((step - self.stages[number].first_step) * self.rows_per_step)
        first_window = stage.mixture.first_window
        return {
            "step": step,
            "stage": number,
            "first_window": first_window,
            "cursors": stage.mixture.cursors(first_window).tolist(),
            "window": window,
            "window_start": window_start,
            "data": self.digest,
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Continue from what `position` returned.

        Raises:
            DataError: the position belongs to other data or another configuration of it.
        """
        if position.get("data") != self.digest:
            raise DataError(
                f"the checkpoint stands in data {str(position.get('data'))[:12]}, but sources, tokenizers, seed and "
                f"config now make {self.digest[:12]}: bring them back, or start a new run"
            )
        # Positions of runs without stages say no more than the window.
        number = int(position.get("stage", 0))
        if number not in self._stage_rows:
            self._stage_rows[number] = self._start_stage(number, int(position["first_window"]), position["cursors"])
        self._stage_rows[number].note(int(position["window"]), int(position["window_start"]))

    def _start_stage(self, number: int, first_window: int, cursors: Sequence[int] | None) -> StageRows:
        config, sizes = self.stages[number].config, [len(source) for source in self.sources]
        mixture = Mixture(config, sizes, self.seed, first_window=first_window, cursors=cursors)
        # What a subset takes is known as its cut is drawn, long before its tokens are read.
        drawn_length = functools.partial(self._drawn_length, config) if self._subsets else None
        return StageRows(mixture, self._lengths[number], config.row_length, drawn_length)

    def _n_steps(self, number: int) -> int:
        return self.stages[number + 1].first_step - self.stages[number].first_step

    def _document_lengths(self, place: int, tasks: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """Return tokens by (task, unconditional, sample); 0 for a hole."""
        source, path = self.sources[place], self.config.sources[place].path
        table = np.zeros((len(tasks), 2, len(source)), dtype=np.int64)
        known: dict[tuple[tuple[str, int], ...], npt.NDArray[np.int64]] = {}
        for sample in range(len(source)):
            spans = tuple(source.spans(sample))
            if spans not in known:
                known[spans] = np.array(
                    [[self._length(task, spans, dropped) for dropped in (False, True)] for task in tasks]
                )
            table[:, :, sample] = known[spans]
        for number, task in enumerate(tasks):
            longest = int(table[number].max(axis=0).argmax())
            if not table[number].any():
                raise DataError(
                    f"{path} holds no sample for the task {task}: remove it from data.sources.tasks, or join a folder "
                    "that has what the samples lack (data.sources.join)"
                )
            if table[number, 0, longest] > self.config.row_length:
                raise DataError(
                    f"{source.describe(longest)} takes {table[number, 0, longest]} tokens in the task {task}, "
                    f"a row holds {self.config.row_length}: raise data.row_length or shorten the sample"
                )
        return table

    def _length(self, task: str, spans: tuple[tuple[str, int], ...], unconditional: bool) -> int:
        used = arrange(task, [modality for modality, _ in spans])
        if denoised(task):
            # Where the cuts are depends on the draw, how many rows there are does not: any key tells.
            codes = [torch.zeros(spans[place][1], dtype=torch.int64) for place, _ in used]
            cut = [part for one in codes for part in self._cut(task, one, 0)]
            described = [(part.modality, len(part.tokens), part.role) for part in cut]
            return document_length(described, self._vocabulary, self._objectives)
        if subset := subset_of(task):
            return self._subsets[subset[1]].longest(self._sizes(spans[place] for place, _ in used)) if used else 0
        parts = [(*spans[place], role) for place, role in used if role is Role.TARGET or not unconditional]
        return document_length(parts, self._vocabulary, self._objectives, learn_order=task == INTERLEAVED)

    def _drawn_length(self, config: DataConfig, draws: Draws, draw: int) -> int:
        place = draws.source[draw]
        task = list(config.sources[place].tasks)[draws.task[draw]]
        subset = subset_of(task)
        assert subset is not None, "beside subsets nothing else is learnt"
        spans = self.sources[place].spans(int(draws.sample[draw]))
        used = arrange(task, [modality for modality, _ in spans])
        sizes = self._sizes(spans[place] for place, _ in used)
        return n_rows_of(self._subsets[subset[1]].counts(sizes, int(draws.noise_key[draw])))

    def _sizes(self, spans: Iterable[tuple[str, int]]) -> dict[str, int]:
        """Return the contents of each span's modality, with an end where there is one."""
        return {name: n_codes + (self._vocabulary.end_of(name) is not None) for name, n_codes in spans}

    def _build(self, config: DataConfig, draws: Draws, draw: int) -> MultimodalSequence:
        place, sample = draws.source[draw], int(draws.sample[draw])
        source, task = self.sources[place], list(config.sources[place].tasks)[draws.task[draw]]
        spans, key = source.spans(sample), int(draws.noise_key[draw])
        used = arrange(task, [modality for modality, _ in spans])
        if subset := subset_of(task):
            items = {spans[span][0]: source.tokens(sample, span) for span, _ in used}
            codes = {modality: item for modality, item in items.items() if isinstance(item, Tokens)}
            assert len(codes) == len(items), "subsets are of codes"
            return self._subsets[subset[1]].document(codes, self._vocabulary, self._objectives, key)
        parts = [
            Part(spans[span][0], source.tokens(sample, span), role, prefix=self._prefix and role is Role.CONTEXT)
            for span, role in used
            if role is Role.TARGET or not draws.unconditional[draw]
        ]
        if denoised(task):
            text = parts[0].tokens
            assert isinstance(text, Tokens), "texts alone are denoised"
            parts = self._cut(task, text.codes, key)
        return MultimodalSequence.build(parts, self._vocabulary, self._objectives, key, learn_order=task == INTERLEAVED)

    def _cut(self, task: str, codes: Int[Tensor, "N"], key: int) -> list[Part]:
        """Return the parts of a span as the task's denoiser cuts it."""
        found = denoised(task)
        assert found is not None
        modality, name = found
        return self._denoisers[name].parts(modality, codes, self._denoisers[name].mode or name, key)

    def _check_denoiser(self, path: Path, task: str) -> None:
        if (found := denoised(task)) is None:
            return
        modality, name = found
        if name not in self._denoisers:
            there = ", ".join(self._denoisers) or "none"
            raise DataError(f"{path}: task {task} needs model.denoisers.{name}; there is {there}: name one, or add it")
        objective = self._objectives[modality]
        if not objective.commits or self._vocabulary.end_of(modality) is None:
            how = "spans of one length" if self._vocabulary.end_of(modality) is None else objective.kind
            raise DataError(
                f"{path}: task {task} fills gaps token by token, but model.objectives.{modality} is for {how}: "
                "expected next_token and spans that end themselves, as those of text"
            )
        if self._vocabulary.n_codebooks(modality) > 1:
            raise DataError(
                f"{path}: task {task} cuts a span between any two tokens, but {modality} has several codes a frame: "
                "name a modality of one codebook, such as text"
            )


def _check_modalities(path: Path, task: str, tokenizers: Mapping[str, Modality]) -> None:
    for modality in itertools.chain(*modalities_of(task)):
        if modality not in tokenizers:
            raise DataError(
                f"{path}: task {task} needs a tokenizer for {modality!r}; there is one for "
                f"{', '.join(sorted(tokenizers))}"
            )


def _settings(config: DataConfig) -> dict[str, Any]:
    """Return what of the configuration decides what is drawn."""
    settings: dict[str, Any] = TypeAdapter(DataConfig).dump_python(config, mode="json")
    for source in settings["sources"]:
        # The data may move and be called something else; its digest says what it is.
        del source["path"], source["index_dir"], source["name"]
        if not source["join"]:
            del source["join"]  # runs that were begun before sources could be joined go on
        for partner in source.get("join", ()):
            del partner["path"], partner["index_dir"]
    return settings
