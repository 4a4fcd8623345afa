"""A source whose samples are completed from other folders, by labels that are equal.

What each folder holds is paired no further than by its labels: any drawing of a seven with any sound of the word. This
makes as many pairs as there are combinations out of data that was never recorded together, as MNIST and SVHN are paired
for multimodal models (arXiv:1911.03393, section 4.1: there each digit with 20 of the other set, here each sample with
one of each folder).
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omniform.data.mixture import SourceConfig, modalities_of
from omniform.data.schema import DataError
from omniform.data.token_shards import Failure
from omniform.data.token_source import TokenSource, fill_cache
from omniform.kernels.keyed_noise import keyed_bits, stream
from omniform.tokenizers.base import Latents, Modality, Tokens


class Source(Protocol):
    """Samples as spans of tokens."""

    @property
    def folder(self) -> Path:
        """Where the samples lie, or those that others complete."""
        ...

    @property
    def failures(self) -> Mapping[int, Failure]:
        """By number, the samples that cannot be used."""
        ...

    @property
    def digest(self) -> str:
        """Of everything that the tokens depend on."""
        ...

    def __len__(self) -> int: ...

    def describe(self, sample: int) -> str:
        """Return the file and key of a sample, for messages."""
        ...

    def spans(self, sample: int) -> list[tuple[str, int]]:
        """Return (modality, number of tokens) of a sample's spans; none if it cannot be used."""
        ...

    def tokens(self, sample: int, place: int) -> Tokens | Latents:
        """Return the codes or vectors of a sample's span at `place`."""
        ...


@dataclass(frozen=True)
class Partner:
    """A folder to complete samples from.

    Attributes:
        ours, theirs: labels of the samples to complete, and of its own; None where a sample has none.
        modalities: of the spans that join.
    """

    source: TokenSource
    ours: Sequence[str | None]
    theirs: Sequence[str | None]
    modalities: Sequence[str]


class JoinedSource:
    """Samples of one folder, each with the spans of one sample of every partner that has the same labels.

    Which one is drawn once for all, by keyed numbers: samples stay as many, and are the same in every epoch and run.
    It is drawn among all with these labels, so that one that cannot be decoded leaves holes and changes no other pair.
    A sample is paired with itself only where no other has its labels.

    Attributes:
        failures: those of the folder, and samples without a counterpart, or whose counterpart cannot be used.
        repeated: modalities that more than one of the folders gives; see `check_tasks`.

    Raises:
        DataError: no sample at all has a counterpart in a partner.
    """

    def __init__(self, base: TokenSource, partners: Sequence[Partner]) -> None:
        self.base, self.folder = base, base.folder
        self.failures = dict(base.failures)
        self._joined: list[list[tuple[TokenSource, int, int]]] = [[] for _ in range(len(base))]
        for number, partner in enumerate(partners):
            self._join(number, partner)
        own = {modality for sample in range(len(base)) for modality, _ in base.spans(sample)}
        given = Counter([*own, *(modality for partner in partners for modality in {*partner.modalities})])
        self.repeated = frozenset(modality for modality, n_folders in given.items() if n_folders > 1)
        described = [[partner.source.digest, *partner.modalities] for partner in partners]
        self.digest = hashlib.sha256(json.dumps([base.digest, described]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.base)

    def describe(self, sample: int) -> str:
        """Return the file and key of a sample, for messages."""
        return self.base.describe(sample)

    def spans(self, sample: int) -> list[tuple[str, int]]:
        """Return (modality, number of tokens) of a sample's spans, its own first; none if it cannot be used."""
        if sample in self.failures:
            return []
        return self.base.spans(sample) + [other.spans(its)[place] for other, its, place in self._joined[sample]]

    def tokens(self, sample: int, place: int) -> Tokens | Latents:
        """Return the codes or vectors of a sample's span at `place`."""
        source, its_sample, its_place = self._find(sample, place)
        return source.tokens(its_sample, its_place)

    def _find(self, sample: int, place: int) -> tuple[TokenSource, int, int]:
        n_own = len(self.base.spans(sample))
        return (self.base, sample, place) if place < n_own else self._joined[sample][place - n_own]

    def _join(self, number: int, partner: Partner) -> None:
        source, alike = partner.source, dict[str, list[int]]()
        for its_sample, label in enumerate(partner.theirs):
            if label is not None:
                alike.setdefault(label, []).append(its_sample)
        chosen = keyed_bits(stream("data/join"), number, np.arange(len(self.base)))
        same, matched = source.digest == self.base.digest, 0
        for sample, label in enumerate(partner.ours):
            candidates = [] if label is None else alike.get(label, [])
            why = f"{source.folder} has nothing with the labels {label}"
            if candidates:
                its_sample = _draw(candidates, int(chosen[sample]), sample if same else None)
                modalities = [modality for modality, _ in source.spans(its_sample)]
                places = [place for place, modality in enumerate(modalities) if modality in partner.modalities]
                if places:
                    self._joined[sample] += [(source, its_sample, place) for place in places]
                    matched += 1
                    continue
                why = f"it has no {' or '.join(partner.modalities)} from {source.describe(its_sample)}"
            message = f"{self.describe(sample)}: {why}"
            self.failures.setdefault(sample, Failure(sample, None, "unpaired", message))
        if not matched:
            raise DataError(
                f"no sample of {self.folder} has a counterpart with {' or '.join(partner.modalities)} in "
                f"{source.folder}: look at `by`, whose keys both have to say with equal values"
            )


def _draw(candidates: Sequence[int], number: int, without: int | None) -> int:
    """Return one of the candidates, which ascend, but `without` only if it is the only one."""
    own = len(candidates) if without is None else bisect.bisect_left(candidates, without)
    if len(candidates) == 1 or own == len(candidates) or candidates[own] != without:
        return candidates[number % len(candidates)]
    place = number % (len(candidates) - 1)
    return candidates[place + (place >= own)]


def open_sources(
    configs: Sequence[SourceConfig], tokenizers: Mapping[str, Modality[Any]], cache_dir: Path, workers: int = 1
) -> list[Source]:
    """Open what `SourceConfig`s describe, each folder once however often it is named; see `TokenSource`.

    Args:
        workers: processes that encode at the same time what the cache lacks; see `encode_missing`.

    Raises:
        DataError: see `TokenSource` and `JoinedSource`.
    """
    labels = dict[tuple[Path, Path | None], set[str]]()
    for config in configs:
        keys = labels.setdefault((config.path, config.index_dir), set())
        for other in config.join:
            keys.update(other.by)
            labels.setdefault((other.path, other.index_dir), set()).update(other.by)
    fill_cache(labels, tokenizers, cache_dir, workers)
    opened = {
        (path, index_dir): TokenSource(path, tokenizers, cache_dir, index_dir, labels=sorted(keys))
        for (path, index_dir), keys in labels.items()
    }
    sources: list[Source] = []
    for config in configs:
        base, partners = opened[config.path, config.index_dir], []
        for other in config.join:
            source = opened[other.path, other.index_dir]
            partners.append(Partner(source, base.labels_by(other.by), source.labels_by(other.by), other.modalities))
        sources.append(JoinedSource(base, partners) if partners else base)
    return sources


def check_tasks(source: Source, tasks: Iterable[str]) -> None:
    """Refuse a task for which two folders of a joined source would give spans of one modality.

    "X->X" and "X->Y+X" may: they give the span of the one and learn that of the other.

    Raises:
        DataError: the first such task.
    """
    repeated = source.repeated if isinstance(source, JoinedSource) else frozenset()
    for task in tasks:
        given, learnt = modalities_of(task)
        named = set(given) | set(learnt) if learnt else repeated
        if (twice := sorted(named & repeated)) and (not given or twice != [given[0]] or learnt[-1] != given[0]):
            raise DataError(
                f"{source.folder}: the task {task} would take {' and '.join(twice)} of several folders for one "
                f"sample, where only {twice[0]}->{twice[0]} can, or one that learns others before it: leave it out of "
                "`join.modalities`, or join a folder without it"
            )
