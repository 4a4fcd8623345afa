"""Check that the rooms import one way: lint a copy of the package that import-linter can see in full.

Usage: python .ci/lint_imports.py [PACKAGE_FOLDER]   (default: src/omniform)

import-linter skips folders without an `__init__.py`, and `tokenizers/` and `kernels/` must not have one (they would
shadow the packages of those names). So the package is copied with its links followed, the missing files are added to
the copy, and the contracts of pyproject.toml are checked on that. The exit status is 0 when all of them hold.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


def lint(package: Path) -> int:
    """Check the contracts on a copy of `package`; return the linter's exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "omniform"
        shutil.copytree(package, copy, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in {file.parent for file in copy.rglob("*.py")}:
            (folder / "__init__.py").touch()
        with contextlib.chdir(scratch):  # the linter looks there before it finds the installed package
            return lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(lint(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src" / "omniform"))
