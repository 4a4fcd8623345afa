"""Reconstruction figures against scikit-image, and the evaluation of a tokenizer against sums by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from omniform.data.digits import build_digits
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.tokenizer_evaluation import code_figures, evaluate_tokenizer, judged_figures, psnr, ssim
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False)


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
    figures = code_figures([Tokens(torch.tensor(entry), (len(entry),)) for entry in codes], Discrete(8))
    every = [code for entry in codes for code in entry]
    shares = [every.count(code) / len(every) for code in set(every)]
    assert figures["code_use"] == len(set(every)) / 8
    assert figures["perplexity"] == pytest.approx(math.prod(share**-share for share in shares))
    assert figures["bits_per_item"] == pytest.approx(3 * len(every) / len(codes))


def test_judged_figures_per_digit() -> None:
    before, after, digits = np.array([1, 1, 2, 2]), np.array([1, 2, 2, 2]), np.array([1, 1, 2, 1])
    figures = judged_figures(before, after, digits)
    assert (figures["accuracy_before"], figures["accuracy_after"]) == (0.75, 0.5)
    assert figures["ratio"] == pytest.approx(2 / 3)
    assert figures["per_class"]["1"] == {"accuracy_before": 2 / 3, "accuracy_after": 1 / 3, "n": 3}


def test_evaluating_text_counts_exact_round_trips(world: Path, tmp_path: Path) -> None:
    captions = [span.text or "" for sample in ShardReader(world / "train-text") for span in sample.spans]
    SentencePieceTokenizer.train(captions, vocab_size=300).save(tmp_path / "text")
    figures = evaluate_tokenizer(tmp_path / "text", world, out=tmp_path / "out")
    assert figures["exact"] == 1
    assert figures["n"] == 252
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == figures
    with pytest.raises(OmniformError, match="nowhere"):
        evaluate_tokenizer(tmp_path / "text", world, "nowhere")


def test_evaluating_images_judges_the_round_trip(world: Path, tmp_path: Path) -> None:
    config = ImageTokenizerConfig(widths=(8,), patch_size=4)
    tokenizer = ImageTokenizer(config, config.build())
    tokenizer.save(tmp_path / "image")
    figures = evaluate_tokenizer(tmp_path / "image", world, "validation", out=tmp_path / "out")
    samples = list(ShardReader(world / "validation"))
    items = [tokenizer.read(sample.spans[1].payload or b"") for sample in samples]
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(items))
    errors = [float((a - b).square().mean()) for a, b in zip(items, decoded, strict=True)]
    assert figures["psnr_db"] == pytest.approx(np.mean([10 * math.log10(4 / error) for error in errors]), rel=1e-4)
    assert figures["judge"]["accuracy_before"] > 0.95
    assert figures["judge"]["accuracy_after"] < 0.5  # random weights keep nothing
    assert sum(entry["n"] for entry in figures["judge"]["per_class"].values()) == figures["n"] == 130
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 0
