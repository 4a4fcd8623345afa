"""Video files of many makers: each is read as it was meant, and no more of it than is needed."""

import io
import struct
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_videos import EXTENSIONS, clip, irregular, numbered, numbers, stamped, turned

from omniform.tokenizers.image_files import fit_picture
from omniform.tokenizers.video_files import VideoFileError, read_video, read_video_header
from omniform.tokenizers.video_writing import video_bytes


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
def test_of_a_thousand_frames_as_many_are_held_as_asked_for(extension: str) -> None:
    payload = video_bytes(np.tile(numbered(10, 16), (100, 1, 1, 1)), 50, extension)
    tracemalloc.start()
    try:
        assert numbers(read_video(payload, fps=None, max_frames=7)) == list(range(7))
        assert numbers(read_video(payload, fps=1, max_frames=3)) == [0, 0, 0]
        assert numbers(read_video(payload, fps=12.5, max_frames=6)) == [0, 4, 8, 2, 6, 0]
        assert len(read_video(payload, fps=0.5, max_frames=1000).frames) == 10
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * 16 * 16 * 3


def test_a_result_is_held_once() -> None:
    frames = np.broadcast_to(np.uint8(7), (500, 64, 64, 1))
    payload = video_bytes(frames, 50, "mp4")
    tracemalloc.start()
    try:
        found = read_video(payload, fps=50, max_frames=1000).frames
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.shape == (500, 64, 64, 3)
    assert peak < 1.25 * found.nbytes + 2**18


def test_frames_that_an_edit_list_leaves_out_are_not_missed() -> None:
    payload = stamped("mp4", "libx264", range(-3, 6))
    assert read_video_header(payload).n_frames == 9
    assert numbers(read_video(payload, fps=None, max_frames=99)) == [3, 4, 5, 6, 7, 8]
    place = payload.index(b"elst") + 12
    assert payload[place : place + 8] == struct.pack(">Ii", 750, 3 * 2048)  # milliseconds shown, from this unit on
    for n_shown, first in ((2, 0), (2, 4), (4, 5)):
        edited = payload[:place] + struct.pack(">Ii", 125 * n_shown, 2048 * first) + payload[place + 8 :]
        assert numbers(read_video(edited, fps=None, max_frames=99)) == list(range(first, first + n_shown))


def test_the_gaps_of_an_avi_are_no_missing_frames() -> None:
    payload = stamped("avi", "mpeg4", [0, 1, 4, 5, 6])
    assert numbers(read_video(payload, fps=None, max_frames=99)) == [0, 1, 2, 3, 4]
    assert numbers(read_video(payload, fps=8, max_frames=99)) == [0, 1, 1, 1, 2, 3, 4]


def test_frames_without_stamps_of_their_own_follow_each_other() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:  # an AVI knows only the order in which frames are decoded
        stream = container.add_stream("libx264", rate=8, options={"bf": "2", "b_strategy": "0"})
        stream.width = stream.height = 16
        for levels in numbered(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode(None))
    video = read_video(file.getvalue(), fps=8, max_frames=99)
    assert numbers(video) == list(range(9))


@pytest.mark.parametrize("codec", ["mpeg4", "libvpx-vp9"])
def test_frames_with_stamps_that_go_back_follow_each_other(codec: str) -> None:
    payload = stamped("matroska", codec, [0, 3, 1, 2, 6])  # shown at 0, 3, 4, 5 and 6
    assert numbers(read_video(payload, fps=8, max_frames=99)) == [0, 0, 0, 1, 2, 3, 4]
    video = read_video(payload, fps=None, max_frames=99)
    assert numbers(video) == [0, 1, 2, 3, 4]
    assert video.fps == pytest.approx(5 / (7 / 8))


def test_frames_that_appear_at_once_have_the_average_rate_of_the_file() -> None:
    payload = stamped("matroska", "libvpx-vp9", [0, 0, 0, 5])
    assert read_video(payload, fps=None, max_frames=2).fps == read_video_header(payload).fps
    assert numbers(read_video(payload, fps=8, max_frames=99)) == [2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("fps", [1e-4, 1e-300])
def test_a_rate_far_below_any_video_shows_its_first_frame(fps: float) -> None:
    video = read_video(video_bytes(numbered(3), 8, "mp4"), fps=fps, max_frames=9)
    assert numbers(video) == [0]
    assert video.fps == fps


@pytest.mark.parametrize("tail", [b"\xff" * 20, bytes(50), b"abc", bytes(range(1, 20))])
def test_what_follows_the_last_box_of_an_mp4_is_passed_over(tail: bytes) -> None:
    payload = video_bytes(numbered(3), 8, "mp4") + tail
    assert numbers(read_video(payload, fps=None, max_frames=9)) == [0, 1, 2]
