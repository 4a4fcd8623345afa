"""The rows of every training step: a pure function of (config, data, seed, step).

There is one endless sequence of rows for all processes. Windows of draws are packed one after the other; step s takes
rows [s * rows_per_step, (s + 1) * rows_per_step), and each process builds only those that it needs. No process holds
state that another could miss, so any number of ranks and workers sees each sample once per epoch.
"""

import bisect
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from omniform.data.encode import EncodedSource
from omniform.data.mixture import WINDOW, DataConfig, Draws, Mixture, arrange
from omniform.data.packing import first_fit
from omniform.data.schema import DataError
from omniform.modeling.objectives.base import Objective
from omniform.modeling.sequence import MultimodalSequence, Part, Role, document_length
from omniform.tokenizers.base import Modality
from omniform.tokenizers.vocabulary import Vocabulary


class TrainingData:
    """Packed rows of all sources.

    Args:
        tokenizers: by modality; every modality of every task is among them.
        objectives: by modality.
        cache_dir: where tokens are kept.
        rows_per_step: rows of one optimizer step over all processes.

    Raises:
        DataError: a source that cannot be read, a task that no sample serves, or a document longer than a row.
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
        rows_per_step: int,
    ) -> None:
        self.config, self.rows_per_step = config, rows_per_step
        self._vocabulary, self._objectives = vocabulary, objectives
        for source in config.sources:
            for task in source.tasks:
                for modality in task.split("->"):
                    if modality not in tokenizers:
                        raise DataError(
                            f"{source.path}: task {task} needs a tokenizer for {modality!r}; there is one for "
                            f"{', '.join(sorted(tokenizers))}"
                        )
        self.sources = [EncodedSource(s.path, tokenizers, cache_dir, s.index_dir) for s in config.sources]
        self._lengths = [self._document_lengths(place) for place in range(len(self.sources))]
        self.mixture = Mixture(config, [len(source) for source in self.sources], seed)
        settings = TypeAdapter(DataConfig).dump_python(config, mode="json")
        for source in settings["sources"]:
            del source["path"], source["index_dir"]  # the data may move; its digest says what it is
        kinds = {modality: objective.kind for modality, objective in objectives.items()}
        content = [settings, [s.digest for s in self.sources], seed, WINDOW, vocabulary.digest(), kinds]
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._window_starts = [(0, 0)]  # ascending (first row, window), as far as known
        self._plan = lru_cache(maxsize=4)(self._plan_window)

    @property
    def holes(self) -> dict[str, int]:
        """By source, how many samples cannot be decoded: each draw of one leaves a hole, and nothing else changes."""
        return {str(source.folder): len(source.failures) for source in self.sources}

    @property
    def unserved(self) -> dict[str, int]:
        """By source and task, how many readable samples lack what the task needs: their draws are holes too."""
        return {
            f"{source.folder}, {task}": int((table[number, 0] == 0).sum()) - len(source.failures)
            for source, config, table in zip(self.sources, self.config.sources, self._lengths, strict=True)
            for number, task in enumerate(config.tasks)
        }

    def rows(self, step: int, part: slice = slice(None)) -> list[list[MultimodalSequence]]:
        """Return the rows of `step`, from 0, each the sequences that share it; with `part`, only those rows of it."""
        first = step * self.rows_per_step
        found = []
        for row in range(first, first + self.rows_per_step)[part]:
            window, window_start = self._locate(row)
            draws, rows = self._plan(window)
            found.append([self._build(draws, draw) for draw in rows[row - window_start]])
        return found

    def position(self, step: int) -> dict[str, Any]:
        """Return where the data stands before `step`, as JSON: enough to continue without replaying."""
        window, window_start = self._locate(step * self.rows_per_step)
        return {"step": step, "window": window, "window_start": window_start, "data": self.digest}

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
        start = (int(position["window_start"]), int(position["window"]))
        if start not in self._window_starts:
            bisect.insort(self._window_starts, start)

    def _locate(self, row: int) -> tuple[int, int]:
        """Return the window that holds a row of the endless sequence, and the first row of that window."""
        place = bisect.bisect_right(self._window_starts, row, key=lambda start: start[0]) - 1
        while True:
            start, window = self._window_starts[place]
            n_rows = len(self._plan(window)[1])
            if row < start + n_rows:
                return window, start
            place += 1
            if place == len(self._window_starts) or self._window_starts[place][1] != window + 1:
                self._window_starts.insert(place, (start + n_rows, window + 1))

    def _plan_window(self, window: int) -> tuple[Draws, list[list[int]]]:
        draws = self.mixture.window(window)
        lengths = np.empty(WINDOW, dtype=np.int64)
        for source, table in enumerate(self._lengths):
            here = draws.source == source
            lengths[here] = table[draws.task[here], draws.unconditional[here].astype(int), draws.sample[here]]
        return draws, first_fit(lengths.tolist(), self.config.row_length)

    def _document_lengths(self, place: int) -> npt.NDArray[np.int64]:
        """Return tokens by (task, unconditional, sample); 0 for a hole."""
        source, config = self.sources[place], self.config.sources[place]
        table = np.zeros((len(config.tasks), 2, len(source)), dtype=np.int64)
        known: dict[tuple[tuple[str, int], ...], npt.NDArray[np.int64]] = {}
        for sample in range(len(source)):
            spans = tuple(source.spans(sample))
            if spans not in known:
                known[spans] = np.array(
                    [[self._length(task, spans, dropped) for dropped in (False, True)] for task in config.tasks]
                )
            table[:, :, sample] = known[spans]
        for number, task in enumerate(config.tasks):
            longest = int(table[number].max(axis=0).argmax())
            if not table[number].any():
                raise DataError(f"{config.path} holds no sample for the task {task}: remove it from data.sources.tasks")
            if table[number, 0, longest] > self.config.row_length:
                raise DataError(
                    f"{source.reader.describe(longest)} takes {table[number, 0, longest]} tokens in the task {task}, "
                    f"a row holds {self.config.row_length}: raise data.row_length or shorten the sample"
                )
        return table

    def _length(self, task: str, spans: tuple[tuple[str, int], ...], unconditional: bool) -> int:
        used = arrange(task, [modality for modality, _ in spans])
        parts = [(*spans[place], role) for place, role in used if role is Role.TARGET or not unconditional]
        return document_length(parts, self._objectives)

    def _build(self, draws: Draws, draw: int) -> MultimodalSequence:
        place, sample = draws.source[draw], int(draws.sample[draw])
        source, task = self.sources[place], list(self.config.sources[place].tasks)[draws.task[draw]]
        spans = source.spans(sample)
        parts = [
            Part(spans[span][0], source.tokens(sample, span), role)
            for span, role in arrange(task, [modality for modality, _ in spans])
            if role is Role.TARGET or not draws.unconditional[draw]
        ]
        return MultimodalSequence.build(parts, self._vocabulary, self._objectives, int(draws.noise_key[draw]))
