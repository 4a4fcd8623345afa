"""Odd sound files: each is read as it was meant or refused with a reason, within bounds."""

import io
import struct
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import signal

from omniform.tokenizers.audio_files import (
    Audio,
    AudioFileError,
    audio_bytes,
    read_audio,
    read_audio_header,
    write_audio,
)
from omniform.tokenizers.image_files import open_picture
from omniform.tokenizers.video_writing import video_bytes

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


def encoded(samples: np.ndarray, rate: int, container_format: str, codec: str) -> bytes:
    """A mono file as FFmpeg writes it."""
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def m4a(samples: np.ndarray, rate: int) -> bytes:
    """AAC in MP4."""
    return encoded(samples, rate, "ipod", "aac")


def refusal(payload: bytes | Path, max_seconds: float = 60.0) -> str:
    """Why a file is refused."""
    with pytest.raises(AudioFileError) as caught:
        read_audio(payload, RATE, max_seconds)
    return caught.value.reason


@pytest.mark.parametrize(
    ("file_format", "subtype", "bits"),
    [
        *(("WAV", "PCM_U8", 8), ("WAV", "PCM_16", 16), ("WAV", "PCM_24", 24), ("WAV", "PCM_32", 24)),
        *(("WAV", "FLOAT", 24), ("WAV", "DOUBLE", 24), ("WAV", "ULAW", 5), ("WAV", "ALAW", 5)),
        *(("FLAC", "PCM_S8", 8), ("FLAC", "PCM_16", 16), ("FLAC", "PCM_24", 24)),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_depth_is_read_as_libsndfile_reads_it(file_format: str, subtype: str, bits: int, channels: int) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (3001, channels))
    payload = stored(noise, RATE, file_format, subtype)
    expected, _ = soundfile.read(io.BytesIO(payload), always_2d=True)
    found = read_audio(payload, RATE).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(found, noise.mean(axis=1), atol=2.0 ** (1 - bits))


@pytest.mark.parametrize("payload", [stored(sine(1, RATE), RATE, "OGG", "VORBIS"), stored(sine(1, RATE), RATE, "MP3")])
def test_lossy_files_are_decoded_as_libsndfile_decodes_them(payload: bytes) -> None:
    expected, _ = soundfile.read(io.BytesIO(payload))
    found = read_audio(payload, RATE).numpy()
    assert abs(len(found) - len(expected)) <= 1152
    shared = min(len(found), len(expected))
    np.testing.assert_allclose(found[:shared], expected[:shared], atol=2e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000, 96000, 192_000])
def test_a_tone_stays_that_tone_at_another_rate(rate: int) -> None:
    seconds = 0.7654
    found = read_audio(stored(sine(seconds, rate), rate, subtype="FLOAT"), RATE).numpy()
    expected = sine(seconds, RATE)
    assert abs(len(found) - round(seconds * rate) * RATE / rate) <= 1
    inner = slice(100, min(len(found), len(expected)) - 100)  # the filter sees silence beyond the ends
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-3)


@settings(max_examples=25)
@given(
    rate=st.sampled_from([11025, 22050, 32000, 44100, 48000, 96000]),
    partials=st.lists(st.integers(50, 3000), max_size=4),
)
def test_resampling_agrees_with_scipy_below_the_band_edge(rate: int, partials: list[int]) -> None:
    sound = np.sum([sine(0.3, rate, f, 0.2) for f in partials] or [np.zeros(round(0.3 * rate), np.float32)], axis=0)
    found = read_audio(stored(sound, rate, subtype="FLOAT"), RATE).numpy()
    ratio = Fraction(RATE, rate)
    expected = signal.resample_poly(
        sound, ratio.numerator, ratio.denominator, window=("kaiser", 8.0), padtype="constant"
    )
    shared = slice(200, min(len(found), len(expected)) - 200)
    np.testing.assert_allclose(found[shared], expected[shared], atol=4e-3)


def test_what_a_lower_rate_cannot_hold_is_filtered_out() -> None:
    found = read_audio(stored(sine(0.5, 96_000, 12_000), 96_000), RATE)
    assert found[100:-100].abs().max() < 1e-3  # it would fold down to 4 kHz


@pytest.mark.parametrize("channels", [2, 6, 8])
def test_channels_are_averaged_with_equal_weights(channels: int) -> None:
    levels = np.linspace(-0.6, 0.9, channels)
    found = read_audio(stored(np.tile(levels, (800, 1)), 8000, subtype="FLOAT"), 8000)
    np.testing.assert_allclose(found, levels.mean(), atol=1e-6)
    opposite = np.stack([sine(0.5, 44_100), -sine(0.5, 44_100)], axis=1)
    assert read_audio(stored(opposite, 44_100), RATE).abs().max() < 1e-4


def test_a_clipped_recording_is_right_input_and_floats_beyond_full_scale_are_clipped() -> None:
    loud = sine(0.2, RATE, amplitude=3.0)
    found = read_audio(stored(loud, RATE, subtype="FLOAT"), RATE).numpy()
    np.testing.assert_allclose(found, loud.clip(-1, 1), atol=1e-6)
    clipped = stored(loud.clip(-1, 1), 48_000)
    overshooting = read_audio(clipped, RATE)
    assert overshooting.abs().max() == 1


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_silence_stays_silence(extension: str) -> None:
    found = read_audio(audio_bytes(torch.zeros(5000), 22050, extension), RATE)
    assert found.abs().max() < 1e-6
    assert abs(len(found) - 5000 * RATE / 22050) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 32767.0])
def test_samples_that_are_no_levels_are_refused(value: float) -> None:
    samples = sine(0.1, RATE).astype(np.float64)
    samples[700] = value
    for rate in (RATE, 44_100):
        assert refusal(stored(samples, rate, subtype="DOUBLE")) == "levels out of range"
        assert (
            refusal(stored(np.stack([samples, -samples / 2], axis=1), rate, subtype="DOUBLE")) == "levels out of range"
        )


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000])
def test_what_is_written_is_read_again_at_its_own_length(tmp_path: Path, extension: str, rate: int) -> None:
    samples = torch.from_numpy(sine(0.4321, rate))
    path = tmp_path / f"sound.{extension.upper()}"
    write_audio(path, samples, rate)
    assert path.read_bytes() == audio_bytes(samples, rate, extension)  # the same bytes every time
    found = read_audio(path, rate)
    assert abs(len(found) - len(samples)) <= (0.01 * rate if extension == "mp3" else 1)
    shared = slice(rate // 20, len(samples) - rate // 20)
    lossless = extension in ("wav", "flac")
    difference = found[shared] - samples[shared]
    assert difference.abs().max() < (2**-15 if lossless else 0.1)
    assert difference.square().mean().sqrt() < (2**-15 if lossless else 0.04)
    header = read_audio_header(path)
    assert header.channels == 1
    assert header.seconds == pytest.approx(0.4321, abs=0.03)


def test_wav_holds_plain_16_bit_samples_and_nothing_else() -> None:
    samples = torch.tensor([0.0, 1.0, -1.0, 0.5, 1.5, 2**-15, 2**-17])
    file = io.BytesIO()
    with wave.open(file, "wb") as expected:
        expected.setparams((1, 2, RATE, 0, "NONE", ""))
        expected.writeframes(np.array([0, 32767, -32768, 16384, 32767, 1, 0], "<i2").tobytes())
    payload = audio_bytes(samples, RATE, "wav")
    assert payload == file.getvalue()
    exact = torch.arange(-(2**15), 2**15) / 2**15
    assert torch.equal(read_audio(audio_bytes(exact, RATE, "wav"), RATE), exact)


def test_m4a_is_read_without_the_padding_of_its_codec() -> None:
    tone = sine(1, RATE, 200)
    found = read_audio(m4a(tone, RATE), RATE).numpy()
    assert len(found) == len(tone)
    assert np.abs(found - tone)[1000:-1000].max() < 0.1


@pytest.mark.parametrize(
    ("container_format", "codec", "error"),
    [
        *(("ipod", "alac", 1e-4), ("ogg", "flac", 1e-4), ("matroska", "flac", 1e-4), ("mov", "pcm_s16be", 1e-4)),
        *(("webm", "libopus", 0.05), ("mp4", "libmp3lame", 0.05)),
    ],
)
def test_sounds_of_other_makers_are_read(container_format: str, codec: str, error: float) -> None:
    tone = sine(1, 48_000)
    found = read_audio(encoded(tone, 48_000, container_format, codec), 48_000).numpy()
    assert abs(len(found) - len(tone)) <= 1
    assert np.abs(found[5000:40_000] - tone[5000:40_000]).max() < error


@pytest.mark.parametrize(
    ("samples", "rate", "extension", "reason"),
    [
        (torch.zeros(0), RATE, "wav", "no samples"),
        (torch.zeros(2, 9), RATE, "wav", "no samples"),
        (torch.tensor([0.0, torch.nan]), RATE, "flac", "levels out of range"),
        (torch.zeros(9), 0, "wav", "rate out of range"),
        (torch.zeros(9), RATE, "aiff", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(samples: torch.Tensor, rate: int, extension: str, reason: str) -> None:
    with pytest.raises(AudioFileError) as caught:
        audio_bytes(samples, rate, extension)
    assert caught.value.reason == reason


def test_empty_files_and_headers_without_samples_are_refused(tmp_path: Path) -> None:
    assert refusal(b"") == "empty file"
    assert refusal(audio_bytes(torch.zeros(9), RATE, "wav")[:44]) in ("no samples", "cut short")
    assert refusal(stored(np.zeros(0), RATE)) == "no samples"
    assert refusal(tmp_path / "nothing.wav") == "cannot be opened"
    assert refusal(tmp_path) == "cannot be opened"
    one = read_audio(audio_bytes(torch.ones(1), RATE, "wav"), RATE)
    assert len(one) == 1


def test_an_hour_is_streamed_and_a_longer_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hour.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 1000, 0, "NONE", ""))
        file.writeframes(np.repeat((sine(1, 1000, 50) * 2**15).astype("<i2"), 2).tobytes() * 3600)
    assert refusal(path, 3599) == "too long"
    tracemalloc.start()
    try:
        found = read_audio(path, 1000, 3600)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 3_600_000
    assert peak < 3 * found.numel() * found.element_size()
    np.testing.assert_allclose(found[-1000:], sine(1, 1000, 50), atol=2**-14)
    assert len(read_audio(path, 1001, 3600)) == pytest.approx(3_603_600, abs=1)


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


@pytest.mark.parametrize("rate", [0, 1, 999, 800_000, 2**31 - 1, 2**32 - 1])
def test_rates_that_no_recorder_has_are_refused(rate: int) -> None:
    payload = bytearray(audio_bytes(torch.zeros(2000), RATE, "wav"))
    payload[24:28] = struct.pack("<I", rate)
    assert refusal(bytes(payload), 1e9) in ("rate out of range", "damaged file")


def test_more_channels_than_any_recorder_has_are_refused() -> None:
    assert refusal(stored(np.zeros((80, 9)), RATE)) == "too many channels"


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
    payload = audio_bytes(torch.from_numpy(sine(0.5, RATE)), RATE, extension)
    whole = read_audio(payload, RATE)
    for size in range(len(payload) // 2, len(payload), 97):
        try:
            found = read_audio(payload[:size], RATE)
        except AudioFileError:
            continue
        assert len(found) <= len(whole) + 1200
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
    assert refusal(payload) in ("not a sound file of a known format", "damaged file")


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


def test_the_sound_of_a_video_is_read_and_a_video_without_sound_is_refused() -> None:
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    for extension in ("mp4", "webm"):
        assert refusal(video_bytes(frames, 8, extension)) == "no sound"
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        pictures = container.add_stream("libx264", rate=8)
        pictures.width = pictures.height = 16
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for levels in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        container.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(np.full((1, 3000), 2**14, np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert torch.equal(read_audio(file.getvalue(), RATE), torch.full((3000,), 0.5))


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


def test_audio_knows_how_long_it_is() -> None:
    assert Audio(torch.zeros(8000), 16000).seconds == 0.5
