"""The import linter sees every room, also those that are only namespaces."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint(package: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "lint_imports.py"), str(package)]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "omniform"
    shutil.copytree(ROOT / "src" / "omniform", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_the_package_as_it_is_passes(package: Path) -> None:
    done = lint(package)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", "import omniform.tokenizers.base"),
        ("tokenizers", "from omniform.modeling import sequence"),
        ("modeling", "import omniform.data.schema"),
        ("training", "import omniform.inference.generate"),
        ("inference", "import omniform.training.task"),
        ("inference", "import omniform.data.schema"),
        ("training", "import deepspeed"),
        ("modeling", "import diffusers"),
        ("data", "def f():\n    import omniform.cli"),
    ],
)
def test_a_wrong_import_fails_and_is_named(package: Path, room: str, line: str) -> None:
    (package / room / "seeded.py").write_text(f"{line}\n")
    done = lint(package)
    assert done.returncode == 1
    assert f"omniform.{room}.seeded ->" in done.stdout
