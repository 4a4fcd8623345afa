"""Documents of digits-world continued by a model: does what it says next fit what it draws next?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from omniform.data.schema import RawSample
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.judges import digit_of_text, wilson_interval
from omniform.inference.protocol import ANY, ContentPart, DataPart, ImagePart, Reply, TextPart

CHANCE = 0.1
# What follows the first text of the longest documents, and room to show that a model does not end.
TURNS = ("image", "text", "image", "text", "image", "text", "image")
MOST_PARTS = 9
N_SHOWN = 8

DigitsOf = Callable[[Sequence[Image.Image]], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Continued:
    """A document's beginning, and what the model made of it.

    Attributes:
        judged: what each part of the reply names or shows; None where a text names no digit.
        right: whether the reply is as the document's kind demands.
    """

    kind: str
    prompt: tuple[ContentPart, ...]
    reply: tuple[ContentPart, ...]
    judged: tuple[int | None, ...]
    right: bool


def evaluate_documents(
    model: Model, folder: Path, digits_of: DigitsOf, *, seed: int = 0, limit: int | None = None
) -> tuple[dict[str, dict[str, Any]], list[Continued]]:
    """Let a model go on with held-out documents, and return figures and the first replies of each kind.

    "counting" gives the first text and picture of a document that counts, and asks for a text and a picture: is the
    next digit `named`, is it `drawn`, and do both `agree`, right or not? "naming" gives a text that names no digit:
    does the text after the real picture name what it shows (`read`), and where the model draws the picture too,
    whatever it likes, does its text name what the judge sees in it (`agree`)? "free" gives the first text of a document
    that counts and lets the model choose what comes, until it ends the document: does it draw and write in `turns`, two
    to four pictures in all, and is each part `right`?

    All parts follow from each other directly, whatever `GenerationConfig.through` says of prompts.

    Args:
        folder: documents of a held-out split.
        digits_of: the image judge.
        limit: use only so many documents of each kind, spread evenly.

    Returns:
        {"counting": {"named": {"accuracy", "n", "ci95", "chance", "ceiling"}, "drawn", "agree"},
        "naming": {"read", "agree"}, "free": {"turns", "right"}}; the ceiling is the judge's accuracy on real pictures
        where a picture is judged, and 1 elsewhere; chance is a guess among ten digits where one digit is guessed.

    Raises:
        OmniformError: no shards, or documents of no known kind.
    """
    documents = list(ShardReader(folder))
    by_kind = {kind: [d for d in documents if d.metadata.get("kind") == kind] for kind in ("counting", "naming")}
    if empty := [kind for kind, found in by_kind.items() if not found]:
        raise OmniformError(f"{folder} holds no documents of the kind {' or '.join(empty)}: expected a digits-world")
    counting, naming = (_spread(found, limit) for found in by_kind.values())
    ceiling = _ceiling(model, [*counting, *naming], digits_of)

    prompts = [(_text(d), _picture(model, d)) for d in counting]
    replies = model.generate_batch([list(prompt) for prompt in prompts], ["text", "image"], seed=seed, direct=True)
    named, drawn = _named(replies), digits_of([reply.images[0] for reply in replies]).tolist()
    following = [d.metadata["digits"][1] for d in counting]
    figures: dict[str, dict[str, Any]] = {
        "counting": {
            "named": _figure([a == b for a, b in zip(named, following, strict=True)], CHANCE, 1.0),
            "drawn": _figure([a == b for a, b in zip(drawn, following, strict=True)], CHANCE, ceiling),
            "agree": _figure([a == b for a, b in zip(named, drawn, strict=True)], CHANCE, ceiling),
        }
    }
    shown = [
        Continued("counting", prompt, reply.parts, (text, image), text == image == wanted)
        for prompt, reply, text, image, wanted in zip(prompts, replies, named, drawn, following, strict=True)
    ][:N_SHOWN]

    replies = model.generate_batch([[_text(d), _picture(model, d)] for d in naming], "text", seed=seed, direct=True)
    read = [a == d.metadata["digits"][0] for a, d in zip(_named(replies), naming, strict=True)]
    beginnings = [_text(d) for d in naming]
    replies = model.generate_batch(beginnings, ["image", "text"], seed=seed, direct=True)
    named, drawn = _named(replies), digits_of([reply.images[0] for reply in replies]).tolist()
    figures["naming"] = {
        "read": _figure(read, CHANCE, ceiling),
        "agree": _figure([a == b for a, b in zip(named, drawn, strict=True)], CHANCE, ceiling),
    }
    shown += [
        Continued("naming", (prompt,), reply.parts, (image, text), text == image)
        for prompt, reply, text, image in zip(beginnings, replies, named, drawn, strict=True)
    ][:N_SHOWN]

    free = _count_freely(model, counting, digits_of, seed)
    turns = [_takes_turns(document) for document in free]
    figures["free"] = {
        "turns": _figure(turns, None, 1.0),
        "right": _figure([document.right for document in free], None, None),
    }
    return figures, shown + free[:N_SHOWN]


def _count_freely(model: Model, counting: Sequence[RawSample], digits_of: DigitsOf, seed: int) -> list[Continued]:
    beginnings = [_text(d) for d in counting]
    replies = model.generate_batch(beginnings, ANY, max_parts=MOST_PARTS, seed=seed)
    images = [image for reply in replies for image in reply.images]
    drawn = iter(digits_of(images).tolist() if images else [])
    found = []
    for document, prompt, reply in zip(counting, beginnings, replies, strict=True):
        judged = [
            digit_of_text(part.text)
            if isinstance(part, TextPart)
            # A model of more modalities may choose one that no document has: it names no digit here.
            else next(drawn)
            if isinstance(part, ImagePart)
            else None
            for part in reply.parts
        ]
        # The first picture is of the first text's digit; each text and the picture after it are of the next one.
        first = document.metadata["digits"][0]
        expected = [(first + (place + 1) // 2) % 10 for place in range(len(judged))]
        continued = Continued("free", (prompt,), reply.parts, tuple(judged), judged == expected)
        found.append(Continued(**{**vars(continued), "right": continued.right and _takes_turns(continued)}))
    return found


def _takes_turns(document: Continued) -> bool:
    modalities = tuple(part.modality for part in document.reply)
    return len(modalities) in (3, 5, 7) and modalities == TURNS[: len(modalities)]


def _ceiling(model: Model, documents: Sequence[RawSample], digits_of: DigitsOf) -> float:
    """Return the judge's accuracy on the real first pictures, as the model's tokenizer reads them."""
    tokenizer: Any = model.tokenizers["image"]
    pictures = [tokenizer.to_pil(_picture(model, document).data) for document in documents]
    return float((digits_of(pictures) == [document.metadata["digits"][0] for document in documents]).mean())


def _text(document: RawSample) -> TextPart:
    return TextPart(document.spans[0].text or "")


def _picture(model: Model, document: RawSample) -> DataPart:
    return DataPart("image", model.tokenizers["image"].read(document.spans[1].payload or b""))


def _named(replies: Sequence[Reply]) -> list[int | None]:
    return [digit_of_text(reply.text) for reply in replies]


def _spread(documents: Sequence[RawSample], limit: int | None) -> list[RawSample]:
    count = len(documents) if limit is None else min(limit, len(documents))
    return [documents[place] for place in np.linspace(0, len(documents) - 1, count).round().astype(int).tolist()]


def _figure(right: Sequence[bool], chance: float | None, ceiling: float | None) -> dict[str, Any]:
    n_right, n = sum(right), len(right)
    interval = list(wilson_interval(n_right, n))
    return {"accuracy": n_right / n, "n": n, "ci95": interval, "chance": chance, "ceiling": ceiling}
