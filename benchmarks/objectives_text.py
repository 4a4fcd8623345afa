"""Objectives on text in bits per byte, and text beside pictures: docs/objectives.md.

Needs the models that the commands of that page train. Texts are scored through the model's own forward process: exactly
where every token is predicted from those before it, by an upper bound where masked tokens are.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from omniform import load
from omniform.data.moving_digits import HELD_OUT_PAIRS
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.modeling.config import parse_config
from omniform.modeling.corruption import corrupt
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.training.config import TrainConfig

ROOT, WORLD = Path("runs/objectives/text"), Path("runs/demo/data")
RESULTS = Path("benchmarks/results/objectives_text.json")
N_DRAWS = 128  # of times and masks per text, for the bound
N_RESAMPLES = 2000
REFERENCE = "next_token"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to learn the same captions.

    Attributes:
        bound: what is measured is an upper bound.
        differs: settings that may differ from those of the reference.
        seeds: of its trainings, each in the folder NAME-SEED.
    """

    bound: bool
    differs: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


ARMS = {
    "next_token": Arm(False, (), (0, 1)),
    "denoisers": Arm(False, ("model.denoisers", "data.sources")),
    "masked": Arm(True, ("model.objectives.text",)),
    "masked_4": Arm(True, ("model.objectives.text",)),
    "with_pictures": Arm(
        False, ("data.sources", "data.row_length", "rows_per_step", "engine.micro_batch_rows", "steps"), (0, 1)
    ),
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Held-out captions, and whether training showed the digit and motion that each names together."""

    texts: list[str]
    known: NDArray[np.bool_]

    @classmethod
    def read(cls, name: str) -> "Texts":
        """Read the captions of a folder of digits-world."""
        samples = list(ShardReader(WORLD / name))
        unknown = {pair for pairs in HELD_OUT_PAIRS.values() for pair in pairs}
        pairs = [(sample.metadata["digit"], sample.metadata["motion"]) for sample in samples]
        return cls([str(sample.spans[0].text) for sample in samples], np.array([p not in unknown for p in pairs]))

    @property
    def n_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of each."""
        return np.array([len(text.encode()) for text in self.texts])


def check_training() -> dict[str, Any]:
    """Return the settings of the reference, and in what the others differ from it: in what `ARMS` says alone.

    Raises:
        OmniformError: a run is missing, or differs in something else.
    """
    reference, differing = _flat(_resolved(f"{REFERENCE}-0")), {}
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            found = {k: v for k, v in _flat(_resolved(f"{name}-{seed}")).items() if reference.get(k, ()) != v}
            if found.pop("seed", 0) != seed or any(not key.startswith(arm.differs) for key in found):
                raise OmniformError(
                    f"{ROOT / name}-{seed} differs from {REFERENCE}-0 in {', '.join(found)}: train it as the page says"
                )
            differing[name] = found
    return {"reference": reference, "differing": differing}


def bits(model: Model, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the bits that each text and its end cost: exact, or the mean of a bound over N_DRAWS keyed draws."""
    network = model.network.eval()
    vocabulary, objectives = network.vocabulary, network.config.objectives
    n_draws = N_DRAWS if objectives["text"].corrupts else 1
    found = np.empty(len(texts))
    for place, text in enumerate(texts):
        parts = [Part("text", model.tokenizers["text"].encode(text), Role.TARGET)]
        drawn = [
            MultimodalSequence.build(parts, vocabulary, objectives, noise_key=place * n_draws + number)
            for number in range(n_draws)
        ]
        batch = corrupt(pack([[one] for one in drawn], len(drawn[0]), vocabulary), vocabulary, objectives)
        with torch.inference_mode():
            found[place] = float(network(batch)["text"]) / n_draws / math.log(2)
    return found


def per_byte(costs: NDArray[np.float64], sizes: NDArray[np.int64]) -> dict[str, Any]:
    """Return all bits over all bytes, with a 95 % interval by the bootstrap over texts."""
    places = np.random.default_rng(0).integers(len(costs), size=(N_RESAMPLES, len(costs)))
    resampled = costs[places].sum(1) / sizes[places].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(costs.sum() / sizes.sum()), "ci95": [float(low), float(high)]}


def run() -> dict[str, Any]:
    """Score every arm and write benchmarks/results/objectives_text.json."""
    torch.set_num_threads(1)
    training, held_out = check_training(), Texts.read("validation-video")
    shown = Texts.read("train-video").texts
    # Captions are made from templates, digits and motions, all alike: no model of the captions does better.
    floor = math.log2(len(set(shown)))
    costs = {
        (name, seed): bits(load(ROOT / f"{name}-{seed}" / "model"), held_out.texts)
        for name, arm in ARMS.items()
        for seed in arm.seeds
    }
    sizes, groups = held_out.n_bytes, {"known": held_out.known, "new": ~held_out.known}
    found = [
        {
            "arm": name,
            "seed": seed,
            "bound": ARMS[name].bound,
            **{group: per_byte(cost[chosen], sizes[chosen]) for group, chosen in groups.items()},
            "less_next_token": {
                group: per_byte((cost - costs[REFERENCE, seed])[chosen], sizes[chosen])
                for group, chosen in groups.items()
            },
        }
        for (name, seed), cost in costs.items()
    ]
    results = {
        "training": training,
        "n_texts": {group: int(chosen.sum()) for group, chosen in groups.items()},
        "n_texts_of_training": len(shown),
        "n_distinct_texts_of_training": len(set(shown)),
        "floor": {
            "bits_per_text": floor,
            "bits_per_byte": floor * int(held_out.known.sum()) / int(sizes[held_out.known].sum()),
        },
        "n_draws": N_DRAWS,
        "arms": found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    return {**results, "text": as_text(results)}


def as_text(results: Mapping[str, Any]) -> str:
    """Return the table of docs/objectives.md."""

    def cell(entry: Mapping[str, Any], sign: str = "") -> str:
        value, low, high = entry["value"], *entry["ci95"]
        return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"

    rows = [("bits per byte", "known", "new", "known, less next_token", "new, less next_token"), ("---",) * 5]
    for found in results["arms"]:
        less = found["less_next_token"]
        figures = (cell(found["known"]), cell(found["new"]), cell(less["known"], "+"), cell(less["new"], "+"))
        rows.append((f"{found['arm']}, seed {found['seed']}{', at most' if found['bound'] else ''}", *figures))
    rows.append(("floor", f"{results['floor']['bits_per_byte']:.4f}", "-", "-", "-"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _resolved(name: str) -> dict[str, Any]:
    folder = ROOT / name
    if not (folder / "model" / "manifest.sha256").exists():
        raise OmniformError(f"{folder} holds no model: train it with the commands of docs/objectives.md")
    config = parse_config(TrainConfig, (folder / "config.yaml").read_text(encoding="utf-8"))
    resolved: dict[str, Any] = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    return resolved


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by dotted path; lists are one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


if __name__ == "__main__":
    print(run()["text"])
