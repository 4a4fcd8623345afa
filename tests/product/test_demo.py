"""The demo: stages are done once and in order, and what it and the README say to try works."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data import digits
from omniform.demo import MODALITIES, Stage, demo_stages, run_demo, run_stages
from omniform.errors import OmniformError
from omniform.modeling.config import parse_config
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.video_files import read_video
from omniform.training.config import TrainConfig
from omniform.training.tokenizer_task import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Workshop:
    """Stages a -> b -> c, and d after a alone, that each write a file, and a record of what ran, with what `fresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, list[tuple[str, bool]]()
        self.settings, self.broken = dict.fromkeys("abcd", 1), ""

    def run(self, *, fresh: bool = False) -> list[tuple[str, bool]]:
        """Go through the stages and return what ran this time."""
        self.ran = []
        needs = {"a": (), "b": ("a",), "c": ("b",), "d": ("a",)}
        stages = [Stage(n, self.settings[n], (self.folder / n,), self._maker(n), of) for n, of in needs.items()]
        run_stages(stages, self.folder / "stages.json", fresh=fresh)
        return self.ran

    def _maker(self, name: str) -> Any:
        def make(fresh: bool) -> None:
            self.ran.append((name, fresh))
            if self.broken == name:
                raise RuntimeError(name)
            (self.folder / name).touch()

        return make


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_finished_stages_are_not_done_again(workshop: Workshop) -> None:
    assert workshop.run() == [(name, True) for name in "abcd"]
    assert workshop.run() == []
    assert workshop.run(fresh=True) == [(name, True) for name in "abcd"]


def test_an_interrupted_stage_goes_on_and_its_time_adds_up(workshop: Workshop) -> None:
    workshop.broken = "b"
    with pytest.raises(RuntimeError):
        workshop.run()
    record = workshop.folder / "stages.json"
    content = json.loads(record.read_text())
    assert [(name, entry["done"]) for name, entry in content.items()] == [("a", True), ("b", False)]
    content["b"]["seconds"] = 1000.0
    record.write_text(json.dumps(content))
    workshop.broken = ""
    assert workshop.run() == [("b", False), ("c", True), ("d", True)]
    assert 1000 <= json.loads(record.read_text())["b"]["seconds"] < 1100


def test_changed_settings_redo_a_stage_and_all_that_need_it(workshop: Workshop) -> None:
    workshop.run()
    for name, redone in (("a", "abcd"), ("b", "bc"), ("c", "c"), ("d", "d")):
        workshop.settings[name] += 1
        assert workshop.run() == [(again, True) for again in redone]


def test_the_model_needs_the_tokenizers_of_its_configuration(tmp_path: Path) -> None:
    needs = {stage.name: stage.needs for stage in demo_stages(tmp_path, "full")}
    config = parse_config(TrainConfig, (ROOT / "configs" / "digits.yaml").read_text(encoding="utf-8"))
    assert set(config.tokenizers) == set(MODALITIES)
    assert set(needs["model"]) == {"data", "tokenizers"}
    for place, name in enumerate(needs):
        assert set(needs[name]) <= set(list(needs)[:place])


def test_a_lost_output_is_made_again(workshop: Workshop) -> None:
    workshop.run()
    (workshop.folder / "b").unlink()
    assert workshop.run() == [("b", False)]


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_folder_with_other_things_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(OmniformError, match=rf"{name} is not empty and has no manifest.*another --out"):
            run_demo(tmp_path, fresh=fresh, size="tiny")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.txt"]


def test_a_world_of_another_version_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (digits.VERSION, digits.VERSION + 1):
        monkeypatch.setattr(digits, "VERSION", version)
        run_stages(demo_stages(tmp_path, "tiny")[:1], tmp_path / "stages.json")
        assert json.loads((tmp_path / "data" / "manifest.json").read_text())["version"] == version


def test_data_under_a_manifest_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"files": ["precious"]}')
    with pytest.raises(OmniformError, match=r"manifest\.json is damaged.*choose another --out"):
        run_demo(tmp_path, size="tiny")
    assert (tmp_path / "data" / "manifest.json").read_text() == '{"files": ["precious"]}'


def test_tiny_demo_goes_all_the_way_and_what_it_suggests_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tmp_path / "runs" / "my demo"  # a space, which the commands that it prints must survive
    command = [sys.executable, "-m", "omniform.cli", "demo", "--size", "tiny", "--out", str(demo)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    metrics = json.loads((demo / "metrics.json").read_text())
    assert metrics["suite"] == "any-to-any"
    assert list(metrics["cells"]) == [f"{source}->{target}" for source in MODALITIES for target in MODALITIES]
    assert metrics["missing"] == []
    # Two were made at a time: every line tells of which it is.
    for modality in MODALITIES[1:]:
        assert f"\n{modality} tokenizer: step 4/4" in first.stderr
    report = (demo / "report.html").read_text()
    assert "learnt nothing" in report
    for modality in MODALITIES:
        assert f"<h3>{modality}</h3>" in report
    assert "data:audio/wav" in report
    assert "data:image/gif" in report

    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.stdout.count("done before") == 4

    monkeypatch.chdir(tmp_path)
    suggested = [line.strip() for line in again.stdout.partition("Try next:")[2].splitlines() if line.strip()]
    assert len(suggested) == 7
    for line in suggested:
        if "omniform eval" not in line:
            done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
    assert read_audio((tmp_path / "seven.wav").read_bytes(), 16000).numel()
    assert len(read_video((tmp_path / "seven.mp4").read_bytes(), fps=None, max_frames=100).frames) == 9
    assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")

    # The README loads what the demo and one of the configs have left.
    (tmp_path / "runs" / "demo").symlink_to(demo)
    steps = ["steps=2", "stages.0.steps=1", "optim.warmup_steps=1", "rows_per_step=2", "engine.micro_batch_rows=2"]
    done = CliRunner().invoke(app, ["train", "digits-documents", *steps], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    programs = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert programs
    exec("".join(programs), {})


def shown_commands() -> list[list[str]]:
    # Both fences from the start of a line, of any language: else a block's end is taken for a block's beginning.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    plain = "".join(block for language, block in blocks if not language).replace("\\\n", " ")
    lines = [line for line in plain.splitlines() if line.startswith("omniform ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", shown_commands(), ids=" ".join)
def test_readme_shows_commands_and_options_that_exist(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert arguments[0] in command.commands
        command, arguments = command.commands[arguments[0]], arguments[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert {argument for argument in own if argument.startswith("--")} <= options


def training_commands() -> list[tuple[str, list[str]]]:
    """(config, overrides) of each that the README and the help of `train` and `launch` show."""
    helps = "\n".join(inspect.getdoc(command.callback) or "" for command in app.registered_commands)
    examples = [shlex.split(line)[1:] for line in helps.splitlines() if line.startswith("omniform ")]
    found = []
    for arguments in [*shown_commands(), *examples]:
        if "train" in arguments:
            config, *rest = arguments[arguments.index("train") + 1 :]
            found.append((config, [argument for argument in rest if "=" in argument]))
    return found


@pytest.mark.parametrize(("config", "overrides"), training_commands(), ids=str)
def test_training_commands_that_are_shown_fit_their_configs(config: str, overrides: list[str]) -> None:
    file = ROOT / "configs" / f"{config}.yaml"
    if config.startswith("tokenizers/"):
        load_config(file, overrides)
    else:
        parse_config(TrainConfig, file.read_text(encoding="utf-8"), overrides)


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
