"""Sound files of many makers: each is read as it was meant."""

import io
import struct
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_sounds import EXTENSIONS, RATE, encoded, m4a, sine, stored
from scipy import signal

from omniform.tokenizers.audio_files import (
    Audio,
    AudioFileError,
    audio_bytes,
    read_audio,
    read_audio_header,
)
from omniform.tokenizers.video_writing import video_bytes


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


def test_the_sound_of_a_video_is_read_and_a_video_without_sound_is_refused() -> None:
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    for extension in ("mp4", "webm"):
        with pytest.raises(AudioFileError, match="holds no sound"):
            read_audio(video_bytes(frames, 8, extension), RATE)
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


def test_audio_knows_how_long_it_is() -> None:
    assert Audio(torch.zeros(8000), 16000).seconds == 0.5


def test_an_hour_is_held_once() -> None:
    second = (sine(1, 1000, 50) * 2**15).astype("<i2")
    payload = stored(np.tile(second, 3600), 1000)
    for rate, n_samples in ((1000, 3_600_000), (1001, 3_603_600)):
        tracemalloc.start()
        try:
            found = read_audio(payload, rate, 3600)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(found) == pytest.approx(n_samples, abs=1)
        assert peak < 1.25 * found.numel() * found.element_size() + 2**20
        expected = sine(1, rate, 50 * n_samples / 3600 / rate)
        np.testing.assert_allclose(found[-rate:-100], expected[:-100], atol=2e-4)


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_eight_channels_of_a_lossy_codec_are_averaged(rate: int) -> None:
    payload = stored(np.linspace(-0.4, 0.6, 8) * sine(0.5, RATE)[:, None], RATE, "OGG", "VORBIS")
    found = read_audio(payload, rate)
    decoded, _ = soundfile.read(io.BytesIO(payload))
    expected = read_audio(stored(decoded.mean(axis=1), RATE, subtype="FLOAT"), rate)
    assert abs(len(found) - len(expected)) <= 0.03 * rate
    np.testing.assert_allclose(found[:-100], expected[: len(found) - 100], atol=1e-4)


def restated(payload: bytes, box: bytes, offset: int, value: int) -> bytes:
    """An MP4 with another 32-bit number in a box."""
    place = payload.index(box) + 4 + offset
    return payload[:place] + struct.pack(">I", value) + payload[place + 4 :]


def test_a_sound_that_goes_on_beyond_its_stated_length_is_read_to_its_end() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 20_000)
    whole = stored(noise, RATE, "FLAC")
    for stated in (1, 4000, 12_000):
        short = bytearray(whole)
        short[21] &= 0xF0
        short[22:26] = struct.pack(">I", stated)
        assert torch.equal(read_audio(bytes(short), RATE), read_audio(whole, RATE))
    payload = m4a(sine(1, RATE), RATE)
    filled = 1024 * 16  # samples: AAC fills up its last frame
    assert len(read_audio(payload, RATE)) == RATE
    for stated, found in ((100, filled), (filled - 1025, filled), (filled - 1024, filled - 1024)):
        assert len(read_audio(restated(payload, b"mdhd", 16, stated), RATE)) == found
    assert len(read_audio(restated(payload, b"mdhd", 12, 2**31 - 1), RATE)) == filled  # units per second


def test_an_mp3_is_as_long_as_it_is_and_not_as_estimated() -> None:
    parts = [encoded(sine(2, RATE), RATE, "mp3", "libmp3lame", bit_rate) for bit_rate in (8000, 160_000)]
    payload = b"".join(parts)
    estimate = read_audio_header(payload).seconds
    assert estimate is not None
    assert estimate > 10
    assert len(read_audio(payload, RATE, 5)) == pytest.approx(4 * RATE, abs=0.5 * RATE)
    with pytest.raises(AudioFileError, match="at most 3") as caught:
        read_audio(payload, RATE, 3)
    assert caught.value.reason == "too long"


def test_tags_in_any_encoding_are_passed_over() -> None:
    tone = sine(0.1, RATE)
    wav = stored(tone, RATE)
    tag = b"INFOINAM\4\0\0\0caf\xe9"
    chunk = b"LIST" + struct.pack("<I", len(tag)) + tag
    tagged = wav[:36] + chunk + wav[36:]
    tagged = tagged[:4] + struct.pack("<I", len(tagged) - 8) + tagged[8:]
    assert torch.equal(read_audio(tagged, RATE), read_audio(wav, RATE))
    mp3 = audio_bytes(torch.from_numpy(tone), RATE, "mp3")
    latin, ascii = (read_audio(mp3 + b"TAG" + name.ljust(125, b"\0"), RATE) for name in (b"caf\xe9", b"cafe"))
    assert torch.equal(latin, ascii)
