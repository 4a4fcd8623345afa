"""The any-to-any suite: what a model generates from held-out data, scored by judges that it never trained with."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from omniform.data.sealed import write_atomically
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.document_evaluation import evaluate_documents
from omniform.inference.generate import Model
from omniform.inference.judges import (
    DigitImageJudge,
    at_judged_size,
    copy_rate,
    digit_of_text,
    wilson_interval,
)
from omniform.inference.protocol import ContentPart, DataPart, TextPart

CELLS = ("text->image", "image->text", "text->text")
HELD_OUT = ("validation", "test")
N_DIGITS, NO_DIGIT = 10, -1
N_SHOWN = 60
IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class _Items:
    """Samples of one split: the first text and the first picture of each, and the digit that both name.

    Attributes:
        images: in the raw form of the image tokenizer, empty where samples have no picture.
        altered: whether the picture was made from another one of the split.
    """

    texts: list[str]
    images: list[Tensor]
    digits: npt.NDArray[np.int64]
    altered: list[bool]

    def prompts(self, modality: str) -> list[ContentPart]:
        """Return the part of each sample to prompt with."""
        if modality == "text":
            return [TextPart(text) for text in self.texts]
        return [DataPart(modality, image) for image in self.images]


def evaluate_any_to_any(
    model: Model,
    data_dir: Path,
    *,
    split: str = "test",
    cells: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Score a model on digits-world.

    Judges are fitted on train items and their altered copies, on nothing else. A cell's ceiling is what the image judge
    reaches on the same real held-out images; text to text has 1. The copy rate counts generated images that are nearer
    to a train image, altered ones among them, than original train images are to each other (5th percentile), all after
    the tokenizer's round trip; that of real held-out images stands beside it.

    Args:
        data_dir: the world's folder, with its splits.
        split: held-out items to prompt with: choose settings on "validation", report "test".
        cells: "SOURCE->TARGET" each; all that the split has data for unless given (text pairs are in "test" alone).
        limit: use only so many items, spread evenly over the split.
        sampling: keywords of `generate` by target modality, over the model's defaults.
        out: metrics.json to write; samples.json, with the first replies, is written beside it.

    Returns:
        The content of metrics.json: {"suite", "split", "seed", "cells": {"text->image": {"accuracy", "n", "ci95",
        "chance", "ceiling", "copy_rate", "copy_rate_held_out", "macro_accuracy", "per_class"}, ...}}.
        Without `cells`, and where the model has learnt what follows a part, also "documents": see `evaluate_documents`.

    Raises:
        OmniformError: an unknown cell, a split that is not held out, data that is not there or has no digits to score
            by, a model without images, or a folder as `out`.
    """
    whole = cells is None
    if cells is None:
        cells = [cell for cell in CELLS if cell != "text->text" or (data_dir / f"{split}-text").exists()]
    if unknown := [cell for cell in cells if cell not in CELLS]:
        raise OmniformError(f"unknown cells {', '.join(unknown)}, expected some of {', '.join(CELLS)}")
    if split not in HELD_OUT:
        raise OmniformError(f"split is {split!r}, expected a held-out one: {' or '.join(HELD_OUT)}")
    if "image" not in model.modalities:
        raise OmniformError(f"the any-to-any suite scores text and images, but this model has {model.modalities}")
    if out is not None and out.is_dir():
        raise OmniformError(f"out is the folder {out}, expected a file to write, such as {out / 'metrics.json'}")
    train, held_out = _read(model, data_dir / "train", None), _read(model, data_dir / split, limit)
    judge = DigitImageJudge.fit(_pixels(train.images), train.digits)
    image_ceiling = float((judge.predict(_pixels(held_out.images)) == held_out.digits).mean())
    scored: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for cell in cells:
        source, _, target = cell.partition("->")
        items = _read(model, data_dir / f"{split}-text", limit) if cell == "text->text" else held_out
        prompts = items.prompts(source)
        replies = model.generate_batch(prompts, target, seed=seed, **(sampling or {}).get(target, {}))
        judged: list[int | None]
        copying: dict[str, float | None] = {"copy_rate": None, "copy_rate_held_out": None}
        if target == "image":
            drawn = [_item(model, reply.images[0]) for reply in replies]
            judged = [int(digit) for digit in judge.predict(_pixels(drawn))]
            copying = _copying(model, drawn, train, held_out)
        else:
            judged = [digit_of_text(reply.text) for reply in replies]
        ceiling = 1.0 if cell == "text->text" else image_ceiling
        scored[cell] = {**_score(judged, items.digits, ceiling), **copying}
        shown[cell] = [
            {"prompt": _tell(model, prompt), "reply": _tell(model, reply.parts[0]), "digit": digit, "judged": answer}
            for prompt, reply, digit, answer in zip(prompts, replies, items.digits.tolist(), judged, strict=True)
        ][:N_SHOWN]
    metrics = {"suite": "any-to-any", "split": split, "seed": seed, "cells": scored}
    if whole and model.network.config.next_span_weight and (data_dir / f"{split}-documents").exists():

        def digits_of(images: Sequence[Image.Image]) -> npt.NDArray[np.int64]:
            return judge.predict(_pixels([_item(model, image) for image in images]))

        folder = data_dir / f"{split}-documents"
        metrics["documents"], continued = evaluate_documents(model, folder, digits_of, seed=seed, limit=limit)
        told = [
            {**vars(document), "prompt": _told(model, document.prompt), "reply": _told(model, document.reply)}
            for document in continued
        ]
        if out is not None:
            write_atomically(out.with_name("documents.json"), json.dumps(told, indent=1).encode() + b"\n")
    if out is not None:
        write_atomically(out.with_name("samples.json"), json.dumps(shown, indent=1).encode() + b"\n")
        write_atomically(out, json.dumps(metrics, indent=2).encode() + b"\n")
    return metrics


def _score(judged: Sequence[int | None], digits: npt.NDArray[np.int64], ceiling: float) -> dict[str, Any]:
    """Return the figures of one cell; an answer that names no digit is wrong."""
    answers = np.array([NO_DIGIT if answer is None else answer for answer in judged])
    right = answers == digits
    per_class = {
        str(digit): {"accuracy": float(right[digits == digit].mean()), "n": int((digits == digit).sum())}
        for digit in np.unique(digits)
    }
    return {
        "accuracy": float(right.mean()),
        "n": len(digits),
        "ci95": list(wilson_interval(int(right.sum()), len(digits))),
        "chance": 1 / N_DIGITS,
        "ceiling": ceiling,
        "macro_accuracy": sum(entry["accuracy"] for entry in per_class.values()) / len(per_class),
        "per_class": per_class,
    }


def _copying(model: Model, drawn: list[Tensor], train: _Items, held_out: _Items) -> dict[str, float | None]:
    shown = _pixels(_round_trip(model, train.images))
    originals = shown[~np.array(train.altered)]
    return {
        "copy_rate": copy_rate(_pixels(drawn), shown, originals),
        "copy_rate_held_out": copy_rate(_pixels(_round_trip(model, held_out.images)), shown, originals),
    }


def _round_trip(model: Model, images: list[Tensor]) -> list[Tensor]:
    tokenizer, done = model.tokenizers["image"], []
    with torch.inference_mode():
        for first in range(0, len(images), IMAGES_AT_ONCE):
            done += tokenizer.decode_batch(tokenizer.encode_batch(images[first : first + IMAGES_AT_ONCE]))
    return done


def _read(model: Model, folder: Path, limit: int | None) -> _Items:
    reader = ShardReader(folder)
    count = len(reader) if limit is None else min(limit, len(reader))
    samples = [reader[place] for place in np.linspace(0, len(reader) - 1, count).round().astype(int).tolist()]
    texts, images = [], []
    for sample in samples:
        if "digit" not in sample.metadata:
            raise OmniformError(f"{folder}: sample {sample.key} says no digit to score by: expected a digits-world")
        texts += [span.text for span in sample.spans if span.text is not None][:1]
        payloads = [span.payload for span in sample.spans if span.modality == "image" and span.payload is not None]
        images += [model.tokenizers["image"].read(payload) for payload in payloads[:1]]
    digits = np.array([sample.metadata["digit"] for sample in samples], dtype=np.int64)
    return _Items(texts, images, digits, [sample.metadata.get("copy", 0) > 0 for sample in samples])


def _item(model: Model, image: Image.Image) -> Tensor:
    tokenizer: Any = model.tokenizers["image"]
    return tokenizer.from_pil(image)


def _pixels(images: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """Return gray images (N, 16, 16) in [-1, 1], as judges see them."""
    return at_judged_size(torch.stack(list(images)).mean(dim=1).numpy())


def _told(model: Model, parts: Sequence[ContentPart]) -> list[dict[str, str]]:
    return [_tell(model, part) for part in parts]


def _tell(model: Model, part: ContentPart) -> dict[str, str]:
    """Return a part as JSON: text as it is, a picture as a PNG data URL."""
    if isinstance(part, TextPart):
        return {"text": part.text}
    tokenizer: Any = model.tokenizers["image"]
    image = part.data if isinstance(part.data, Image.Image) else tokenizer.to_pil(part.data)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"image": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
