"""Half a digit, for docs/objectives.md: what becomes of a drawing of which a model sees one half."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from picture_arms import ARMS, Settings, kept
from picture_scale import Scale, to_array, to_picture
from PIL import Image

from omniform.inference.generate import Model
from omniform.inference.image_metrics import jackknife_interval
from omniform.inference.judges import DigitImageJudge, wilson_interval

HALVES = {"left": (0, 0, 8, 16), "right": (8, 0, 16, 16), "top": (0, 0, 16, 8), "bottom": (0, 8, 16, 16)}


def inpaint(
    name: str, model: Model, settings: Settings, scale: Scale, seed: int
) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Erase each half of every held-out drawing before the model sees it, have it drawn anew, and ask the judge.

    Returns:
        Figures by half, and rows of pictures: drawing, erased, anew with its caption, anew without.
    """
    test, given = scale.test, ARMS[name].keywords(model, settings)
    free = {**given, "guidance_scale": 1.0}  # nothing to push towards
    originals = [to_picture(picture) for picture in test.pictures]
    manifest = (ARMS[name].model_folder / "manifest.sha256").read_text()
    right: dict[str, list[NDArray[np.bool_]]] = {}
    rows: list[list[Image.Image]] = []
    for half, box in HALVES.items():
        mask = Image.new("L", (16, 16), 0)
        mask.paste(255, box)
        erased = [Image.composite(Image.new("L", (16, 16), 0), picture, mask) for picture in originals]
        pictures = {"original": test.pictures, "erased": np.stack([to_array(picture) for picture in erased])}
        for how, prompts, chosen in (("with caption", test.texts, given), ("without", [[]] * len(erased), free)):
            edit = functools.partial(model.generate_batch, prompts, "image", image=erased, mask=mask, seed=seed)
            work = functools.partial(lambda edit, chosen: [reply.images[0] for reply in edit(**chosen)], edit, chosen)
            pictures[how] = kept(f"{half} half {how}", [prompts, dict(settings), manifest], work)
        for how, shown in pictures.items():
            right.setdefault(how, []).append(scale.judge.predict(shown) == test.digits)
        # What the rest of a drawing tells: a judge that was fitted on erased train drawings alone.
        train = scale.train.pictures[~scale.train.altered].copy()
        train[:, box[1] : box[3], box[0] : box[2]] = -1
        of_halves = DigitImageJudge.fit(train, scale.train.digits[~scale.train.altered])
        right.setdefault("erased, judge of halves", []).append(of_halves.predict(pictures["erased"]) == test.digits)
        for digit in range(10):
            place = int(np.flatnonzero(test.digits == digit)[0])
            rows.append([to_picture(shown[place]) for shown in pictures.values()])
    figures = {}
    for how, by_half in right.items():
        mean = np.stack(by_half).mean(0)  # of the halves of one drawing, which are not independent of each other
        low, high = jackknife_interval(lambda places, mean=mean: float(mean[places].mean()), len(mean), len(mean))
        halves = {
            half: {"value": float(hits.mean()), "ci95": wilson_interval(int(hits.sum()), len(hits))}
            for half, hits in zip(HALVES, by_half, strict=True)
        }
        figures[how] = {"value": float(mean.mean()), "ci95": [max(0.0, low), min(1.0, high)], "halves": halves}
    return {"n_drawings": len(originals), "settings": dict(settings), **figures}, rows
