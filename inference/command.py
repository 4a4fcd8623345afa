"""What `omniform generate` does: prompt parts from the command line in, text and files out."""

import mimetypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.editing import outpaint
from omniform.inference.generate import Model, load
from omniform.inference.protocol import ANY, ContentPart, DataPart, ImagePart, TextPart, parse_prompt
from omniform.tokenizers.image_files import MAX_BYTES, open_picture

_MODALITY_OF_MEDIA = {"text": "text", "image": "image", "audio": "speech", "video": "video"}


@dataclass(frozen=True)
class Output:
    """One generated part, as the command line shows it.

    Attributes:
        text: the text, or None for a part that only a file holds.
        path: the file that was written, if any.
        sample: which of the samples that were asked for it belongs to.
        seed: what the run can be repeated with.
        n_near_ties: of the whole sample; see `Reply`.
    """

    modality: str
    text: str | None
    path: Path | None
    sample: int
    seed: int
    n_near_ties: int


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
    """Generate, writing pictures to files, and text too if nothing else was asked for and `out` is given.

    Args:
        model: a model, or the folder to load it from.
        prompt: parts in order: text, or @file, or @@text for text that starts with an at sign.
        out: file to write; with several files a number is put before its suffix. Pictures go to omniform-SEED.png in
            the current folder unless given.
        n: number of samples.
        image: file of a picture to draw anew in part.
        mask: file of the mask; see `Model`.
        margins: pixels to add at the left, top, right and bottom of `image` and to draw, instead of a mask.

    Raises:
        OmniformError: a part, file or keyword that cannot be used; checked before anything is generated.
    """
    if n < 1:
        raise OmniformError(f"n is {n}, expected at least 1 sample")
    if out is not None:
        _check_destination(out, to)
    if isinstance(model, Path):
        model = load(model)
    parts = [read_argument(argument, model) for argument in prompt]
    edit = _read_edit(image, mask, margins)
    replies = model.generate_batch([parts] * n, to, seed=seed, **edit, **keywords)
    found = [(sample, part) for sample, reply in enumerate(replies) for part in reply.parts]
    to_files = [place for place, (_, part) in enumerate(found) if not isinstance(part, TextPart)]
    if not to_files and out is not None:
        to_files = list(range(len(found)))
    target = out or Path(f"omniform-{replies[0].seed}.png")
    outputs = []
    for place, (sample, part) in enumerate(found):
        path = None
        if place in to_files:
            number = to_files.index(place)
            path = target if len(to_files) == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
            _write(part, path)
        text = part.text if isinstance(part, TextPart) else None
        outputs.append(Output(part.modality, text, path, sample, replies[sample].seed, replies[sample].n_near_ties))
    return outputs


def read_argument(argument: str, model: Model) -> ContentPart:
    """Turn one PROMPT argument into a part.

    Raises:
        OmniformError: a file that is missing, unreadable, or of a kind that the model does not take.
    """
    if not argument.startswith("@") or argument.startswith("@@"):
        return parse_prompt(argument.removeprefix("@"))[0]
    path = Path(argument[1:])
    media = (mimetypes.guess_type(path.name)[0] or "unknown").partition("/")[0]
    modality = _MODALITY_OF_MEDIA.get(media)
    if modality not in model.modalities:
        raise OmniformError(
            f"{argument}: {path.suffix or 'a name without suffix'} is no kind of file that this model takes: expected "
            f"one of {', '.join(model.modalities)}; write @@ for text that starts with an at sign"
        )
    try:
        payload = _read_file(path)
    except OSError as error:
        raise OmniformError(
            f"{argument}: cannot read the file {path}: {error.strerror}; expected a readable file, or @@ for text that "
            "starts with an at sign"
        ) from error
    try:
        item = model.tokenizers[modality].read(payload)
        return parse_prompt(item if modality == "text" else DataPart(modality, item))[0]
    except OmniformError as error:
        raise OmniformError(f"{argument}: {error}") from error


def _read_edit(image: Path | None, mask: Path | None, margins: Sequence[int] | None) -> dict[str, Any]:
    """Return the pictures among the keywords of `generate`."""
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


def _check_destination(out: Path, to: Sequence[str]) -> None:
    if not out.parent.is_dir():
        raise OmniformError(f"--out {out}: there is no folder {out.parent}; create it first")
    if out.is_dir():
        raise OmniformError(f"--out {out} is a folder, expected the name of a file")
    file_format = Image.registered_extensions().get(out.suffix.lower())
    if set(to) == {"text"} and file_format is not None:
        raise OmniformError(f"--out {out}: text was asked for, and {out.suffix} is a picture format; use .txt")
    if {"image", ANY} & set(to) and file_format not in Image.SAVE:
        raise OmniformError(f"--out {out}: {out.suffix or 'no suffix'} is no picture format; use .png, .jpg or .webp")


def _write(part: ContentPart, path: Path) -> None:
    """Write beside the destination and rename, so that no half-written file is left behind."""
    draft = path.with_name(f".{path.name}.draft{path.suffix}")
    try:
        if isinstance(part, TextPart):
            draft.write_text(part.text + "\n", encoding="utf-8")
        elif isinstance(part, ImagePart):
            part.image.save(draft)
        else:
            raise OmniformError(f"a {part.modality} part cannot be written to a file")
        os.replace(draft, path)
    except OSError as error:
        raise OmniformError(f"cannot write {path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
