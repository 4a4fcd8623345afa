"""Decoders of speech: blocks over frames, and a head from frames to samples."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from omniform.tokenizers.codecs.spectrogram import inverse_stft
from omniform.tokenizers.codecs.speech_layers import DILATIONS, ConvNeXtBlock, ResidualUnit, blocks

_MAX_LOG_MAGNITUDE = 6.0  # e^6: that of a full-scale tone in a window of 800 samples


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class STFTHeadConfig:
    """Magnitude and phase of short-time spectra, turned into samples by a fixed inverse transform.

    Attributes:
        hop: samples from one spectrum to the next; each is of four times as many.
        width: channels of the blocks at the rate of the spectra.
    """

    kind: Literal["stft"] = "stft"
    hop: int = Field(default=160, ge=2, multiple_of=2)
    width: int = Field(default=192, ge=1)
    n_blocks: int = Field(default=3, ge=0)

    @property
    def divisor(self) -> int:
        """What the samples per frame are a multiple of."""
        return 4 * self.hop

    def build(self, frame_samples: int, width: int) -> "STFTHead":
        """Return the head."""
        return STFTHead(width, frame_samples, self.hop, self.width, self.n_blocks)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WaveformHeadConfig:
    """Transposed convolutions.

    Attributes:
        strides: of each resolution, coarsest first.
        width: channels at the rate of the samples; twice as many before each stride.
    """

    kind: Literal["waveform"] = "waveform"
    strides: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (8, 5, 4, 4)
    width: int = Field(default=16, ge=2, multiple_of=2)

    @property
    def divisor(self) -> int:
        """What the samples per frame are."""
        return math.prod(self.strides)

    def build(self, frame_samples: int, width: int) -> "WaveformHead":
        """Return the head."""
        return WaveformHead(width, self.strides, self.width)


class STFTHead(nn.Module):
    """Frames -> blocks at the rate of the spectra -> magnitude and phase -> inverse short-time Fourier transform.

    Source: Vocos (Siuzdak 2023), arXiv:2306.00814, section 3.3. Deviations: blocks at two rates, since a code stands
    for several spectra; a window of four hops; the bound on magnitudes is e^6 for levels in [-1, 1]; phases are
    relative to those of steady tones, one in the middle of each frequency band, which turn by k / 4 from one spectrum
    to the next in band k: a steady sound is then a steady output, and neighbouring windows do not cancel each other.

    Args:
        width: channels of the frames.
        frame_samples: samples per frame, a multiple of four hops, after which every tone is where it began.
        hop: samples from one spectrum to the next.
        fine_width: channels at the rate of the spectra.

    Attributes:
        margin: samples on each side of a frame's own that depend on it.
    """

    turns: Float[Tensor, "4 F"]

    def __init__(self, width: int, frame_samples: int, hop: int, fine_width: int, n_blocks: int) -> None:
        super().__init__()
        self.hop = hop
        quarters = torch.outer(torch.arange(4), torch.arange(2 * hop + 1)) % 4
        self.register_buffer("turns", quarters * (math.pi / 2), persistent=False)
        self.per_frame = frame_samples // hop
        self.split = nn.Linear(width, fine_width * self.per_frame)
        self.blocks = blocks(fine_width, n_blocks)
        self.last = nn.Linear(fine_width, 4 * hop + 2)
        self.margin = 3 * hop // 2 + 1 + hop * n_blocks * ConvNeXtBlock.margin

    def spectra(self, frames: Float[Tensor, "B T C"]) -> Complex[Tensor, "B t F"]:
        """Return the spectra of the frames."""
        fine = self.blocks(self.split(frames).unflatten(2, (self.per_frame, -1)).flatten(1, 2))
        log_magnitude, phase = self.last(fine).chunk(2, -1)
        with torch.autocast(frames.device.type, enabled=False):
            dtype = torch.promote_types(phase.dtype, torch.float32)
            phase = (phase.to(dtype).unflatten(1, (-1, 4)) + self.turns).flatten(1, 2)
            return torch.polar(log_magnitude.to(dtype).clamp(max=_MAX_LOG_MAGNITUDE).exp(), phase)

    def forward(self, frames: Float[Tensor, "B T C"]) -> Float[Tensor, "B N"]:
        """Return samples."""
        return inverse_stft(self.spectra(frames), self.hop)


class WaveformHead(nn.Module):
    """Frames -> transposed convolutions -> samples.

    Source: the decoder of SoundStream (Zeghidour et al. 2021), arXiv:2107.03312, section III-B, with the deviations of
    `WaveformStem`.

    Args:
        width: channels of the frames.
        strides: of each resolution, coarsest first; their product is the number of samples per frame.
        fine_width: channels at the rate of the samples; twice as many before each stride.

    Attributes:
        margin: samples on each side of a frame's own that depend on it, or a few more.
    """

    def __init__(self, width: int, strides: Sequence[int], fine_width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(width, fine_width * 2 ** len(strides), 1)]
        self.margin, step = 3, math.prod(strides)
        for place, stride in enumerate(strides):
            after = fine_width * 2 ** (len(strides) - 1 - place)
            layers += [TransposedConv(2 * after, after, stride)]
            self.margin += step
            step //= stride
            layers += [ResidualUnit(after, dilation) for dilation in DILATIONS]
            self.margin += step * sum(DILATIONS)
        layers += [nn.ELU(), nn.Conv1d(fine_width, 1, 7, padding=3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Float[Tensor, "B T C"]) -> Float[Tensor, "B N"]:
        """Return samples."""
        samples: Tensor = self.layers(frames.transpose(1, 2))
        return samples[:, 0]


class TransposedConv(nn.Module):
    """Gives a stride of samples for each, of which every one sees two."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(before, after, 2 * stride, stride)

    def forward(self, samples: Float[Tensor, "B C n"]) -> Float[Tensor, "B D N"]:
        """Return `stride` samples for each."""
        start = self.stride // 2
        longer: Tensor = self.conv(F.elu(samples))
        return longer[..., start : start + samples.shape[-1] * self.stride]


class SpeechDecoder(nn.Module):
    """Code vectors -> blocks over frames -> head -> samples.

    Args:
        dim: channels of the code vectors.
        width: channels of the head's frames.
        frame_samples: samples per frame.

    Attributes:
        margin: frames on each side of its own that a sample depends on; it may be fewer.
    """

    def __init__(self, dim: int, width: int, n_blocks: int, head: STFTHead | WaveformHead, frame_samples: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(dim, width, 3, padding=1)
        self.blocks = blocks(width, n_blocks)
        self.head = head
        self.margin = 1 + n_blocks * ConvNeXtBlock.margin + math.ceil(head.margin / frame_samples)

    def frames(self, vectors: Float[Tensor, "B D T"]) -> Float[Tensor, "B T C"]:
        """Return the frames that the head turns into samples."""
        frames: Tensor = self.blocks(self.first(vectors).transpose(1, 2))
        return frames

    def forward(self, vectors: Float[Tensor, "B D T"]) -> Float[Tensor, "B 1 N"]:
        """Return samples, not clamped."""
        return self.head(self.frames(vectors))[:, None]
