"""Programs of benchmarks/ that no other test runs still fit the code that they measure."""

import runpy
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_benchmark_imports_what_is_there_and_is_listed_if_it_runs(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(program.parent)
    found = runpy.run_path(str(program))
    # The command lists programs by this line, without running them.
    assert ("run" in found) == ("\ndef run(" in program.read_text(encoding="utf-8"))
