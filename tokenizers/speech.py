"""Speech <-> codes of a convolutional codec, one or several per frame of time."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float, Int, Int16
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.base import Discrete, TokenizerError, Tokens
from omniform.tokenizers.codec_tokenizer import CodecTokenizer
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.quantizers import QuantizerConfig
from omniform.tokenizers.codecs.speech_codec import SpeechCodec
from omniform.tokenizers.codecs.speech_decoder import SpeechDecoder, STFTHeadConfig, WaveformHeadConfig
from omniform.tokenizers.codecs.speech_encoder import MelStemConfig, SpeechEncoder, WaveformStemConfig
from omniform.tokenizers.stream_windows import stream_windows

if TYPE_CHECKING:
    from omniform.tokenizers.audio_files import Audio

_LEVELS = 2**15  # of 16-bit samples, on each side of 0
_PAUSE = 0.25  # seconds between the sounds of a comparison


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SpeechTokenizerConfig:
    """Sizes of a speech tokenizer.

    Attributes:
        sample_rate: samples per second (Hz); files of other rates are resampled.
        frame_samples: samples that the code, or codes, of one frame stand for.
        width: channels of the blocks over frames, in encoder and decoder each.
        n_blocks: such blocks; each lets a code depend on 3 more frames on both sides.
        encoder: what turns samples into frames: "mel" or "waveform".
        decoder: what turns frames into samples: "stft" or "waveform".
        window: frames that are encoded or decoded at a time, beside those that they depend on.
    """

    sample_rate: int = Field(default=16000, ge=1000, le=192_000)
    frame_samples: int = Field(default=640, ge=2)
    width: int = Field(default=192, ge=1)
    n_blocks: int = Field(default=4, ge=0)
    encoder: Annotated[MelStemConfig | WaveformStemConfig, Field(discriminator="kind")] = MelStemConfig()
    decoder: Annotated[STFTHeadConfig | WaveformHeadConfig, Field(discriminator="kind")] = STFTHeadConfig()
    quantizer: QuantizerConfig = FSQConfig(levels=(8, 5, 5, 5))
    window: int = Field(default=24, ge=1)

    @property
    def channels(self) -> int:
        """Of an item: speech is mono."""
        return 1

    @model_validator(mode="after")
    def _check_frames(self) -> "SpeechTokenizerConfig":
        for side, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            divisor, spectral = part.divisor, part.kind in ("mel", "stft")
            if self.frame_samples % divisor if spectral else self.frame_samples != divisor:
                expected = (
                    f"a multiple of {divisor}, by its hop" if spectral else f"{divisor}, the product of its strides"
                )
                raise ValueError(f"frame_samples is {self.frame_samples}, but the {side} needs {expected}")
        return self

    def build(self) -> SpeechCodec:
        """Return the codec with random weights from torch's generator."""
        quantizer = self.quantizer.build()
        stem = self.encoder.build(self.sample_rate, self.frame_samples, self.width)
        head = self.decoder.build(self.frame_samples, self.width)
        return SpeechCodec(
            SpeechEncoder(stem, self.frame_samples, self.width, self.n_blocks, quantizer.input_dim),
            quantizer,
            SpeechDecoder(quantizer.dim, self.width, self.n_blocks, head, self.frame_samples),
            self.sample_rate,
        )


class SpeechTokenizer(CodecTokenizer[Tokens]):
    """A code, or several, per frame of speech.

    An item is a float32 tensor (N,) in [-1, 1] at the config's sample rate, N >= 1. Its tokens are on the grid (T,), or
    (T, Q) with Q codes per frame, coarse first, with T = N / frame_samples, rounded up. They decode to
    T * frame_samples samples: cut these where the length of the original is known.

    A recording stands in silence that never ends, and a code depends on `codec.encoder.margin` frames on each side of
    its own. All goes through windows of one shape, one at a time, aligned with the first sample: so the codes of a
    frame are the same, to the bit, in chunks of any sizes and in any batch; and memory is bounded.
    """

    kind = "speech_codec"
    name = "speech"
    config_type = SpeechTokenizerConfig
    config: SpeechTokenizerConfig
    codec: SpeechCodec
    fixed_grid = None

    def __init__(self, config: SpeechTokenizerConfig, codec: SpeechCodec) -> None:
        super().__init__(config, codec)
        # What a code means depends on which of its frame it is, even where all depths look it up in one table.
        self.representation = Discrete(codec.quantizer.codebook_size, codec.quantizer.depth)

    def grid(self, item: Float[Tensor, "*C N"]) -> tuple[int, ...]:
        """Return the grid of an item's tokens."""
        return self._grid(-(-item.shape[-1] // self.config.frame_samples))

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn speech into codes.

        Raises:
            TokenizerError: an item is empty, of another shape or type, or has values outside [-1, 1].
        """
        codes = [torch.cat(list(self.encode_stream([item]))) for item in items]
        return [Tokens(frames.flatten(), self._grid(len(frames))) for frames in codes]

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Float[Tensor, "N"]]) -> Iterator[Int[Tensor, "T *Q"]]:
        """Turn speech of any length, which comes in chunks of any sizes, into the codes of its frames, as soon as
        what they depend on is there. Together they are those of the whole recording, to the bit.

        Raises:
            TokenizerError: a chunk is of another shape or type, or has values outside [-1, 1]; there is no sample.
        """
        frame, margin = self.config.frame_samples, self.codec.encoder.margin
        empty = True
        for window, n_samples in stream_windows(
            map(self._checked_samples, chunks), self.config.window * frame, margin * frame, torch.zeros(())
        ):
            empty = False
            yield self.codec.encode(window[None, None])[0, margin : margin - (-n_samples // frame)]
        if empty:
            raise TokenizerError("speech of no samples, expected at least one")

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[Float[Tensor, "N"]]:
        """Turn codes into speech.

        Generated codes lie on one axis, and may end anywhere: with Q per frame, the frames that they hold whole are
        decoded, and no frame is speech of no samples.

        Raises:
            TokenizerError: another grid, or a code outside the codebook.
        """
        frames = [self._frames(entry) for entry in tokens]
        return [torch.cat(list(self.decode_stream([codes]))) if len(codes) else torch.zeros(0) for codes in frames]

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Int[Tensor, "T *Q"]]) -> Iterator[Float[Tensor, "N"]]:
        """Turn the codes of frames, which come in chunks of any sizes, into samples, as soon as what they depend on is
        there. Before the first frame and after the last stand the codes of silence.

        Raises:
            TokenizerError: a chunk is of another shape, or a code is outside the codebook; there is no code.
        """
        frame, margin = self.config.frame_samples, self.codec.decoder.margin
        empty = True
        for window, n_frames in stream_windows(
            map(self._checked_codes, chunks), self.config.window, margin, self._silence()
        ):
            empty = False
            yield self.codec.decode(window[None])[0, 0, margin * frame : (margin + n_frames) * frame]
        if empty:
            raise TokenizerError("no codes of speech, expected those of at least one frame")

    def seconds(self, n_tokens: int) -> float:
        """Return how long the sound of so many tokens is, as far as they are of whole frames."""
        return n_tokens // self.codec.quantizer.depth * self.config.frame_samples / self.config.sample_rate

    def read(self, payload: bytes, max_seconds: float = math.inf) -> Float[Tensor, "N"]:
        """Decode a sound file (`audio_files` says which): mono, at the tokenizer's rate.

        Raises:
            TokenizerError: it is not a whole sound file, longer than `max_seconds`, or above the bounds of
                `audio_files`.
        """
        from omniform.tokenizers.audio_files import MAX_SECONDS, read_audio

        return read_audio(payload, self.config.sample_rate, min(max_seconds, MAX_SECONDS))

    def from_audio(self, audio: "Audio") -> Float[Tensor, "N"]:
        """Turn sound of any rate into an item, as `read` does with a WAV file of it.

        Raises:
            TokenizerError: no samples, samples that are not numbers, or a rate out of the bounds of `audio_files`.
        """
        from omniform.tokenizers.audio_files import audio_bytes

        return self.read(audio_bytes(audio.samples, audio.rate, "wav"))

    def to_audio(self, item: Float[Tensor, "N"]) -> "Audio":
        """Turn an item into sound."""
        from omniform.tokenizers.audio_files import Audio

        return Audio(item, self.config.sample_rate)

    def compact(self, item: Float[Tensor, "N"]) -> Int16[Tensor, "N"]:
        """Return 16-bit samples."""
        return (item * _LEVELS).round().clamp(-_LEVELS, _LEVELS - 1).to(torch.int16)

    def expand(self, compact: Int16[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Turn 16-bit samples back into an item."""
        return compact.float() / _LEVELS

    def write_comparison(self, items: Sequence[Float[Tensor, "N"]], stem: Path) -> list[Path]:
        """Write two WAV files, of the items one after another and of what their codes decode to, a pause after each."""
        from omniform.tokenizers.audio_files import write_audio

        decoded = [
            samples[: len(item)]
            for item, samples in zip(items, self.decode_batch(self.encode_batch(items)), strict=True)
        ]
        pause = torch.zeros(round(_PAUSE * self.config.sample_rate))
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(f"{stem.name}-{side}.wav") for side in ("original", "decoded")]
        for path, sounds in zip(paths, (items, decoded), strict=True):
            write_audio(path, torch.cat([part for sound in sounds for part in (sound, pause)]), self.config.sample_rate)
        return paths

    def _grid(self, n_frames: int) -> tuple[int, ...]:
        depth = self.codec.quantizer.depth
        return (n_frames,) if depth == 1 else (n_frames, depth)

    def _frames(self, tokens: Tokens) -> Int[Tensor, "T *Q"]:
        codes, grid, expected = tokens.codes, tuple(tokens.grid), self._grid(1)[1:]
        n_frames = len(codes) // math.prod(expected)
        if grid == (len(codes),):
            return codes[: n_frames * math.prod(expected)].view(n_frames, *expected)
        if grid != (n_frames, *expected) or len(codes) != math.prod(grid):
            shape = ", ".join(["T", *map(str, expected)])
            raise TokenizerError(f"{len(codes)} codes of grid {grid}, expected ({shape}), or all on one axis")
        return codes.view(grid)

    def _silence(self) -> Int[Tensor, "*Q"]:
        """Return the codes of a frame in the midst of silence."""
        margin = self.codec.encoder.margin
        return self.codec.encode(torch.zeros(1, 1, (2 * margin + 1) * self.config.frame_samples))[0, margin]

    def _checked_samples(self, samples: object) -> Float[Tensor, "N"]:
        if not isinstance(samples, Tensor) or samples.dtype != torch.float32 or samples.ndim != 1:
            given = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
            raise TokenizerError(f"speech is {given}, expected float32 (N,): `read` makes such tensors")
        if not (samples.abs() <= 1).all():
            raise TokenizerError(f"speech spans [{samples.min()}, {samples.max()}], expected finite values in [-1, 1]")
        return samples

    def _checked_codes(self, codes: Int[Tensor, "T *Q"]) -> Int[Tensor, "T *Q"]:
        if codes.shape != self._grid(len(codes) if codes.ndim else 0):
            raise TokenizerError(f"codes of speech are {tuple(codes.shape)}, expected {('T', *self._grid(0)[1:])}")
        self.check_codes(codes)
        return codes
