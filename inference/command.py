"""What `omniform generate` does: prompt parts from the command line in, text and files out."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.destination import Destination
from omniform.inference.editing import outpaint
from omniform.inference.generate import Model, load
from omniform.inference.part_files import has_files, read_part, write_part
from omniform.inference.protocol import ANY, ContentPart, DataPart, TextPart, parse_prompt, split_names
from omniform.inference.terminal_text import harmless
from omniform.tokenizers.image_files import MAX_BYTES, open_picture


@dataclass(frozen=True)
class Output:
    """One generated part, as the command line shows it.

    Attributes:
        text: the text, or the JSON text of a modality that has no files of its own; None for what only a file holds.
        path: the file that was written, if any; none of speech without a sample.
        sample: which of the samples that were asked for it belongs to.
        seed: what the run can be repeated with.
        n_near_ties: of the whole sample; see `Reply`.
        through: what was generated on the way to the whole sample: text as it is, all else by its modality.
    """

    modality: str
    text: str | None
    path: Path | None
    sample: int
    seed: int
    n_near_ties: int
    through: tuple[str, ...]


def generate_files(
    model: Model | Path,
    prompt: Sequence[str],
    to: Sequence[str] = ("text",),
    out: Path | None = None,
    seed: int | None = None,
    n: int = 1,
    *,
    image: Path | None = None,
    mask: Path | None = None,
    margins: Sequence[int] | None = None,
    **keywords: Any,
) -> list[Output]:
    """Generate, and write pictures, sound and videos to files, and text too if `out` says so.

    Args:
        model: a model, or the folder to load it from.
        prompt: parts in order: text, or @file, or @@text for text that starts with an at sign.
        to: names of modalities in order; one entry can hold several, with commas between.
        out: the file to write, whose suffix names the format; what is of another modality than that goes beside it,
            with the default suffix of its own, but text is only printed. Or a name without suffix, or a folder that
            exists, for files named omniform-SEED: these take text too. Names that several parts would have get a number
            each. Unless given, files are named omniform-SEED in the current folder.
        n: number of samples.
        image: file of a picture to draw anew in part.
        mask: file of the mask; see `Model`.
        margins: pixels to add at the left, top, right and bottom of `image` and to draw, instead of a mask.

    Raises:
        OmniformError: a part, file or keyword that cannot be used; checked before anything is generated.
    """
    if n < 1:
        raise OmniformError(f"n is {n}, expected at least 1 sample")
    to = [name for entry in to for name in split_names(entry)]
    seed = secrets.randbits(63) if seed is None else seed
    destination = Destination.parse(out, seed)
    if isinstance(model, Path):
        model = load(model)
    modalities = model.modalities if ANY in to else to
    destination.check(modalities)
    for modality in set(modalities) & set(model.modalities):
        if not has_files(modality, model):
            raise OmniformError(f"a {modality} part can neither be printed nor written: generate it in Python")
    parts = [read_argument(argument, model) for argument in prompt]
    edit = _read_edit(image, mask, margins)
    replies = model.generate_batch([parts] * n, to, seed=seed, **edit, **keywords)
    found = [(sample, part) for sample, reply in enumerate(replies) for part in reply.parts]
    outputs = []
    for (sample, part), path in zip(found, destination.paths([part for _, part in found]), strict=True):
        if path is not None:
            write_part(part, path)
        reply = replies[sample]
        through = tuple(one.modality if (text := _text(one)) is None else text for one in reply.through)
        outputs.append(Output(part.modality, _text(part), path, sample, seed, reply.n_near_ties, through))
    return outputs


def read_argument(argument: str, model: Model) -> ContentPart:
    """Turn one PROMPT argument into a part; text that is the name of a file is so, but said to be on standard error.

    Raises:
        OmniformError: a file that is missing, unreadable, or of a kind that the model does not take.
    """
    if not argument.startswith("@") or argument.startswith("@@"):
        if _names_a_file(argument):
            name = harmless(argument)
            print(f"{name} is taken as text; for the file write @{name}", file=sys.stderr)
        return parse_prompt(argument.removeprefix("@"))[0]
    path = Path(argument[1:])
    try:
        return read_part(path, model)
    except OmniformError as error:
        hint = "" if path.is_file() else "; write @@ for text that starts with an at sign"
        raise OmniformError(f"@{error}{hint}") from error


def _names_a_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):  # too long for a name, or of characters that no name has
        return False


def _text(part: ContentPart) -> str | None:
    if isinstance(part, TextPart):
        return part.text
    return part.json if isinstance(part, DataPart) else None


def _read_edit(image: Path | None, mask: Path | None, margins: Sequence[int] | None) -> dict[str, Any]:
    """Return the pictures among the keywords of `generate`."""
    if mask is not None and image is None:
        raise OmniformError("--mask says what of a picture to draw anew: give the picture, with --image")
    found = {
        name: _read_picture(f"--{name}", path) for name, path in (("image", image), ("mask", mask)) if path is not None
    }
    if margins is None:
        return found
    if "image" not in found or "mask" in found:
        raise OmniformError("--outpaint adds margins to a picture and masks them: give --image, and no --mask")
    canvas, margin_mask = outpaint(
        found["image"], **dict(zip(("left", "top", "right", "bottom"), margins, strict=True))
    )
    return {"image": canvas, "mask": margin_mask}


def _read_picture(option: str, path: Path) -> Image.Image:
    try:
        return open_picture(_read_file(path))
    except OSError as error:
        raise OmniformError(f"{option} {path}: {error.strerror}; expected a picture file") from error
    except OmniformError as error:
        raise OmniformError(f"{option} {path}: {error}") from error


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        payload = file.read(MAX_BYTES + 1)
    if len(payload) > MAX_BYTES:
        raise OmniformError(f"{path} is too large, expected at most {MAX_BYTES:,} bytes")
    return payload
