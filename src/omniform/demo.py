"""`omniform demo`: data, tokenizers, model, evaluation and report, each stage done once.

    OUT/data   OUT/tokenizers/{text,image,speech,video}   OUT/run   OUT/model   OUT/metrics.json   OUT/report.html

A stage is identified by a digest of its settings and of the stages that it needs. It is skipped when the one that
OUT/stages.json calls finished has that digest, continued when the one that was begun has it, and made anew otherwise.
"""

import functools
import hashlib
import json
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from omniform import __version__
from omniform.cell_report import cells_as_text
from omniform.data import digits
from omniform.data.job_pool import done_in_processes, lines_after
from omniform.data.sealed import unseal, write_atomically
from omniform.data.templates import TEST_TEMPLATES, render
from omniform.data.verify import MANIFEST as WORLD_MANIFEST
from omniform.errors import OmniformError
from omniform.inference.evaluation import evaluate_any_to_any
from omniform.inference.generate import Model
from omniform.inference.tokenizer_evaluation import evaluate_tokenizer
from omniform.modeling.folder import MANIFEST as MODEL_MANIFEST
from omniform.modeling.folder import commit, load_model_folder
from omniform.preview import PROMPTS, draw_samples
from omniform.report import write_report
from omniform.training.run import train
from omniform.training.run_folder import lock_folder
from omniform.training.tokenizer_task import train_tokenizer

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_OUT = Path("runs/demo")
# That make tokenizers, that encode, as configs/digits.yaml says, and that evaluate, each with a gigabyte of its own.
N_WORKERS = 2
N_ITEMS = 100  # of a cell that are scored, and of a tokenizer: `omniform eval` takes all
MODALITIES = ("text", "image", "speech", "video")
_LONGEST_FIRST = ("speech", "video", "image", "text")
_PROMPTS = tuple(f"the digit {digit}" for digit in range(10))
# Two rows of ten for each wording that training never saw.
_SHOWN = tuple(render(template, digit) for template in TEST_TEMPLATES * 2 for digit in range(10))
_TINY_STEPS = ("steps=4", "optim.warmup_steps=1", "rows_per_step=4", "engine.micro_batch_rows=4", "log.every=1")


@dataclass(frozen=True)
class Stage:
    """One step on the way.

    Attributes:
        settings: everything that its result depends on, besides the stages that it needs.
        outputs: what exists once it is done.
        run: carries it out; `fresh` tells to delete what an earlier, different run left.
        needs: names of the stages before it whose results it reads.
    """

    name: str
    settings: object
    outputs: tuple[Path, ...]
    run: Callable[[bool], object]
    needs: tuple[str, ...] = ()


def run_demo(out: Path, fresh: bool = False, size: Literal["full", "tiny"] = "full") -> Path:
    """Go from nothing to a trained model and its report, and return the report's path.

    Args:
        out: folder for everything; what is finished in it is kept, what was begun goes on.
        fresh: do all stages anew.
        size: "tiny" takes the same path with very few steps: its model has learnt nothing.

    Raises:
        OmniformError: `out` holds other things where the demo puts its own, another process works in it, or a stage
            could not be carried out; the stages before it stay done.
    """
    _refuse_foreign(out)
    lock_folder(out)
    run_stages(demo_stages(out, size), out / "stages.json", fresh=fresh)
    note = "Size tiny: a few steps of everything. The model has learnt nothing yet." if size == "tiny" else ""
    report = write_report(out, _commands(out, size), note)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{cells_as_text(metrics)}\n\nreport: {report}\nmodel:  {out / 'model'}\n\nTry next:")
    for command in _next_commands(out):
        print(f"  {command}")
    return report


def run_stages(stages: Sequence[Stage], record: Path, *, fresh: bool = False) -> None:
    """Carry out the stages that `record` does not know as finished, in order, and note time and memory of each.

    Args:
        record: JSON file, {stage: {"digest", "done", "seconds", "peak_mib"}}, seconds summed over interruptions.
    """
    known: dict[str, dict[str, Any]] = {}
    if record.exists() and not fresh:
        known = json.loads(record.read_text(encoding="utf-8"))
    digests: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        settings = json.dumps([[digests[name] for name in stage.needs], stage.name, stage.settings], default=str)
        digest = digests[stage.name] = hashlib.sha256(settings.encode()).hexdigest()
        before = known.get(stage.name, {})
        begun = before.get("digest") == digest
        title = f"[{number}/{len(stages)}] {stage.name}"
        if begun and before["done"] and all(output.exists() for output in stage.outputs):
            print(f"{title}: done before, in {before['seconds']:.0f} s", flush=True)
            continue
        print(f"{title} ...", flush=True)
        spent = before["seconds"] if begun and not before["done"] else 0.0
        entry: dict[str, Any] = {"digest": digest, "done": False, "seconds": spent, "peak_mib": 0.0}
        known[stage.name] = entry
        started = time.monotonic()
        _write_record(record, known)
        try:
            stage.run(not begun)
            entry["done"] = True
        finally:
            entry["seconds"] = round(spent + time.monotonic() - started, 2)
            entry["peak_mib"] = _peak_mib()
            _write_record(record, known)
        print(f"{title}: {entry['seconds']:.0f} s, at most {entry['peak_mib']:,.0f} MiB", flush=True)


def demo_stages(out: Path, size: str) -> list[Stage]:
    """Return the stages of the demo in `out`, in order."""
    data, model = out / "data", out / "model"
    tiny = size == "tiny"
    copies, takes, limit = (1, 1, 20) if tiny else (16, None, N_ITEMS)
    configs = {name: f"tokenizers/digits-{name}" for name in MODALITIES} | {"model": "digits"}
    # The text tokenizer is not trained in steps.
    short: dict[str, tuple[str, ...]] = {}
    if tiny:
        short = {name: _TINY_STEPS for name in MODALITIES if name != "text"}
        short["model"] = (*_TINY_STEPS, "stages.0.steps=2")
    overrides = {name: [*_moved_to(out, file), *short.get(name, ())] for name, file in configs.items()}
    recipes = {
        name: [(CONFIGS / f"{file}.yaml").read_text(encoding="utf-8"), overrides[name]]
        for name, file in configs.items()
    }

    def build(fresh: bool) -> None:
        if fresh and (data / WORLD_MANIFEST).exists():
            unseal(data / WORLD_MANIFEST, f"if {data} may go, remove it; else choose another --out")  # is it ours?
            shutil.rmtree(data)
        digits.build_digits(data, copies=copies, limit=takes)

    def tokenize(fresh: bool) -> None:
        # A thread more shortens each of them less than another one beside it: their layers are small.
        n_threads = torch.get_num_threads()
        n_processes = min(N_WORKERS, n_threads)
        jobs = [
            _TokenizerJob(name, CONFIGS / f"{configs[name]}.yaml", overrides[name], folders[name], fresh)
            for name in _LONGEST_FIRST
        ]
        start = functools.partial(_tokenizer_maker, data, limit, n_threads // n_processes)
        with closing(done_in_processes(jobs, start, n_processes)) as done:
            for _ in done:
                pass

    def fit(fresh: bool) -> None:
        preview = functools.partial(draw_samples, prompts=_PROMPTS)
        trained = train(CONFIGS / "digits.yaml", overrides["model"], out / "run", fresh=fresh, preview=preview)
        draft = out / ".model.draft"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(trained, draft)
        commit(draft, model)

    def evaluate(fresh: bool) -> None:
        loaded = load_model_folder(model)
        draw_samples(loaded, out / "samples", _SHOWN)
        # The second judge of speech would take a minute more; `omniform eval` asks it.
        evaluate_any_to_any(
            Model(loaded), data, limit=limit, second_judge=False, out=out / "metrics.json", workers=N_WORKERS
        )

    folders = {name: out / "tokenizers" / name for name in MODALITIES}
    made = [folder / file for folder in folders.values() for file in ("tokenizer", "evaluation/tokenizer.json")]
    evaluated = (out / "metrics.json", out / "samples.json", out / "samples/images.png", out / "samples" / PROMPTS)
    of_tokenizers = [[recipes[name] for name in MODALITIES], limit]
    return [
        Stage("data", [__version__, digits.VERSION, copies, takes], (data / "manifest.json",), build),
        Stage("tokenizers", of_tokenizers, tuple(made), tokenize, needs=("data",)),
        Stage("model", recipes["model"], (model / "manifest.sha256",), fit, needs=("data", "tokenizers")),
        Stage("evaluation", [limit, "one judge of speech"], evaluated, evaluate, needs=("data", "model")),
    ]


@dataclass(frozen=True)
class _TokenizerJob:
    modality: str
    config: Path
    overrides: Sequence[str]
    folder: Path
    fresh: bool

    def __str__(self) -> str:
        return f"{self.modality} tokenizer"


def _tokenizer_maker(data: Path, limit: int | None, n_threads: int) -> Callable[[_TokenizerJob], None]:
    torch.set_num_threads(n_threads)

    def make(job: _TokenizerJob) -> None:
        with lines_after(f"{job}: "):
            folder = train_tokenizer(job.config, job.overrides, job.folder, fresh=job.fresh)
            evaluate_tokenizer(folder, data, limit=limit, out=job.folder / "evaluation")

    return make


def _refuse_foreign(out: Path) -> None:
    """Refuse to replace folders that hold something, but not the file that completes what the demo writes there."""
    for folder, mark in ((out / "data", WORLD_MANIFEST), (out / "model", MODEL_MANIFEST)):
        if folder.exists() and not (folder / mark).exists() and any(folder.iterdir()):
            raise OmniformError(
                f"{folder} is not empty and has no {mark}, so Omniform did not write it: choose another --out, or move "
                "it away"
            )


def _moved_to(out: Path, config: str) -> list[str]:
    """Return overrides that turn a shipped config's paths below runs/demo into paths below `out`."""
    if out == DEFAULT_OUT:
        return []
    content = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8"))
    moved = {key: _replace_prefix(value, out) for key, value in content.items()}
    return [f"{key}={json.dumps(value)}" for key, value in moved.items() if value != content[key]]


def _replace_prefix(value: Any, out: Path) -> Any:
    if isinstance(value, dict):
        return {key: _replace_prefix(entry, out) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replace_prefix(entry, out) for entry in value]
    if isinstance(value, str) and Path(value).is_relative_to(DEFAULT_OUT):
        return str(out / Path(value).relative_to(DEFAULT_OUT))
    return value


def _write_record(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")


def _peak_mib() -> float:
    """Return at most how much memory was held at once so far, in MiB: what this process held, and N_WORKERS times what
    the largest of the processes that it started did."""
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round((own + N_WORKERS * child) / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _commands(out: Path, size: str) -> list[str]:
    tiny = ["--size tiny"] if size == "tiny" else []
    options = [*([] if out == DEFAULT_OUT else [f"--out {shlex.quote(str(out))}"]), *tiny]
    return [
        "make demo" if not options else f"omniform demo {' '.join(options)}",
        "",
        "# or one stage after the other, with the shipped configs:",
        f"omniform data build digits --out {DEFAULT_OUT}/data",
        *(
            f"omniform tokenizer train tokenizers/digits-{name} --out {DEFAULT_OUT}/tokenizers/{name}"
            for name in MODALITIES
        ),
        f"omniform train digits --out {DEFAULT_OUT}/run",
        f"omniform eval {DEFAULT_OUT}/run/model --data {DEFAULT_OUT}/data --out {DEFAULT_OUT}/metrics.json \\",
        f"    --limit {N_ITEMS} --no-second-judge --workers {N_WORKERS}",
    ]


def _next_commands(out: Path) -> list[str]:
    model, data = shlex.quote(str(out / "model")), shlex.quote(str(out / "data"))
    return [
        f'omniform generate {model} "a handwritten seven" --to image --out seven.png',
        f"omniform generate {model} @seven.png --to text",
        f"omniform generate {model} @seven.png --to speech --seed 0 --out seven.wav",
        f"omniform generate {model} @seven.wav --to video --out seven.mp4",
        f"omniform chat {model} --to image",
        f"omniform eval {model} --data {data}",
        f"omniform data preview {data}",
    ]
