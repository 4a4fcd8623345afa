"""Continuous tokens of images: raw patches, and the latents of a variational autoencoder."""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.base import Continuous, Latents, Modality, TokenizerError
from omniform.tokenizers.codecs.gaussian import GaussianBottleneck
from omniform.tokenizers.image_latents import (
    ImageLatentsConfig,
    ImageLatentsTokenizer,
    ImagePatchesConfig,
    ImagePatchesTokenizer,
)
from omniform.tokenizers.registry import load_modality

SIZE = 16


def images(n: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(n, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_tokenizer(channels: int = 1) -> ImageLatentsTokenizer:
    torch.manual_seed(0)
    config = ImageLatentsConfig(channels=channels, image_size=SIZE, widths=(16, 24), latent_channels=3)
    return ImageLatentsTokenizer(config, config.build())


@given(st.sampled_from([1, 3]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 3))
def test_patches_lose_nothing_and_are_in_row_major_order(channels: int, patch_size: int, n: int) -> None:
    config = ImagePatchesConfig(channels=channels, image_size=SIZE, patch_size=patch_size)
    tokenizer = ImagePatchesTokenizer(config)
    items = list(images(n, channels))
    tokens = tokenizer.encode_batch(items)
    side = SIZE // patch_size
    assert tokenizer.representation == Continuous(channels * patch_size**2)
    for item, entry in zip(items, tokens, strict=True):
        assert entry.grid == tokenizer.fixed_grid == tokenizer.grid(item) == (side, side)
        for place in range(side**2):
            top, left = place // side * patch_size, place % side * patch_size
            patch = item[:, top : top + patch_size, left : left + patch_size]
            assert torch.equal(entry.values[place], patch.flatten())
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.decode_batch(tokens), items, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_latents_have_the_grid_and_stored_tokenizers_give_the_same(channels: int, tmp_path: Path) -> None:
    tokenizer = latents_tokenizer(channels)
    tokenizer.codec.train()
    tokenizer.codec(images(8, channels))  # moves the averages away from where they begin
    tokenizer.codec.eval()
    tokenizer.save(tmp_path / "latents")
    loaded = load_modality(tmp_path / "latents")
    assert isinstance(loaded, ImageLatentsTokenizer)
    items = list(images(3, channels))
    tokens = tokenizer.encode_batch(items)
    assert loaded.representation == Continuous(3)
    assert all(entry.grid == (4, 4) and entry.values.shape == (16, 3) for entry in tokens)
    for ours, stored in zip(tokens, loaded.encode_batch(items), strict=True):
        assert torch.equal(ours.values, stored.values)
    decoded = loaded.decode_batch(tokens)
    assert all(torch.equal(a, b) for a, b in zip(decoded, tokenizer.decode_batch(tokens), strict=True))
    assert all(image.shape == (channels, SIZE, SIZE) and image.abs().max() <= 1 for image in decoded)


def test_stored_patches_are_read_back(tmp_path: Path) -> None:
    tokenizer = ImagePatchesTokenizer(ImagePatchesConfig(image_size=SIZE, patch_size=8, fit="pad"))
    tokenizer.save(tmp_path / "patches")
    loaded = load_modality(tmp_path / "patches")
    assert isinstance(loaded, ImagePatchesTokenizer)
    assert loaded.config == tokenizer.config


def test_the_divergence_is_that_of_diffusers() -> None:
    parameters = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(2)) * 3
    loss = GaussianBottleneck(3).eval().choose(parameters).losses["kl"]
    reference = DiagonalGaussianDistribution(parameters).kl().sum() / (3 * 4 * 4)
    torch.testing.assert_close(loss, reference)


def test_training_decodes_draws_of_the_right_moments() -> None:
    torch.manual_seed(0)
    bottleneck = GaussianBottleneck(2).train()
    mean, log_variance = torch.tensor([0.5, -2.0]), torch.tensor([0.0, -3.0])
    parameters = torch.cat([mean, log_variance])[None, :, None, None].expand(64, -1, 32, 32)
    drawn = bottleneck.choose(parameters).latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(drawn.mean(1), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(1), (log_variance / 2).exp(), atol=0.02, rtol=0)


def test_tokens_become_of_mean_0_and_variance_1_and_are_brought_back() -> None:
    generator = torch.Generator().manual_seed(3)
    bottleneck = GaussianBottleneck(2).train()
    scale, shift = torch.tensor([4.0, 0.1]).view(1, 2, 1, 1), torch.tensor([7.0, -1.0]).view(1, 2, 1, 1)
    for _ in range(400):
        means = torch.randn(32, 2, 4, 4, generator=generator) * scale + shift
        bottleneck.choose(torch.cat([means, torch.zeros_like(means)], dim=1))
    bottleneck.eval()
    means = torch.randn(512, 2, 4, 4, generator=generator) * scale + shift
    quantized = bottleneck.choose(torch.cat([means, torch.zeros_like(means)], dim=1))
    values = quantized.codes.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(values.std(1), torch.ones(2), atol=0.05, rtol=0)
    torch.testing.assert_close(bottleneck.code_vectors(quantized.codes), means)
    assert torch.equal(quantized.latents, means)  # nothing is drawn outside training


@pytest.mark.parametrize("tokenizer", [latents_tokenizer(), ImagePatchesTokenizer(ImagePatchesConfig())])
def test_what_does_not_fit_is_refused(tokenizer: Modality[Latents]) -> None:
    entry = tokenizer.encode(images(1)[0])
    for wrong in (
        Latents(entry.values, (2, 8)),
        Latents(entry.values[:, :-1], entry.grid),
        Latents(entry.values[:-1], entry.grid),
    ):
        with pytest.raises(TokenizerError, match="and the grid"):
            tokenizer.decode(wrong)
    with pytest.raises(TokenizerError, match="not finite"):
        tokenizer.decode(Latents(entry.values * torch.nan, entry.grid))
    with pytest.raises(TokenizerError, match="expected finite values"):
        tokenizer.encode(images(1)[0] * 3)
    with pytest.raises(TokenizerError, match="expected float32"):
        tokenizer.encode(images(1)[0].double())


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of patch_size = 5"):
        ImagePatchesConfig(image_size=16, patch_size=5)
