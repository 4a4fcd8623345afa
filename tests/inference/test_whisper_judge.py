"""The second judge of speech on voices that no training hears, and on no sound at all."""

import numpy as np
import torch

from omniform.data.spoken_digits import VOICES, Utterance, render_speech
from omniform.data.templates import SPOKEN, WORDS, render
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.inference.whisper_judge import WhisperJudge


def test_whisper_hears_words_and_phrases_of_validation_voices() -> None:
    voices = VOICES["validation"]
    words = [Utterance(WORDS[digit], voices[digit % len(voices)], 150) for digit in range(10)]
    phrases = [
        Utterance(render(SPOKEN, 2 * place, motion), voices[place % len(voices)], 150)
        for place, motion in enumerate(MOTIONS)
    ]
    sounds = [torch.from_numpy(sound / np.float32(32768)) for sound in render_speech([*words, *phrases])]
    judge = WhisperJudge()
    assert (judge.predict(sounds[:10]) == np.arange(10)).mean() >= 0.8
    digits, motions = judge.predict_phrases(sounds[10:])
    assert (digits == 2 * np.arange(5)).mean() >= 0.8
    assert (motions == np.arange(5)).mean() >= 0.8
    assert judge.predict([torch.zeros(0)]).tolist() == [NO_ANSWER]
