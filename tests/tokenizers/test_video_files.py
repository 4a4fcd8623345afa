"""Odd video files: each is read as it was meant or refused with a reason, and none takes more memory than its bound."""

import io
import json
import struct
import subprocess
import sys
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.image_files import fit_picture
from omniform.tokenizers.video_files import (
    Video,
    VideoFileError,
    read_video,
    read_video_header,
)
from omniform.tokenizers.video_writing import video_bytes, write_video

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


def refusal(payload: bytes | Path, fps: float | None = None, max_frames: int = 100) -> str:
    """Why a file is refused."""
    with pytest.raises(VideoFileError) as caught:
        read_video(payload, fps=fps, max_frames=max_frames)
    return caught.value.reason


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 17), (1, 1), (2, 3), (90, 160)])
@pytest.mark.parametrize("channels", [1, 3])
def test_frames_come_back_in_their_own_size_and_order(extension: str, height: int, width: int, channels: int) -> None:
    frames = clip(5, height, width, channels)
    payload = video_bytes(frames, 8, extension)
    assert payload == video_bytes(frames, 8, extension)
    video = read_video(payload, fps=None, max_frames=100, mode="RGB" if channels == 3 else "L")
    assert video.frames.shape == frames.shape
    assert video.frames.dtype == np.uint8
    assert video.fps == pytest.approx(8, abs=0.15)  # GIF counts hundredths of a second
    assert video.seconds == pytest.approx(5 / 8, abs=0.01)
    difference = np.abs(video.frames.astype(int) - frames)
    assert difference.mean() < 7
    if channels == 1 and extension == "gif":
        assert not difference.any()
    header = read_video_header(payload)
    assert (header.width, header.height) == (width, height)


@pytest.mark.parametrize(
    ("container_format", "codec", "layout"),
    [
        *(("avi", "mpeg4", "yuv420p"), ("avi", "mjpeg", "yuvj420p"), ("mov", "libx264", "yuv420p")),
        *(("webm", "libvpx", "yuv420p"), ("mp4", "libx264", "yuv420p10le"), ("matroska", "libx264", "yuv444p")),
    ],
)
def test_videos_of_other_makers_are_read(container_format: str, codec: str, layout: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = layout
        for levels in numbered(5, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_video(file.getvalue(), fps=8, max_frames=99)
    assert numbers(video) == list(range(5))
    assert np.abs(video.frames.astype(int) - numbered(5, 64)).mean() < 3


@pytest.mark.parametrize("extension", ["mp4", "webm"])
@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])),
    fps=st.sampled_from([1, 7.5, 24, Fraction(30000, 1001), 60]),
)
def test_every_level_is_kept_where_that_is_asked_for(extension: str, seed: int, shape: tuple, fps: Fraction) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    video = read_video(video_bytes(frames, fps, extension, lossless=True), fps=fps, max_frames=9)
    assert np.array_equal(video.frames, np.broadcast_to(frames, (*shape[:3], 3)))
    assert video.fps == pytest.approx(float(fps))


def test_a_gif_keeps_256_colours_per_frame_and_says_so_of_more() -> None:
    few = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    payload = video_bytes(few, 10, "gif", lossless=True)
    assert np.array_equal(read_video(payload, fps=None, max_frames=9).frames, few)
    picture = Image.open(io.BytesIO(payload))  # another decoder sees the same
    for k in range(4):
        picture.seek(k)
        assert np.array_equal(np.asarray(picture.convert("RGB")), few[k])
    many = clip(2, 40, 40)
    with pytest.raises(VideoFileError, match="up to 256"):
        video_bytes(many, 10, "gif", lossless=True)
    reduced = read_video(video_bytes(many, 10, "gif"), fps=None, max_frames=9).frames
    assert np.abs(reduced.astype(int) - many).mean() < 6


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("fps", [5, 8, 12, 24, 25, Fraction(30000, 1001), 30, 60])
def test_a_video_sampled_at_its_own_rate_gives_each_frame_once(extension: str, fps: Fraction) -> None:
    video = read_video(video_bytes(numbered(9), fps, extension), fps=float(fps), max_frames=100)
    assert numbers(video) == list(range(9))
    assert video.fps == float(fps)


def oracle(stamps: Sequence[Fraction], end: Fraction, fps: Fraction, max_frames: int) -> list[int]:
    """Look at the clock again and again: which frame is shown now?"""
    shown, now = [], Fraction(0)
    while now < end and len(shown) < max_frames:
        shown.append(max(place for place, stamp in enumerate(stamps) if stamp - stamps[0] <= now))
        now += 1 / fps
    return shown


@settings(max_examples=40, deadline=None)
@given(
    extension=st.sampled_from(["mp4", "gif"]),
    first=st.integers(0, 50),
    gaps=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    fps=st.one_of(st.integers(1, 60).map(Fraction), st.fractions(Fraction(1, 3), 90, max_denominator=1001)),
    max_frames=st.integers(1, 200),
)
def test_sampling_shows_what_the_clock_shows(
    extension: str, first: int, gaps: list[int], fps: Fraction, max_frames: int
) -> None:
    stamps = [first + sum(gaps[:k]) for k in range(len(gaps))]
    payload = irregular(extension, stamps, gaps[-1], Fraction(1, 100))
    video = read_video(payload, fps=fps, max_frames=max_frames)
    seconds = [Fraction(stamp, 100) for stamp in stamps]
    end = seconds[-1] - seconds[0] + Fraction(gaps[-1], 100)
    slack = Fraction(1, 200) if extension == "gif" else Fraction(0)  # its stamps are rounded to hundredths
    shifted = [seconds[0], *(second - slack for second in seconds[1:])]
    assert numbers(video) == oracle(shifted, end - slack, fps, max_frames)
    whole = read_video(payload, fps=None, max_frames=100)
    assert numbers(whole) == list(range(len(gaps)))
    assert whole.fps == pytest.approx(float(len(gaps) / end))


def test_the_last_frame_of_a_webm_is_shown_as_long_as_the_file_says() -> None:
    payload = irregular("matroska", [0, 100, 150], 2000, Fraction(1, 1000))
    assert numbers(read_video(payload, fps=20, max_frames=100))[:4] == [0, 0, 1, 2]
    assert len(read_video(payload, fps=20, max_frames=100).frames) == 43


def test_only_the_frames_that_are_needed_are_decoded() -> None:
    payload = bytearray(video_bytes(np.tile(numbered(10), (1000, 1, 1, 1)), 25, "mp4"))
    assert read_video_header(bytes(payload)).n_frames == 10_000
    start = payload.index(b"mdat")
    end = payload.index(b"moov")
    payload[start + (end - start) // 2 : end - 4] = bytes(end - 4 - start - (end - start) // 2)  # never looked at
    video = read_video(bytes(payload), fps=12.5, max_frames=12)
    assert numbers(video) == [2 * k % 10 for k in range(12)]
    with pytest.raises(VideoFileError):
        read_video(bytes(payload), fps=12.5, max_frames=5000)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_ten_thousand_frames_give_as_many_as_asked_for(extension: str) -> None:
    payload = video_bytes(np.tile(numbered(10, 2), (1000, 1, 1, 1)), 50, extension)
    assert numbers(read_video(payload, fps=None, max_frames=7)) == list(range(7))
    assert numbers(read_video(payload, fps=1, max_frames=3)) == [0, 0, 0]
    assert numbers(read_video(payload, fps=12.5, max_frames=6)) == [0, 4, 8, 2, 6, 0]
    assert len(read_video(payload, fps=0.5, max_frames=1000).frames) == 100


def test_frames_are_fitted_as_they_are_decoded() -> None:
    payload = video_bytes(clip(3, 40, 64), 8, "webm")
    seen = []

    def half(picture: Image.Image) -> Image.Image:
        seen.append(picture.size)
        return fit_picture(picture, (20, 20), "crop")

    video = read_video(payload, fps=16, max_frames=100, mode="L", fit=half)
    assert video.frames.shape == (6, 20, 20, 1)
    assert seen == [(64, 40)] * 3  # a repeated frame is fitted once


ORIENTATIONS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


def turned(matrix: tuple[float, ...], payload: bytes) -> bytes:
    """An MP4 with another display matrix."""
    a, b, c, d = (round(65536 * entry) for entry in matrix)
    plain = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    place = payload.index(plain, payload.index(b"tkhd"))
    return payload[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + payload[place + len(plain) :]


@pytest.mark.parametrize("matrix", ORIENTATIONS + MIRRORED)
def test_frames_are_turned_upright_as_the_display_matrix_says(matrix: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 3, 3), dtype=np.uint8)
    payload = turned(matrix, video_bytes(frames, 8, "mp4", lossless=True))
    [found] = read_video(payload, fps=None, max_frames=9).frames
    a, b, c, d = matrix
    corners = [(a * x + c * y, b * x + d * y) for x in (0, 2) for y in (0, 4)]
    left, top = min(x for x, _ in corners), min(y for _, y in corners)
    for y in range(5):
        for x in range(3):
            assert found[b * x + d * y - top, a * x + c * y - left].tolist() == frames[0, y, x].tolist()
    if matrix in ORIENTATIONS:
        with av.open(io.BytesIO(payload)) as container:
            frame = next(container.decode(video=0))
        assert np.array_equal(found, np.rot90(frames[0], frame.rotation // 90))


def test_a_video_that_is_turned_askew_is_refused() -> None:
    payload = turned((0.8, 0.6, -0.6, 0.8), video_bytes(clip(1, 4, 4), 8, "mp4"))
    assert refusal(payload) == "turned askew"


def test_transparent_gifs_are_laid_on_white_as_pictures_are() -> None:
    first = Image.new("P", (2, 1))
    first.putpalette([255, 0, 0, 0, 0, 255])
    second = first.copy()
    first.putpixel((1, 0), 1)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second], transparency=1, duration=100, disposal=2, loop=0)
    video = read_video(file.getvalue(), fps=None, max_frames=9)
    assert video.frames.tolist() == [[[[255, 0, 0], [255, 255, 255]]], [[[255, 0, 0], [255, 0, 0]]]]
    assert video.fps == 10


def test_a_still_gif_is_a_video_of_one_frame() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "lime").save(file, "GIF")
    video = read_video(file.getvalue(), fps=24, max_frames=9)
    assert video.frames.shape[1:] == (6, 8, 3)
    assert np.all(video.frames == [0, 255, 0])


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_cut_anywhere_is_refused(extension: str, tmp_path: Path) -> None:
    payload = video_bytes(clip(6, 24, 20), 8, extension)
    whole = read_video(payload, fps=None, max_frames=100).frames
    read = []
    for size in [*range(0, len(payload), 29), *range(len(payload) - 100, len(payload))]:
        try:
            found = read_video(payload[:size], fps=None, max_frames=100).frames
        except VideoFileError:
            continue
        assert np.array_equal(found, whole)  # only what follows the last frame is missing
        read.append(size)
    assert read == []
    assert refusal(b"") == "empty file"
    assert refusal(tmp_path / "nothing.mp4") == "cannot be opened"


def test_a_fragmented_or_moov_first_mp4_that_is_cut_short_is_refused() -> None:
    file = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(file, "w", format="mp4", container_options=options) as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "2"})
        stream.width = stream.height = 16
        for levels in numbered(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode(None))
    payload = file.getvalue()
    assert numbers(read_video(payload, fps=None, max_frames=100)) == list(range(9))
    place = payload.rindex(b"mdat")
    assert refusal(payload[: place + 6]) in ("damaged file", "cut short")


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"<html>404 not found</html>",
        bytes(4096),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
        b"1\n00:00:00,000 --> 00:00:01,000\nhello\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_other_files_are_refused_by_what_they_begin_with(payload: bytes) -> None:
    assert refusal(payload) == "not a video file of a known format"


def test_a_list_of_files_opens_none_of_them_whatever_it_is_called(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    write_video(secret, numbered(3), 8)
    for name, text in [
        ("list.mp4", f"ffconcat version 1.0\nfile {secret}\n"),
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"),
    ]:
        (tmp_path / name).write_text(text)
        assert refusal(tmp_path / name) == "not a video file of a known format"
    for name in ("concat:secret.mp4", "%03d.mp4"):  # what FFmpeg takes for more than a name is a plain one here
        (tmp_path / name).write_bytes(secret.read_bytes())
        assert numbers(read_video(tmp_path / name, fps=None, max_frames=9)) == [0, 1, 2]


def test_an_mp4_whose_frames_lie_in_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    write_video(other, numbered(3), 8)
    payload = other.read_bytes()
    local = b"\0\0\0\x0curl \0\0\0\1"  # "the samples are in this file"
    assert payload.count(local) == 1
    elsewhere = b"url \0\0\0\0" + str(other).encode() + b"\0"
    outer = tmp_path / "outer.mp4"
    moved = payload.replace(local, struct.pack(">I", 4 + len(elsewhere)) + elsewhere)
    grown = len(moved) - len(payload)
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = moved.index(box) - 4
        size = struct.unpack(">I", moved[place : place + 4])[0]
        moved = moved[:place] + struct.pack(">I", size + grown) + moved[place + 4 :]
    blank = moved.index(b"mdat") + 4
    outer.write_bytes(moved[:blank] + bytes(moved.index(b"moov") - 4 - blank) + moved[moved.index(b"moov") - 4 :])
    assert refusal(outer) in ("damaged file", "points to another file", "cut short", "no frames")


def test_files_without_frames_are_refused() -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    assert refusal(file.getvalue()) == "not a video file of a known format"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(read_audio(file.getvalue(), 8000)) > 7000
    assert refusal(file.getvalue()) == "no video"
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    assert refusal(file.getvalue()) in ("no frames", "damaged file")
    gif = video_bytes(numbered(1), 8, "gif")
    palette = 13 + 3 * 256
    assert refusal(gif[:palette] + b";") in ("no frames", "damaged file")


@pytest.mark.parametrize(
    ("frames", "fps", "extension", "reason"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 8, "mp4", "no frames"),
        (np.zeros((3, 0, 4, 3), np.uint8), 8, "mp4", "no frames"),
        (np.zeros((3, 4, 4), np.uint8), 8, "mp4", "no frames"),
        (np.zeros((3, 4, 4, 4), np.uint8), 8, "mp4", "no frames"),
        (np.zeros((3, 4, 4, 3), np.float32), 8, "mp4", "no frames"),
        (np.zeros((3, 4, 4, 3), np.uint8), 8, "avi", "cannot be written"),
        (np.zeros((3, 4, 4, 3), np.uint8), 0, "mp4", "cannot be written"),
        (np.zeros((3, 4, 4, 3), np.uint8), 101, "gif", "cannot be written"),
        (np.zeros((3, 4, 4, 3), np.uint8), float("nan"), "webm", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(frames: np.ndarray, fps: float, extension: str, reason: str) -> None:
    with pytest.raises(VideoFileError) as caught:
        video_bytes(frames, fps, extension)
    assert caught.value.reason == reason


@pytest.mark.parametrize(("fps", "max_frames"), [(0, 9), (-1, 9), (float("nan"), 9), (2000, 9), (8, 0)])
def test_what_cannot_be_sampled_is_refused(fps: float, max_frames: int) -> None:
    assert refusal(video_bytes(numbered(2), 8, "gif"), fps, max_frames) == "cannot be sampled"


BOMBS = """
import json, resource, struct, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_video_files import clip, video_bytes
from omniform.tokenizers.video_files import VideoFileError, read_video, read_video_header

def patched(payload, offset, content):
    return payload[:offset] + content + payload[offset + len(content):]

mp4, webm, gif = (video_bytes(clip(3, 16, 16), 8, extension) for extension in ("mp4", "webm", "gif"))
stated = mp4.index(b"avc1", mp4.index(b"stsd")) + 28
descriptor = gif.index(b",", 13 + 768)
bombs = {
    "gif": patched(gif, 6, struct.pack("<HH", 65535, 65535)),
    "gif below the bound of FFmpeg": patched(gif, 6, struct.pack("<HH", 12000, 12000)),
    "gif of a large frame": patched(gif, descriptor + 5, bytes([255] * 4)),
    "mp4 that states more than it holds": patched(mp4, stated, struct.pack(">HH", 65535, 65535)),
    **{path.name: path.read_bytes() for path in Path(sys.argv[2]).iterdir()},
}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {}
for name, payload in bombs.items():
    for read in (read_video_header, lambda payload: read_video(payload, fps=None, max_frames=9)):
        try:
            result = read(payload)
            found[name] = str(result.frames.shape if hasattr(result, "frames") else result)
        except VideoFileError as error:
            found[name] = error.reason
print(json.dumps({"kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "found": found}))
"""


def test_bombs_are_refused_from_their_headers_in_little_memory(tmp_path: Path) -> None:
    black = np.zeros((1, 2304, 3840, 1), np.uint8)
    (tmp_path / "large mp4").write_bytes(video_bytes(black, 8, "mp4"))
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-W", "ignore", "-c", BOMBS, folder, str(tmp_path)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = result["found"]
    assert "(3, 16, 16, 3)" in found.pop("mp4 that states more than it holds")
    assert "(3, 16, 16, 3)" in found.pop("gif of a large frame")
    assert len(found) == 3
    assert set(found.values()) == {"frame size out of range"}
    assert result["kilobytes"] < 2**16


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_bound_on_pixels_is_that_of_the_caller(extension: str) -> None:
    payload = video_bytes(clip(3, 16, 20), 8, extension)
    assert len(read_video(payload, fps=None, max_frames=9, max_pixels=320).frames) == 3
    with pytest.raises(VideoFileError) as caught:
        read_video(payload, fps=None, max_frames=9, max_pixels=319)
    assert caught.value.reason == "frame size out of range"


def test_a_video_that_grows_after_its_first_frames_is_refused_in_bounds() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.width = stream.height = 16
        small, large = (read_packets(size) for size in (16, 64))
        for place, payload in enumerate([*small, *large]):
            packet = av.Packet(payload)
            packet.stream, packet.pts, packet.dts = stream, place, place
            packet.time_base = Fraction(1, 8)
            container.mux(packet)
    assert refusal(file.getvalue()) == "frames of changing size"


def read_packets(size: int) -> list[bytes]:
    """The coded frames of a small VP9 video."""
    with av.open(io.BytesIO(video_bytes(numbered(2, size), 8, "webm"))) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


WHOLE = {extension: video_bytes(clip(4, 16, 16), 8, extension) for extension in EXTENSIONS}


@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bits_give_bounded_frames_or_a_refusal(data: st.DataObject) -> None:
    payload = bytearray(WHOLE[data.draw(st.sampled_from(EXTENSIONS))])
    top = data.draw(st.sampled_from([800, 8 * len(payload)]))
    for place in data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=6)):
        payload[place // 8] ^= 1 << place % 8
    try:
        video = read_video(bytes(payload), fps=8, max_frames=20, max_pixels=2**16)
    except VideoFileError:
        return
    assert 1 <= len(video.frames) <= 20
    assert video.frames[0].size <= 3 * 2**16


@settings(max_examples=100)
@given(
    payload=st.one_of(
        st.binary(max_size=300),
        st.builds(bytes.__add__, st.sampled_from([p[:60] for p in WHOLE.values()]), st.binary(max_size=200)),
    )
)
def test_random_bytes_are_bounded_frames_or_are_refused(payload: bytes) -> None:
    try:
        video = read_video(payload, fps=None, max_frames=9, max_pixels=2**16)
    except VideoFileError:
        return
    assert 1 <= len(video.frames) <= 9
