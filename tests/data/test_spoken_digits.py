"""Speech is rendered to the same bits, at one level, without silence around it; voices keep to their side."""

import io
import re

import numpy as np
import pytest
from scipy.io import wavfile

from omniform.data import spoken_digits
from omniform.data.schema import DataError
from omniform.data.spoken_digits import (
    PHRASE_RATE,
    PITCHES,
    RATES,
    SAMPLE_RATE,
    VOICES,
    Utterance,
    render_speech,
    wav_bytes,
)
from omniform.data.templates import WORDS

SLOWEST = [Utterance(word, voice, min(RATES[split])) for split in VOICES for voice in VOICES[split] for word in WORDS]
KIN = (
    {"mike", "Mike"},
    {"belinda", "linda", "aunty"},
    {"anika", "anikaRobot"},
    {"m", "Nguyen", "robosoft"},
    {"adam", "benjamin", "caleb", "david"},
    {"", "grandpa", "john", "fast"},
)


def family(voice: str) -> str:
    """Return what the voice shares with its kin: the stem of its variant, or the first of those alike."""
    stem = re.sub(r"\d+$", "", voice.partition("+")[2])
    return next((min(kin) for kin in KIN if stem in kin), stem)


def test_no_family_of_voices_is_on_two_sides_and_each_side_has_both_accents() -> None:
    assert {split: len(voices) for split, voices in VOICES.items()} == {"train": 32, "validation": 8, "test": 8}
    families = {split: {family(voice) for voice in voices} for split, voices in VOICES.items()}
    assert not families["train"] & families["validation"]
    assert not families["train"] & families["test"]
    assert not families["validation"] & families["test"]
    for voices in VOICES.values():
        assert len(set(voices)) == len(voices)
        assert {voice.startswith("gmw/en-US") for voice in voices} == {True, False}


def test_the_same_utterances_give_the_same_bits_in_every_process() -> None:
    # f2 breathes: its noise would be seeded by the clock.
    said = [Utterance(word, voice, 150) for voice in ("gmw/en-US+f2", "gmw/en+klatt") for word in WORDS]
    first, second = render_speech(said), render_speech(said)
    assert [sound.tobytes() for sound in first] == [sound.tobytes() for sound in second]
    assert len({sound.tobytes() for sound in first}) == len(said)


def test_words_of_all_voices_have_one_level_and_neither_silence_around_them_nor_too_much_length() -> None:
    sounds = render_speech(SLOWEST)
    assert len(sounds) == len(SLOWEST)
    margin = round(spoken_digits.MARGIN_SECONDS * SAMPLE_RATE)
    for said, sound in zip(SLOWEST, sounds, strict=True):
        assert 0.2 < len(sound) / SAMPLE_RATE < 0.75, said
        level = np.abs(sound.astype(np.float64)) / 32768
        assert level.max() == spoken_digits.PEAK
        loud = np.flatnonzero(level > spoken_digits.SILENCE * level.max() - 0.5 / 32768)
        assert loud[0] <= margin + 1
        assert len(sound) - 1 - loud[-1] <= margin + 1


def test_phrases_are_longer_than_words_and_rates_and_pitches_are_heard() -> None:
    voice = "gmw/en-US+m3"
    word, phrase, fast, high = render_speech(
        [
            Utterance("seven", voice, PHRASE_RATE),
            Utterance("seven standing still", voice, PHRASE_RATE),
            Utterance("seven", voice, max(RATES["train"])),
            Utterance("seven", voice, PHRASE_RATE, max(PITCHES["train"])),
        ]
    )
    assert 2 * len(word) < len(phrase) < 1.6 * SAMPLE_RATE
    assert len(fast) < len(word)
    assert pitch_hz(high) > 1.05 * pitch_hz(word)


def pitch_hz(sound: np.ndarray) -> float:
    """Estimate the pitch of a voiced sound where it is loudest, by its autocorrelation."""
    middle = int(np.convolve(np.abs(sound.astype(np.float64)), np.ones(1024), "same").argmax())
    piece = sound[max(middle - 1024, 0) : middle + 1024].astype(np.float64)
    correlation = np.correlate(piece, piece, "full")[len(piece) - 1 :]
    shortest, longest = SAMPLE_RATE // 180, SAMPLE_RATE // 60
    return SAMPLE_RATE / (shortest + int(correlation[shortest:longest].argmax()))


def test_a_wav_file_holds_the_samples() -> None:
    samples = np.array([0, 1, -32768, 32767], dtype=np.int16)
    rate, found = wavfile.read(io.BytesIO(wav_bytes(samples)))
    assert rate == SAMPLE_RATE
    np.testing.assert_array_equal(found, samples)


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (Utterance("one", "gmw/nobody", 150), r"no voice 'gmw/nobody'"),
        (Utterance(" ", "gmw/en", 150), "gives no sound for Utterance"),
    ],
)
def test_what_cannot_be_said_is_an_error_that_names_it(utterance: Utterance, message: str) -> None:
    with pytest.raises(DataError, match=f"could not render 2 utterances: .*{message}"):
        render_speech([Utterance("one", "gmw/en", 150), utterance])


def test_a_machine_without_the_package_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"need espeakng-loader: install omniform\[demo\]"):
        render_speech([Utterance("one", "gmw/en", 150)])


def test_a_process_that_dies_tells_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken_digits.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="could not render 1 utterances: status 1, no message"):
        render_speech([Utterance("one", "gmw/en", 150)])
