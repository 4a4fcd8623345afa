"""Video files that are written here: others read them, and they are read again."""

import io
import resource
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_videos import EXTENSIONS, clip, numbered, numbers

from omniform.tokenizers.video_files import VideoFileError, read_video, read_video_header
from omniform.tokenizers.video_writing import video_bytes


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
        (np.zeros((3, 4, 4, 3), np.uint8), 0.001, "gif", "cannot be written"),
        (np.zeros((3, 4, 4, 3), np.uint8), 1e-5, "mp4", "cannot be written"),
        (np.zeros((3, 4, 4, 3), np.uint8), float("nan"), "webm", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(frames: np.ndarray, fps: float, extension: str, reason: str) -> None:
    with pytest.raises(VideoFileError) as caught:
        video_bytes(frames, fps, extension)
    assert caught.value.reason == reason


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


@pytest.mark.parametrize(("extension", "fps"), [("mp4", 1e-4), ("webm", 1e-4), ("gif", 0.002), ("mp4", 0.0015)])
def test_frames_may_be_shown_for_hours(extension: str, fps: float) -> None:
    video = read_video(video_bytes(numbered(3), fps, extension), fps=None, max_frames=9)
    assert numbers(video) == [0, 1, 2]
    assert video.fps == pytest.approx(fps, rel=1e-3)


class Watched(np.ndarray):
    """Frames that note how many bytes the process holds when each is taken."""

    def __iter__(self) -> Iterator[np.ndarray]:
        self.held = []
        for place in range(len(self)):
            self.held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            yield np.asarray(self[place])


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_frames_are_converted_as_they_are_written(extension: str) -> None:
    frames = np.broadcast_to(np.uint8(7), (400, 320, 320, 1)).view(Watched)
    video_bytes(frames, 50, extension)
    assert len(frames.held) == 400
    grown = max(frames.held[200:]) - frames.held[200]  # by then the encoder has what it looks ahead
    assert grown < 50 * 320 * 320  # a converted frame takes as many bytes as it has pixels, or more
