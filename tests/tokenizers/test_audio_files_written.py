"""Sound files that are written here: others read them, and they are read again."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_sounds import EXTENSIONS, RATE, sine

from omniform.tokenizers.audio_files import (
    AudioFileError,
    audio_bytes,
    read_audio,
    read_audio_header,
    write_audio,
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
