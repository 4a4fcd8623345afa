"""Training of tokenizers: which images come when, the same bits after a stop, and runs that cannot be continued."""

import shutil
from pathlib import Path

import pytest
import yaml

from omniform.data.digits import build_digits
from omniform.data.index import index_shards
from omniform.errors import OmniformError
from omniform.tokenizers.base import folder_digest
from omniform.tokenizers.registry import load_modality
from omniform.training.codec_task import CodecTask
from omniform.training.config import EngineConfig, OptimConfig
from omniform.training.tokenizer_config import ImageTokenizerTrainConfig
from omniform.training.tokenizer_task import train_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizers"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False)


def image_config(world: Path) -> dict[str, object]:
    return {
        "kind": "conv_vq",
        "name": "tiny",
        "data": str(world / "validation"),
        "steps": 4,
        "rows_per_step": 8,
        "tokenizer": {"widths": [8], "patch_size": 4, "quantizer": {"kind": "vq_ema", "codebook_size": 8, "dim": 4}},
        "optim": {"lr": 0.01, "ema_decay": None},
        "engine": {"precision": "fp32", "micro_batch_rows": 4},
        "checkpoint": {"every": 2},
        "log": {"every": 2, "samples_every": 3},
    }


def write(path: Path, config: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_comes_once_per_epoch_over_ranks_and_steps(world: Path, world_size: int) -> None:
    config = ImageTokenizerTrainConfig(
        kind="conv_vq",
        name="any",
        data=world / "validation",
        steps=13,
        rows_per_step=30,
        engine=EngineConfig(micro_batch_rows=5),
        optim=OptimConfig(ema_decay=None),
    )
    task = CodecTask(config)
    n_images = task.position(0)["n_items"]
    assert n_images == 130
    seen: list[bytes] = []
    for step in range(13):  # 390 images: three epochs
        ranks = [task.micro_batches(step, rank, world_size) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {30 // 5 // world_size}
        for batch in (batch for batches in ranks for batch in batches):
            assert batch.counts == {"reconstruction": 5.0}
            assert batch.n_tokens == 5 * 16
            seen += [item.numpy().tobytes() for item in batch.inputs]
    assert len(set(seen)) == n_images
    assert all(seen.count(item) == 3 for item in set(seen))
    assert sorted(seen[: 30 * 4]) != sorted(seen[30 * 4 : 30 * 8])


def test_other_data_cannot_continue_a_run(world: Path) -> None:
    config = ImageTokenizerTrainConfig(kind="conv_vq", name="any", data=world / "validation", steps=1)
    task = CodecTask(config)
    task.restore(task.position(0))
    with pytest.raises(OmniformError, match="holds other image items"):
        task.restore({**task.position(0), "data": "else"})


def test_a_run_that_was_stopped_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "tiny.yaml", image_config(world))
    first = train_tokenizer(config, [], tmp_path / "first")
    assert load_modality(first).representation.vocab_size == 8
    assert (tmp_path / "first" / "samples" / "step-3.png").exists()
    # As if it had been killed after step 2: the codebook's averages are in the checkpoint too.
    stopped = shutil.copytree(tmp_path / "first", tmp_path / "stopped")
    shutil.rmtree(stopped / "tokenizer")
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    again = train_tokenizer(config, [], stopped)
    assert folder_digest(again) == folder_digest(first)
    digest = folder_digest(first)
    assert train_tokenizer(config, [], tmp_path / "first") == first
    assert folder_digest(first) == digest
    with pytest.raises(OmniformError, match="seed: 3"):
        train_tokenizer(config, ["seed=3"], tmp_path / "first")


def test_the_text_tokenizer_is_learnt_from_captions_and_a_corpus(world: Path, tmp_path: Path) -> None:
    overrides = [f"data=[{world}/validation]", "vocab_size=600"]
    folder = train_tokenizer(CONFIGS / "digits-text.yaml", overrides, tmp_path / "text")
    assert load_modality(folder).representation.vocab_size == 600
    digest = folder_digest(folder)
    assert train_tokenizer(CONFIGS / "digits-text.yaml", overrides, tmp_path / "text") == folder
    assert folder_digest(folder) == digest
    with pytest.raises(OmniformError, match=r"-vocab_size: 600\n\+vocab_size: 500"):
        train_tokenizer(CONFIGS / "digits-text.yaml", [*overrides, "vocab_size=500"], tmp_path / "text")
    train_tokenizer(CONFIGS / "digits-text.yaml", [*overrides, "vocab_size=500"], tmp_path / "text", fresh=True)
    assert load_modality(folder).representation.vocab_size == 500


def test_damaged_samples_are_counted_and_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(world / "validation", tmp_path / "damaged")
    shard = damaged / "000000.tar"
    content = bytearray(shard.read_bytes())
    position = content.index(b'"text"')
    content[position + 1] ^= 1  # in the JSON of one sample
    shard.write_bytes(content)
    overrides = [f"data=[{damaged}]", "vocab_size=600"]
    folder = train_tokenizer(CONFIGS / "digits-text.yaml", overrides, tmp_path / "text")
    assert "cannot be read are left out: 1 x damaged, or not a sample: " in capsys.readouterr().out
    assert load_modality(folder).representation.vocab_size == 600
    config = write(tmp_path / "tiny.yaml", {**image_config(world), "data": str(damaged), "steps": 1})
    train_tokenizer(config, [], tmp_path / "image")
    assert (
        f"image items of {damaged} that cannot be read are left out: 1 x damaged, or not a sample: "
        in capsys.readouterr().out
    )


def test_indexes_may_lie_elsewhere(world: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(world / "validation", tmp_path / "bare", ignore=shutil.ignore_patterns("*.json"))
    index_shards(bare, tmp_path / "indexes")
    before = sorted(bare.iterdir())
    config = {**image_config(world), "data": str(bare), "index_dir": str(tmp_path / "indexes"), "steps": 1}
    train_tokenizer(write(tmp_path / "image.yaml", config), [], tmp_path / "image")
    overrides = [f"data=[{world}/validation,{bare}]", f"index_dirs=[null,{tmp_path}/indexes]", "vocab_size=400"]
    train_tokenizer(CONFIGS / "digits-text.yaml", overrides, tmp_path / "text")
    assert sorted(bare.iterdir()) == before


def test_configurations_that_cannot_be_used_are_refused(world: Path, tmp_path: Path) -> None:
    config = image_config(world)
    cases = [
        ({**config, "kind": "abacus"}, "expected a mapping whose kind is one of .*conv_vq, "),
        ({**config, "stepz": 4}, "stepz: unknown key; did you mean steps"),
        ({**config, "tokenizer": {"image_size": 18}}, "tokenizer: image_size is 18, expected a multiple of 4"),
        ({**config, "engine": {"precision": "bf16"}}, "choose bf16_autocast"),
        ({**config, "data": str(tmp_path / "none")}, "none does not exist: give the folder that holds the .tar shards"),
        (
            {**config, "stages": [{"name": "a", "loss_weights": {"txet": 1.0}}]},
            "txet: no such loss term",
        ),
        ({**config, "index_dir": str(tmp_path)}, f"omniform data index {world}/validation"),
        ({"kind": "sentencepiece", "name": "t", "data": ["a", "b"], "index_dirs": [None]}, "1 entries for 2 folders"),
        ({**config, "rows_per_step": 0}, "rows_per_step: .*greater than or equal to 1"),
    ]
    for content, message in cases:
        with pytest.raises(OmniformError, match=message):
            train_tokenizer(write(tmp_path / "bad.yaml", content), [], tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["digits-image", "digits-image-64", "digits-text"])
def test_shipped_configs_fit_digits_world(world: Path, tmp_path: Path, name: str) -> None:
    if name == "digits-text":
        overrides = [f"data=[{world}/train,{world}/train-text]"]
        folder = train_tokenizer(CONFIGS / f"{name}.yaml", overrides, tmp_path / "out")
        assert load_modality(folder).representation.vocab_size == 1024
    else:
        overrides = [f"data={world}/validation", "steps=1", "optim.warmup_steps=0", "engine.precision=fp32"]
        folder = train_tokenizer(CONFIGS / f"{name}.yaml", overrides, tmp_path / "out")
        tokenizer = load_modality(folder)
        assert tokenizer.fixed_grid == ((8, 8) if name == "digits-image-64" else (4, 4))
        assert tokenizer.representation.vocab_size == (16 if name == "digits-image-64" else 64)
