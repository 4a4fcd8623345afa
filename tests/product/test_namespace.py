"""The rooms lie at the repository's root under names that other packages use too; neither hides the other."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "inference", "kernels", "modeling", "tokenizers", "training")
PROBE = """
import os, runpy, sys
if "console" in sys.argv:
    sys.argv[1:] = ["--version"]
    try:
        runpy.run_path(os.path.join(os.path.dirname(sys.executable), "omniform"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
import tokenizers, transformers, diffusers
transformers.PreTrainedTokenizerFast, transformers.LlamaConfig, diffusers.AutoencoderKL
assert hasattr(tokenizers, "Tokenizer"), tokenizers
import omniform.tokenizers.vocabulary, omniform.kernels.keyed_noise
assert tokenizers is not omniform.tokenizers
# One text, which two processes cannot write into each other.
print("as it " + "should be")
"""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["tokenizers", "kernels"])
def test_folder_named_like_a_package_is_only_a_namespace(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py hides the package {folder!r}"


def test_no_test_folder_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_linked_relatively(room: str) -> None:
    link = ROOT / "src" / "omniform" / room
    assert os.readlink(link) == f"../../{room}"


def test_peers_import_under_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    exec(PROBE, {})


@pytest.mark.parametrize("way", ["-c", "-m", "console script"])
def test_peers_import_from_the_root(way: str, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    command = {"-c": ("-c", PROBE), "-m": ("-m", "probe"), "console script": ("-c", PROBE, "console")}[way]
    assert "as it should be" in run(*command, PYTHONPATH=str(tmp_path))


def test_peers_import_in_launched_processes(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    options = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    printed = run("-m", "torch.distributed.run", *options, "-m", "probe", PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    assert printed.count("as it should be") == 2


def test_low_rooms_import_without_the_heavy_libraries() -> None:
    run(
        "-c",
        "import importlib, pathlib, sys\n"
        "for name in ('deepspeed', 'webdataset', 'sentencepiece'): sys.modules[name] = None\n"
        "for room in ('kernels', 'modeling'):\n"
        "    for file in pathlib.Path(room).rglob('*.py'):\n"
        "        importlib.import_module('omniform.' + '.'.join(file.with_suffix('').parts).removesuffix('.__init__'))",
    )


def test_wheel_holds_every_module_and_config_and_works_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "configs", *ROOMS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    package = ROOT / "src" / "omniform"
    expected = {file.relative_to(package) for room in ROOMS for file in (package / room).rglob("*.py")}
    expected |= {file.relative_to(package) for file in (package / "configs").rglob("*.yaml")}
    expected |= {file.relative_to(package) for file in package.glob("*.py")} | {Path("py.typed")}
    found = {file.relative_to(target / "omniform") for file in (target / "omniform").rglob("*") if file.is_file()}
    assert found == expected
    shown = run(
        "-c",
        "import omniform.cli as c, omniform.tokenizers.base as t, omniform.data.templates as d\n"
        "print(c.__file__, t.__file__, d.__file__, sep='\\n'); c.app(['--help'])",
        cwd=tmp_path,
        PYTHONPATH=str(target),
    )
    assert all(line.startswith(str(target)) for line in shown.splitlines()[:3])
    assert "demo" in shown
