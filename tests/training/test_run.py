"""Training from a YAML file to a model folder, on a small world with a real text and a random image tokenizer."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import omniform
from omniform.errors import OmniformError
from omniform.modeling.config import parse_config
from omniform.modeling.folder import LoadedModel
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.image import ImageTokenizer
from omniform.tokenizers.vocabulary import Vocabulary
from omniform.training.config import FitConfig, TrainConfig
from omniform.training.forecast import forecast
from omniform.training.run import model_card, train
from omniform.training.run_folder import LOCK, RunFolderError, open_run_folder


@pytest.fixture(scope="module")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[bool, Path]]]:
    out, previews = tmp_path_factory.mktemp("run"), []
    train(config_file, out=out, preview=lambda model, folder: previews.append((isinstance(model, LoadedModel), folder)))
    return out, previews


def test_run_folder_holds_a_model_that_generates(trained: tuple[Path, list]) -> None:
    out, previews = trained
    assert {"config.yaml", "log.jsonl", "checkpoints", "model", "tensorboard"} <= {p.name for p in out.iterdir()}
    assert previews == [(True, out / "samples" / "step-2"), (True, out / "samples" / "step-4")]
    model = omniform.load(out / "model")
    assert model.defaults["image"].guidance_scale == 2.0
    assert model.max_sequence_length == 96
    [image] = model.generate("a seven", to="image", seed=0).images
    assert np.asarray(image).shape[:2] == (16, 16)
    average = load_file(out / "checkpoints" / "step-4" / "ema.safetensors")
    stored = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in average.items())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_and_micro_batches_take_the_same_steps(
    config_file: Path, trained: tuple[Path, list], tmp_path: Path, stage: int
) -> None:
    train(config_file, [f"engine.zero_stage={stage}", "engine.micro_batch_rows=4"], tmp_path)
    ours, theirs = (
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (tmp_path, trained[0])
    )
    for a, b in zip(ours, theirs, strict=True):
        # fp32 rounding of sums in another order
        for key in ("loss/text", "loss/image", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_continued_run_has_the_same_end(config_file: Path, trained: tuple[Path, list], tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(model: LoadedModel, folder: Path) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(config_file, out=tmp_path, preview=interrupt)
    assert not (tmp_path / "model").exists()
    train(config_file, out=tmp_path)
    for name in ("model/model.safetensors", "checkpoints/step-4/weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_run_with_routers_resumes_to_the_bit_and_reports_their_violation(
    config_file: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    experts = "{kind: topk, n: 4, k: 2, z_weight: 0.001, bias_rate: 0.001}"
    overrides = [f"model.decoder.experts={experts}", "checkpoint.every=1"]
    overrides += [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    train(config_file, overrides, tmp_path / "never")
    entries = [json.loads(line) for line in (tmp_path / "never" / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        assert 0 <= entry["router_violation"] <= 1  # of 4 experts, 2 for each row
        assert entry["loss/router_z"] > 0
    assert entries[0]["loss/router_balance"] == pytest.approx(1)  # no load is known before the first step

    class Interrupted(Exception):
        pass

    def interrupt(model: LoadedModel, folder: Path) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(config_file, overrides, tmp_path / "stopped", preview=interrupt)
    stopped = load_file(tmp_path / "stopped" / "checkpoints" / "step-2" / "weights.safetensors")
    for buffer in ("load", "bias_steps"):
        assert any(name.endswith(buffer) and value.any() for name, value in stopped.items())
    train(config_file, overrides, tmp_path / "stopped")
    for name in ("model/model.safetensors", "checkpoints/step-4/weights.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "never" / name).read_bytes()
    model = omniform.load(tmp_path / "never" / "model")
    assert model.generate("a seven", to="image", seed=0).images


STAGES = [
    {"name": "pairs", "steps": 2, "mixture": {"train-documents": {"weight": 0.0}}},
    {"name": "all", "mixture": {"train": {"tasks": {"image->text": 1.0}}}},
]
DOCUMENTS = "data.row_length=240", f"stages={json.dumps(STAGES)}", "model.next_span_weight=0.5"


def with_documents(config_file: Path) -> list[str]:
    data = yaml.safe_load(config_file.read_text())["data"]
    folder = Path(data["sources"][0]["path"]).parent
    documents = {"path": f"{folder}/train-documents", "tasks": {"interleaved": 1.0}}
    return [f"data.sources={json.dumps([*data['sources'], documents])}", *DOCUMENTS]


def test_a_run_of_stages_learns_documents_when_it_should_and_resumes_in_either_stage(
    config_file: Path, tmp_path: Path
) -> None:
    overrides = [*with_documents(config_file), "checkpoint.every=1", "log.samples_every=1"]
    train(config_file, overrides, tmp_path / "never")
    entries = [json.loads(line) for line in (tmp_path / "never" / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], "loss/next_span" in entry) for entry in entries] == [
        *(("pairs", False), ("pairs", False), ("all", True), ("all", True))
    ]

    class Interrupted(Exception):
        pass

    for crash in (1, 2, 3):
        out = tmp_path / f"stopped-{crash}"

        def interrupt(model: LoadedModel, folder: Path, crash: int = crash) -> None:
            if folder.name == f"step-{crash}":
                raise Interrupted

        with pytest.raises(Interrupted):
            train(config_file, overrides, out, preview=interrupt)
        train(config_file, overrides, out)
        for name in ("model/model.safetensors", "checkpoints/step-4/state.json"):
            assert (out / name).read_bytes() == (tmp_path / "never" / name).read_bytes()


def test_a_way_is_learnt_and_taken_by_the_model(config_file: Path, tmp_path: Path) -> None:
    """Any drawing of the same digit, after what the given one is called."""
    data = config_file.parent / "data/train"
    overrides = [
        f"data.sources.0.join=[{{path: {data}, by: [digit], modalities: [image]}}]",
        "data.sources.0.tasks={image->text+image: 1}",
        "through={image: {image: text}}",
        "steps=2",
        "log.samples_every=0",
    ]
    model = omniform.load(train(config_file, overrides, tmp_path / "run"))
    [seven] = model.generate([], "image", seed=0).images
    reply = model.generate(seven, "image", seed=1)
    assert [part.modality for part in (*reply.through, *reply.parts)] == ["text", "image"]
    losses = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert losses["loss/text"] > 0 < losses["loss/image"]


def test_a_mixture_of_denoisers_trains_and_its_folder_fills_gaps(config_file: Path, tmp_path: Path) -> None:
    """The markers of the modes are those of training: the folder's vocabulary is built from the same config."""
    overrides = [
        "model.denoisers={r: {kind: spans}, s: {kind: prefix, given: bidirectional}, fill: middle}",
        "data.sources.0.tasks={text~r: 1, text~s: 1, text~fill: 1, text->image: 1}",
        "steps=2",
        "log.samples_every=0",
    ]
    model = omniform.load(train(config_file, overrides, tmp_path / "run"))
    assert model.network.vocabulary.modes == ("r", "s", "fill")
    asked: list[dict[str, Any]] = [{"suffix": " seven"}, {"mode": "s"}, {"mode": "r"}]
    for keywords in asked:
        assert [part.modality for part in model.generate("a", seed=0, max_new_tokens=4, **keywords).parts] == ["text"]
    losses = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert losses["loss/text"] > 0 < losses["loss/image"]


def test_text_in_masked_blocks_trains_and_generates(config_file: Path, tmp_path: Path) -> None:
    text = "{kind: masked, block_size: 4, schedule: linear, masking: independent, weighting: elbo, threshold: 0.9}"
    overrides = [f"model.objectives.text={text}", "data.row_length=128", "steps=2", "log.samples_every=0"]
    model = omniform.load(train(config_file, overrides, tmp_path / "run"))
    reply = model.generate([], to=["text", "image", "text"], seed=0, max_new_tokens=8)
    assert [part.modality for part in reply.parts] == ["text", "image", "text"]


def test_model_card_names_what_was_joined(config_file: Path) -> None:
    join = "[{path: a, by: [digit], modalities: [image, text]}, {path: b, by: [digit], modalities: [image]}]"
    config = parse_config(TrainConfig, config_file.read_text(), [f"data.sources.0.join={join}"])
    image = ImageTokenizer.load(config.tokenizers["image"])
    with torch.device("meta"):
        model = UnifiedModel(config.model, Vocabulary(300, {"image": image.representation}, []))
    path = config.data.sources[0].path
    assert f"- `{path}`, with image and text of `a`, with image of `b`: image->text, text->image" in model_card(
        config, model
    )


def test_dry_run_shows_the_stages(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*with_documents(config_file), "optim.lr=0.1", "optim.schedule=constant"]
    train(config_file, overrides, tmp_path / "run", dry_run=True)
    shown = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert shown == [
        "pairs: steps 1 to 2, learning rate 0.1 to 0.1; train 83% (image->text, text->image), "
        "train-text 17% (text->text)",
        "all: steps 3 to 4, learning rate 0.1 to 0.1; train 45% (image->text), train-text 9% (text->text), "
        "train-documents 45% (interleaved)",
    ]


def test_stages_that_draw_alike_are_one_stretch_of_data(config_file: Path) -> None:
    stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 2, "learning_rate": {"lr": 1.0}}, *STAGES[1:]]
    config = parse_config(TrainConfig, config_file.read_text(), [f"stages={json.dumps(stages)}"])
    assert [stage.first_step for stage in config.data_stages] == [0, 3]
    assert config.data_stages[0].config == config.data
    assert parse_config(TrainConfig, config_file.read_text()).data_stages == ()


def test_launched_processes_train_the_same_model(config_file: Path, trained: tuple[Path, list], tmp_path: Path) -> None:
    command = ["launch", "--nproc", "2", "--", "train", str(config_file), "engine.zero_stage=3", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "omniform.cli", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (tmp_path, trained[0]))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_dry_run_writes_nothing_and_counts_what_is_built(
    config_file: Path, trained: tuple[Path, list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_file, out=tmp_path / "run", dry_run=True)
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    model = omniform.load(trained[0] / "model").network
    n = sum(p.numel() for p in model.parameters())
    assert f"parameters  {n:,} (" in printed
    config = parse_config(TrainConfig, config_file.read_text())
    figures = forecast(model, config, 1, free_disk=10**12)
    checkpoint = trained[0] / "checkpoints" / "step-4"
    stored = sum(p.stat().st_size for p in checkpoint.iterdir())
    # Headers, digests and random state are beside the tensors.
    assert figures.checkpoint_bytes <= stored < figures.checkpoint_bytes + 40_000
    with pytest.raises(OmniformError, match="two checkpoints take"):
        forecast(model, config, 1, free_disk=figures.checkpoint_bytes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lerning_rate=1", "optim.lerning_rate: unknown key"),
        ("optim.lr=-1", "optim.lr: .*greater than 0"),
        ("optim.warmup_steps=4", "warmup_steps is 4, expected fewer than steps = 4"),
        ("rows_per_step=0", "rows_per_step: .*greater than or equal to 1"),
        ("tokenizers.image=/nowhere", "/nowhere"),
        ("model.objectives={text: next_token}", "model.objectives is for"),
        (
            "model.position_embeddings={smell: 4}",
            r"model\.position_embeddings\.smell is for no modality .* text",
        ),
        ("data.sources.0.join=[{path: /nowhere, by: [digit], modalities: [image]}]", "/nowhere"),
        ("name=..", "name: String should match"),
        ("seed=9223372036854775808", "seed: .*less than 9223372036854775808"),
        ("engine={zero_stage: 0, precision: bf16}", "bf16 at zero_stage 0"),
        ("stages=[{name: a, mixture: {tarin: {weight: 1}}}]", r"stages\.0\.mixture: tarin: data.sources has 0 sources"),
        ("stages=[{name: a, mixture: {train: {weight: -1}}}]", r"stages\.0\.mixture\.train\.weight: .*greater than"),
        ("stages=[{name: a, mixture: {train: {tasks: {text: 1}}}}]", r"stages\.0\.mixture\.train: task 'text'"),
        (
            "stages=[{name: a, mixture: {train: {weight: 0}, train-text: {weight: 0}}}]",
            r"stages\.0\.mixture: every source has the weight 0",
        ),
        ("stages=[{name: a, loss_weights: {text: 0, image: 0}}]", r"stages\.0\.loss_weights: every loss of .* 0"),
        (
            "stages=[{name: a, steps: 1, loss_weights: {text: 0}, mixture: {train: {weight: 0}}}, {name: b}]",
            r"stages\.0\.loss_weights: every loss of text->text has the weight 0",
        ),
        ("stages=[{name: a, loss_weights: {imgae: 1}}]", r"stages\.0\.loss_weights\.imgae: no such .*are text, image"),
        ("through={text: {image: image}}", r"through: .*text\.image is image, expected a modality other than these"),
        (
            "through={image: {image: text}}",
            r"through\.image\.image is text, but no source that is drawn has the task image->text\+image",
        ),
        ("data.sources.0.tasks={text~z: 1}", r"\(train\): the task text~z needs model\.denoisers\.z; there is none"),
        ("data.sources.1.weight=0", r"data\.sources\.1: train-text has the weight 0 in the whole run"),
    ],
)
def test_bad_config_fails_before_anything_is_written(
    config_file: Path, tmp_path: Path, override: str, message: str
) -> None:
    for dry_run in (True, False):
        with pytest.raises(OmniformError, match=message):
            train(config_file, [override], tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_guidance_needs_a_branch_without_a_condition(config_file: Path, tmp_path: Path) -> None:
    overrides = ["generation={image: {guidance_scale: 2.0}}", "data.condition_dropout=0"]
    with pytest.raises(OmniformError, match=r"generation\.image\.guidance_scale is 2\.0, .*condition_dropout is 0"):
        train(config_file, overrides, tmp_path / "run", dry_run=True)
    # What a document of texts and pictures in turns begins with has no condition.
    documents = json.dumps({"path": str(config_file.parent / "data" / "train-documents"), "tasks": {"interleaved": 1}})
    train(config_file, [*overrides, f"data.sources.1={documents}"], tmp_path / "run", dry_run=True)


def test_tokenizer_under_another_name_is_refused(config_file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(config_file.read_text())
    swapped = [f"tokenizers.text={config['tokenizers']['image']}"]
    with pytest.raises(OmniformError, match="holds a tokenizer for image: expected one for text"):
        train(config_file, swapped, tmp_path / "run")


def test_a_tokenizer_that_does_not_exist_is_answered_with_one_that_does(config_file: Path, tmp_path: Path) -> None:
    image = Path(yaml.safe_load(config_file.read_text())["tokenizers"]["image"])
    nearly = image.with_name("imag")
    inner = image.with_name("tex") / "tokenizer"
    for name, given, advice in (
        ("image", nearly, f"did you mean {image}\\?"),
        ("text", inner, f"did you mean {image.with_name('text')}/tokenizer\\?"),
        ("image", tmp_path / "x" / "tokenizer", f"tokenizer train tokenizers/digits-image --out {tmp_path}/x`"),
        ("smell", tmp_path / "x", f"tokenizer train CONFIG --out {tmp_path}/x`"),
    ):
        with pytest.raises(OmniformError, match=rf"tokenizers\.{name} is {given}, which does not exist: .*{advice}"):
            train(config_file, [f"tokenizers.{name}={given}"], tmp_path / "run", dry_run=True)


def test_changed_config_names_the_change(config_file: Path, trained: tuple[Path, list]) -> None:
    with pytest.raises(RunFolderError, match=r"-seed: 0\n\+seed: 1"):
        train(config_file, ["seed=1"], trained[0])


def test_where_and_by_how_many_tokens_are_kept_may_change(config_file: Path, tmp_path: Path) -> None:
    config = parse_config(TrainConfig, config_file.read_text(encoding="utf-8"))
    open_run_folder(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)  # it has begun
    open_run_folder(tmp_path / "run", replace(config, encoding_workers=3, cache_dir=tmp_path / "elsewhere"))
    with pytest.raises(RunFolderError, match="another configuration"):
        open_run_folder(tmp_path / "run", replace(config, rows_per_step=2 * config.rows_per_step))


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OmniformError, match=r"nothing\.yaml cannot be read"):
        train(tmp_path / "nothing.yaml")


def test_folder_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    config = FitConfig(name="any", steps=1)
    open_run_folder(tmp_path / "mine", config)
    open_run_folder(tmp_path / "mine", config)  # one process may go on in the folder that it holds
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    (tmp_path / "theirs" / "config.yaml").touch()
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "theirs" / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        for fresh in (False, True):
            with pytest.raises(RunFolderError, match=r"another process is training in .*theirs"):
                open_run_folder(tmp_path / "theirs", config, fresh=fresh)
        assert (tmp_path / "theirs" / "checkpoints").exists()
        process.kill()
    open_run_folder(tmp_path / "theirs", config, fresh=True)
    assert not (tmp_path / "theirs" / "checkpoints").exists()
