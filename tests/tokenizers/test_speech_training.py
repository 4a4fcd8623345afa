"""Training of speech tokenizers: which segments are shown, the same bits after a stop, layers that follow a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from omniform.data.index import index_shards
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.errors import OmniformError
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.base import folder_digest
from omniform.tokenizers.codecs.adversarial import AdversarialCodec
from omniform.tokenizers.codecs.speech_layers import LatentNorm
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.speech import SpeechTokenizer
from omniform.training.speech_task import SpeechTask, perturbed
from omniform.training.tokenizer_config import PerturbationConfig, SpeechTokenizerTrainConfig
from omniform.training.tokenizer_task import load_config, train_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizers"
FRAME = 40


def noise(n_samples: int, seed: int = 0) -> Tensor:
    return torch.rand(n_samples, generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    with ShardWriter(folder) as writer:
        for n, n_samples in enumerate((50, 1200, 3000, 999, 240)):
            payload = audio_bytes(noise(n_samples, n), 16000, "wav")
            writer.write(RawSample(str(n), (RawSpan("speech", payload=payload, extension="wav"),)))
        writer.write(RawSample("broken", (RawSpan("speech", payload=b"no sound", extension="wav"),)))
    index_shards(folder)
    return folder


def config_of(shards: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "speech_codec",
        "name": "tiny",
        "data": str(shards),
        "steps": 4,
        "rows_per_step": 4,
        "segment_samples": 30 * FRAME,
        "tokenizer": {
            "frame_samples": FRAME,
            "width": 8,
            "n_blocks": 1,
            "encoder": {"kind": "mel", "hop": 8, "n_mels": 6, "width": 8},
            "decoder": {"kind": "stft", "hop": 10, "width": 8, "n_blocks": 1},
            "quantizer": {"kind": "fsq", "levels": [5, 5]},
        },
        "optim": {"lr": 0.01, "ema_decay": None},
        "engine": {"precision": "fp32", "micro_batch_rows": 2},
        "checkpoint": {"every": 2},
        "log": {"every": 2, "samples_every": 2},
        **changes,
    }


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def task_of(tmp_path: Path, config: dict[str, Any]) -> SpeechTask:
    loaded = load_config(written(tmp_path / "any.yaml", config))
    assert isinstance(loaded, SpeechTokenizerTrainConfig)
    return SpeechTask(loaded)


def test_a_segment_is_a_part_of_its_recording_or_holds_all_of_it(shards: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path, config_of(shards, perturbation=None))
    places = set()
    for n in range(40):
        for n_samples in (1, 1199, 1200, 1201, 2000):
            recording = task.tokenizer.compact(noise(n_samples, n_samples) + 0.5)
            segment = task.example(recording, n)
            assert segment.shape == (1, 1200)
            assert torch.equal(segment, task.example(recording, n))
            whole, part = task.tokenizer.expand(recording), segment[0]
            if n_samples <= 1200:
                whole, part = part, whole
            found = (whole.unfold(0, len(part), 1) == part).all(1).nonzero().flatten().tolist()
            assert found, (n, n_samples)
            if n_samples == 2000:
                places.add(found[0])
            elif n_samples < 1200:
                assert whole.count_nonzero() == part.count_nonzero()
    assert min(places) < 100
    assert max(places) > 500


@given(st.integers(0, 2**40), st.integers(1, 500))
def test_perturbed_recordings_stay_in_range_and_follow_their_keys(key: int, n_samples: int) -> None:
    config = PerturbationConfig(speed=0.25, gain_db=(-6, 20))
    samples = 2 * noise(n_samples)
    changed = perturbed(samples, config, key)
    assert torch.equal(changed, perturbed(samples, config, key))
    assert changed.abs().max() <= 1
    assert n_samples / 1.25 - 1 <= len(changed) <= n_samples * 1.25 + 1


@pytest.mark.parametrize("n_taps", [1, 3, 9])
def test_a_recording_is_filtered_as_numpy_convolves_it(n_taps: int) -> None:
    """With the response to an impulse, which is the filter: of all that is perturbed only that one is left."""
    config = PerturbationConfig(speed=0, filter_taps=n_taps, filter_strength=0.3, gain_db=(0, 0))
    impulse = torch.zeros(51)
    impulse[25] = 0.5
    response = 2 * perturbed(impulse, config, 7).double().numpy()
    assert np.count_nonzero(response) == n_taps
    samples = noise(400) / 4
    expected = np.convolve(samples.double().numpy(), response, mode="same")
    np.testing.assert_allclose(perturbed(samples, config, 7).numpy(), expected, atol=1e-6)


def test_a_perturbation_of_nothing_changes_nothing() -> None:
    config = PerturbationConfig(speed=0, filter_strength=0, gain_db=(0, 0))
    torch.testing.assert_close(perturbed(noise(300), config, 1), noise(300))


def test_a_stopped_run_goes_on_to_the_same_bits(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards)
    whole = train_tokenizer(written(tmp_path / "a.yaml", config), out=tmp_path / "whole")
    out = tmp_path / "parts"
    train_tokenizer(written(tmp_path / "a.yaml", config), out=out)
    (out / "checkpoints" / "step-4").rename(tmp_path / "gone")
    again = train_tokenizer(written(tmp_path / "a.yaml", config), out=out)
    assert folder_digest(again) == folder_digest(whole)
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == [f"step-{step}-{side}.wav" for step in (2, 4) for side in ("decoded", "original")]
    assert isinstance(load_modality(again), SpeechTokenizer)


def test_training_against_spectra_moves_both_sides(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, adversarial={"widths": [4], "n_ffts": [64, 128]})
    task = task_of(tmp_path, config)
    assert isinstance(task.module, AdversarialCodec)
    (batch, *_) = task.micro_batches(0, 0, 1)
    losses = task.module(batch.inputs)
    assert tuple(losses) == tuple(task.term_weights) == tuple(batch.counts)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.module.parameters())
    assert any(p.grad is not None and p.grad.any() for p in task.module.discriminator.parameters())
    train_tokenizer(written(tmp_path / "a.yaml", config | {"steps": 2}), out=tmp_path / "run")


def test_segments_that_are_no_whole_frames_are_refused(shards: Path) -> None:
    with pytest.raises(ValidationError, match="a multiple of tokenizer"):
        SpeechTokenizerTrainConfig(kind="speech_codec", name="any", data=shards, steps=1, segment_samples=7700)


def test_a_folder_without_speech_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(RawSample("0", (RawSpan("text", text="seven"),)))
    index_shards(tmp_path / "data")
    with pytest.raises(OmniformError, match="no speech that can be read"):
        task_of(tmp_path, config_of(tmp_path / "data"))


def test_several_folders_are_learnt_from_alike(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "more") as writer:
        for n in range(4):
            span = RawSpan("speech", payload=audio_bytes(noise(700, 10 + n), 16000, "wav"), extension="wav")
            writer.write(RawSample(str(n), (span, RawSpan("text", text="more"))))
    index_shards(tmp_path / "more")
    alone, other = (task_of(tmp_path, config_of(folder)) for folder in (shards, tmp_path / "more"))
    both = task_of(tmp_path, config_of(shards, more_data=[str(tmp_path / "more")]))
    assert len(both._items) == len(alone._items) + len(other._items) == 9
    assert all(map(torch.equal, both._items, [*alone._items, *other._items]))
    cut = task_of(tmp_path, config_of(shards, more_data=[str(tmp_path / "more")], max_items=3))
    assert all(map(torch.equal, cut._items, [*alone._items[:3], *other._items[:3]]))
    # A run that began with other folders does not go on with these; one with the same does.
    both.restore(task_of(tmp_path, config_of(shards, more_data=[str(tmp_path / "more")])).position(2))
    with pytest.raises(OmniformError, match=f"{shards}, {tmp_path / 'more'} holds other speech items"):
        both.restore(alone.position(2))
    both_ways = config_of(tmp_path / "more", more_data=[str(shards)], steps=1)
    train_tokenizer(written(tmp_path / "both.yaml", both_ways), out=tmp_path / "run")
    said = capsys.readouterr().out
    assert f"speech items of {shards} that cannot be read are left out: 1 x" in said
    assert f"items of {tmp_path / 'more'} that" not in said


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 5))
def test_latents_are_normalised_as_torch_does_with_what_they_average_to_kept(batch: int, length: int, dim: int) -> None:
    norm, latents = LatentNorm(dim, decay=0.9), 3 * torch.randn(batch, length, dim) + 1
    expected = F.batch_norm(latents.transpose(1, 2), None, None, training=True)
    torch.testing.assert_close(norm(latents), expected.transpose(1, 2), rtol=1e-4, atol=1e-4)
    for _ in range(200):
        norm(latents)
    norm.eval()
    torch.testing.assert_close(norm(latents), expected.transpose(1, 2), rtol=1e-3, atol=1e-3)
    alone = norm(latents[:1, :1])
    torch.testing.assert_close(alone, norm(latents)[:1, :1])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*speech*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_build(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, SpeechTokenizerTrainConfig)
    tokenizer = SpeechTokenizer(config.tokenizer, config.tokenizer.build())
    assert len(tokenizer.decode(tokenizer.encode(torch.zeros(100)))) == config.tokenizer.frame_samples
