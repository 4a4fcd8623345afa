"""Denoisers: a text is cut into pieces, some given and some learnt, and its gaps are filled token by token.

    text      one two three four five six
    spans     <mode:r> one <end> <gap:0> four five <end>   |   <gap:0> two three <end> <gap:1> six <end>
    prefix    <mode:s> one two <end>                       |   <gap:0> three four five six <end>
    middle    <mode:m> one two <end> <gap:0> six <end>     |   <gap:0> three four five <end>

What is given stands left of the bar. Every piece is a part like any other, opened by a marker in place of its begin
marker: what follows a gap by the gap's, what fills the gap by the same one again. So nothing else of the model knows of
denoisers, and the markers are given, never predicted.

Sources: UL2 (arXiv:2205.05131), a mixture of denoisers with a token for each mode; the cuts of its spans are those of
T5 (arXiv:1910.10683), and so is a prefix that is read in both directions (prefix LM); fill-in-the-middle
(arXiv:2207.14255). Deviations: a piece ends with `end`, where in T5 the next sentinel ends it; gaps have 32 markers,
which come round again, where T5 has 100 sentinels; fill-in-the-middle cuts between tokens, which were made from the
whole text, rather than between characters, so a cut within a token is never learnt; its share of the documents is the
weight of its task.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_permutation, keyed_uniform, stream
from omniform.modeling.sequence import Part, Role
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.vocabulary import gap_marker, mode_marker

Given = Literal["causal", "bidirectional", "learnt"]
MODE = r"^[a-z]\w*$"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class Denoiser(ABC):
    """How a text is cut.

    Attributes:
        kind: its name in configurations.
        mode: names the marker that what is given begins with; several denoisers may share one.
        given: how what is given is read: "causal"; "bidirectional", as one block (prefix LM); or "learnt": causal, and
            predicted too, as fill-in-the-middle does so that nothing of the text goes unlearnt.

    Class attributes:
        suffix: what stands after the last gap is given, even if it is nothing; else the last gap ends the text.
    """

    kind: Any
    mode: str | None
    given: Given
    suffix: ClassVar[bool]

    @abstractmethod
    def gaps(self, length: int, key: int) -> list[tuple[int, int]]:
        """Return (start, stop) of each gap in a text of `length` tokens, at least 2, in order.

        How many there are depends on `length` alone, so that the rows of a document are known before it is drawn.

        Args:
            key: 64 bits that decide the cuts.
        """

    def suffix_first(self, key: int) -> bool:
        """Return whether the last of what is given is put first."""
        return False

    def context(
        self, modality: str, pieces: Sequence[Int[Tensor, "_"]], mode: str, *, suffix_first: bool = False
    ) -> list[Part]:
        """Return what is given as parts.

        Args:
            pieces: codes of what stands before the first gap, after it, after the second, and so on.
            mode: the name of the marker, which is `self.mode` unless that is None.
            suffix_first: put the last piece first.
        """
        openings = [mode_marker(mode), *(gap_marker(number) for number in range(len(pieces) - 1))]
        parts = [
            replace(_part(modality, piece, Role.CONTEXT, opening), prefix=self.given == "bidirectional")
            for piece, opening in zip(pieces, openings, strict=True)
        ]
        return [parts[-1], *parts[:-1]] if suffix_first else parts

    def parts(self, modality: str, codes: Int[Tensor, "N"], mode: str, key: int) -> list[Part]:
        """Return a document that teaches to fill the gaps of a text: what is given, then what fills each gap.

        Texts of fewer than two tokens have no room for a cut, and no parts.

        Args:
            mode, key: see `context` and `gaps`.
        """
        if len(codes) < 2:
            return []
        gaps = self.gaps(len(codes), key)
        starts, stops = [0, *(stop for _, stop in gaps)], [*(start for start, _ in gaps), len(codes)]
        pieces = [codes[start:stop] for start, stop in zip(starts, stops, strict=True)]
        given = self.context(
            modality, pieces if self.suffix else pieces[:-1], mode, suffix_first=self.suffix_first(key)
        )
        if self.given == "learnt":
            given = [replace(part, role=Role.TARGET) for part in given]
        return given + [
            _part(modality, codes[start:stop], Role.TARGET, gap_marker(number))
            for number, (start, stop) in enumerate(gaps)
        ]


def _part(modality: str, codes: Tensor, role: Role, opening: str) -> Part:
    return Part(modality, Tokens(codes, (len(codes),)), role, opening)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Spans(Denoiser):
    """Spans all over the text are gaps: the R denoisers of UL2, and with long spans or a high rate the X denoisers.

    With n tokens, round(rate * n) are in gaps, but at least one and not all; there are round(that / mean_length) gaps,
    but at least one. Which they are is uniform over all ways to cut the text into so many pieces, given and learnt in
    turns, none of them empty. As in T5, the first is given and the last is learnt.

    Attributes:
        rate: fraction of the tokens that is in gaps.
        mean_length: of the gaps, in tokens.
    """

    kind: Literal["spans"] = "spans"
    mode: str | None = Field(default=None, pattern=MODE)
    given: Given = "causal"
    rate: float = Field(default=0.15, gt=0, lt=1)
    mean_length: float = Field(default=3.0, ge=1)

    suffix: ClassVar[bool] = False

    def gaps(self, length: int, key: int) -> list[tuple[int, int]]:
        """Cut what is learnt and what is given into as many pieces each, and let them take turns."""
        n_learnt = min(max(round(self.rate * length), 1), length - 1)
        n_gaps = min(max(round(n_learnt / self.mean_length), 1), n_learnt, length - n_learnt)
        learnt = _composition(n_learnt, n_gaps, key, stream("denoise/learnt"))
        stops = np.cumsum(learnt + _composition(length - n_learnt, n_gaps, key, stream("denoise/given")))
        return [(int(stop - size), int(stop)) for stop, size in zip(stops, learnt, strict=True)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Prefix(Denoiser):
    """The beginning is given and the rest is learnt: the S denoiser of UL2.

    Attributes:
        rate: fraction that is learnt, 0.25 in UL2; None cuts anywhere with equal probability, as T5's prefix LM does.
            Never nothing, and never all.
    """

    kind: Literal["prefix"] = "prefix"
    mode: str | None = Field(default=None, pattern=MODE)
    given: Given = "bidirectional"
    rate: float | None = Field(default=None, gt=0, lt=1)

    suffix: ClassVar[bool] = False

    def gaps(self, length: int, key: int) -> list[tuple[int, int]]:
        """Cut once."""
        if self.rate is not None:
            return [(length - min(max(round(self.rate * length), 1), length - 1), length)]
        return [(1 + int(keyed_uniform(key, stream("denoise/cut"), 0) * (length - 1)), length)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Middle(Denoiser):
    """The middle is learnt from what stands before and after it: fill-in-the-middle.

    Both cuts are uniform over all places between tokens and at the ends, so any of the three pieces may be empty.

    Attributes:
        suffix_first_rate: probability with which the suffix is put before the prefix (SPM in the paper's terms, else
            PSM), so that the middle goes on where the prefix ends.
    """

    kind: Literal["middle"] = "middle"
    mode: str | None = Field(default=None, pattern=MODE)
    given: Given = "learnt"
    suffix_first_rate: float = Field(default=0.5, ge=0, le=1)

    suffix: ClassVar[bool] = True

    def gaps(self, length: int, key: int) -> list[tuple[int, int]]:
        """Cut twice."""
        first, second = sorted((keyed_uniform(key, stream("denoise/cut"), np.arange(2)) * (length + 1)).astype(int))
        return [(int(first), int(second))]

    def suffix_first(self, key: int) -> bool:
        """Return it for a share of `suffix_first_rate` of all keys."""
        return bool(keyed_uniform(key, stream("denoise/order")) < self.suffix_first_rate)


def _composition(total: int, n_pieces: int, *keys: int) -> Int[np.ndarray, "_"]:
    """Return the lengths of `n_pieces` pieces, none empty, that add up to `total`; all lists are equally likely."""
    cuts = 1 + np.sort(keyed_permutation(total - 1, *keys)[: n_pieces - 1])
    return np.diff([0, *cuts, total])


DENOISERS: dict[str, type[Denoiser]] = {"spans": Spans, "prefix": Prefix, "middle": Middle}
