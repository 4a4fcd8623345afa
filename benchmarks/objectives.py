"""Objectives on pictures of 64 tokens at equal training compute: docs/objectives.md.

Needs the models that the commands of that page train. Every arm draws the same prompts with the same seeds; how it
samples is chosen on wordings of training with other seeds. `python benchmarks/objectives.py ARM ...` draws some arms
only, and keeps them for the run that measures.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paired import compare, control
from picture_arms import ARMS, ROOT, SLACK, Arm, Settings, captions, choose, draw, forward_passes
from picture_halves import HALVES, inpaint
from picture_scale import Pictures, Scale, to_picture
from pydantic import TypeAdapter

from omniform import load
from omniform.data.templates import TEST_TEMPLATES
from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.image_metrics import N_COMPONENTS, N_NEIGHBOURS
from omniform.inference.judges import difference_interval
from omniform.modeling.config import parse_config
from omniform.preview import image_grid
from omniform.training.config import TrainConfig

DOCS, RESULTS = Path("docs/images"), Path("benchmarks/results/objectives.json")
N, SEED, N_PAIRS = 1050, 1, 15
REFERENCE, EDITOR = "next_token", "masked 8"
TIMED = ("masked 4", "masked 8", "masked 16", "flow 10", "flow 25", "flow 50", "gmm", "masked_gmm 8")
SHOWN = (
    "next_token",
    "masked 4",
    "masked 8",
    "masked 16",
    "flow 10",
    "flow 50",
    "causal flow 25",
    "gmm",
    "masked_gmm 8",
)
# Pairs whose difference a published claim is about.
DIFFERENCES = (
    ("masked 8", "next_token"),
    ("flow 25", "next_token"),
    ("flow 10", "flow 50"),
    ("causal flow 25", "flow 25, guidance 2"),
    ("gmm", "masked_gmm 8"),
)


def check_equal_training() -> dict[str, Any]:
    """Return what all runs share, after making sure that they differ in nothing but how they learn images: in that
    objective, and in the tokenizer where one is for codes and the other for vectors.

    Raises:
        OmniformError: a run is missing, or they differ in something else.
    """
    learnt: dict[str, Any] = {}
    shared: dict[str, dict[str, Any]] = {}
    tokenizers: dict[str, dict[str, str]] = {}
    for arm in ARMS.values():
        if not (arm.model_folder / "manifest.sha256").exists():
            raise OmniformError(f"{arm.model_folder} holds no model: train it with the commands of docs/objectives.md")
        config = _resolved(arm.run)
        del config["tokenizers"]  # what a tokenizer is its bytes say, not where it lay
        learnt[arm.run] = config["model"]["objectives"].pop("image")
        shared[arm.run] = config
        digests = _digests(arm)
        if config != shared[ARMS[REFERENCE].run]:
            raise OmniformError(f"{ROOT / arm.run} differs from the others in more than model.objectives.image")
        for kind, modality in (("captions", "text"), (arm.tokenizer, "image")):
            if tokenizers.setdefault(kind, digests[modality]) != digests[modality]:
                raise OmniformError(f"{ROOT / arm.run} has another tokenizer of {kind} than the other runs")
    return {**shared[ARMS[REFERENCE].run], "objectives_of_image": learnt}


def _resolved(run: str) -> dict[str, Any]:
    """Return the settings of a run as today's code completes them: a run may be older than some of them."""
    config = parse_config(TrainConfig, (ROOT / run / "config.yaml").read_text(encoding="utf-8"))
    resolved: dict[str, Any] = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    return resolved


def _digests(arm: Arm) -> dict[str, dict[str, str]]:
    """Return the digest of each file of a model's tokenizers, by modality."""
    found: dict[str, dict[str, str]] = {}
    for line in (arm.model_folder / "manifest.sha256").read_text(encoding="utf-8").splitlines():
        digest, _, path = line.partition("  ")
        if path.startswith("tokenizers/"):
            _, modality, name = path.split("/", 2)
            found.setdefault(modality, {})[name] = digest
    return found


def time_arms(models: Mapping[str, Model], settings: Mapping[str, Settings]) -> dict[str, Any]:
    """Return seconds for a picture by arm, each arm timed in turns with the reference; alone, one thread."""
    torch.set_num_threads(1)

    def work(name: str) -> Callable[[], object]:
        given = ARMS[name].keywords(models[name], settings[name])
        return lambda: models[name].generate("the digit three", to="image", seed=0, **given)

    ratios = {name: compare(work(name), work(REFERENCE), N_PAIRS) for name in TIMED}
    calm, verdict = control(work("masked 4"), N_PAIRS)
    return {
        "seconds": {name: ratio.seconds[0] for name, ratio in ratios.items()}
        | {REFERENCE: statistics.median(ratio.seconds[1] for ratio in ratios.values())},
        "next_token_over_arm": {name: [r.ratio, r.low, r.high, r.n_dropped] for name, r in ratios.items()},
        "control": calm.ratio,
        "verdict": verdict,
    }


def differences(figures: Mapping[str, Any], drawn: Mapping[str, Pictures], scale: Scale) -> list[dict[str, Any]]:
    """Return how the arms of each of DIFFERENCES differ in accuracy and Fréchet distance."""
    found = []
    for one, other in DIFFERENCES:
        right, of_other = figures[one]["n_right"], figures[other]["n_right"]
        accuracy = {"value": (right - of_other) / N, "ci95": difference_interval(right, N, of_other, N)}
        frechet = scale.frechet_difference(drawn[one], drawn[other])
        found.append({"arms": [one, other], "accuracy": accuracy, "frechet": frechet})
    return found


def run(arms: Sequence[str] = tuple(ARMS)) -> dict[str, Any]:
    """Draw, choose, measure and time; write benchmarks/results/objectives.json and the pictures of the page.

    Args:
        arms: with fewer than all, their pictures are only drawn and kept for the run that measures.
    """
    torch.set_num_threads(1)
    training = check_equal_training()
    # One model object per arm: the choice temperature is set in it.
    models = {name: load(arm.model_folder) for name, arm in ARMS.items()}
    scale = Scale(N, SEED, {arm.tokenizer: models[name].tokenizers["image"] for name, arm in ARMS.items()})
    prompts, digits = captions(TEST_TEMPLATES, N)
    choosers = dict.fromkeys(ARMS[name].chosen_like or name for name in arms)
    chosen = {name: choose(name, models[name], scale) for name in choosers}
    settings = {name: chosen[ARMS[name].chosen_like or name][0] for name in arms}
    drawn = {name: draw(name, models[name], settings[name], prompts, SEED) for name in arms}
    if EDITOR in arms:
        inpainting, rows = inpaint(EDITOR, models[EDITOR], settings[EDITOR], scale, SEED)
    if set(arms) != set(ARMS):
        return {"text": f"drew {', '.join(arms)}"}
    figures: dict[str, Any] = {
        name: {
            "settings": dict(settings[name]),
            "forward_passes": forward_passes(name, models[name], settings[name]),
            **scale.measure(drawn[name], digits, arm.tokenizer),
        }
        for name, arm in ARMS.items()
    }
    for name in ARMS:
        figures[name]["less_next_token"] = difference_interval(
            figures[name]["n_right"], N, figures[REFERENCE]["n_right"], N
        )
    for name in SHOWN:
        grid = image_grid([to_picture(picture) for picture in drawn[name][:60]], scale=4)
        grid.save(DOCS / f"objectives-{name.replace(' ', '-').replace('_', '-')}.png")
    # Ten drawings, a digit each, through the halves in turn; one column per drawing.
    picked = [rows[10 * (digit % len(HALVES)) + digit] for digit in range(10)]
    image_grid([row[kind] for kind in range(4) for row in picked], scale=4).save(DOCS / "objectives-inpainting.png")
    results = {
        "training": training,
        "parameters": {arm.run: _n_parameters(models[name]) for name, arm in ARMS.items()},
        "features": {"n_components": N_COMPONENTS, "k": N_NEIGHBOURS, "n_references": len(scale.shown)},
        "real": scale.floors(),
        "choices": {"slack": SLACK, **{name: tried for name, (_, tried) in chosen.items()}},
        "arms": figures,
        "differences": differences(figures, drawn, scale),
        "inpainting": inpainting,
        "timing": time_arms(models, settings),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    return {**results, "text": as_text(results)}


def _n_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def as_text(results: Mapping[str, Any]) -> str:
    """Return the tables of docs/objectives.md."""
    lines: list[str] = []

    def row(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |")

    figures = {"accuracy": True, "frechet": False, "density": False, "coverage": True, "diversity": False}
    row("", "right, %", "Fréchet", "density", "coverage, %", "diversity", "copies, %")
    row(*["---"] * 7)
    for name, found in {**results["arms"], **results["real"]}.items():
        row(name, *(cell(found[key], percent) for key, percent in {**figures, "copy_rate": True}.items()))
    lines.append("")
    row("", "forward passes", "sampling", "right, less next_token, points", "s / picture")
    row(*["---"] * 5)
    for name, found in results["arms"].items():
        accuracy, reference = (results["arms"][arm]["accuracy"]["value"] for arm in (name, REFERENCE))
        difference = {"value": accuracy - reference, "ci95": found["less_next_token"]}
        seconds = results["timing"]["seconds"].get(name)
        told = "-" if seconds is None else f"{seconds:.3f}"
        settings = ", ".join(f"{key} {value:g}" for key, value in found["settings"].items())
        row(name, str(found["forward_passes"]), settings, cell(difference, True), told)
    lines.append("")
    row("", "right, points", "Fréchet")
    row(*["---"] * 3)
    for found in results["differences"]:
        row(" less ".join(found["arms"]), cell(found["accuracy"], True), cell(found["frechet"], False))
    lines.append("")
    row("", "all halves, %", *HALVES)
    row(*["---"] * 6)
    for name in ("original", "erased", "erased, judge of halves", "with caption", "without"):
        found = results["inpainting"][name]
        row(name, cell(found, True), *(cell(half, True) for half in found["halves"].values()))
    timing = results["timing"]
    ratios = (f"{name} {r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" for name, r in timing["next_token_over_arm"].items())
    lines.append(f"\nnext_token takes times as long as: {', '.join(ratios)}")
    lines.append(f"(control {timing['control']:.2f}: {timing['verdict']})")
    return "\n".join(lines)


def cell(entry: Mapping[str, Any], percent: bool) -> str:
    """Return a figure and its interval."""
    factor, digits = (100, 1) if percent else (1, 3)
    value, low, high = (factor * number for number in (entry["value"], *entry["ci95"]))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    print(run(sys.argv[1:] or tuple(ARMS))["text"])
