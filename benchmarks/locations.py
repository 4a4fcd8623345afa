"""How well a model finds a digit in a scene, and draws one where it is told: scenes of the validation split.

    omniform bench locations
    python benchmarks/locations.py MODEL WORLD

Reads runs/digits-locations/model and the world in runs/demo/data, unless told otherwise.

find: the first box of the answer against the true box of the digit asked for; right from an intersection over union of
0.5 on. Beside it the same of the answers dealt out to other scenes of the split, and of the box of the other digit.
draw: the digit that the image judge reads in the box, against the one asked for; beside it the same of the answers
dealt out, of real scenes, and of real scenes after the image tokenizer. Ink is the sum of brightness above black.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omniform.data.digit_scenes import SCENE_SIZE
from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images
from omniform.data.schema import RawSample
from omniform.data.shards import ShardReader
from omniform.inference.generate import Model, load
from omniform.inference.judges import DigitImageJudge, wilson_interval
from omniform.inference.protocol import DataPart, TextPart
from omniform.page import percent, text_columns

MODEL, WORLD = Path("runs/digits-locations/model"), Path("runs/demo/data")
IOU_RIGHT = 0.5
N_DEALS = 100
Box = Sequence[float]  # left, upper, right, lower


def run(folder: Path = MODEL, world: Path = WORLD) -> dict[str, Any]:
    """Return the figures of both tasks, and `text` that shows them as a table."""
    torch.set_num_threads(1)
    model = load(folder)
    find = score_find(model, list(ShardReader(world / "validation-find")))
    draw = score_draw(model, list(ShardReader(world / "validation-draw")))
    rows = [
        ("find", "n", str(find["n"])),
        ("", f"intersection over union >= {IOU_RIGHT}", proportion(find["accuracy"], find["ci95"])),
        ("", "mean intersection over union", f"{find['mean_iou']:.3f}"),
        ("", "chance: answers dealt out", percent(find["chance"])),
        ("", "box of the other digit", percent(find["other_digit"])),
        ("", "no box in the answer", percent(find["no_box"])),
        ("draw", "n", str(draw["n"])),
        ("", "the box shows the digit", proportion(draw["accuracy"], draw["ci95"])),
        ("", "chance: answers dealt out", percent(draw["chance"])),
        ("", "real scenes; after the tokenizer", f"{percent(draw['real'])}; {percent(draw['round_trip'])}"),
        ("", "ink outside the box", percent(draw["ink_outside"])),
        ("", "the same of real scenes after the tokenizer", percent(draw["ink_outside_round_trip"])),
    ]
    return {"find": find, "draw": draw, "text": "\n".join(line.rstrip() for line in text_columns(rows))}


def score_find(model: Model, samples: Sequence[RawSample]) -> dict[str, Any]:
    """Return the figures of finding digits."""
    prompts = [[DataPart("image", picture_of(model, sample)), TextPart(text_of(sample))] for sample in samples]
    replies = model.generate_batch(prompts, "location", seed=0)
    boxes = [first_box(reply.parts[0].data) for reply in replies]
    truth = [sample.metadata["box"] for sample in samples]
    others = [sample.metadata["other"]["box"] for sample in samples]
    overlaps = np.array([overlap(box, true) for box, true in zip(boxes, truth, strict=True)])
    mistaken = np.array([overlap(box, other) for box, other in zip(boxes, others, strict=True)])
    table = np.array([[overlap(box, true) for true in truth] for box in boxes])
    right = overlaps >= IOU_RIGHT
    return {
        "n": len(samples),
        "accuracy": float(right.mean()),
        "ci95": list(wilson_interval(int(right.sum()), len(samples))),
        "mean_iou": float(overlaps.mean()),
        "chance": dealt(table >= IOU_RIGHT),
        "other_digit": float((mistaken >= IOU_RIGHT).mean()),
        "no_box": sum(box is None for box in boxes) / len(boxes),
    }


def score_draw(model: Model, samples: Sequence[RawSample]) -> dict[str, Any]:
    """Return the figures of drawing digits in boxes."""
    images, labels = load_digit_images()
    train = SPLIT_ROWS["train"]
    judge = DigitImageJudge.fit(images[train] / 127.5 - 1, labels[train])
    tokenizer: Any = model.tokenizers["image"]
    locations = [
        model.tokenizers["location"].read(span.payload)
        for sample in samples
        for span in sample.spans
        if span.modality == "location" and span.payload is not None
    ]
    prompts = [
        [TextPart(text_of(sample)), DataPart("location", location)]
        for sample, location in zip(samples, locations, strict=True)
    ]
    replies = model.generate_batch(prompts, "image", seed=0)
    real = [picture_of(model, sample) for sample in samples]
    with torch.inference_mode():
        shown = {
            "model": [tokenizer.from_pil(reply.images[0]) for reply in replies],
            "real": real,
            "round_trip": tokenizer.decode_batch(tokenizer.encode_batch(real)),
        }
    boxes = [sample.metadata["box"] for sample in samples]
    digits = np.array([sample.metadata["digit"] for sample in samples])
    read = {name: judge.predict(np.stack(list(map(crop, items, boxes)))) for name, items in shown.items()}
    right = read["model"] == digits
    return {
        "n": len(samples),
        "accuracy": float(right.mean()),
        "ci95": list(wilson_interval(int(right.sum()), len(samples))),
        "chance": dealt(read["model"][:, None] == digits),
        "real": float((read["real"] == digits).mean()),
        "round_trip": float((read["round_trip"] == digits).mean()),
        "ink_outside": ink_outside(shown["model"], boxes),
        "ink_outside_round_trip": ink_outside(shown["round_trip"], boxes),
    }


def picture_of(model: Model, sample: RawSample) -> Tensor:
    """Return the picture of a scene, as the model's tokenizer reads it."""
    [payload] = [span.payload for span in sample.spans if span.modality == "image"]
    picture: Tensor = model.tokenizers["image"].read(payload or b"")
    return picture


def text_of(sample: RawSample) -> str:
    """Return the text of a scene."""
    [text] = [span.text for span in sample.spans if span.modality == "text"]
    return text or ""


def first_box(locations: Any) -> Box | None:
    """Return the first box among the locations of an answer, in pixels of a scene, if there is one."""
    boxes = [location.coordinates for location in locations if location.kind == "box"]
    return [SCENE_SIZE * edge for edge in boxes[0]] if boxes else None


def overlap(box: Box | None, other: Box) -> float:
    """Return the intersection over union of two boxes; 0 where there is none."""
    if box is None:
        return 0.0
    width = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    height = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    union = sum((right - left) * (lower - upper) for left, upper, right, lower in (box, other)) - width * height
    return width * height / union


def dealt(right: npt.NDArray[np.bool_]) -> float:
    """Return how often answers dealt out to other items are right, the mean of N_DEALS deals.

    Args:
        right: whether the answer of each row would be right for the item of each column.
    """
    random, n = np.random.default_rng(0), len(right)
    return float(np.mean([right[random.permutation(n), np.arange(n)].mean() for _ in range(N_DEALS)]))


def crop(picture: Tensor, box: Box) -> npt.NDArray[np.float64]:
    """Return the gray pixels in a box, in [-1, 1]."""
    left, upper, right, lower = (int(edge) for edge in box)
    return picture.mean(dim=0)[upper:lower, left:right].double().numpy()


def ink_outside(pictures: Sequence[Tensor], boxes: Sequence[Box]) -> float:
    """Return the part of all ink that lies outside of the boxes."""
    total = sum(float((picture.mean(dim=0) + 1).double().sum()) for picture in pictures)
    inside = sum(float((crop(picture, box) + 1).sum()) for picture, box in zip(pictures, boxes, strict=True))
    return 1 - inside / total


def proportion(rate: float, interval: Sequence[float]) -> str:
    """Return a rate with its interval as percentages."""
    return f"{percent(rate)} [{percent(interval[0])} - {percent(interval[1])}]"


if __name__ == "__main__":
    print(run(*map(Path, sys.argv[1:]))["text"])
