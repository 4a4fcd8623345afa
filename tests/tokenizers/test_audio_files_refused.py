"""Odd and damaged sound files: each is refused with its reason, or read within bounds."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_sounds import EXTENSIONS, RATE, m4a, sine, stored

from omniform.tokenizers.audio_files import (
    AudioFileError,
    audio_bytes,
    read_audio,
)
from omniform.tokenizers.image_files import open_picture


def refusal(payload: bytes | Path, max_seconds: float = 60.0) -> str:
    """Why a file is refused."""
    with pytest.raises(AudioFileError) as caught:
        read_audio(payload, RATE, max_seconds)
    return caught.value.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 32767.0])
def test_samples_that_are_no_levels_are_refused(value: float) -> None:
    samples = sine(0.1, RATE).astype(np.float64)
    samples[700] = value
    for rate in (RATE, 44_100):
        assert refusal(stored(samples, rate, subtype="DOUBLE")) == "levels out of range"
        assert (
            refusal(stored(np.stack([samples, -samples / 2], axis=1), rate, subtype="DOUBLE")) == "levels out of range"
        )


def test_empty_files_and_headers_without_samples_are_refused(tmp_path: Path) -> None:
    assert refusal(b"") == "empty file"
    assert refusal(audio_bytes(torch.zeros(9), RATE, "wav")[:44]) == "cut short"
    assert refusal(stored(np.zeros(0), RATE)) == "no samples"
    assert refusal(tmp_path / "nothing.wav") == "cannot be opened"
    assert refusal(tmp_path) == "cannot be opened"
    one = read_audio(audio_bytes(torch.ones(1), RATE, "wav"), RATE)
    assert len(one) == 1


def test_what_a_file_states_of_its_length_is_not_believed() -> None:
    payload = bytearray(audio_bytes(torch.zeros(20 * RATE), RATE, "wav"))
    payload[40:44] = b"\xff" * 4  # as a stream says that does not know
    assert len(read_audio(bytes(payload), RATE)) == 20 * RATE
    assert refusal(bytes(payload), 19) == "too long"
    silence = audio_bytes(torch.zeros(600 * 8000), 8000, "flac")
    assert len(silence) < 120_000  # a small file of a long sound
    assert refusal(silence, 500) == "too long"
    unstated = bytearray(silence)
    unstated[21] &= 0xF0
    unstated[22:26] = bytes(4)  # the number of samples: unknown
    assert refusal(bytes(unstated), 500) == "too long"


@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        *((rate, "rate out of range") for rate in (1, 999, 800_000, 2**31 - 1)),
        *((rate, "damaged file") for rate in (0, 2**31, 2**32 - 1)),
    ],
)
def test_rates_that_no_recorder_has_are_refused(rate: int, reason: str) -> None:
    payload = bytearray(audio_bytes(torch.zeros(2000), RATE, "wav"))
    payload[24:28] = struct.pack("<I", rate)
    assert refusal(bytes(payload), 1e9) == reason


def test_more_channels_than_any_recorder_has_are_refused() -> None:
    assert refusal(stored(np.zeros((80, 9)), RATE)) == "too many channels"


CHANGING = """
import io, sys
from fractions import Fraction
import av, numpy as np
sys.path.insert(0, sys.argv[1])
from sample_sounds import RATE, stored
from omniform.tokenizers.audio_files import AudioFileError, read_audio

def parts(payload):
    # Three headers, of which the first two state their sizes in as many bytes as it takes, then the packets.
    with av.open(io.BytesIO(payload)) as container:
        stream = container.streams.audio[0]
        laced = bytes(stream.codec_context.extradata)
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
    place, sizes = 1, []
    for _ in range(laced[0]):
        size = laced[place]
        while laced[place] == 255:
            place += 1
            size += laced[place]
        place += 1
        sizes.append(size)
    ends = np.cumsum([place, *sizes])
    return [laced[start:end] for start, end in zip(ends, [*ends[1:], len(laced)])], packets

noise = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 9))
mono = stored(noise[:, 0], RATE, "OGG", "VORBIS")
for channels in (2, 8, 9):
    headers, packets = parts(stored(noise[:, :channels], RATE, "OGG", "VORBIS"))
    file = io.BytesIO()
    with av.open(io.BytesIO(mono)) as source, av.open(file, "w", format="matroska") as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for place, content in enumerate([*parts(mono)[1], *headers, *packets]):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, place, place, Fraction(1, 100)
            container.mux(packet)
    try:
        read_audio(file.getvalue(), RATE)
    except AudioFileError as error:
        print(error.reason)
"""


def test_channels_that_change_within_a_sound_are_refused() -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHANGING, str(Path(__file__).parents[1])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # in a process that may crash
    assert result.stdout.splitlines() == ["changing channels"] * 3


@pytest.mark.parametrize("extension", ["wav", "flac", "m4a"])
def test_a_file_cut_anywhere_is_refused(extension: str) -> None:
    tone = sine(0.2, RATE)
    payload = m4a(tone, RATE) if extension == "m4a" else audio_bytes(torch.from_numpy(tone), RATE, extension)
    whole = read_audio(payload, RATE)
    read = []
    for size in [*range(0, len(payload), 37), *range(len(payload) - 80, len(payload))]:
        try:
            found = read_audio(payload[:size], RATE)
        except AudioFileError:
            continue
        assert torch.equal(found, whole)  # only what follows the sound is missing
        read.append(size)
    assert read == []


@pytest.mark.parametrize("extension", ["mp3", "ogg"])
def test_a_stream_cut_anywhere_is_read_up_to_there(extension: str) -> None:
    seconds = 5
    payload = audio_bytes(torch.from_numpy(sine(seconds, RATE)), RATE, extension)
    whole = read_audio(payload, RATE)
    for size in range(len(payload) // 2, len(payload), 601):
        found = read_audio(payload[:size], RATE)
        held = size / len(payload) * len(whole)
        assert held - 1.1 * RATE < len(found) < held + 0.2 * RATE  # a page of an Ogg lasts a second
        shared = min(len(found), len(whole)) - 1200
        np.testing.assert_allclose(found[:shared], whole[:shared], atol=1e-6)


def picture_of_noise(file_format: str) -> bytes:
    """A picture file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, file_format)
    assert open_picture(file.getvalue()).size == (40, 40)
    return file.getvalue()


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"<html>404 not found</html>",
        b"\x00" * 4096,
        *map(picture_of_noise, ("PNG", "GIF", "WEBP")),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
        b"[playlist]\nFile1=http://127.0.0.1:9/a.mp3\n",
    ],
)
def test_other_files_are_refused_by_what_they_begin_with(payload: bytes) -> None:
    assert refusal(payload) == "not a sound file of a known format"


def test_a_list_of_files_opens_none_of_them_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(audio_bytes(torch.zeros(900), RATE, "wav"))
    for name, text in [
        ("list.wav", f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n"),
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"),
    ]:
        (tmp_path / name).write_text(text)
        assert refusal(tmp_path / name) == "not a sound file of a known format"
    for name in ("concat:secret.wav", "%03d.wav"):  # what FFmpeg takes for more than a name is a plain one here
        (tmp_path / name).write_bytes((tmp_path / "secret.wav").read_bytes())
        assert len(read_audio(tmp_path / name, RATE)) == 900


WHOLE = {extension: audio_bytes(torch.from_numpy(sine(0.2, RATE)), RATE, extension) for extension in EXTENSIONS}


@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bits_give_bounded_samples_or_a_refusal(data: st.DataObject) -> None:
    payload = bytearray(WHOLE[data.draw(st.sampled_from(EXTENSIONS))])
    top = data.draw(st.sampled_from([400, 8 * len(payload)]))  # headers matter most
    for place in data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=6)):
        payload[place // 8] ^= 1 << place % 8
    try:
        found = read_audio(bytes(payload), RATE, 5)
    except AudioFileError:
        return
    assert 1 <= len(found) <= 5 * RATE + 1
    assert found.abs().max() <= 1


@settings(max_examples=100)
@given(
    payload=st.one_of(
        st.binary(max_size=300),
        st.builds(bytes.__add__, st.sampled_from([p[:48] for p in WHOLE.values()]), st.binary(max_size=200)),
    )
)
def test_random_bytes_are_bounded_samples_or_are_refused(payload: bytes) -> None:
    try:
        found = read_audio(payload, RATE, 5)
    except AudioFileError:
        return
    assert len(found) <= 5 * RATE + 1
