"""Configurations of the training of tokenizers: which weights each has, and what is refused with a reason."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from omniform.modeling.config import ConfigError
from omniform.training.tokenizer_config import CodecTrainConfig, PerturbationConfig
from omniform.training.tokenizer_task import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizers"
QUANTIZED = ["digits-image", "digits-speech", "digits-speech-25", "digits-speech-residual", "digits-video"]


def weights(name: str, *overrides: str) -> Any:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    assert isinstance(config, CodecTrainConfig)
    return config.loss_weights


@pytest.mark.parametrize("name", QUANTIZED)
def test_codecs_of_codes_weigh_the_terms_of_their_quantizers(name: str) -> None:
    found = weights(name, "commitment_weight=0.5", "entropy_weight=0.75")
    assert (found["reconstruction"], found["commitment"], found["entropy"]) == (1, 0.5, 0.75)
    assert "kl" not in found


def test_an_autoencoder_of_vectors_has_no_weights_without_effect() -> None:
    assert weights("digits-image-latents", "kl_weight=0.5") == {"reconstruction": 1, "kl": 0.5}
    for name in ("commitment_weight", "entropy_weight"):
        with pytest.raises(ConfigError, match=name):
            weights("digits-image-latents", f"{name}=0.5")


@pytest.mark.parametrize("name", ["digits-image", "digits-image-latents"])
def test_a_discriminator_of_images_halves_them_as_often_as_can_be(name: str) -> None:
    weights(name, "adversarial={widths: [8, 8, 8, 8]}")
    with pytest.raises(ConfigError, match="halve the resolution 5 times, expected at most 4"):
        weights(name, "adversarial={widths: [8, 8, 8, 8, 8]}")


@pytest.mark.parametrize("name", QUANTIZED)
def test_moving_averages_are_not_kept_in_bf16(name: str) -> None:
    codebook = "{kind: vq_ema, codebook_size: 64, dim: 8}"
    for quantizer in (codebook, f"{{kind: residual, depth: 2, base: {codebook}}}"):
        with pytest.raises(ConfigError, match="stand still: choose bf16_autocast"):
            weights(name, f"tokenizer.quantizer={quantizer}", "engine.precision=bf16")
        weights(name, f"tokenizer.quantizer={quantizer}", "engine.precision=bf16_autocast")


def test_perturbations_that_mean_nothing_are_refused() -> None:
    PerturbationConfig(filter_taps=1, gain_db=(0, 0))
    with pytest.raises(ValidationError, match="filter_taps is 8, expected an odd number"):
        PerturbationConfig(filter_taps=8)
    with pytest.raises(ValidationError, match=r"gain_db is \[9.0, -9.0\], expected the least gain before the most"):
        PerturbationConfig(gain_db=(9, -9))
