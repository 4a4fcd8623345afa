"""Sound files as people have them -> bounded mono samples at the rate asked for, and back.

The formats are WAV, FLAC, MP3, Ogg (Opus, Vorbis, FLAC), MP4 and WebM with their usual codecs; the sound of a video
file counts. The format is recognised by content; a file's name says nothing.
"""

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from jaxtyping import Float
from torch import Tensor

from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.growing_array import GrowingArray
from omniform.tokenizers.media_container import MediaFileError, open_container

FORMATS = ("wav", "flac", "mp3", "ogg", "mov", "matroska")
CODECS = (
    *("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw"),
    *("pcm_s16be", "flac", "alac", "mp3", "mp3float", "vorbis", "opus", "libopus", "aac"),
)
MAX_SECONDS = 7200.0
RATES = (1000, 768_000)  # resampling takes memory in proportion to the ratio of rates, and a header may state any
# Floats above full scale are clipped; far above they were stored in another unit, such as 16-bit numbers.
MAX_LEVEL = 16.0
MAX_CHANNELS = 8
_EXACT_LENGTHS = ("flac", "mov")
_CUT_SHORT = 0.1  # seconds that a whole file may lack of its stated duration: less than two frames of any codec here
_BLOCK = 2**16  # samples that are encoded at a time
_LARGE_PACKETS = {"max_size": "65536"}  # bytes, of WAV files: FFmpeg's default is a tenth of a second
_ENCODERS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus"}


class AudioFileError(MediaFileError):
    """A sound that cannot be read or written, with the reason by which such sounds are counted."""


@dataclass(frozen=True)
class Audio:
    """Sound as it is heard.

    Attributes:
        samples: float32, mono, in [-1, 1].
        rate: samples per second (Hz).

    Raises:
        TokenizerError: samples that are no real tensor of one axis, or a rate that is no integer.
    """

    samples: Float[Tensor, "N"]
    rate: int

    def __post_init__(self) -> None:
        if not isinstance(self.samples, Tensor) or self.samples.ndim != 1 or not self.samples.is_floating_point():
            shape = f" {self.samples.dtype} {tuple(self.samples.shape)}" if hasattr(self.samples, "dtype") else ""
            raise TokenizerError(
                f"the samples of an Audio are a {type(self.samples).__name__}{shape}, expected a float tensor (N,) in "
                "[-1, 1]: torch.from_numpy makes one of an array, .mean(1) one of two channels"
            )
        if isinstance(self.rate, bool) or not isinstance(self.rate, int):
            raise TokenizerError(
                f"the rate of an Audio is {self.rate!r}, expected a whole number of samples per second"
            )

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class AudioHeader:
    """What a sound file says of itself before a sample is decoded.

    Attributes:
        codec: FFmpeg's name of the codec, such as "pcm_s16le" or "mp3".
        rate: samples per second (Hz).
        channels: how many channels it has.
        seconds: its stated length, None where it states none; that of an MP3 may be an estimate.
    """

    codec: str
    rate: int
    channels: int
    seconds: float | None


def read_audio_header(source: bytes | Path, max_seconds: float = MAX_SECONDS) -> AudioHeader:
    """Return what a sound file says of itself; the sound is not decoded.

    Raises:
        AudioFileError: no sound file of the listed formats and codecs, damaged as far as it is read, or its stated
            length or rate is out of bounds.
    """
    with _opened(source, max_seconds) as (_, _, header):
        return header


def read_audio(source: bytes | Path, rate: int, max_seconds: float = MAX_SECONDS) -> Float[Tensor, "N"]:
    """Decode the (first) sound of a file, mixed to mono by the mean of its channels, resampled to `rate` Hz.

    The file is streamed: memory is that of the result and a quarter more, and decoding stops once the sound has proved
    longer than `max_seconds`, whatever the file states. Levels beyond full scale are clipped to [-1, 1]. A FLAC or MP4
    that ends before the length it states is refused; of one that goes on for up to a codec frame, that is filling and
    is left out; one that goes on for longer is read to its end, as are MP3, Ogg and streamed files, which state no
    length or a guess.

    Args:
        source: the bytes of a file, or its path.
        rate: samples per second of the result.

    Returns:
        float32 samples in [-1, 1].

    Raises:
        AudioFileError: no whole sound file of the listed formats and codecs; one without sound or samples; longer than
            `max_seconds`; a rate outside of RATES; more than MAX_CHANNELS; a rate or channels that change; samples that
            are not numbers or far beyond full scale.
    """
    _check_rate(rate)
    with _opened(source, max_seconds) as (container, stream, _):
        sound, longest_frame = GrowingArray(), Fraction(0)
        resampler: av.AudioResampler | None = None
        for frame in itertools.chain(_decoded(container, stream), [None]):
            if frame is not None:
                longest_frame = max(longest_frame, Fraction(frame.samples, frame.sample_rate))
                if _needs_scaling_alone(frame, rate):
                    sound.extend(frame.to_ndarray()[0].astype(np.float32) / 2**15)
                else:
                    resampler = resampler or av.AudioResampler(format="flt", rate=rate)
            for block in resampler.resample(frame) if resampler else ():
                if block is not None:  # which is the end of a sound that needs no conversion
                    sound.extend(_clipped(_mean_of_channels(block)))
            if len(sound) > max_seconds * rate + 1:
                raise _too_long("more", max_seconds)
        n_samples = len(sound)
        if not n_samples:
            raise AudioFileError("no samples", "a sound file holds no samples")
        if container.format.name.startswith(_EXACT_LENGTHS) and stream.duration and stream.time_base:
            stated = round(stream.duration * stream.time_base * rate)
            if n_samples < stated - _CUT_SHORT * rate:
                raise AudioFileError(
                    "cut short", f"a sound file states {stated / rate:.2f} seconds, and holds {n_samples / rate:.2f}"
                )
            if 0 < stated <= n_samples <= stated + longest_frame * rate:
                n_samples = stated
        return torch.from_numpy(sound.finish(n_samples))


def audio_bytes(samples: Float[Tensor, "N"], rate: int, extension: str) -> bytes:
    """Return mono samples as a sound file, the same bytes every time.

    Args:
        samples: in [-1, 1]; levels beyond are clipped.
        rate: samples per second (Hz). MP3 and Opus know only some rates: others are resampled to the next one above.
        extension: "wav" (16-bit PCM), "flac" (16 bits, lossless), "mp3", or "ogg" (Opus).

    Raises:
        AudioFileError: no samples, samples that are not numbers, a rate outside of RATES, or another extension.
    """
    if extension not in _ENCODERS:
        raise AudioFileError(
            "cannot be written", f"sound cannot be written as {extension!r}: give one of {', '.join(_ENCODERS)}"
        )
    _check_rate(rate)
    if samples.ndim != 1 or not len(samples):
        raise AudioFileError("no samples", f"samples of shape {tuple(samples.shape)}, expected (N,) with N >= 1")
    levels = samples.detach().cpu().double().numpy()
    if not np.isfinite(levels).all():
        raise AudioFileError("levels out of range", "some samples are not finite numbers, expected levels in [-1, 1]")
    pcm = np.clip(np.rint(levels * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format=extension, container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(_ENCODERS[extension], rate=_encoder_rate(extension, rate), layout="mono")
        assert isinstance(stream, AudioStream)
        stream.codec_context.options = {"flags": "+bitexact"}
        for start in range(0, len(pcm), _BLOCK):
            frame = AudioFrame.from_ndarray(pcm[None, start : start + _BLOCK], format="s16", layout="mono")
            # Without time stamps the end would not be trimmed to what was given.
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def write_audio(path: Path, samples: Float[Tensor, "N"], rate: int) -> None:
    """Write mono samples in the format that the extension of `path` names; see `audio_bytes`."""
    path.write_bytes(audio_bytes(samples, rate, path.suffix.removeprefix(".").lower()))


@contextmanager
def _opened(source: bytes | Path, max_seconds: float) -> Iterator[tuple[InputContainer, AudioStream, AudioHeader]]:
    with open_container(source, "sound", FORMATS, CODECS, AudioFileError, _LARGE_PACKETS) as container:
        if not container.streams.audio:
            raise AudioFileError("no sound", "the file holds no sound")
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None or context.name not in CODECS:
            name = "an unknown codec" if context is None else context.name
            raise AudioFileError("codec that is not read", f"a sound of {name}, expected one of {', '.join(CODECS)}")
        context.thread_count = 1
        seconds = None if container.duration is None else container.duration / av.time_base
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        if container.format.name != "mp3" and seconds is not None and seconds > max_seconds:  # an MP3's is an estimate
            raise _too_long(f"{seconds:.1f}", max_seconds)
        header = AudioHeader(context.name, context.sample_rate, context.channels, seconds)
        if header.rate:
            _check_rate(header.rate)
        _check_channels(header.channels)
        yield container, stream, header


def _decoded(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Yield the frames of a sound of one rate and one number of channels, without time stamps: gaps are no sound."""
    first: tuple[int, int, str] | None = None
    for frame in container.decode(stream):
        stored = frame.sample_rate, frame.layout.nb_channels, frame.format.name
        if first is None:
            first = stored
            _check_rate(frame.sample_rate)
            _check_channels(frame.layout.nb_channels)
        elif stored != first:
            was, goes_on = (f"{rate} Hz, {channels} channels, {name}" for rate, channels, name in (first, stored))
            raise AudioFileError(
                "changing rate" if stored[0] != first[0] else "changing channels",
                f"a sound of {was} goes on with {goes_on}, expected one kind of samples: split it",
            )
        frame.pts = None
        yield frame


def _needs_scaling_alone(frame: AudioFrame, rate: int) -> bool:
    """Return whether a frame has one channel of 16-bit samples at the right rate, like all frames of its sound then: to
    set up a conversion takes FFmpeg longer than to decode some seconds, and it would divide by 2**15 as well."""
    return (frame.format.name, frame.layout.nb_channels, frame.sample_rate) == ("s16", 1, rate)


def _mean_of_channels(frame: AudioFrame) -> npt.NDArray[np.float32]:
    """Mix down a frame of interleaved floats; FFmpeg's own mixing would weigh channels by their place. Frames of a
    plane for each channel are never looked at: PyAV crashes on those of eight."""
    channels = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number, or none of float32, is refused later
        return channels.mean(axis=1, dtype=np.float64).astype(np.float32)


def _clipped(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    peak = np.abs(block).max(initial=0)
    if not peak <= MAX_LEVEL:  # NaN is no number below any bound
        raise AudioFileError(
            "levels out of range", f"samples as large as {peak}, expected [-1, 1]: scale the recording first"
        )
    return block.clip(-1, 1)


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioFileError("rate out of range", f"a rate of {rate} Hz, expected {RATES[0]} to {RATES[1]}")


def _check_channels(channels: int) -> None:
    if channels > MAX_CHANNELS:
        raise AudioFileError("too many channels", f"a sound of {channels} channels, expected at most {MAX_CHANNELS}")


def _too_long(seconds: str, max_seconds: float) -> AudioFileError:
    return AudioFileError("too long", f"a sound of {seconds} seconds, expected at most {max_seconds:g}: cut it first")


def _encoder_rate(extension: str, rate: int) -> int:
    known = av.Codec(_ENCODERS[extension], "w").audio_rates
    return rate if not known else min((r for r in known if r >= rate), default=max(known))
