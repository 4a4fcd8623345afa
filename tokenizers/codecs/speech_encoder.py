"""Encoders of speech: a stem from samples to frames, and blocks over frames."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from omniform.tokenizers.codecs.spectrogram import magnitude, mel_filters, stft
from omniform.tokenizers.codecs.speech_layers import DILATIONS, ConvNeXtBlock, LatentNorm, ResidualUnit, blocks

_FLOOR = 1e-2  # magnitudes far below it are silence; the levels of a recording with a peak of 1 reach about 100


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MelStemConfig:
    """A fixed log-mel spectrum, and blocks at its rate.

    Attributes:
        hop: samples from one spectrum to the next; each sees four times as many.
        n_mels: bands of the mel scale.
        width: channels of the blocks.
    """

    kind: Literal["mel"] = "mel"
    hop: int = Field(default=160, ge=2, multiple_of=2)
    n_mels: int = Field(default=80, ge=1)
    width: int = Field(default=192, ge=1)
    n_blocks: int = Field(default=1, ge=0)

    @property
    def divisor(self) -> int:
        """What the samples per frame are a multiple of."""
        return self.hop

    def build(self, rate: int, frame_samples: int, width: int) -> "MelStem":
        """Return the stem."""
        return MelStem(rate, frame_samples, self.hop, self.n_mels, self.width, self.n_blocks, width)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WaveformStemConfig:
    """Strided convolutions of samples.

    Attributes:
        strides: of each resolution, finest first.
        width: channels at the rate of the samples; doubled at each stride.
    """

    kind: Literal["waveform"] = "waveform"
    strides: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (4, 4, 5, 8)
    width: int = Field(default=16, ge=2, multiple_of=2)

    @property
    def divisor(self) -> int:
        """What the samples per frame are."""
        return math.prod(self.strides)

    def build(self, rate: int, frame_samples: int, width: int) -> "WaveformStem":
        """Return the stem."""
        return WaveformStem(self.strides, self.width, width)


class MelStem(nn.Module):
    """Samples -> a fixed log-mel spectrum -> blocks at its rate -> frames.

    Magnitude alone is kept, as in the input of Whisper (arXiv:2212.04356, section 2.2): phase is the decoder's to find.

    Args:
        rate: samples per second.
        frame_samples: samples per frame, a multiple of `hop`.
        hop: samples from one spectrum to the next; each sees four times as many.
        fine_width: channels at the rate of the spectra.
        width: channels of the frames.

    Attributes:
        margin: samples on each side of its own that a frame depends on.
    """

    filters: Float[Tensor, "F M"]

    def __init__(
        self, rate: int, frame_samples: int, hop: int, n_mels: int, fine_width: int, n_blocks: int, width: int
    ) -> None:
        super().__init__()
        self.hop = hop
        self.per_frame = frame_samples // hop
        self.register_buffer("filters", mel_filters(4 * hop, n_mels, rate), persistent=False)
        self.first = nn.Conv1d(n_mels, fine_width, 5, padding=2)
        self.blocks = blocks(fine_width, n_blocks)
        self.join = nn.Linear(fine_width * self.per_frame, width)
        self.margin = 3 * hop // 2 + 1 + hop * (2 + n_blocks * ConvNeXtBlock.margin)

    def forward(self, samples: Float[Tensor, "B N"]) -> Float[Tensor, "B T C"]:
        """Return frames."""
        with torch.autocast(samples.device.type, enabled=False):
            mel = magnitude(stft(samples, 4 * self.hop, self.hop)) @ self.filters
            levels = torch.log1p(mel / _FLOOR) / 3  # silence is 0, as the padding of convolutions is
        fine = self.blocks(self.first(levels.transpose(1, 2)).transpose(1, 2))
        return self.join(fine.unflatten(1, (-1, self.per_frame)).flatten(2))


class WaveformStem(nn.Module):
    """Samples -> strided convolutions -> frames.

    Source: the encoder of SoundStream (Zeghidour et al. 2021), arXiv:2107.03312, section III-A. Deviations: each
    residual unit begins with a norm over channels, there are two per resolution, and nothing is causal.

    Args:
        strides: of each resolution, finest first; their product is the number of samples per frame.
        fine_width: channels at the rate of the samples; doubled at each stride.
        width: channels of the frames.

    Attributes:
        margin: samples on each side of its own that a frame depends on, or a few more.
    """

    def __init__(self, strides: Sequence[int], fine_width: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(1, fine_width, 7, padding=3)]
        self.margin, step = 3, 1
        for place, stride in enumerate(strides):
            now = fine_width * 2**place
            layers += [*(ResidualUnit(now, dilation) for dilation in DILATIONS), StridedConv(now, 2 * now, stride)]
            self.margin += step * (sum(DILATIONS) + stride)
            step *= stride
        layers += [nn.ELU(), nn.Conv1d(fine_width * 2 ** len(strides), width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, samples: Float[Tensor, "B N"]) -> Float[Tensor, "B T C"]:
        """Return frames."""
        frames: Tensor = self.layers(samples[:, None])
        return frames.transpose(1, 2)


class StridedConv(nn.Module):
    """A convolution that sees two strides of samples for each that it gives."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.padding = (stride // 2, stride - stride // 2)
        self.conv = nn.Conv1d(before, after, 2 * stride, stride)

    def forward(self, samples: Float[Tensor, "B C N"]) -> Float[Tensor, "B D n"]:
        """Return one sample for each stride."""
        return self.conv(F.pad(F.elu(samples), self.padding))


class SpeechEncoder(nn.Module):
    """Samples -> stem -> blocks over frames -> normalised latents.

    Args:
        frame_samples: samples per frame.
        width: channels of the stem's frames.
        dim: channels of the latents.

    Attributes:
        margin: frames on each side of its own that a latent depends on; it may be fewer.
    """

    def __init__(self, stem: MelStem | WaveformStem, frame_samples: int, width: int, n_blocks: int, dim: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = blocks(width, n_blocks)
        self.last = nn.Linear(width, dim)
        self.norm = LatentNorm(dim)
        self.margin = math.ceil(stem.margin / frame_samples) + n_blocks * ConvNeXtBlock.margin

    def forward(self, items: Float[Tensor, "B 1 N"]) -> Float[Tensor, "B D T"]:
        """Return latents."""
        return self.norm(self.last(self.blocks(self.stem(items[:, 0])))).transpose(1, 2)
