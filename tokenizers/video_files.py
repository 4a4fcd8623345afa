"""Video files as people have them -> upright frames at the rate asked for.

The formats are MP4 and QuickTime, WebM and Matroska, AVI and GIF, with their usual codecs. The format is recognised by
content; a file's name says nothing. Pixels are taken as square, and the alpha channel of a WebM is left out; GIFs are
laid on white where they are transparent, as pictures are.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.growing_array import GrowingArray
from omniform.tokenizers.image_files import Mode, plain_picture
from omniform.tokenizers.media_container import MediaFileError, open_container

FORMATS = ("mov", "matroska", "avi", "gif")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif")
MAX_PIXELS = 2**23  # per frame: 3840 x 2160, and a little more
MAX_RESULT_BYTES = 2**31
MAX_FPS = 1000
_USUAL_FPS = 25  # where a file says nothing of its rate
# Their time stamps are rounded to hundredths or thousandths of a second: without half a unit of slack, a video that is
# sampled at its own rate would repeat some frames and lose others.
_COARSE_CLOCKS = ("gif", "matroska,webm")
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT


class VideoFileError(MediaFileError):
    """A video that cannot be read or written, with the reason by which such videos are counted."""


@dataclass(frozen=True)
class Video:
    """Moving pictures as they are shown.

    Attributes:
        frames: 8-bit levels, C = 3 for RGB, 1 for grey.
        fps: frames per second.

    Raises:
        TokenizerError: frames that are no array, or a rate that is no number.
    """

    frames: UInt8[np.ndarray, "T H W C"]
    fps: float

    def __post_init__(self) -> None:
        if not isinstance(self.frames, np.ndarray) or not isinstance(self.fps, int | float | Fraction):
            raise TokenizerError(
                f"a Video of a {type(self.frames).__name__} at {self.fps!r} frames per second, expected a NumPy array "
                "uint8 (T, H, W, 1 or 3) and a number"
            )

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.frames) / self.fps


@dataclass(frozen=True)
class VideoHeader:
    """What a video file says of itself before a frame is decoded.

    Attributes:
        codec: FFmpeg's name of the codec, such as "h264" or "gif".
        width: pixels as stored, before any turn; so is `height`.
        fps: the average rate, None where the file states none.
        n_frames: how many frames, also those that an edit list leaves out; None where the file states no number.
        seconds: its stated length, None where it states none.
    """

    codec: str
    width: int
    height: int
    fps: float | None
    n_frames: int | None
    seconds: float | None


def read_video_header(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> VideoHeader:
    """Return what a video file says of itself; no frame of the result is decoded.

    Raises:
        VideoFileError: no video file of the listed formats and codecs, damaged as far as it is read, or frames above
            `max_pixels`.
    """
    with _opened(source, max_pixels) as (_, _, header):
        return header


def read_video(
    source: bytes | Path,
    *,
    fps: float | Fraction | None,
    max_frames: int,
    max_pixels: int = MAX_PIXELS,
    mode: Mode = "RGB",
    fit: Callable[[Image.Image], Image.Image] | None = None,
) -> Video:
    """Decode the (first) video of a file into at most `max_frames` frames, its first ones.

    With `fps`, frame k of the result is the one shown k / fps seconds after the first frame appeared, by the time
    stamps of the file, whether its own rate is constant or not: frames are left out or repeated, never mixed. Stamps
    of WebM and GIF are taken as rounded to the nearest unit of their clocks. The last frame is shown for as long as
    the file says, or else as long as the one before. Decoding stops at the first frame after the result.

    Args:
        source: the bytes of a file, or its path.
        fps: frames per second of the result (a float near a fraction with a denominator up to 1001 is taken for it);
            None keeps the frames that are stored, and the result has their average rate.
        max_frames: the longest result.
        max_pixels: the most pixels of a stored frame; known before one is decoded.
        mode: "L" for grey, "RGB".
        fit: applied to every frame of the result as it is decoded, such as a resize, so that no more is held.

    Raises:
        VideoFileError: no whole video file of the listed formats and codecs as far as it is decoded; one without
            frames; frames above `max_pixels`, or of changing size; a result above MAX_RESULT_BYTES; `fps` outside of
            (0, MAX_FPS] or `max_frames` below 1.
    """
    if max_frames < 1 or (fps is not None and not 0 < fps <= MAX_FPS):
        raise VideoFileError(
            "cannot be sampled",
            f"{max_frames} frames at {fps} per second asked for, expected 1 or more at (0, {MAX_FPS}]",
        )
    with _opened(source, max_pixels) as (container, stream, header):
        shown = _shown(container, stream, header)
        if fps is None:
            chosen = itertools.islice(shown, max_frames)
        else:
            slack = (stream.time_base or Fraction(0)) / 2 if container.format.name in _COARSE_CLOCKS else Fraction(0)
            chosen = itertools.islice(_sampled(shown, rational(fps), slack), max_frames)
        frames = GrowingArray()
        n_bytes = 0
        last: _Shown | None = None
        for moment in chosen:
            if last is None or moment.frame is not last.frame:
                picture = _picture(moment.frame, mode)
                levels = np.asarray(picture if fit is None else fit(picture))
                levels = levels[..., None] if levels.ndim == 2 else levels
            n_bytes += levels.nbytes
            if n_bytes > MAX_RESULT_BYTES:
                raise VideoFileError(
                    "too many pixels",
                    f"{len(frames) + 1} frames of {levels.shape} take more than {MAX_RESULT_BYTES} bytes",
                )
            frames.extend(levels[None])
            last = moment
        if last is None:
            raise VideoFileError("no frames", "a video file holds no frames")
        if fps is not None:
            rate = rational(fps)
        elif last.end:
            rate = len(frames) / last.end
        else:  # all of them appear at once
            rate = Fraction(stream.average_rate or _USUAL_FPS)
        return Video(frames.finish(), float(rate))


@dataclass(frozen=True)
class _Shown:
    """A decoded frame, shown from `start` to `end`, in seconds after the first frame appeared."""

    frame: VideoFrame
    start: Fraction
    end: Fraction


@contextmanager
def _opened(source: bytes | Path, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream, VideoHeader]]:
    # FFmpeg counts the rows and columns that it adds for speed; the exact bound is checked below.
    bounds = {"max_pixels": str(2 * max_pixels + 2**20), "threads": "1"}
    with open_container(source, "video", FORMATS, CODECS, VideoFileError, bounds) as container:
        pictured = [
            stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic
        ]
        if not pictured:
            raise VideoFileError("no video", "the file holds no video")
        stream = pictured[0]
        context = stream.codec_context
        if context is None or context.name not in CODECS:
            name = "an unknown codec" if context is None else context.name
            raise VideoFileError("codec that is not read", f"a video of {name}, expected one of {', '.join(CODECS)}")
        if not 1 <= context.width * context.height <= max_pixels:  # FFmpeg leaves out sizes above its own bound
            raise VideoFileError(
                "frame size out of range",
                f"a video has frames of {context.width} x {context.height} pixels (0 x 0: too many to say), expected "
                f"1 to {max_pixels} in all",
            )
        context.options = bounds
        context.thread_count = 1
        fps = None if stream.average_rate is None else float(stream.average_rate)
        seconds = None if container.duration is None else container.duration / av.time_base
        header = VideoHeader(context.name, context.width, context.height, fps, stream.frames or None, seconds)
        yield container, stream, header


def _shown(container: InputContainer, stream: VideoStream, header: VideoHeader) -> Iterator[_Shown]:
    """Yield all frames in the order of their appearance, once it is known until when each is shown.

    A time stamp that is missing or behind the one before stands for the end of the frame before.
    """
    usual = 1 / Fraction(stream.average_rate or _USUAL_FPS)
    waiting: VideoFrame | None = None
    origin = start = Fraction(0)
    n_frames = 0
    for frame in _decoded(container, stream):
        if frame.is_corrupt:
            raise VideoFileError("damaged file", f"frame {n_frames} of a video is damaged")
        if (frame.width, frame.height) != (header.width, header.height):
            raise VideoFileError(
                "frames of changing size",
                f"a frame has {frame.width} x {frame.height} pixels in a video of {header.width} x {header.height}",
            )
        time = None if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base)
        if waiting is None:
            origin = time or Fraction(0)
        else:
            following = start + (_duration(waiting) or usual)
            if time is not None and time - origin >= start:
                following = time - origin
            yield _Shown(waiting, start, following)
            usual, start = following - start or usual, following
        waiting, n_frames = frame, n_frames + 1
    if waiting is not None:
        end = start + (_duration(waiting) or usual)
        if not _duration(waiting) and header.seconds is not None and not container.streams.audio:
            end = max(end, Fraction(header.seconds))
        yield _Shown(waiting, start, end)


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield all frames, and at their end check that the file held as many as its index lists. What the file states
    beside it counts those that an edit list leaves out too, and the gaps that an AVI fills with empty frames."""
    n_held = 0
    for packet in container.demux(stream):
        n_held += packet.size > 0
        yield from packet.decode()
    n_listed = sum(entry.size > 0 for entry in stream.index_entries)
    if n_held < n_listed:
        raise VideoFileError("cut short", f"a video lists {n_listed} frames and holds only {n_held}")


def _duration(frame: VideoFrame) -> Fraction:
    """Return for how long a frame is shown as it says itself, in seconds, 0 where it does not."""
    if frame.time_base is None or frame.duration is None or frame.duration < 0:
        return Fraction(0)
    return frame.duration * Fraction(frame.time_base)


def _sampled(shown: Iterator[_Shown], fps: Fraction, slack: Fraction) -> Iterator[_Shown]:
    n_sampled = 0
    for moment in shown:
        while n_sampled / fps + slack < moment.end:
            yield moment
            n_sampled += 1


def rational(fps: float | Fraction) -> Fraction:
    """Return the rate that is meant, of two numbers of which the smaller is at most 1001: 29.97003 is 30000 / 1001."""
    exact = Fraction(fps)
    return exact.limit_denominator(1001) if exact >= 1 else 1 / (1 / exact).limit_denominator(1001)


def _picture(frame: VideoFrame, mode: Mode) -> Image.Image:
    transparent = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    levels = frame.reformat(
        format="rgba" if transparent else "rgb24", interpolation=EXACT, dst_color_range=ColorRange.JPEG, threads=1
    ).to_ndarray()
    return plain_picture(Image.fromarray(_upright(levels, frame)), mode)


def _upright(levels: UInt8[np.ndarray, "H W C"], frame: VideoFrame) -> UInt8[np.ndarray, "H2 W2 C"]:
    """Turn and mirror a frame as the file's display matrix says: x' = a x + c y, y' = b x + d y."""
    side_data: Any = frame.side_data  # a list, whatever its declared type says
    stored = [bytes(data) for data in side_data if data.type == SideDataType.DISPLAYMATRIX]
    if not stored:
        return levels
    a, b, _, c, d = np.frombuffer(stored[0], np.int32)[:5].tolist()
    swapped = abs(b) > abs(a)
    if max(abs(b), abs(c)) if not swapped else max(abs(a), abs(d)):
        raise VideoFileError(
            "turned askew", f"a video is turned by {frame.rotation} degrees, expected a multiple of 90: turn it first"
        )
    turned = levels.transpose(1, 0, 2) if swapped else levels
    rows, columns = (b, c) if swapped else (d, a)
    return np.ascontiguousarray(turned[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1])
