"""The speech judge on voices that no training hears, and on what says nothing."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from omniform.data.spoken_digits import VOICES, Utterance, render_speech
from omniform.data.templates import MOTIONS as WORLD_MOTIONS
from omniform.data.templates import SPOKEN, WORDS, render
from omniform.errors import OmniformError
from omniform.inference import judges
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.inference.speech_judge import NOISE_STD, SpeechJudge, _noise

N_VOICES = 3


@pytest.fixture(scope="module")
def judge() -> SpeechJudge:
    return SpeechJudge()


@pytest.fixture(scope="module")
def spoken() -> tuple[list[Tensor], list[Tensor]]:
    """The ten words in some validation voices, and fifteen phrases, three of each motion."""
    voices = VOICES["validation"][:N_VOICES]
    words = [Utterance(word, voice, 150) for voice in voices for word in WORDS]
    phrases = [Utterance(render(SPOKEN, k % 10, MOTIONS[k % 5]), voices[k % 3], 150) for k in range(15)]
    sounds = [torch.from_numpy(sound / np.float32(32768)) for sound in render_speech([*words, *phrases])]
    return sounds[: len(words)], sounds[len(words) :]


def test_words_and_motions_are_those_of_the_world() -> None:
    assert judges.DIGIT_WORDS == WORDS
    assert judges.MOTIONS == WORLD_MOTIONS


def test_words_of_voices_that_no_training_hears(judge: SpeechJudge, spoken: tuple[list[Tensor], list[Tensor]]) -> None:
    expected = np.tile(np.arange(10), N_VOICES)
    answers = judge.predict(spoken[0])
    assert (answers == expected).mean() >= 0.9
    assert (np.random.default_rng(0).permutation(answers) == expected).mean() < 0.35  # chance is 0.1


def test_an_item_has_one_answer_whatever_is_heard_before(
    judge: SpeechJudge, spoken: tuple[list[Tensor], list[Tensor]]
) -> None:
    some = spoken[0][::4]
    together = judge.predict(some)
    assert np.array_equal(judge.predict(some[::-1])[::-1], together)
    judge.predict_phrases(spoken[1][:1])
    assert np.array_equal([judge.predict([item])[0] for item in some], together)


def test_phrases_say_digit_and_motion(judge: SpeechJudge, spoken: tuple[list[Tensor], list[Tensor]]) -> None:
    digits, motions = judge.predict_phrases(spoken[1])
    assert (digits == np.arange(15) % 10).mean() >= 0.8
    assert (motions == np.arange(15) % 5).mean() >= 0.9


def test_what_says_nothing(judge: SpeechJudge, spoken: tuple[list[Tensor], list[Tensor]]) -> None:
    """Silence and loud noise have no answer; a word backwards has a wrong one, its samples in disorder have none."""
    random = torch.Generator().manual_seed(0)
    nothing = [torch.zeros(0), torch.zeros(8000), 0.3 * torch.randn(8000, generator=random)]
    assert judge.predict(nothing).tolist() == [NO_ANSWER] * 3
    assert [answers.tolist() for answers in judge.predict_phrases(nothing)] == [[NO_ANSWER] * 3] * 2
    expected, words = np.tile(np.arange(10), 2), spoken[0][:20]
    assert (judge.predict([word.flip(0) for word in words]) == expected).mean() < 0.5
    shuffled = [word[torch.randperm(len(word), generator=random)] for word in words]
    assert (judge.predict(shuffled) == expected).mean() < 0.2


def test_a_word_alone_is_no_phrase(judge: SpeechJudge, spoken: tuple[list[Tensor], list[Tensor]]) -> None:
    assert (judge.predict_phrases(spoken[0][:10])[0] == NO_ANSWER).all()


def test_noise_is_white_keyed_and_of_its_level() -> None:
    noise = _noise(40_000)
    assert np.array_equal(_noise(100), noise[:, :100])
    assert noise.std(axis=1) == pytest.approx(NOISE_STD, rel=0.02)
    assert np.abs(np.corrcoef(noise) - np.eye(len(noise))).max() < 0.02
    assert np.abs(np.corrcoef(noise[0, 1:], noise[0, :-1])[0, 1]) < 0.02


@pytest.mark.parametrize("item", [torch.zeros(2, 100), torch.tensor([0.0, float("nan")]), torch.zeros(())])
def test_what_is_no_sound_is_refused(judge: SpeechJudge, item: Tensor) -> None:
    with pytest.raises(OmniformError, match="expected one row of finite samples"):
        judge.predict([item])


def test_without_pocketsphinx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(OmniformError, match=r"install omniform\[demo\]"):
        SpeechJudge()
