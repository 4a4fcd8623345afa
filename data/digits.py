"""digits-world: real handwritten digits with captions, built offline from what scikit-learn ships.

The images are the 1797 of the UCI optical digits test set (CC BY 4.0), 8 x 8 with 17 grey levels, by 13 writers one
after the other. Who wrote which is not recorded, but runs of labels show 14 blocks; validation and test take whole
blocks at the end, as a proxy for writers that training never saw.
"""

import bisect
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from PIL import Image

from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import unseal
from omniform.data.shards import ShardWriter
from omniform.data.templates import TEST_DOCUMENTS, TEST_TEMPLATES, TRAIN_DOCUMENTS, TRAIN_TEMPLATES, render
from omniform.data.verify import MANIFEST, verify, write_manifest
from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, keyed_uniform, stream

VERSION = 2
IMAGE_SIZE = 16
SPLIT_ROWS = {"train": range(1415), "validation": range(1415, 1545), "test": range(1545, 1797)}
# First row of each block.
WRITER_BLOCKS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
SOURCES = [
    {
        "name": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part)",
        "licence": "CC BY 4.0",
        "attribution": "E. Alpaydin, C. Kaynak; UCI Machine Learning Repository, doi:10.24432/C50P49",
    }
]
# Pictures of a document, and how many documents of each kind begin with an image: with each of its first copies.
FEWEST_PICTURES, MOST_PICTURES, DOCUMENT_COPIES = 2, 4, 2
# How far a training copy may be turned (degrees), enlarged or shrunk, and moved (pixels).
MAX_ROTATION, MAX_SCALING, MAX_SHIFT = 10.0, 0.1, 1.0


def build_digits(out: Path, seed: int = 0, copies: int = 16) -> Path:
    """Write digits-world to `out`; the same arguments give the same bytes. Nothing is left behind on an error.

    Image-text samples in train/, validation/ and test/, pairs of captions of one digit in train-text/ and test-text/,
    and documents in train-documents/, validation-documents/ and test-documents/: texts and pictures in turns, two to
    four of each, that count up or name what is shown. A document's pictures are those of its split.
    A training image appears `copies` times: once as it is, the others turned, scaled and moved a little, and each with
    the next of the templates.
    A world that is there already, complete and of the same recipe, is left as it is.

    Args:
        seed: chooses how copies differ, and templates.
        copies: of each training image, at least 1.

    Raises:
        DataError: `copies` is out of range, or `out` holds something else.
    """
    if not out.name or out.name == "..":
        raise DataError(f"{out} cannot be built anew: give the name of a folder that may be created")
    if copies < 1:
        raise DataError(f"copies is {copies}, expected at least 1: the first is the image as it is")
    recipe = {
        "format": "omniform-world",
        "world": "digits",
        "version": VERSION,
        "seed": seed,
        "copies": copies,
    }
    if out.exists() and any(out.iterdir()):
        if (out / MANIFEST).exists():
            found = unseal(out / MANIFEST, f"remove {out} and build it again")
            if {key: found.get(key) for key in recipe} == recipe:
                report = verify(out)
                if not report.ok:
                    raise DataError(f"{out} is damaged, remove it and build it again: {report.problems[0]}")
                return out
        raise DataError(f"{out} is not empty and holds no digits-world of {recipe}: remove it or choose another folder")
    images, labels = load_digit_images()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        counts = {}
        for split in SPLIT_ROWS:
            counts[split] = _write(partial / split, _image_samples(images, labels, split, seed, copies))
            documents = _document_samples(images, labels, split, seed, copies)
            counts[f"{split}-documents"] = _write(partial / f"{split}-documents", documents)
        # Each test prompt stands once: an answer is right if it names the digit, in whatever words.
        for split, prompts, answers in (
            ("train", TRAIN_TEMPLATES, TRAIN_TEMPLATES),
            ("test", TEST_TEMPLATES, TRAIN_TEMPLATES[:1]),
        ):
            counts[f"{split}-text"] = _write(partial / f"{split}-text", _text_samples(prompts, answers))
        write_manifest(partial, {**recipe, "samples": counts, "sources": SOURCES})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def load_digit_images() -> tuple[UInt8[np.ndarray, "1797 16 16"], npt.NDArray[np.int64]]:
    """Return all images, enlarged by bicubic interpolation, ink 255 on 0, and their digits.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits-world needs scikit-learn: install omniform[demo]") from error
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    return np.stack(images), digits.target.astype(np.int64)


def _image_samples(
    images: UInt8[np.ndarray, "R H W"], labels: npt.NDArray[np.int64], split: str, seed: int, copies: int
) -> Iterator[RawSample]:
    templates = TEST_TEMPLATES if split == "test" else TRAIN_TEMPLATES
    for row in SPLIT_ROWS[split]:
        order = keyed_permutation(len(templates), seed, stream("digits/template"), row)
        for copy in range(copies if split == "train" else 1):
            drawing, warp = _drawing(images, row, copy, seed)
            template = int(order[copy % len(templates)])
            metadata = {
                "digit": int(labels[row]),
                "row": row,
                "copy": copy,
                **warp,
                "template": templates[template],
                "writer_block": bisect.bisect_right(WRITER_BLOCKS, row) - 1,
            }
            caption = RawSpan("text", text=render(templates[template], int(labels[row])))
            yield RawSample(f"{row:04d}-{copy}", (caption, drawing), metadata)


def _document_samples(
    images: UInt8[np.ndarray, "R H W"], labels: npt.NDArray[np.int64], split: str, seed: int, copies: int
) -> Iterator[RawSample]:
    if split != "train":
        copies = 1
    rows_of = [[row for row in SPLIT_ROWS[split] if labels[row] == digit] for digit in range(10)]
    for number, kind in enumerate(("counting", "naming")):
        templates = [t for t in (TEST_DOCUMENTS if split == "test" else TRAIN_DOCUMENTS) if t.kind == kind]
        step = 1 if kind == "counting" else 0
        for row in SPLIT_ROWS[split]:
            for copy in range(min(copies, DOCUMENT_COPIES)):
                bits = keyed_bits(seed, stream("digits/document"), number, row, copy, np.arange(2 + 2 * MOST_PICTURES))
                template = templates[int(bits[0] % len(templates))]
                n_pictures = FEWEST_PICTURES + int(bits[1] % (MOST_PICTURES - FEWEST_PICTURES + 1))
                digits = [(int(labels[row]) + step * place) % 10 for place in range(n_pictures)]
                rows, chosen_copies, spans = [row], [copy], list[RawSpan]()
                for digit, row_bits, copy_bits in zip(digits[1:], bits[2::2], bits[3::2], strict=False):
                    rows.append(rows_of[digit][int(row_bits % len(rows_of[digit]))])
                    chosen_copies.append(int(copy_bits % copies))
                for place, (digit, its_row, its_copy) in enumerate(zip(digits, rows, chosen_copies, strict=True)):
                    text = render(template.following if place else template.first, digit)
                    spans += [RawSpan("text", text=text), _drawing(images, its_row, its_copy, seed)[0]]
                metadata = {
                    "kind": kind,
                    "digits": digits,
                    "rows": rows,
                    "copies": chosen_copies,
                    "templates": [template.first, template.following],
                }
                yield RawSample(f"{kind}-{row:04d}-{copy}", tuple(spans), metadata)


def _drawing(
    images: UInt8[np.ndarray, "R H W"], row: int, copy: int, seed: int
) -> tuple[RawSpan, dict[str, float | list[float]]]:
    """Return a copy of an image, 0 as it is, and how it differs."""
    image, rotation, scale, shift = images[row], 0.0, 1.0, [0.0, 0.0]
    if copy:
        turn, size, *move = 2 * keyed_uniform(seed, stream("digits/warp"), row, copy, np.arange(4)) - 1
        rotation, scale = round(MAX_ROTATION * float(turn), 3), round(1 + MAX_SCALING * float(size), 3)
        shift = [round(MAX_SHIFT * float(pixels), 3) for pixels in move]
        image = warped(image, rotation, scale, shift)
    warp: dict[str, float | list[float]] = {"rotation": rotation, "scale": scale, "shift": shift}
    return RawSpan("image", payload=_png(image), extension="png"), warp


def _text_samples(prompts: tuple[str, ...], answers: tuple[str, ...]) -> Iterator[RawSample]:
    for digit in range(10):
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(answers):
                if prompt != answer:
                    spans = (RawSpan("text", text=render(prompt, digit)), RawSpan("text", text=render(answer, digit)))
                    yield RawSample(f"{digit}-{i}-{j}", spans, {"digit": digit, "template": prompt, "answer": answer})


def _write(folder: Path, samples: Iterator[RawSample]) -> int:
    listed = list(samples)
    # A fixed shuffle: the data set's own order runs through one writer after the other.
    order = np.argsort(keyed_bits(stream("digits/order"), np.arange(len(listed))), kind="stable")
    with ShardWriter(folder) as writer:
        for place in order:
            writer.write(listed[place])
    return len(listed)


def warped(
    image: UInt8[np.ndarray, "H W"], rotation: float, scale: float, shift: Sequence[float]
) -> UInt8[np.ndarray, "H W"]:
    """Return the image turned about its centre, scaled and then moved, by bicubic interpolation.

    Args:
        rotation: degrees, clockwise as seen.
        shift: pixels to the right and down.
    """
    height, width = image.shape
    x, y = (width - 1) / 2, (height - 1) / 2
    cosine, sine = np.cos(np.radians(rotation)) / scale, np.sin(np.radians(rotation)) / scale
    # Pillow asks where each output pixel comes from, and puts pixel centres at halves.
    from_x, from_y = x + 0.5 + shift[0], y + 0.5 + shift[1]
    matrix = (
        *(cosine, sine, x + 0.5 - cosine * from_x - sine * from_y),
        *(-sine, cosine, y + 0.5 + sine * from_x - cosine * from_y),
    )
    size = (width, height)
    return np.asarray(Image.fromarray(image).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def _png(image: UInt8[np.ndarray, "H W"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
