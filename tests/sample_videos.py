"""Videos and their files, by the encoders of others."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from omniform.tokenizers.video_files import Video

EXTENSIONS = ("mp4", "webm", "gif")


def clip(n_frames: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth moving pattern."""
    t, y, x = np.ogrid[:n_frames, :height, :width]
    waves = [128 + 100 * np.sin(x / 9 + y / (8 + c) + t / (4 + c) + c) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def numbered(n_frames: int, size: int = 16) -> np.ndarray:
    """Frames that tell their number: level 20 + 20 k, modulo 200."""
    levels = 20 + 20 * np.arange(n_frames) % 200
    return np.broadcast_to(levels[:, None, None, None], (n_frames, size, size, 3)).astype(np.uint8)


def numbers(video: Video) -> list[int]:
    """Which frame of `numbered` each frame shows."""
    return [round((float(frame.mean()) - 20) / 20) for frame in video.frames]


def irregular(extension: str, stamps: Sequence[int], last: int, time_base: Fraction) -> bytes:
    """A file of `numbered` frames shown at the given time stamps, the last one for `last` units."""
    file = io.BytesIO()
    codec = {"mp4": "libx264", "matroska": "libvpx-vp9", "gif": "gif"}[extension]
    options = {"crf": "10", "preset": "ultrafast", "bf": "0", "b": "0", "cpu-used": "8"}
    lasts = dict(zip(stamps, np.diff([*stamps, stamps[-1] + last]).tolist(), strict=True))
    with av.open(file, "w", format=extension, container_options={"final_delay": str(last)}) as container:
        stream = container.add_stream(codec, rate=1 / time_base, options=options)
        stream.width = stream.height = 16
        stream.pix_fmt = "gray" if extension == "gif" else "yuv420p"
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        frames = [av.VideoFrame.from_ndarray(levels, format="rgb24") for levels in numbered(len(stamps))]
        for frame, stamp in zip(frames, stamps, strict=True):
            frame.pts, frame.time_base = stamp, time_base
        for packet in (packet for frame in [*frames, None] for packet in stream.encode(frame)):
            packet.duration = lasts[packet.pts]
            container.mux(packet)
    return file.getvalue()


def stamped(container_format: str, codec: str, stamps: Sequence[int]) -> bytes:
    """A file of `numbered` frames whose time stamps are these eighths of a second, in the order of decoding."""
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=8, options={"bf": "0"})
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = Fraction(1, 8)
        frames = [av.VideoFrame.from_ndarray(levels, format="rgb24") for levels in numbered(len(stamps))]
        for place, frame in enumerate(frames):
            frame.pts, frame.time_base = place, Fraction(1, 8)
        for packet in (packet for frame in [*frames, None] for packet in stream.encode(frame)):
            place = packet.pts
            packet.pts = stamps[place]
            packet.dts = min(stamps[place:])  # never beyond the stamp, and never back
            container.mux(packet)
    return file.getvalue()


def turned(matrix: tuple[float, ...], payload: bytes) -> bytes:
    """An MP4 with another display matrix."""
    a, b, c, d = (round(65536 * entry) for entry in matrix)
    plain = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = payload.index(plain, payload.index(b"tkhd"))
    return payload[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + payload[place + len(plain) :]
