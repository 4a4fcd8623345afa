"""Upright frames -> video files, the same bytes every time."""

import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from omniform.tokenizers.video_files import EXACT, MAX_FPS, VideoFileError, rational

MIN_FPS = 1e-4  # the clock of an MP4 counts no longer frames
_MAX_GIF_DELAY = 2**16 - 1  # hundredths of a second
_PLACES = np.array([2**16, 2**8, 1], np.uint32)  # of red, green and blue in one number


def video_bytes(
    frames: UInt8[np.ndarray, "T H W C"], fps: float | Fraction, extension: str, lossless: bool = False
) -> bytes:
    """Return frames as a video file, the same bytes every time.

    Args:
        frames: 8-bit levels, C = 3 for RGB or 1 for grey.
        fps: frames per second. GIF counts in hundredths of a second: other intervals are rounded in turn, and their
            sum is kept.
        extension: "mp4" (H.264; frames of odd sizes with full colour resolution, which not every player knows), "webm"
            (VP9), or "gif" (up to 256 colours in each frame are kept, more are reduced).
        lossless: every level is kept, in RGB, which fewer players know; of a GIF, frames of more than 256 colours are
            then refused.

    Raises:
        VideoFileError: no frames, an `fps` that the format cannot hold, another extension, or too many colours.
    """
    if extension not in _WRITERS:
        raise VideoFileError(
            "cannot be written", f"video cannot be written as {extension!r}: give one of {', '.join(_WRITERS)}"
        )
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] not in (1, 3) or not frames.size:
        raise VideoFileError(
            "no frames", f"frames of {frames.dtype} and shape {frames.shape}, expected uint8 (T, H, W, 1 or 3), T >= 1"
        )
    lowest, highest = (100 / _MAX_GIF_DELAY, 100) if extension == "gif" else (MIN_FPS, MAX_FPS)
    if not lowest <= fps <= highest:
        raise VideoFileError(
            "cannot be written", f"{fps} frames per second, expected {lowest:.3g} to {highest} in {extension}"
        )
    return _WRITERS[extension](frames, rational(fps), lossless)


def write_video(
    path: Path, frames: UInt8[np.ndarray, "T H W C"], fps: float | Fraction, lossless: bool = False
) -> None:
    """Write frames in the format that the extension of `path` names; see `video_bytes`."""
    path.write_bytes(video_bytes(frames, fps, path.suffix.removeprefix(".").lower(), lossless))


def _write_mp4(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    odd = any(side % 2 for side in frames.shape[1:3])
    codec, layout = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv444p" if odd else "yuv420p")
    # Its macroblock tree reads numbers that nobody wrote, so that a few files in a hundred would differ.
    options = {"crf": "0" if lossless else "16", "x264-params": "cpu-independent=1:mbtree=0"}
    times = range(len(frames) + 1)
    return _encoded((_frame(levels, layout) for levels in frames), times, 1 / fps, "mp4", codec, options)


def _write_webm(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    quality = {"lossless": "1"} if lossless else {"crf": "16", "b": "0"}
    layout = "gbrp" if lossless else "yuv420p"
    options = {**quality, "deadline": "good", "cpu-used": "4"}
    times = range(len(frames) + 1)
    return _encoded((_frame(levels, layout) for levels in frames), times, 1 / fps, "webm", "libvpx-vp9", options)


def _write_gif(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    times = [round(100 * place / fps) for place in range(len(frames) + 1)]
    indexed = (_palette_frame(_rgb(levels), lossless) for levels in frames)
    # Frames are kept whole: FFmpeg compares indices with the frame before, though their palettes may differ.
    options, muxing = {"gifflags": "-offsetting-transdiff"}, {"final_delay": str(times[-1] - times[-2])}
    return _encoded(indexed, times, Fraction(1, 100), "gif", "gif", options, muxing)


_WRITERS = {"mp4": _write_mp4, "webm": _write_webm, "gif": _write_gif}


def _rgb(levels: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _frame(levels: UInt8[np.ndarray, "H W C"], layout: str) -> VideoFrame:
    frame = VideoFrame.from_ndarray(_rgb(levels), format="rgb24")
    if not layout.startswith("yuv"):
        return frame.reformat(format=layout, threads=1)
    return frame.reformat(
        format=layout,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT,
        threads=1,
    )


def _palette_frame(levels: UInt8[np.ndarray, "H W 3"], lossless: bool) -> VideoFrame:
    """Return a frame with a palette of its own: its colours, or the best 256 of more (median cut)."""
    packed, places = np.unique(levels.astype(np.uint32) @ _PLACES, return_inverse=True)
    colours = (packed[:, None] // _PLACES).astype(np.uint8)
    if len(colours) > 256:
        if lossless:
            raise VideoFileError(
                "too many colours", f"a frame of {len(colours)} colours cannot be kept in a GIF: it holds up to 256"
            )
        reduced = Image.fromarray(levels).quantize(256, dither=Image.Dither.NONE)
        colours, places = np.array(reduced.getpalette(), np.uint8).reshape(-1, 3), np.asarray(reduced)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255  # opaque
    palette[: len(colours), 1:] = colours
    indices = places.reshape(levels.shape[:2]).astype(np.uint8)
    indexed: Any = (indices, palette)  # which the declared type of the argument leaves out
    return VideoFrame.from_ndarray(indexed, format="pal8")


def _encoded(
    frames: Iterator[VideoFrame],
    times: Sequence[int],
    time_base: Fraction,
    extension: str,
    codec: str,
    options: dict[str, str],
    muxing: dict[str, str] | None = None,
) -> bytes:
    """Return frames, which are taken one by one, as a file; frame k is shown from times[k] to times[k + 1], in units of
    `time_base` seconds."""
    file = io.BytesIO()
    bitexact = {"fflags": "+bitexact", **(muxing or {})}
    with av.open(file, "w", format=extension, container_options=bitexact) as container:
        stream = container.add_stream(codec, rate=1 / time_base, options={**options, "flags": "+bitexact"})
        assert isinstance(stream, VideoStream)
        first = next(frames)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        context = stream.codec_context
        context.time_base = time_base
        context.thread_count = 1
        if first.format.name.startswith("yuv"):
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = ColorRange.MPEG
        for frame, start, end in zip(itertools.chain([first], frames), times[:-1], times[1:], strict=True):
            frame.pts, frame.duration, frame.time_base = start, end - start, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
