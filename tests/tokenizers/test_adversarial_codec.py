"""Training against a discriminator: who gets which gradient, when, and what is stored."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from omniform.data.digits import build_digits
from omniform.errors import OmniformError
from omniform.tokenizers.base import folder_digest
from omniform.tokenizers.codecs.adversarial import AdversarialCodec, PatchDiscriminator
from omniform.tokenizers.codecs.lfq import LFQConfig
from omniform.tokenizers.image import ImageTokenizerConfig
from omniform.tokenizers.registry import load_modality
from omniform.training.codec_task import CodecTask
from omniform.training.tokenizer_config import ImageTokenizerTrainConfig
from omniform.training.tokenizer_task import train_tokenizer

TERMS = ["reconstruction", "commitment", "entropy", "adversarial", "features", "discriminator"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False)


def build() -> AdversarialCodec:
    torch.manual_seed(0)
    codec = ImageTokenizerConfig(widths=(8, 16), margin=1, quantizer=LFQConfig(bits=4)).build()
    return AdversarialCodec(codec, PatchDiscriminator(1, (8, 16)))


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_one_step_gives_each_side_the_gradient_that_turns_would() -> None:
    module, pixels = build(), images(5)
    losses = module(pixels)
    assert list(losses) == TERMS
    together = gradients(module, sum(losses.values()))

    # The slow way, as GANs are written: the discriminator frozen in one pass, the codec in the other.
    codec, discriminator = copy.deepcopy(module.codec), copy.deepcopy(module.discriminator)
    reconstruction, own = codec.reconstruct(pixels)
    discriminator.requires_grad_(False)
    *fake, score = discriminator(reconstruction)
    *real, _ = discriminator(pixels)
    distance = sum(F.mse_loss(a, b) for a, b in zip(fake, real, strict=True)) / len(real) * 5
    of_codec = gradients(codec, sum(own.values()) - score.mean((1, 2, 3)).sum() + distance)
    discriminator.requires_grad_(True)
    hinge = F.relu(1 - discriminator(pixels)[-1]).mean() + F.relu(1 + discriminator(reconstruction.detach())[-1]).mean()
    of_discriminator = gradients(discriminator, 5 * hinge)

    assert together.keys() == {f"codec.{n}" for n in of_codec} | {f"discriminator.{n}" for n in of_discriminator}
    for side, expected in (("codec", of_codec), ("discriminator", of_discriminator)):
        for name, gradient in expected.items():
            torch.testing.assert_close(together[f"{side}.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_autocast_changes_no_gradient_but_by_rounding() -> None:
    module, pixels = build(), images(5)
    exact = gradients(module, sum(module(pixels).values()))
    with torch.autocast("cpu", torch.bfloat16):
        losses = module(pixels)
    rounded = gradients(module, sum(losses.values()))
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():
        if gradient.norm() > 0.1:
            assert F.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0) > 0.95, name


@given(n=st.integers(2, 6))
def test_each_term_is_a_sum_over_images(n: int) -> None:
    module, pixels = build(), images(n)
    whole = module(pixels)
    alone = [module(pixel[None]) for pixel in pixels]
    for term in set(TERMS) - {"entropy"}:  # which is of a batch
        assert sum(loss[term] for loss in alone).item() == pytest.approx(whole[term].item(), rel=1e-4)


def test_terms_that_cannot_be_told_apart_are_zero() -> None:
    module = build()
    with torch.no_grad():
        module.discriminator.score.weight.zero_()
        module.discriminator.score.bias.zero_()
    losses = module(images(3))
    assert losses["adversarial"].item() == 0
    assert losses["discriminator"].item() == pytest.approx(3 * 2)


def config_of(world: Path, **adversarial: object) -> dict[str, object]:
    return {
        "kind": "conv_vq",
        "name": "tiny",
        "data": str(world / "validation"),
        "steps": 4,
        "rows_per_step": 8,
        "tokenizer": {"widths": [8, 8], "margin": 1, "quantizer": {"kind": "lfq", "bits": 4}},
        "adversarial": {"widths": [8], "start_step": 2, **adversarial},
        "optim": {"lr": 0.01, "ema_decay": None, "clip_grad_norm": None},
        "engine": {"precision": "fp32", "micro_batch_rows": 4},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
    }


def write(path: Path, config: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_codec_heeds_the_discriminator_from_its_start_step(world: Path) -> None:
    task = CodecTask(ImageTokenizerTrainConfig(**config_of(world)))
    assert list(task.term_weights) == TERMS
    for step, count in ((0, 0), (1, 0), (2, 4), (3, 4)):
        for batch in task.micro_batches(step, 0, 1):
            expected = dict.fromkeys(TERMS, 4.0) | {"adversarial": count, "features": count}
            assert batch.counts == expected


def test_the_stored_tokenizer_holds_the_codec_alone_and_a_stop_changes_no_bit(world: Path, tmp_path: Path) -> None:
    folder = train_tokenizer(write(tmp_path / "a.yaml", config_of(world)), [], tmp_path / "a")
    tokenizer = load_modality(folder)
    assert not [name for name in tokenizer.codec.state_dict() if "discriminator" in name]
    logged = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert ["loss/adversarial" in line for line in logged if "loss" in line] == [False, False, True, True]
    stopped = shutil.copytree(tmp_path / "a", tmp_path / "stopped")
    shutil.rmtree(stopped / "tokenizer")
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    again = train_tokenizer(tmp_path / "a.yaml", [], stopped)
    assert folder_digest(again) == folder_digest(folder)


def test_before_the_start_the_codec_is_that_of_plain_training(world: Path, tmp_path: Path) -> None:
    config = config_of(world, start_step=4)
    with_it = train_tokenizer(write(tmp_path / "a.yaml", config), [], tmp_path / "a")
    without = train_tokenizer(write(tmp_path / "b.yaml", {**config, "adversarial": None}), [], tmp_path / "b")
    assert folder_digest(with_it) == folder_digest(without)
    heeded = train_tokenizer(write(tmp_path / "c.yaml", config_of(world, start_step=3)), [], tmp_path / "c")
    assert folder_digest(heeded) != folder_digest(without)


def test_configurations_that_cannot_train_are_refused(world: Path, tmp_path: Path) -> None:
    config = config_of(world)
    for change, message in (
        ({"engine": {"zero_stage": 3}}, "zero_stage is 3, .* choose 0, 1 or 2"),
        ({"adversarial": {"widths": [8] * 5}}, "halve the resolution 5 times, expected at most 4"),
    ):
        with pytest.raises(OmniformError, match=message):
            train_tokenizer(write(tmp_path / "bad.yaml", {**config, **change}), [], tmp_path / "out")
