"""Samples of a model while it trains."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from omniform.inference.generate import Model
from omniform.inference.part_files import DEFAULT_SUFFIX, write_part
from omniform.inference.protocol import SpeechPart, TextPart, parse_prompt
from omniform.modeling.folder import LoadedModel

_SCALE, _COLUMNS = 4, 10
_N_MEDIA = 2  # sounds and videos: generating them is slower than drawing, and the model waits
PROMPTS = "prompts.json"
UNCONDITIONAL: tuple[object, ...] = ([],) * 10


def draw_samples(loaded: LoadedModel, folder: Path, prompts: Sequence[object] = UNCONDITIONAL) -> None:
    """Write images.png with an image for each prompt, text.txt with what the model says about each of them, and
    speech-K.wav and video-K.mp4 for the first two prompts, as far as the model has these modalities; and prompts.json,
    {name of a file: its prompt as text}, of images.png a list of the prompts of each row.

    A model that has no images writes what it says about the prompts. Speech of no samples leaves no file. A prompt with
    the modality that is asked for is passed over where the model learnt subsets, which have each once. Seed 0: what
    differs from one time to the next is the model.

    Args:
        folder: created if need be.
        prompts: in any form of a prompt; unconditional ones unless given.
    """
    model = Model(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, object] = {}
    for modality in ("speech", "video"):
        if not (asked := _answerable(prompts, modality, model)[:_N_MEDIA]):
            continue
        words = [_in_words(prompt) for prompt in asked]
        for place, reply in enumerate(model.generate_batch(asked, modality, seed=0)):
            path = folder / f"{modality}-{place}{DEFAULT_SUFFIX[modality]}"
            path.unlink(missing_ok=True)  # an earlier sample, if this one leaves no file
            if not (isinstance(part := reply.parts[0], SpeechPart) and not len(part.audio.samples)):
                write_part(part, path)
                given[path.name] = words[place]
    if asked := _answerable(prompts, "image", model):
        words = [_in_words(prompt) for prompt in asked]
        images = [reply.images[0] for reply in model.generate_batch(asked, "image", seed=0)]
        image_grid(images).save(folder / "images.png")
        given["images.png"] = [words[first : first + _COLUMNS] for first in range(0, len(words), _COLUMNS)]
        prompts = images
    if asked := _answerable(prompts, "text", model):
        lines = [" ".join(reply.text.split()) for reply in model.generate_batch(asked, "text", seed=0)]
        (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / PROMPTS).write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")


def _answerable(prompts: Sequence[object], modality: str, model: Model) -> list[object]:
    if modality not in model.modalities:
        return []
    each_once = bool(model.network.config.subsets)
    return [p for p in prompts if not each_once or modality not in {part.modality for part in parse_prompt(p)}]


def _in_words(prompt: object) -> str:
    """Return the texts of a prompt, and in brackets the modalities of what is no text."""
    return " ".join(part.text if isinstance(part, TextPart) else f"[{part.modality}]" for part in parse_prompt(prompt))


def image_grid(images: Sequence[Image.Image], columns: int = _COLUMNS, scale: int = _SCALE) -> Image.Image:
    """Return images of one size side by side, row by row, enlarged without smoothing, with a gap of `scale` pixels."""
    width, height = ((side + 1) * scale for side in images[0].size)
    n_columns, n_rows = min(columns, len(images)), -(-len(images) // columns)
    background: Any = 128 if images[0].mode == "L" else (128, 128, 128)
    grid = Image.new(images[0].mode, (n_columns * width + scale, n_rows * height + scale), background)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        enlarged = image.resize((width - scale, height - scale), Image.Resampling.NEAREST)
        grid.paste(enlarged, (column * width + scale, row * height + scale))
    return grid
