"""Distances of sounds and pictures against references and closed forms, judged accuracies against sums by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann
from scipy.stats import bootstrap
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from omniform.errors import OmniformError
from omniform.inference.judges import NO_ANSWER, wilson_interval
from omniform.inference.reconstruction.base import code_use, mean_figure, token_figures
from omniform.inference.reconstruction.judged import Answers, judged_figures
from omniform.inference.reconstruction.pictures import psnr, ssim
from omniform.inference.reconstruction.sounds import (
    FLOOR_DB,
    MEL_HOP,
    N_MELS,
    log_mel_distance,
    mel_levels,
    si_sdr,
    spectral_convergence,
    spectrogram_picture,
    spectrum,
)
from omniform.tokenizers.base import Continuous, Discrete, Latents, Tokens

RATE = 16_000


def sound(seed: int, length: int = 6000) -> Any:
    return np.random.default_rng(seed).normal(scale=0.1, size=length)


@given(seed=st.integers(0, 2**16), height=st.integers(11, 24), noise=st.floats(0.01, 2))
def test_psnr_and_ssim_are_scikit_images(seed: int, height: int, noise: float) -> None:
    random = np.random.default_rng(seed)
    image = random.uniform(-1, 1, (height, 16))
    other = (image + random.normal(scale=noise, size=image.shape)).clip(-1, 1)
    reference = structural_similarity(
        image, other, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(image, other) == pytest.approx(reference, abs=1e-9)
    assert psnr(image, other) == pytest.approx(peak_signal_noise_ratio(image, other, data_range=2))
    assert ssim(image, image) == pytest.approx(1)
    assert psnr(image, image) == math.inf


def test_an_image_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(OmniformError, match="at least 11 per side"):
        ssim(np.zeros((10, 16)), np.zeros((10, 16)))


@given(codes=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=9), min_size=1, max_size=5))
def test_code_figures_are_counts(codes: list[list[int]]) -> None:
    figures = token_figures([Tokens(torch.tensor(entry), (len(entry),)) for entry in codes], Discrete(8))
    every = [code for entry in codes for code in entry]
    shares = [every.count(code) / len(every) for code in set(every)]
    assert figures["code_use"] == len(set(every)) / 8
    assert figures["perplexity"] == pytest.approx(math.prod(share**-share for share in shares))
    assert figures["bits_per_item"] == pytest.approx(3 * len(every) / len(codes))
    assert code_use(torch.tensor(every), 8).items() <= figures.items()


def test_means_leave_out_what_is_infinite_and_say_so() -> None:
    assert mean_figure("psnr_db", [1.0, 3.0]) == {"psnr_db": 2}
    assert mean_figure("psnr_db", [1.0, math.inf, 3.0, -math.inf]) == {"psnr_db": 2, "psnr_db_left_out": 2}
    assert mean_figure("psnr_db", np.array([math.inf])) == {"psnr_db": None, "psnr_db_left_out": 1}
    assert mean_figure("psnr_db", []) == {"psnr_db": None}


def test_vectors_have_channels_instead_of_codes() -> None:
    figures = token_figures([Latents(torch.zeros(6, 4), (2, 3)), Latents(torch.zeros(2, 4), (1, 2))], Continuous(4))
    assert figures == {"channels": 4, "tokens_per_item": 4, "numbers_per_item": 16}


def test_judged_figures_by_class_and_group() -> None:
    answers = Answers(np.array([1, 1, 2, 2, 0]), np.array([1, 2, 2, 2, NO_ANSWER]), np.array([1, 1, 2, 1, 0]))
    figures = judged_figures(answers, {"voice": ["x", "x", "y", "y", "y"]})
    assert (figures["accuracy_before"], figures["accuracy_after"]) == (0.8, 0.4)
    assert figures["ratio"] == pytest.approx(0.5)
    assert figures["per_class"]["1"] == {"accuracy_before": 2 / 3, "accuracy_after": 1 / 3, "n": 3}
    assert figures["by_voice"]["y"] == {"accuracy_before": 2 / 3, "accuracy_after": 1 / 3, "n": 3}
    assert (figures["ci95_before"], figures["ci95_after"]) == (list(wilson_interval(4, 5)), list(wilson_interval(2, 5)))
    assert figures["confusions"] == [
        {"right": "1", "judged": "2", "n": 2},
        {"right": "0", "judged": "none", "n": 1},
    ]
    assert figures["n_sources"] == 5
    named = judged_figures(Answers(np.array([0]), np.array([1]), np.array([0]), names=("still", "left")))
    assert named["confusions"] == [{"right": "still", "judged": "left", "n": 1}]


def answers_of(right_before: Any, right_after: Any) -> Answers:
    return Answers(np.where(right_before, 1, 0), np.where(right_after, 1, 0), np.ones(len(right_before), int))


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_intervals_draw_whole_sources_as_scipy_does(seed: int) -> None:
    """Against scipy's bootstrap of (items, right before, right after) of each source; both draw at random."""
    random = np.random.default_rng(seed)
    source_of = np.repeat(np.arange(12), random.integers(5, 30, 12))
    ease = random.uniform(0.5, 1, 12)[source_of]
    before, after = random.random(len(ease)) < ease, random.random(len(ease)) < 0.8 * ease
    figures = judged_figures(answers_of(before, after), sources=source_of.tolist())
    columns = [np.bincount(source_of, weights=of) for of in (np.ones(len(ease)), before, after)]
    for key, over, under in (("before", 1, 0), ("after", 2, 0), ("ratio", 2, 1)):
        reference = bootstrap(
            columns,
            lambda *drawn, over=over, under=under, axis=-1: drawn[over].sum(axis) / drawn[under].sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=4000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        width = reference.high - reference.low
        assert figures[f"ci95_{key}"] == pytest.approx([reference.low, reference.high], abs=0.12 * width)
    assert figures["n_sources"] == 12


@given(right=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=20), copies=st.integers(2, 5))
@settings(max_examples=20)
def test_copies_of_items_narrow_no_interval(right: list[tuple[bool, bool]], copies: int) -> None:
    before, after = np.array(right).T
    alone = judged_figures(answers_of(before, after))
    names = [f"voice {place:02d}" for place in range(len(right))] * copies
    repeated = judged_figures(answers_of(np.tile(before, copies), np.tile(after, copies)), sources=names)
    assert repeated["n_sources"] == alone["n_sources"] == len(right)
    assert repeated["ci95_ratio"] == pytest.approx(alone["ci95_ratio"])
    assert alone["ci95_before"] == list(wilson_interval(int(before.sum()), len(right)))


@given(seed=st.integers(0, 2**16), length=st.integers(512, 3000), window=st.sampled_from([256, 512]))
def test_spectra_are_scipys(seed: int, length: int, window: int) -> None:
    samples, hop = sound(seed, length), window // 4
    scipys = ShortTimeFFT(hann(window, sym=False), hop, fs=1)
    reference, found = scipys.stft(samples), spectrum(samples, window, hop)
    first = -scipys.p_min  # of its slices, the one about sample 0
    assert np.abs(reference.T[first : first + len(found)]) == pytest.approx(found, abs=1e-9)
    assert len(found) == length // hop + 1


@given(pitch=st.floats(200, 7000))
def test_a_tone_is_loudest_in_its_band(pitch: float) -> None:
    """The band whose triangle weighs the tone most, by the formula of the mel scale for one tone alone."""
    tone = np.sin(2 * np.pi * pitch * np.arange(RATE // 2) / RATE)
    levels = mel_levels(tone, RATE)[10:-10].mean(0)
    place = math.log10(1 + pitch / 700) / math.log10(1 + RATE / 1400) * (N_MELS + 1) - 1
    assert abs(int(levels.argmax()) - place) <= 1.5


@given(seed=st.integers(0, 2**16), gain_db=st.floats(-20, 20))
def test_a_gain_is_its_own_distance(seed: int, gain_db: float) -> None:
    original = sound(seed)
    louder = original * 10 ** (gain_db / 20)
    assert log_mel_distance(original, original, RATE) == 0
    assert spectral_convergence(original, original) == 0
    if gain_db > -5:  # far from the floor
        assert log_mel_distance(louder, original, RATE) == pytest.approx(abs(gain_db), abs=0.05)
    assert spectral_convergence(louder, original) == pytest.approx(abs(10 ** (gain_db / 20) - 1))
    assert si_sdr(louder, original) > 120


def test_silences_differ_by_no_more_than_the_floor() -> None:
    original = np.concatenate([sound(0), np.zeros(6000)])
    hiss = original + 1e-6 * sound(1, 12000)
    assert log_mel_distance(hiss, original, RATE) < 0.05
    assert log_mel_distance(np.zeros(12000), original, RATE) < -FLOOR_DB
    assert spectral_convergence(np.zeros(12000), original) == 1
    assert spectral_convergence(np.zeros(9), np.zeros(9)) == 0
    assert spectral_convergence(original, 0 * original) == math.inf
    assert log_mel_distance(np.zeros(900), np.zeros(900), RATE) == 0


@given(seed=st.integers(0, 2**16), ratio_db=st.floats(-20, 60), gain=st.floats(0.1, 10))
def test_si_sdr_is_the_ratio_of_orthogonal_noise(seed: int, ratio_db: float, gain: float) -> None:
    original = sound(seed) - sound(seed).mean()
    noise = sound(seed + 1) - sound(seed + 1).mean()
    noise -= (noise @ original) / (original @ original) * original
    noise *= math.sqrt(original @ original / (noise @ noise)) * 10 ** (-ratio_db / 20)
    assert si_sdr(gain * (original + noise) + 0.3, original) == pytest.approx(ratio_db, abs=1e-6)


def test_si_sdr_of_silence_is_as_low_as_can_be() -> None:
    assert si_sdr(np.zeros(100), sound(0, 100)) == si_sdr(sound(0, 100), np.zeros(100)) == -math.inf


def test_a_spectrogram_shows_sounds_side_by_side_on_one_scale() -> None:
    loud = sound(0, MEL_HOP * 20)
    picture = np.asarray(spectrogram_picture([loud, 0 * loud], RATE))
    assert picture.shape == (2 * N_MELS, 2 * (21 + 4 + 21), 3)
    assert (picture[:, 2 * (21 + 4) :] == picture[0, -1]).all()  # silence is of one colour
    assert picture[:, : 2 * 21].mean() > picture[0, -1].mean() + 50
