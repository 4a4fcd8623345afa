"""Sounds and their files, by the encoders of others."""

import io
from fractions import Fraction

import av
import numpy as np
import soundfile

RATE = 16000


EXTENSIONS = ("wav", "flac", "mp3", "ogg")


def sine(seconds: float, rate: int, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """A tone in float32."""
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def stored(samples: np.ndarray, rate: int, file_format: str = "WAV", subtype: str | None = None) -> bytes:
    """A file as libsndfile writes it, of samples (N,) or (N, channels)."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype)
    return file.getvalue()


def encoded(samples: np.ndarray, rate: int, container_format: str, codec: str, bit_rate: int | None = None) -> bytes:
    """A mono file as FFmpeg writes it; of an MP3 its frames alone."""
    file = io.BytesIO()
    plain = {"write_xing": "0", "id3v2_version": "0"} if container_format == "mp3" else {}
    with av.open(file, "w", format=container_format, container_options=plain) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def m4a(samples: np.ndarray, rate: int) -> bytes:
    """AAC in MP4."""
    return encoded(samples, rate, "ipod", "aac")
