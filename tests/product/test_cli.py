"""The command line: helpful to a stranger, quick to answer, one line and a status for what went wrong."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from omniform.cli import app
from omniform.errors import COMPLAINTS_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
COMMAND = typer.main.get_command(app)


def paths(group: object, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in getattr(group, "commands", {}).items():
        found += [(*prefix, name), *paths(command, (*prefix, name))]
    return found


def omniform(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-m", "omniform.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("path", [(), *paths(COMMAND)], ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage: " in shown.output
    command: object = COMMAND
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    assert all(parameter.help for parameter in command.params if parameter.name != "help")  # type: ignore[attr-defined]


def test_help_of_every_command_leaves_torch_alone() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from omniform.cli import app\n"
        f"for path in {[(), *paths(COMMAND)]!r}: assert CliRunner().invoke(app, [*path, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'diffusers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["tran"], ["train"]),
        (["train", "--ot", "x"], ["--out"]),
        (["data", "build", "digit", "--out", "x"], ["digits"]),
        (["train", "no-such-config"], ["no-such-config", "expected"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["data", "build", "digits", "--out", "x", "--seed", "-1"], ["--seed"]),
        (["data", "from-folder", ".", "--out", "x", "--max-aspect-ratio", "inf"], ["--max-aspect-ratio: ", "finite"]),
        (["launch", "--", "eval", "x"], ["train"]),
        (["generate", "no-such-folder", "a three"], ["no-such-folder"]),
        (["data", "info", "no-such-folder"], ["no-such-folder"]),
        (["bench", "no-such-benchmark"], ["no-such-benchmark", "expected"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_answered_on_stderr_with_status_2(arguments: list[str], hints: list[str], tmp_path: Path) -> None:
    done = omniform(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert all(hint in done.stderr for hint in hints), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_launch_complain_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLAINTS_VARIABLE, str(tmp_path))
    first, second, other = omniform("bench", "a"), omniform("bench", "a"), omniform("bench", "b")
    assert [done.returncode for done in (first, second, other)] == [2, 2, 2]
    assert "no benchmark 'a'" in first.stderr
    assert second.stderr == ""
    assert "no benchmark 'b'" in other.stderr


def test_an_interrupt_is_answered_with_one_line() -> None:
    stopped = typer.Typer(cls=app.info.cls)

    @stopped.command()
    def work() -> None:
        raise KeyboardInterrupt

    @stopped.callback()
    def root() -> None:
        """Make `work` a command among others."""

    shown = CliRunner().invoke(stopped, ["work"])
    assert (shown.exit_code, shown.output) == (130, "omniform: interrupted\n")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    done = omniform("data", "build", "digits", "--out", "taken", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "omniform: taken: Not a directory\n")


def test_names_from_data_cannot_command_the_terminal(tmp_path: Path) -> None:
    content = tarfile.TarInfo("\x1b[2Jevil.pkl"), tarfile.TarInfo("\x1b[2Jevil.pkl")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for member in content:
            archive.addfile(member)
    done = omniform("data", "index", ".", cwd=tmp_path)
    assert done.returncode == 2
    (tmp_path / "0.tar").unlink()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.addfile(content[0])
    assert omniform("data", "index", ".", cwd=tmp_path).returncode == 0
    shown = omniform("data", "verify", ".", cwd=tmp_path)
    assert shown.returncode == 1
    assert "\ufffd[2Jevil" in shown.stdout
    assert "\x1b" not in shown.stdout + done.stderr


def test_a_missing_extra_is_named_with_the_command_that_brings_it() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from omniform.cli import app, main\n"
        "@app.command('ask')\n"
        "def ask(): import sklearn\n"
        "sys.argv = ['omniform', 'ask']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "omniform[demo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_control_c_gives_status_130_and_no_traceback() -> None:
    program = (
        "import sys\n"
        "from omniform.cli import app, main\n"
        "@app.command('wait')\n"
        "def wait(): raise KeyboardInterrupt\n"
        "sys.argv = ['omniform', 'wait']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
