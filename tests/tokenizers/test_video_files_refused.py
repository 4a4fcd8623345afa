"""Odd and damaged video files: each is refused with its reason, and none takes more memory than its bound."""

import io
import json
import os
import struct
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_videos import EXTENSIONS, clip, numbered, numbers, turned

from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.video_files import VideoFileError, read_video
from omniform.tokenizers.video_writing import video_bytes, write_video


def refusal(payload: bytes | Path, fps: float | None = None, max_frames: int = 100) -> str:
    """Why a file is refused."""
    with pytest.raises(VideoFileError) as caught:
        read_video(payload, fps=fps, max_frames=max_frames)
    return caught.value.reason


def test_a_video_that_is_turned_askew_is_refused() -> None:
    payload = turned((0.8, 0.6, -0.6, 0.8), video_bytes(clip(1, 4, 4), 8, "mp4"))
    assert refusal(payload) == "turned askew"


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
    assert refusal(payload[: place + 6]) == "cut short"


def test_an_mp4_whose_samples_last_to_its_end_is_refused_where_frames_that_it_lists_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with av.open(path, "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        for levels in numbered(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(stream.encode(None))
    payload = path.read_bytes()
    place = payload.index(b"mdat", payload.index(b"moov"))
    payload = payload[: place - 4] + bytes(4) + payload[place:]  # a size of 0: up to the end
    assert numbers(read_video(payload, fps=None, max_frames=100)) == list(range(9))
    reasons = {refusal(payload[:-cut]) for cut in range(1, 120)}
    assert reasons == {"cut short", "damaged file"}  # between two frames, and within one


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
    assert refusal(outer) == "damaged file"


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    descriptors = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "pipe.mp4", tmp_path / "zero\0byte.mp4", Path("/dev/zero")):
        assert refusal(path) == "cannot be opened"
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_sizes_far_beyond_the_end_are_refused_in_files_as_in_bytes(tmp_path: Path) -> None:
    webm = video_bytes(numbered(3), 8, "webm")
    path = tmp_path / "video.webm"
    for size in (2**56 - 2, 2**40):
        payload = webm[:4] + (2**56 + size).to_bytes(8) + webm[5:]
        path.write_bytes(payload)
        assert refusal(path) == refusal(payload) == "cut short"


def test_large_files_and_files_of_very_many_parts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    path.write_bytes(video_bytes(numbered(3), 8, "mp4"))
    os.truncate(path, 2**32 + 1)  # takes no room
    assert refusal(path) == "file too large"
    gif = video_bytes(numbered(3), 8, "gif")
    palette = 13 + 3 * 256
    comment = b"!\xfe" + b"\1x" * 2**20 + b"\0"
    assert refusal(gif[:palette] + comment + gif[palette:]) == "damaged file"


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
    assert refusal(file.getvalue()) == "damaged file"
    gif = video_bytes(numbered(1), 8, "gif")
    palette = 13 + 3 * 256
    assert refusal(gif[:palette] + b";") == "no frames"


@pytest.mark.parametrize(("fps", "max_frames"), [(0, 9), (-1, 9), (float("nan"), 9), (2000, 9), (8, 0)])
def test_what_cannot_be_sampled_is_refused(fps: float, max_frames: int) -> None:
    assert refusal(video_bytes(numbered(2), 8, "gif"), fps, max_frames) == "cannot be sampled"


BOMBS = """
import json, resource, struct, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sample_videos import clip
from omniform.tokenizers.video_files import VideoFileError, read_video, read_video_header
from omniform.tokenizers.video_writing import video_bytes

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
    folder = str(Path(__file__).parents[1])
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
