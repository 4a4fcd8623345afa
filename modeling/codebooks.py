"""Rows of several codes: how a span of a modality with several codebooks is laid out, and what its rows hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from omniform.tokenizers.codebook_layout import CodebookLayout, LayoutKind
from omniform.tokenizers.vocabulary import Vocabulary

NOTHING = -1  # in place of an id: the row holds none of a codebook, and nothing is added to its embedding


@dataclass(frozen=True)
class CodedRows:
    """Rows whose embedding is the sum of those of several ids.

    Attributes:
        rows: where they are, ascending, in whatever the owner lays out.
        ids: what they hold of each codebook; `NOTHING` where that is no id.
    """

    rows: Int[Tensor, "M"]
    ids: Int[Tensor, "M Q"]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def join(cls, held: Sequence[tuple[int, "CodedRows"]]) -> "CodedRows":
        """Join rows, each with what is to be added to its places; in ascending order."""
        return cls(
            torch.cat([coded.rows + first for first, coded in held]), torch.cat([coded.ids for _, coded in held])
        )

    def cut(self, start: int, stop: int) -> "CodedRows":
        """Return those of the rows [start, stop), counted from `start`."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        return CodedRows(self.rows[first:last] - start, self.ids[first:last])

    def to(self, device: torch.device | str) -> "CodedRows":
        """Return the same on `device`."""
        return CodedRows(self.rows.to(device), self.ids.to(device))


@dataclass(frozen=True)
class Codebooks:
    """The codebooks of one modality in a model, and the layout in which rows take their codes.

    A span of T frames is T * Q codes and one end, which takes the place of a code of the first codebook where frame T
    would begin; the other codebooks end where that frame does not follow. So a span has as many rows as hold anything:
    T * Q + 1 flattened, T + Q - 1 delayed, T + 1 parallel.

    Sources: MusicGen (arXiv:2306.05284) for flattened and delayed codes, SoundStorm (arXiv:2305.09636) for parallel
    ones. Deviations: rows end themselves, where both papers know how long the sound is to be; and where a codebook has
    no code nothing is added, in place of a token of its own.

    Attributes:
        end_id: ends a span.
    """

    modality: str
    vocabulary: Vocabulary
    layout: CodebookLayout
    end_id: int

    @classmethod
    def of(cls, modality: str, vocabulary: Vocabulary, layout: LayoutKind | None) -> "Codebooks | None":
        """Return those of a modality whose objective lays them out so; None where it has only one."""
        n_codebooks, end_id = vocabulary.n_codebooks(modality), vocabulary.end_of(modality)
        if n_codebooks == 1:
            return None
        assert layout is not None, "the model refuses objectives that take one codebook"
        assert end_id is not None, "the model refuses spans of one length"
        return cls(modality, vocabulary, CodebookLayout.of(layout, n_codebooks), end_id)

    @property
    def fewest(self) -> int:
        """Rows of one frame, without the end: fewer hold nothing."""
        return self.layout.n_steps(1)

    @property
    def n_end_rows(self) -> int:
        """Rows that the end takes beyond those of the frames, however many these are."""
        return self.n_rows(self.layout.n_codebooks) - self.fewest

    def n_rows(self, n_codes: int) -> int:
        """Return the rows of a span of so many codes, its end included."""
        n_frames = n_codes // self.layout.n_codebooks
        return max(self.layout.n_steps(n_frames), self.layout.stride * n_frames + 1)

    def n_codes(self, n_rows: int) -> int:
        """Return how many codes so many rows hold in whole frames."""
        return self.layout.n_frames(n_rows) * self.layout.n_codebooks

    def arrange(self, codes: Int[Tensor, "T Q"]) -> Int[Tensor, "S Q"]:
        """Return the rows of a span: its frames as ids, and its end.

        Raises:
            VocabularyError: codes that are not of these codebooks.
        """
        frames = self.vocabulary.to_ids(self.modality, codes)
        last = torch.full((1, self.layout.n_codebooks), NOTHING)
        last[0, 0] = self.end_id
        return self.layout.arrange(torch.cat([frames, last]), NOTHING)[: self.n_rows(codes.numel())]

    def restore(self, rows: Int[Tensor, "S Q"]) -> Int[Tensor, "T Q"]:
        """Return the codes of the frames that rows hold whole before the first end."""
        ends = (rows[:, 0] == self.end_id).nonzero().flatten()
        n_frames = self.layout.n_frames(len(rows))
        if len(ends):
            n_frames = min(n_frames, int(ends[0]) // self.layout.stride)
        frames = self.layout.restore(rows[: self.layout.n_steps(n_frames)])
        return self.vocabulary.to_codes(self.modality, frames)

    def chosen(self, choices: Int[Tensor, "N"], codebooks: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Return the ids of choices among what each codebook offers; see `Vocabulary.to_chosen`."""
        return self.vocabulary.to_chosen(self.modality, choices, codebooks)
