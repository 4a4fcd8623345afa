"""In which order a sequence takes the codes of several codebooks."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from omniform.tokenizers.base import TokenizerError

LayoutKind = Literal["flattened", "delayed", "parallel"]


@dataclass(frozen=True)
class CodebookLayout:
    """Code q of frame t is at step `stride` * t + `offsets`[q] of the sequence, in the column of its codebook.

    Every layout is invertible: `restore` undoes `arrange`, whatever the number of frames.

        flattened   one code per step, frame after frame       stride Q, offsets 0, 1, ..., Q-1
        delayed     each codebook a step later than the last   stride 1, offsets 0, 1, ..., Q-1
        parallel    all codes of a frame in one step           stride 1, offsets 0, 0, ..., 0

    Source: MusicGen (Copet et al. 2023), arXiv:2306.05284, section 2.2, where a sequence begins with an empty step;
    here the begin marker of the span is that step.

    Attributes:
        stride: steps from a frame to the next, at least 1.
        offsets: steps of each codebook after the first step of its frame; the least is 0.

    Raises:
        TokenizerError: no codebook, a stride below 1, or offsets that do not begin at 0.
    """

    stride: int
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.offsets or self.stride < 1 or min(self.offsets) != 0:
            raise TokenizerError(
                f"a layout of stride {self.stride} and offsets {self.offsets}: expected a stride of at least 1 and an "
                "offset per codebook, the least of them 0"
            )

    @classmethod
    def of(cls, kind: LayoutKind, n_codebooks: int) -> Self:
        """Return one of the known layouts.

        Raises:
            TokenizerError: an unknown kind, or no codebook.
        """
        in_turn, at_once = tuple(range(n_codebooks)), (0,) * n_codebooks
        known = {"flattened": (n_codebooks, in_turn), "delayed": (1, in_turn), "parallel": (1, at_once)}
        if kind not in known:
            raise TokenizerError(f"codebook layout {kind!r}, expected one of {', '.join(known)}")
        return cls(*known[kind])

    @property
    def n_codebooks(self) -> int:
        """Codes per frame."""
        return len(self.offsets)

    def n_steps(self, n_frames: int) -> int:
        """Return the length of the sequence that holds so many frames."""
        return self.stride * (n_frames - 1) + max(self.offsets) + 1 if n_frames else 0

    def n_frames(self, n_steps: int) -> int:
        """Return how many frames the first `n_steps` steps hold whole."""
        return max(0, (n_steps - max(self.offsets) - 1) // self.stride + 1)

    def at(self, steps: Int[Tensor, "*S"]) -> Int[Tensor, "*S Q"]:
        """Return the frame whose code each codebook has at some steps of a sequence without an end; -1 for none."""
        since = steps[..., None] - torch.tensor(self.offsets)
        return torch.where((since % self.stride == 0) & (since >= 0), since // self.stride, -1)

    def frames(self, n_frames: int) -> Int[Tensor, "S Q"]:
        """Return, for every step and codebook, the frame whose code is there; -1 where there is none."""
        frames = self.at(torch.arange(self.n_steps(n_frames)))
        return torch.where(frames < n_frames, frames, -1)

    def filled(self, n_frames: int) -> Bool[Tensor, "S Q"]:
        """Return where in the sequence there is a code."""
        return self.frames(n_frames) >= 0

    def arrange(self, codes: Int[Tensor, "*B T Q"], fill: int) -> Int[Tensor, "*B S Q"]:
        """Return the sequence of frames of codes, `fill` where a step has none of a codebook.

        Raises:
            TokenizerError: another number of codebooks.
        """
        self._check(codes)
        frames = self.frames(codes.shape[-2])
        if not len(frames):
            return codes.clone()
        arranged = codes.gather(-2, frames.clamp(min=0).expand(*codes.shape[:-2], -1, -1))
        return torch.where(frames >= 0, arranged, fill)

    def restore(self, steps: Int[Tensor, "*B S Q"]) -> Int[Tensor, "*B T Q"]:
        """Return the frames that a sequence holds whole; what is at places without a code, or of a frame that is not
        whole, is left out.

        Raises:
            TokenizerError: another number of codebooks.
        """
        self._check(steps)
        n_frames = self.n_frames(steps.shape[-2])
        places = self.stride * torch.arange(n_frames)[:, None] + torch.tensor(self.offsets)
        return steps.gather(-2, places.expand(*steps.shape[:-2], -1, -1))

    def _check(self, codes: Int[Tensor, "*B N Q"]) -> None:
        if codes.ndim < 2 or codes.shape[-1] != self.n_codebooks:
            raise TokenizerError(f"codes of shape {tuple(codes.shape)}, expected (..., {self.n_codebooks}) codebooks")
