"""One sequence of a session: what it holds so far, and the rows of its open span."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from omniform.modeling.codebooks import CodedRows
from omniform.modeling.objectives.base import ContinuousRows, Objective
from omniform.modeling.sequence import MultimodalSequence, Part, document_length
from omniform.tokenizers.vocabulary import Vocabulary


class Branch:
    """One sequence of a session: the conditional one, or the one that guidance leads away from.

    Args:
        grows: generated parts join it. They are conditions of what follows them, so the other branch never holds them.

    Attributes:
        n_committed: leading rows of the sequence that the cache holds.
        stale: the cache holds rows that no longer belong to the sequence.
    """

    def __init__(self, context: Sequence[Part], *, grows: bool = True) -> None:
        self.parts, self.grows = list(context), grows
        self.n_committed = 0
        self.stale = False
        self._layout: MultimodalSequence | None = None
        self._first_content = self._first_row = 0

    def open(self, target: Part, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> None:
        """Lay out the rows of a span to be generated; `target` holds as many codes as it may get."""
        self._layout = MultimodalSequence.build([*self.parts, target], vocabulary, objectives)
        # A committing objective forwards the begin marker itself: the first content is predicted from it.
        self._first_content = self.n_rows(vocabulary, objectives) + 1
        self._first_row = self._first_content - int(objectives[target.modality].commits)

    def settle(self, modality: str, contents: Int[Tensor, "N *Q"]) -> None:
        """Take the leading contents of the open span as final: their rows may join the cache."""
        assert self._layout is not None
        first, self._first_row = self._first_content, self._first_content + len(contents)
        if contents.ndim == 2:
            held = self._layout.coded[modality]
            places = torch.searchsorted(held.rows, first + torch.arange(len(contents)))
            coded = {**self._layout.coded, modality: CodedRows(held.rows, held.ids.index_copy(0, places, contents))}
            self._layout = dataclasses.replace(self._layout, coded=coded)
            return
        token_ids = self._layout.token_ids.copy()
        token_ids[first : self._first_row] = contents.numpy()
        self._layout = dataclasses.replace(self._layout, token_ids=token_ids)

    def unread(self, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> MultimodalSequence | None:
        """Return the rows of whole spans that the cache does not hold yet, while none is open; None without parts."""
        if not self.parts:
            return None
        self._layout = MultimodalSequence.build(self.parts, vocabulary, objectives)
        return self._rows(len(self._layout) - self.n_committed)

    def close(self, part: Part) -> None:
        """Take leave of the open span, which became `part`."""
        if self.grows:
            self.parts.append(part)
        else:
            self.n_committed, self.stale = 0, True

    def n_rows(self, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> int:
        """Return the number of rows of all parts so far."""
        return document_length([(p.modality, len(p.tokens), p.role) for p in self.parts], vocabulary, objectives)

    def pending(self) -> MultimodalSequence | None:
        """Return the final rows before the next step's own that the cache does not hold yet, whole spans together."""
        count = self._first_row - self.n_committed
        return self._rows(count) if count > 0 else None

    def step_rows(
        self, token_ids: Tensor, vectors: Mapping[str, ContinuousRows], coded: Mapping[str, CodedRows]
    ) -> MultimodalSequence:
        """Return the next rows of the open span, holding `token_ids` and, in their place, `vectors` or `coded` ids."""
        rows = self._rows(len(token_ids))
        return dataclasses.replace(rows, token_ids=token_ids.numpy(), vectors=vectors, coded=coded)

    def _rows(self, count: int) -> MultimodalSequence:
        assert self._layout is not None
        return self._layout.cut(self.n_committed, self.n_committed + count)
