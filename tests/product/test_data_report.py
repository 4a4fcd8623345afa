"""`omniform data info` and `data verify`: what they print for people, for programs, and while they read."""

import json
from pathlib import Path

import pytest
from sample_sounds import sine, stored
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two folders of shards: texts alone, and texts with sounds of half a second."""
    sound = RawSpan("speech", payload=stored(sine(0.5, 16_000), 16_000, "FLAC"), extension="flac")
    for name, spans in {"plain": (), "spoken": (sound, sound)}.items():
        with ShardWriter(tmp_path / name, 2) as writer:
            for place in range(3):
                writer.write(RawSample(f"k{place}", (RawSpan("text", text="a seven"), *spans), {"digit": 7}))
    return tmp_path


def test_info_has_a_row_per_folder_that_says_what_its_json_says(folders: Path) -> None:
    shown = CliRunner().invoke(app, ["data", "info", str(folders)])
    found = json.loads(CliRunner().invoke(app, ["data", "info", str(folders), "--json"]).stdout)
    head, plain, spoken = (line.split() for line in shown.stdout.splitlines()[2:5])
    assert head == ["folder", "samples", "shards", "MB", "text", "speech", "speech,", "s"]
    assert plain[:3] + plain[4:] == ["plain", "3", "2", "3", "-", "-"]
    assert spoken[:3] + spoken[4:] == ["spoken", "3", "2", "3", "6", "3"]
    assert found["splits"]["spoken"]["spans"] == {"speech": 6, "text": 3}
    assert found["splits"]["spoken"]["speech_seconds"] == 3.0
    assert float(spoken[3]) == pytest.approx(found["splits"]["spoken"]["bytes"] / 1e6, abs=0.05)


def test_what_cannot_be_used_stands_below_the_table(folders: Path) -> None:
    with ShardWriter(folders / "broken", 2) as writer:
        writer.write(RawSample("odd", (RawSpan("image", payload=b"no picture", extension="png"),)))
    shown = CliRunner().invoke(app, ["data", "info", str(folders)]).stdout
    assert "broken: 1 cannot be read: " in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("command", ["info", "verify"])
def test_each_folder_is_named_on_standard_error_alone(folders: Path, command: str) -> None:
    done = CliRunner().invoke(app, ["data", command, str(folders), "--json"])
    assert done.stderr.splitlines() == ["reading plain", "reading spoken"]
    assert isinstance(json.loads(done.stdout), dict)
