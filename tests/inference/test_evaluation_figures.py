"""Figures of a cell against slow counts; noise of as many tokens as the real thing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.inference.evaluation_figures import by_noise, cell_figures, crossed, shuffled
from omniform.inference.evaluation_items import Concepts
from omniform.inference.evaluation_noise import noise_like
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig


def some_concepts(random: np.random.Generator, n: int, *, motions: bool, silent: bool) -> Concepts:
    lowest = NO_ANSWER if silent else 0
    return Concepts(random.integers(lowest, 4, n), random.integers(lowest, 3, n) if motions else None)


@given(seed=st.integers(0, 2**16), n=st.integers(2, 12), n_noise=st.integers(1, 5), motions=st.booleans())
def test_controls_are_means_over_all_pairs(seed: int, n: int, n_noise: int, motions: bool) -> None:
    random = np.random.default_rng(seed)
    expected = some_concepts(random, n, motions=motions, silent=False)
    judged = some_concepts(random, n, motions=motions, silent=True)
    noise = some_concepts(random, n_noise, motions=motions, silent=True)

    def same(answer: Concepts, place: int, label: int) -> bool:
        return bool(answer[np.array([place])].agree(expected[np.array([label])])[0])

    others = [same(judged, place, label) for place in range(n) for label in range(n) if place != label]
    assert shuffled(crossed(judged, expected))["accuracy"] == pytest.approx(np.mean(others))
    garbage = [same(noise, place, label) for place in range(n_noise) for label in range(n)]
    assert by_noise(expected, noise) == {"accuracy": pytest.approx(np.mean(garbage)), "n": n_noise}


@given(seed=st.integers(0, 2**16), n=st.integers(1, 12), motions=st.booleans())
def test_figures_are_counts(seed: int, n: int, motions: bool) -> None:
    random = np.random.default_rng(seed)
    expected = some_concepts(random, n, motions=motions, silent=False)
    judged, real = (some_concepts(random, n, motions=motions, silent=True) for _ in range(2))
    also, also_real, unseen = random.integers(0, 2, (3, n)).astype(bool)
    cell = cell_figures(expected, judged, real, unseen, also, also_real)
    right = [
        judged.tell(place)["digit"] == expected.tell(place)["digit"]
        and judged.tell(place)["motion"] == expected.tell(place)["motion"]
        and also[place]
        for place in range(n)
    ]
    assert cell["accuracy"] == pytest.approx(np.mean(right))
    assert sum(entry["n"] for entry in cell["per_class"].values()) == cell["n"] == n
    assert sum(entry["accuracy"] * entry["n"] for entry in cell["per_class"].values()) == pytest.approx(sum(right))
    assert cell["ceiling"] == (expected.agree(real) & also_real).mean()
    assert (cell["motion"] is not None) == (cell["held_out_pairs"] is not None) == motions
    if motions:
        assert cell["held_out_pairs"]["n"] == unseen.sum()
        assert cell["held_out_pairs"]["accuracy"] == (np.mean(np.array(right)[unseen]) if unseen.any() else None)


def test_concepts_are_told_by_name() -> None:
    concepts = Concepts(np.array([3, NO_ANSWER]), np.array([NO_ANSWER, MOTIONS.index("up")]))
    assert concepts.tell(0) == {"digit": 3, "motion": None}
    assert concepts.tell(1) == {"digit": None, "motion": "up"}


def test_noise_has_as_many_tokens_as_the_real_items() -> None:
    torch.manual_seed(0)
    speech = SpeechTokenizerConfig(width=8, n_blocks=1, frame_samples=1280, quantizer=FSQConfig(levels=(3, 3)))
    video = VideoTokenizerConfig(patch_size=16, widths=(8,), time_strides=(), quantizer=FSQConfig(levels=(3, 5)))
    sounds = [torch.zeros(n) for n in (1280, 3000)]
    tokenizer = SpeechTokenizer(speech, speech.build())
    noise = noise_like(sounds, tokenizer, seed=0)
    assert [len(item) for item in noise] == [1280, 3840]
    assert all(torch.equal(a, b) for a, b in zip(noise, noise_like(sounds, tokenizer, seed=0), strict=True))
    assert not torch.equal(noise[0], noise_like(sounds, tokenizer, seed=1)[0])
    (clip,) = noise_like([torch.zeros(1, 9, 32, 32)], VideoTokenizer(video, video.build()), seed=0)
    assert clip.shape == (1, 9, 32, 32)
