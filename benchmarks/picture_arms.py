"""The arms of docs/objectives.md that draw pictures: which model draws, how it samples, and what it has drawn.

What is drawn is kept in runs/objectives/drawn, so that the same command goes on where it was stopped.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from picture_scale import Pictures, Scale, to_array
from PIL import Image

from omniform.data.templates import TRAIN_TEMPLATES, render
from omniform.inference.generate import Model

ROOT = Path("runs/objectives")
CHOICE_SEED = 0
SLACK = 0.01  # of accuracy, given away for a smaller Fréchet distance when settings are chosen
Settings = Mapping[str, float]
_OF_OBJECTIVE = {"choice_temperature"}  # settings that no request has


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to draw.

    Attributes:
        run: folder of the model's run in runs/objectives.
        steps: of drawing; None for an objective that has none.
        tried: values of each setting, all of whose combinations are tried on `n_tried` pictures.
        chosen_like: name of the arm whose settings it takes over instead.
        tokenizer: name of the tokenizer of its pictures.
    """

    run: str
    steps: int | None = None
    tried: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    n_tried: int = 200
    chosen_like: str | None = None
    tokenizer: str = "codes"

    @property
    def model_folder(self) -> Path:
        """Where the documented commands put the model."""
        return ROOT / self.run / "model"

    def keywords(self, model: Model, settings: Settings) -> dict[str, Any]:
        """Return the keywords of `generate`; what is the objective's is set there."""
        config = model.network.config
        own = {name: value for name, value in settings.items() if name in _OF_OBJECTIVE}
        if own:
            image: Any = dataclasses.replace(config.objectives["image"], **own)  # type: ignore[arg-type]
            model.network.config = dataclasses.replace(config, objectives={**config.objectives, "image": image})
        given: dict[str, Any] = {name: value for name, value in settings.items() if name not in own}
        return given if self.steps is None else {**given, "steps": self.steps}


_GUIDANCE = (1.5, 2.0, 3.0)
_MASKED = {"guidance_scale": _GUIDANCE, "choice_temperature": (4.5, 9.0, 18.0)}
_FLOW = {"guidance_scale": (1.0, 1.5, 2.0, 3.0)}
_MIXTURES = {"guidance_scale": (1.0, 2.0, 4.0), "temperature": (0.1, 0.2, 0.3)}
ARMS = {
    "next_token": Arm("next_token", None, {"guidance_scale": _GUIDANCE, "temperature": (0.8, 0.9, 1.0)}, 300),
    "masked 1": Arm("masked", 1, chosen_like="masked 4"),
    "masked 2": Arm("masked", 2, chosen_like="masked 4"),
    "masked 4": Arm("masked", 4, _MASKED, 300),
    "masked 8": Arm("masked", 8, _MASKED, 300),
    "masked 16": Arm("masked", 16, _MASKED, 300),
    "flow 10": Arm("flow", 10, chosen_like="flow 25", tokenizer="latents"),
    "flow 25": Arm("flow", 25, _FLOW, tokenizer="latents"),
    "flow 50": Arm("flow", 50, chosen_like="flow 25", tokenizer="latents"),
    # With the guidance that the causal one takes, which decides more than anything else how pictures are spread.
    "flow 25, guidance 2": Arm("flow", 25, {"guidance_scale": (2.0,)}, 100, tokenizer="latents"),
    "causal flow 25": Arm("flow-causal", 25, _FLOW, 100, tokenizer="latents"),
    "gmm": Arm("gmm", None, _MIXTURES, 100, tokenizer="latents"),
    "masked_gmm 8": Arm("masked_gmm", 8, _MIXTURES, 100, tokenizer="latents"),
}


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


def draw(name: str, model: Model, settings: Settings, prompts: Sequence[str], seed: int) -> Pictures:
    """Draw one picture per prompt."""
    arm = ARMS[name]
    identity = [dict(settings), list(prompts), seed, (arm.model_folder / "manifest.sha256").read_text()]
    given = arm.keywords(model, settings)
    return kept(
        name,
        identity,
        lambda: [reply.images[0] for reply in model.generate_batch(prompts, "image", seed=seed, **given)],
    )


def choose(name: str, model: Model, scale: Scale) -> tuple[Settings, list[dict[str, Any]]]:
    """Return the settings with the smallest Fréchet distance among those whose accuracy is within SLACK of the best,
    and what each was seen to reach; on wordings of training and a seed of its own."""
    arm = ARMS[name]
    prompts, digits = captions(TRAIN_TEMPLATES, arm.n_tried)
    tried: list[dict[str, Any]] = []
    for values in itertools.product(*arm.tried.values()):
        settings = dict(zip(arm.tried, values, strict=True))
        pictures = draw(name, model, settings, prompts, CHOICE_SEED)
        accuracy = scale.n_right(pictures, digits) / len(digits)
        tried.append({**settings, "accuracy": accuracy, "frechet": scale.frechet(pictures)})
    enough = max(entry["accuracy"] for entry in tried) - SLACK
    best = min((entry for entry in tried if entry["accuracy"] >= enough - 1e-9), key=lambda entry: entry["frechet"])
    return {setting: best[setting] for setting in arm.tried}, tried


def forward_passes(name: str, model: Model, settings: Settings) -> int:
    """Count the decoder's passes for one picture; guidance doubles their rows, not their number."""
    calls: list[None] = []
    hook = model.network.decoder.register_forward_hook(lambda *_: calls.append(None))
    model.generate("the digit three", to="image", seed=0, **ARMS[name].keywords(model, settings))
    hook.remove()
    return len(calls)
