"""next_token against masked prediction on pictures of 64 tokens, at equal training compute: docs/objectives.md.

Needs the two models that the commands of that page train. Every arm draws the same prompts with the same seeds; how it
samples is chosen on wordings of training with other seeds. What is drawn is kept in runs/objectives/drawn, so that the
same command goes on where it was stopped, and `python benchmarks/objectives.py ARM ...` draws some arms only.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from paired import compare, control
from PIL import Image

from omniform import load
from omniform.data.shards import ShardReader
from omniform.data.templates import TEST_TEMPLATES, TRAIN_TEMPLATES, render
from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.image_metrics import (
    N_COMPONENTS,
    N_NEIGHBOURS,
    FeatureSpace,
    Manifold,
    diversity,
    frechet_distance,
    jackknife_interval,
)
from omniform.inference.judges import DigitImageJudge, at_judged_size, copy_rate, difference_interval, wilson_interval
from omniform.preview import image_grid

ROOT, WORLD = Path("runs/objectives"), Path("runs/demo/data")
DOCS, RESULTS = Path("docs/images"), Path("benchmarks/results/objectives.json")
STEPS = (1, 2, 4, 8, 16)
ARMS = ("next_token", *(f"masked {steps}" for steps in STEPS))
COMPARED = ("masked 4", "masked 8", "masked 16")
REFERENCE, EDITOR = "next_token", "masked 8"
N, N_CHOICE, SEED, CHOICE_SEED = 2100, 300, 1, 0
GUIDANCE, TEMPERATURES, CHOICE_TEMPERATURES = (1.5, 2.0, 3.0), (0.8, 0.9, 1.0), (4.5, 9.0, 18.0)
CHOSEN_LIKE = {"masked 1": "masked 4", "masked 2": "masked 4"}
SLACK = 0.01  # of accuracy, given away for a smaller Frechet distance when settings are chosen
HALVES = {"left": (0, 0, 8, 16), "right": (8, 0, 16, 16), "top": (0, 0, 16, 8), "bottom": (0, 8, 16, 16)}
Pictures = NDArray[np.float32]
Settings = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Split:
    """Real pictures (N, 16, 16) in [-1, 1], what they show, and whether they were made from another one."""

    pictures: Pictures
    digits: NDArray[np.int64]
    altered: NDArray[np.bool_]
    texts: list[str]

    @classmethod
    def read(cls, name: str) -> "Split":
        samples = list(ShardReader(WORLD / name))
        pictures = [to_array(Image.open(io.BytesIO(sample.spans[1].payload or b""))) for sample in samples]
        return cls(
            np.stack(pictures),
            np.array([sample.metadata["digit"] for sample in samples]),
            np.array([sample.metadata["copy"] > 0 for sample in samples]),
            [str(sample.spans[0].text) for sample in samples],
        )


class Scale:
    """What every arm is measured with: judge, features and references, all of real train rows."""

    def __init__(self, tokenizer: Any) -> None:
        self.train, self.test = Split.read("train"), Split.read("test")
        originals = ~self.train.altered
        self.judge = DigitImageJudge.fit(self.train.pictures, self.train.digits)
        self.space = FeatureSpace.fit(self.train.pictures[originals])
        self.shown = self.space.features(self.train.pictures)
        self.manifold = Manifold(self.shown[originals])
        self.tokenizer = tokenizer
        # Both sides of a copy rate have been through the tokenizer, or its loss alone would keep them apart.
        self.decoded = self.round_trip(self.train.pictures)
        # As many train pictures as an arm draws: what a perfect model would reach, and its spread within a class.
        self.sample = np.random.default_rng(SEED).permutation(len(self.shown))[:N]
        self.spread = diversity(self.shown[self.sample], self.train.digits[self.sample])

    def round_trip(self, pictures: Pictures) -> Pictures:
        """Encode and decode, as a drawn picture is decoded."""
        items = [self.tokenizer.from_pil(to_picture(picture)) for picture in pictures]
        decoded = self.tokenizer.decode_batch(self.tokenizer.encode_batch(items))
        return np.stack([to_array(self.tokenizer.to_pil(item)) for item in decoded])

    def measure(self, pictures: Pictures, digits: NDArray[np.int64]) -> dict[str, Any]:
        """Return every figure of a set of pictures that should show these digits, with 95 % intervals."""
        points, n = self.space.features(pictures), len(pictures)
        right = int((self.judge.predict(pictures) == digits).sum())
        inside = self.manifold.inside(points)
        covered = int(inside.any(0).sum())
        copies = copy_rate(pictures, self.decoded, self.decoded[~self.train.altered])
        around = inside.sum(1) / self.manifold.k

        def with_interval(statistic: Callable[[NDArray[np.int64]], float]) -> dict[str, Any]:
            return {"value": statistic(np.arange(n)), "ci95": jackknife_interval(statistic, n)}

        return {
            "n": n,
            "n_right": right,
            "accuracy": {"value": right / n, "ci95": wilson_interval(right, n)},
            "frechet": with_interval(lambda places: frechet_distance(points[places], self.shown)),
            "density": with_interval(lambda places: float(around[places].mean())),
            "coverage": {
                "value": covered / len(self.manifold.points),
                "ci95": wilson_interval(covered, len(self.manifold.points)),
                "expected_of_real": self.manifold.expected_coverage(n),
            },
            "diversity": with_interval(lambda places: diversity(points[places], digits[places]) / self.spread),
            "copy_rate": {"value": copies, "ci95": wilson_interval(round(copies * n), n)},
        }

    def floors(self) -> dict[str, Any]:
        """Return the figures of real pictures, as they are and through the tokenizer."""
        test, train = self.test, self.train
        found = {
            "train pictures": (train.pictures[self.sample], train.digits[self.sample]),
            "train pictures, decoded": (self.decoded[self.sample], train.digits[self.sample]),
            "held-out drawings": (test.pictures, test.digits),
            "held-out drawings, decoded": (self.round_trip(test.pictures), test.digits),
        }
        return {name: self.measure(*pair) for name, pair in found.items()}


def to_array(picture: Image.Image) -> Pictures:
    """Return a grey picture in [-1, 1] at 16 x 16: the mean of the pixels that each covers."""
    return at_judged_size(np.asarray(picture.convert("L"), dtype=np.float32)[None] / np.float32(127.5) - 1)[0]


def to_picture(pixels: Pictures) -> Image.Image:
    """Return a 16 x 16 array in [-1, 1] as a grey picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8))


def keywords(arm: str, model: Model, settings: Settings) -> dict[str, Any]:
    """Return the keywords of `generate` for an arm; the choice temperature is the objective's, and set there."""
    chosen = dict(settings)
    if arm == REFERENCE:
        return chosen
    config = model.network.config
    image = dataclasses.replace(config.objectives["image"], choice_temperature=chosen.pop("choice_temperature"))  # type: ignore[call-arg]
    model.network.config = dataclasses.replace(config, objectives={**config.objectives, "image": image})
    return {**chosen, "steps": int(arm.split()[1])}


def captions(templates: Sequence[str], n: int) -> tuple[list[str], NDArray[np.int64]]:
    """Return n captions and their digits: neighbouring ones are of all digits, then of all templates."""
    digits = np.arange(n) % 10
    return [render(templates[place // 10 % len(templates)], int(d)) for place, d in enumerate(digits)], digits


def kept(what: str, identity: Sequence[Any], work: Callable[[], Sequence[Image.Image]]) -> Pictures:
    """Return the pictures that some work draws, or read what the same work drew before."""
    digest = hashlib.sha256(json.dumps([what, *identity]).encode()).hexdigest()
    path = ROOT / "drawn" / f"{what.replace(' ', '-')}-{digest[:16]}.npy"
    if not path.exists():
        pictures = np.stack([to_array(picture) for picture in work()])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, pictures)
        print(f"drew {len(pictures)} pictures: {what}", file=sys.stderr, flush=True)
    return np.load(path, allow_pickle=False)


def draw(arm: str, model: Model, settings: Settings, prompts: Sequence[str], seed: int) -> Pictures:
    """Draw one picture per prompt."""
    identity = [dict(settings), list(prompts), seed, (model_folder(arm) / "manifest.sha256").read_text()]
    given = keywords(arm, model, settings)
    return kept(
        arm,
        identity,
        lambda: [reply.images[0] for reply in model.generate_batch(prompts, "image", seed=seed, **given)],
    )


def choose(arm: str, model: Model, scale: Scale) -> tuple[Settings, list[dict[str, Any]]]:
    """Return the settings with the smallest Frechet distance among those whose accuracy is within SLACK of the best,
    and what each was seen to reach."""
    name, values = ("temperature", TEMPERATURES) if arm == REFERENCE else ("choice_temperature", CHOICE_TEMPERATURES)
    prompts, digits = captions(TRAIN_TEMPLATES, N_CHOICE)
    tried = []
    for guidance, value in itertools.product(GUIDANCE, values):
        settings = {"guidance_scale": guidance, name: value}
        pictures = draw(arm, model, settings, prompts, CHOICE_SEED)
        accuracy = float((scale.judge.predict(pictures) == digits).mean())
        tried.append(
            {**settings, "accuracy": accuracy, "frechet": frechet_distance(scale.space.features(pictures), scale.shown)}
        )
    enough = max(entry["accuracy"] for entry in tried) - SLACK
    best = min((entry for entry in tried if entry["accuracy"] >= enough - 1e-9), key=lambda entry: entry["frechet"])
    return {key: best[key] for key in ("guidance_scale", name)}, tried


def forward_passes(arm: str, model: Model, settings: Settings) -> int:
    """Count the decoder's passes for one picture; guidance doubles their rows, not their number."""
    calls: list[None] = []
    hook = model.network.decoder.register_forward_hook(lambda *_: calls.append(None))
    model.generate("the digit three", to="image", seed=0, **keywords(arm, model, settings))
    hook.remove()
    return len(calls)


def time_arms(models: Mapping[str, Model], settings: Mapping[str, Settings]) -> dict[str, Any]:
    """Return seconds per picture by batch size and arm, each arm timed in turns with the reference; one thread."""
    torch.set_num_threads(1)

    def work(arm: str, n: int) -> Callable[[], object]:
        prompts = captions(TEST_TEMPLATES, n)[0]
        given = {} if arm == REFERENCE else {"steps": int(arm.split()[1])}
        given |= {key: value for key, value in settings[arm].items() if key != "choice_temperature"}
        return lambda: models[arm].generate_batch(prompts, "image", seed=0, **given)

    found: dict[str, Any] = {}
    for n, n_pairs in ((1, 21), (100, 7)):
        ratios = {arm: compare(work(arm, n), work(REFERENCE, n), n_pairs) for arm in COMPARED}
        calm, verdict = control(work("masked 4", n), n_pairs)
        seconds = {arm: ratio.seconds[0] / n for arm, ratio in ratios.items()}
        seconds[REFERENCE] = statistics.median(ratio.seconds[1] / n for ratio in ratios.values())
        found[str(n)] = {
            "seconds_per_picture": seconds,
            "next_token_over_arm": {arm: [r.ratio, r.low, r.high, r.n_dropped] for arm, r in ratios.items()},
            "control": calm.ratio,
            "verdict": verdict,
        }
    return found


def inpaint(model: Model, settings: Settings, scale: Scale) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Erase each half of every held-out drawing before the model sees it, have it drawn anew, and ask the judge.

    Returns:
        Figures by half, and rows of pictures: drawing, erased, anew with its caption, anew without.
    """
    test, given = scale.test, keywords(EDITOR, model, settings)
    free = {**given, "guidance_scale": 1.0}  # nothing to push towards
    originals, manifest = [to_picture(p) for p in test.pictures], (model_folder(EDITOR) / "manifest.sha256").read_text()
    right: dict[str, list[NDArray[np.bool_]]] = {}
    rows: list[list[Image.Image]] = []
    for half, box in HALVES.items():
        mask = Image.new("L", (16, 16), 0)
        mask.paste(255, box)
        erased = [Image.composite(Image.new("L", (16, 16), 0), picture, mask) for picture in originals]
        pictures = {"original": test.pictures, "erased": np.stack([to_array(picture) for picture in erased])}
        for name, prompts, chosen in (("with caption", test.texts, given), ("without", [[]] * len(erased), free)):
            edit = functools.partial(model.generate_batch, prompts, "image", image=erased, mask=mask, seed=SEED)
            work = functools.partial(lambda edit, chosen: [reply.images[0] for reply in edit(**chosen)], edit, chosen)
            pictures[name] = kept(f"{half} half {name}", [prompts, dict(settings), manifest], work)
        for name, shown in pictures.items():
            right.setdefault(name, []).append(scale.judge.predict(shown) == test.digits)
        # What the rest of a drawing tells: a judge that was fitted on erased train drawings alone.
        train = scale.train.pictures[~scale.train.altered].copy()
        train[:, box[1] : box[3], box[0] : box[2]] = -1
        of_halves = DigitImageJudge.fit(train, scale.train.digits[~scale.train.altered])
        right.setdefault("erased, judge of halves", []).append(of_halves.predict(pictures["erased"]) == test.digits)
        for digit in range(10):
            place = int(np.flatnonzero(test.digits == digit)[0])
            rows.append([to_picture(shown[place]) for shown in pictures.values()])
    figures = {}
    for name, by_half in right.items():
        mean = np.stack(by_half).mean(0)  # of the halves of one drawing, which are not independent of each other
        low, high = jackknife_interval(lambda places, mean=mean: float(mean[places].mean()), len(mean), len(mean))
        halves = {
            half: {"value": float(hits.mean()), "ci95": wilson_interval(int(hits.sum()), len(hits))}
            for half, hits in zip(HALVES, by_half, strict=True)
        }
        figures[name] = {"value": float(mean.mean()), "ci95": [max(0.0, low), min(1.0, high)], "halves": halves}
    return {"n_drawings": len(originals), "settings": dict(settings), **figures}, rows


def model_folder(arm: str) -> Path:
    """Return where the documented commands put the model of an arm."""
    return ROOT / arm.split()[0] / "model"


def check_equal_training() -> dict[str, Any]:
    """Return what both runs share, after making sure that they differ in the objective of images and in nothing else.

    Raises:
        OmniformError: a run is missing, or they differ in something else.
    """
    for name in ("next_token", "masked"):
        if not (model_folder(name) / "manifest.sha256").exists():
            raise OmniformError(
                f"{model_folder(name)} holds no model: train it with the commands of docs/objectives.md"
            )
    places = [ROOT / name / "config.yaml" for name in ("next_token", "masked")]
    runs: list[dict[str, Any]] = [yaml.safe_load(place.read_text(encoding="utf-8")) for place in places]
    learnt = [run["model"]["objectives"].pop("image") for run in runs]
    if runs[0] != runs[1] or [entry["kind"] for entry in learnt] != ["next_token", "masked"]:
        raise OmniformError(
            "the two runs differ in more than model.objectives.image: train both with the same settings"
        )
    return {**runs[0], "objectives_of_image": learnt}


def run(arms: Sequence[str] = ARMS) -> dict[str, Any]:
    """Draw, choose, measure and time; write benchmarks/results/objectives.json and the pictures of the page.

    Args:
        arms: with fewer than all, their pictures are only drawn and kept for the run that measures.
    """
    torch.set_num_threads(1)
    training = check_equal_training()
    # One model object per arm: the choice temperature is set in it.
    models = {arm: load(model_folder(arm)) for arm in ARMS}
    scale = Scale(models[REFERENCE].tokenizers["image"])
    prompts, digits = captions(TEST_TEMPLATES, N)
    settings: dict[str, Settings] = {}
    tried, drawn = {}, {}
    for arm in sorted(arms, key=lambda arm: arm in CHOSEN_LIKE):
        alike = CHOSEN_LIKE.get(arm, arm)
        settings[arm], tried[alike] = choose(alike, models[alike], scale)
        drawn[arm] = draw(arm, models[arm], settings[arm], prompts, SEED)
    if EDITOR in arms:
        inpainting, rows = inpaint(models[EDITOR], settings[EDITOR], scale)
    if set(arms) != set(ARMS):
        return {"text": f"drew {', '.join(arms)}"}
    figures = {
        arm: {
            "settings": dict(settings[arm]),
            "forward_passes": forward_passes(arm, models[arm], settings[arm]),
            **scale.measure(drawn[arm], digits),
        }
        for arm in ARMS
    }
    of_reference = figures[REFERENCE]["n_right"]
    for arm in ARMS:
        figures[arm]["less_next_token"] = difference_interval(figures[arm]["n_right"], N, of_reference, N)
        shown = [to_picture(picture) for picture in drawn[arm][:60]]
        if arm in (REFERENCE, *COMPARED):
            image_grid(shown, scale=4).save(DOCS / f"objectives-{arm.replace(' ', '-').replace('_', '-')}.png")
    # Ten drawings, a digit each, through the halves in turn; one column per drawing.
    picked = [rows[10 * (digit % len(HALVES)) + digit] for digit in range(10)]
    shown = [row[kind] for kind in range(4) for row in picked]
    image_grid(shown, scale=4).save(DOCS / "objectives-inpainting.png")
    results = {
        "training": training,
        "parameters": sum(p.numel() for p in models[REFERENCE].network.parameters()),
        "features": {"n_components": N_COMPONENTS, "k": N_NEIGHBOURS, "n_references": len(scale.shown)},
        "real": scale.floors(),
        "choices": tried,
        "arms": figures,
        "inpainting": inpainting,
        "timing": time_arms(models, settings),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    return {**results, "text": as_text(results)}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the tables of docs/objectives.md."""

    def cell(entry: Mapping[str, Any], percent: bool = True) -> str:
        factor, digits = (100, 1) if percent else (1, 3)
        value, low, high = (factor * number for number in (entry["value"], *entry["ci95"]))
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def row(*cells: str) -> None:
        lines.append(f"| {' | '.join(cells)} |")

    lines: list[str] = []
    percent = ("accuracy", "coverage", "copy_rate")
    row("", "right, %", "Fréchet", "density", "coverage, %", "diversity", "copies, %")
    row(*["---"] * 7)
    for name, found in {**results["arms"], **results["real"]}.items():
        keys = ("accuracy", "frechet", "density", "coverage", "diversity", "copy_rate")
        row(name, *(cell(found[key], key in percent) for key in keys))
    lines.append("")
    row("", "forward passes", "right, less next_token, points", "s / picture, batch 1", "batch 100")
    row(*["---"] * 5)
    for name, found in results["arms"].items():
        low, high = (100 * number for number in found["less_next_token"])
        difference = 100 * (found["accuracy"]["value"] - results["arms"][REFERENCE]["accuracy"]["value"])
        times = [results["timing"][n]["seconds_per_picture"].get(name) for n in ("1", "100")]
        told = ["-" if seconds is None else f"{seconds:.4f}" for seconds in times]
        apart = "-" if name == REFERENCE else f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        row(name, str(found["forward_passes"]), apart, *told)
    lines.append("")
    row("", "all halves, %", *HALVES)
    row(*["---"] * 6)
    for name in ("original", "erased", "erased, judge of halves", "with caption", "without"):
        found = results["inpainting"][name]
        row(name, cell(found), *(cell(half) for half in found["halves"].values()))
    for n, found in results["timing"].items():
        ratios = (f"{arm} {r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" for arm, r in found["next_token_over_arm"].items())
        lines.append(f"\nnext_token takes, at batch {n}, times as long as: {', '.join(ratios)}")
        lines.append(f"(control {found['control']:.2f}: {found['verdict']})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(run(sys.argv[1:] or ARMS)["text"])
