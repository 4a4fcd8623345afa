"""Video files as people have them -> upright frames at the rate asked for, and back.

The formats are MP4 and QuickTime, WebM and Matroska, AVI and GIF, with their usual codecs. The format is recognised by
content; a file's name says nothing. Pixels are taken as square, and the alpha channel of a WebM is left out; GIFs are
laid on white where they are transparent, as pictures are.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
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
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from omniform.tokenizers.image_files import Mode, plain_picture
from omniform.tokenizers.media_container import MediaFileError, open_container

FORMATS = ("mov", "matroska", "avi", "gif")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif")
MAX_PIXELS = 2**23  # per frame: 3840 x 2160, and a little more
MAX_RESULT_BYTES = 2**31
MAX_FPS = 1000
# Their time stamps are rounded to hundredths or thousandths of a second: without half a unit of slack, a video that is
# sampled at its own rate would repeat some frames and lose others.
_COARSE_CLOCKS = ("gif", "matroska,webm")
_PLACES = np.array([2**16, 2**8, 1], np.uint32)  # of red, green and blue in one number
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT


class VideoFileError(MediaFileError):
    """A video that cannot be read or written, with the reason by which such videos are counted."""


@dataclass(frozen=True)
class Video:
    """Moving pictures as they are shown.

    Attributes:
        frames: 8-bit levels, C = 3 for RGB, 1 for grey.
        fps: frames per second.
    """

    frames: UInt8[np.ndarray, "T H W C"]
    fps: float

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
        n_frames: how many frames, None where the file states no number.
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
            chosen = itertools.islice(_sampled(shown, _rational(fps), slack), max_frames)
        frames: list[UInt8[np.ndarray, "H W C"]] = []
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
            frames.append(levels)
            last = moment
        if last is None:
            raise VideoFileError("no frames", "a video file holds no frames")
        rate = len(frames) / last.end if fps is None else _rational(fps)
        return Video(np.stack(frames), float(rate))


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
    highest = 100 if extension == "gif" else MAX_FPS
    if not 0 < fps <= highest:
        raise VideoFileError("cannot be written", f"{fps} frames per second, expected up to {highest} in {extension}")
    return _WRITERS[extension](frames, _rational(fps), lossless)


def write_video(
    path: Path, frames: UInt8[np.ndarray, "T H W C"], fps: float | Fraction, lossless: bool = False
) -> None:
    """Write frames in the format that the extension of `path` names; see `video_bytes`."""
    path.write_bytes(video_bytes(frames, fps, path.suffix.removeprefix(".").lower(), lossless))


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

    A time stamp that is missing or behind the one before follows it by the frame's duration.
    """
    usual = Fraction(1, 25) if not stream.average_rate else 1 / Fraction(stream.average_rate)
    waiting: VideoFrame | None = None
    origin = start = end = Fraction(0)
    n_frames = 0
    for frame in container.decode(stream):
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
            following = end if time is None else time - origin
            following = max(following, start)
            yield _Shown(waiting, start, following)
            usual, start = following - start or usual, following
        waiting, n_frames = frame, n_frames + 1
        if frame.duration and frame.time_base is not None:
            end = start + frame.duration * Fraction(frame.time_base)
        elif header.seconds is not None and not container.streams.audio:
            end = max(start + usual, Fraction(header.seconds))
        else:
            end = start + usual
    if header.n_frames is not None and n_frames < header.n_frames:
        raise VideoFileError("cut short", f"a video states {header.n_frames} frames and holds only {n_frames}")
    if waiting is not None:
        yield _Shown(waiting, start, end)


def _sampled(shown: Iterator[_Shown], fps: Fraction, slack: Fraction) -> Iterator[_Shown]:
    n_sampled = 0
    for moment in shown:
        while n_sampled / fps + slack < moment.end:
            yield moment
            n_sampled += 1


def _rational(fps: float | Fraction) -> Fraction:
    """Return the rate that is meant: 29.97003 is 30000 / 1001."""
    return Fraction(fps).limit_denominator(1001)


def _picture(frame: VideoFrame, mode: Mode) -> Image.Image:
    transparent = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    levels = frame.reformat(
        format="rgba" if transparent else "rgb24", interpolation=_EXACT, dst_color_range=ColorRange.JPEG, threads=1
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


def _write_mp4(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    odd = any(side % 2 for side in frames.shape[1:3])
    codec, layout = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv444p" if odd else "yuv420p")
    # Its macroblock tree reads numbers that nobody wrote, so that a few files in a hundred would differ.
    options = {"crf": "0" if lossless else "16", "x264-params": "cpu-independent=1:mbtree=0"}
    times = range(len(frames) + 1)
    return _encoded([_frame(levels, layout) for levels in frames], times, 1 / fps, "mp4", codec, options)


def _write_webm(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    quality = {"lossless": "1"} if lossless else {"crf": "16", "b": "0"}
    layout = "gbrp" if lossless else "yuv420p"
    options = {**quality, "deadline": "good", "cpu-used": "4"}
    times = range(len(frames) + 1)
    return _encoded([_frame(levels, layout) for levels in frames], times, 1 / fps, "webm", "libvpx-vp9", options)


def _write_gif(frames: UInt8[np.ndarray, "T H W C"], fps: Fraction, lossless: bool) -> bytes:
    times = [round(100 * place / fps) for place in range(len(frames) + 1)]
    indexed = [_palette_frame(_rgb(levels), lossless) for levels in frames]
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
        interpolation=_EXACT,
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
    frames: Sequence[VideoFrame],
    times: Sequence[int],
    time_base: Fraction,
    extension: str,
    codec: str,
    options: dict[str, str],
    muxing: dict[str, str] | None = None,
) -> bytes:
    """Return frames as a file; frame k is shown from times[k] to times[k + 1], in units of `time_base` seconds."""
    file = io.BytesIO()
    bitexact = {"fflags": "+bitexact", **(muxing or {})}
    with av.open(file, "w", format=extension, container_options=bitexact) as container:
        stream = container.add_stream(codec, rate=1 / time_base, options={**options, "flags": "+bitexact"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        context = stream.codec_context
        context.time_base = time_base
        context.thread_count = 1
        if frames[0].format.name.startswith("yuv"):
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = ColorRange.MPEG
        for frame, start, end in zip(frames, times[:-1], times[1:], strict=True):
            frame.pts, frame.duration, frame.time_base = start, end - start, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
