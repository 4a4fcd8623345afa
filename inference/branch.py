"""One sequence of a session: what it holds so far, and the rows of its open span."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omniform.modeling.codebooks import CodedRows
from omniform.modeling.objectives.base import ContinuousRows, Objective
from omniform.modeling.sequence import MultimodalSequence, Part, document_length
from omniform.modeling.subsets import Contents, lay_out
from omniform.tokenizers.base import Tokens
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
        self._layout = self._lay_out(target, vocabulary, objectives)
        # A committing objective forwards the begin marker itself: the first content is predicted from it.
        self._first_content = self.n_rows(vocabulary, objectives) + 1
        self._first_row = self._first_content - int(objectives[target.modality].commits)

    def _lay_out(
        self, target: Part | None, vocabulary: Vocabulary, objectives: Mapping[str, Objective]
    ) -> MultimodalSequence:
        parts = self.parts if target is None else [*self.parts, target]
        return MultimodalSequence.build(parts, vocabulary, objectives)

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
        self._layout = self._lay_out(None, vocabulary, objectives)
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

    def n_read(self, n_rows: int) -> int:
        """Return of how many of the `n_rows` rows of a step, the last ones, outputs are read."""
        return n_rows

    def outputs(self, found: Float[Tensor, "R W"]) -> Float[Tensor, "N W"]:
        """Return what was found at these rows, as the objective counts its own."""
        return found

    def _rows(self, count: int) -> MultimodalSequence:
        assert self._layout is not None
        return self._layout.cut(self.n_committed, self.n_committed + count)


class SubsetBranch(Branch):
    """The same of a model that learnt subsets: everything that is known is one block, read in both directions.

    So the block is another one whenever it grows: by what has closed, and by what is decided of a span that is filled
    in place, the rest of which a private block asks for. Nothing of such a span is cached; one that is made token by
    token has the block in the cache, and its own rows.
    """

    def open(self, target: Part, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> None:
        """See `Branch.open`."""
        super().open(target, vocabulary, objectives)
        self._vocabulary, self._objectives = vocabulary, objectives
        self._known = [_whole(part, vocabulary) for part in self.parts]
        self._open = _whole(target, vocabulary)
        self._filled_in_place = not objectives[target.modality].commits

    def _lay_out(
        self, target: Part | None, vocabulary: Vocabulary, objectives: Mapping[str, Objective]
    ) -> MultimodalSequence:
        items = [_whole(part, vocabulary) for part in self.parts]
        if target is not None:
            own = _whole(target, vocabulary)
            items.append(dataclasses.replace(own, given=own.asked, asked=own.given))
        return lay_out(items, vocabulary, objectives)

    def close(self, part: Part) -> None:
        """See `Branch.close`; no row is read again as it was."""
        if self.grows:
            self.parts.append(part)
        self.n_committed, self.stale = 0, True

    def pending(self) -> MultimodalSequence | None:
        """See `Branch.pending`."""
        return None if self._filled_in_place else super().pending()

    def step_rows(
        self, token_ids: Tensor, vectors: Mapping[str, ContinuousRows], coded: Mapping[str, CodedRows]
    ) -> MultimodalSequence:
        """See `Branch.step_rows`; of a span that is filled in place all rows: what is known, and what is asked."""
        if not self._filled_in_place:
            return super().step_rows(token_ids, vectors, coded)
        contents, mask = token_ids.numpy(), self._vocabulary.mask
        decided, undecided = (contents != mask).nonzero()[0], (contents == mask).nonzero()[0]
        self._open = dataclasses.replace(self._open, token_ids=contents, given=decided, asked=undecided)
        return lay_out([*self._known, self._open], self._vocabulary, self._objectives)

    def n_read(self, n_rows: int) -> int:
        """See `Branch.n_read`; of a span that is filled in place what is asked, without its marker."""
        return len(self._open.asked) if self._filled_in_place else n_rows

    def outputs(self, found: Float[Tensor, "R W"]) -> Float[Tensor, "N W"]:
        """See `Branch.outputs`; zeros stand where nothing is asked."""
        if not self._filled_in_place:
            return found
        places = torch.from_numpy(self._open.asked)
        return found.new_zeros(len(self._open.token_ids), found.shape[1]).index_copy(0, places, found)


def _whole(part: Part, vocabulary: Vocabulary) -> Contents:
    assert isinstance(part.tokens, Tokens), "subsets are of codes"
    return Contents.whole(part.modality, part.tokens, vocabulary)
