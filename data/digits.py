"""digits-world: real handwritten digits with captions, built offline from what scikit-learn ships.

The images are the 1797 of the UCI optical digits test set (CC BY 4.0), 8 x 8 with 17 grey levels, by 13 writers one
after the other. Who wrote which is not recorded, but runs of labels show 14 blocks; validation and test take whole
blocks at the end, as a proxy for writers that training never saw.
"""

import bisect
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from PIL import Image

from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import seal, unseal, write_atomically
from omniform.data.shards import ShardWriter
from omniform.data.templates import TEST_TEMPLATES, TRAIN_TEMPLATES, render
from omniform.data.verify import MANIFEST, file_digest, verify
from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, stream

VERSION = 1
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
_SHIFTS = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0)]


def build_digits(out: Path, seed: int = 0, copies: int = 8) -> Path:
    """Write digits-world to `out`; the same arguments give the same bytes. Nothing is left behind on an error.

    Image-text samples in train/, validation/ and test/, pairs of captions of one digit in train-text/ and test-text/.
    A training image appears `copies` times: once as it is, the others moved by one pixel, each with another template.
    A world that is there already, complete and of the same recipe, is left as it is.

    Args:
        seed: chooses shifts and templates.
        copies: of each training image, 1 to 9.

    Raises:
        DataError: `copies` is out of range, or `out` holds something else.
    """
    if not 1 <= copies <= len(_SHIFTS) + 1:
        raise DataError(f"copies is {copies}, expected 1 to {len(_SHIFTS) + 1}: there are no more one-pixel shifts")
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
        for split, prompts in (("train", TRAIN_TEMPLATES), ("test", TEST_TEMPLATES)):
            counts[f"{split}-text"] = _write(partial / f"{split}-text", _text_samples(split, prompts))
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        files = [
            {"path": p.relative_to(partial).as_posix(), "size": p.stat().st_size, "sha256": file_digest(p)}
            for p in paths
        ]
        manifest = {**recipe, "samples": counts, "sources": SOURCES, "files": files}
        write_atomically(partial / MANIFEST, seal(manifest))
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
        shifts = keyed_permutation(len(_SHIFTS), seed, stream("digits/shift"), row)
        order = keyed_permutation(len(templates), seed, stream("digits/template"), row)
        for copy in range(copies if split == "train" else 1):
            dx, dy = (0, 0) if copy == 0 else _SHIFTS[shifts[copy - 1]]
            template = int(order[copy])
            metadata = {
                "digit": int(labels[row]),
                "row": row,
                "copy": copy,
                "shift": [dx, dy],
                "template": templates[template],
                "writer_block": bisect.bisect_right(WRITER_BLOCKS, row) - 1,
            }
            caption = RawSpan("text", text=render(templates[template], int(labels[row])))
            image = RawSpan("image", payload=_png(_moved(images[row], dx, dy)), extension="png")
            yield RawSample(f"{row:04d}-{copy}", (caption, image), metadata)


def _text_samples(split: str, prompts: tuple[str, ...]) -> Iterator[RawSample]:
    for digit in range(10):
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(TRAIN_TEMPLATES):
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


def _moved(image: UInt8[np.ndarray, "H W"], dx: int, dy: int) -> UInt8[np.ndarray, "H W"]:
    """Return the image moved right by dx and down by dy pixels, |dx|, |dy| <= 1, with empty pixels behind it."""
    height, width = image.shape
    return np.pad(image, 1)[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]


def _png(image: UInt8[np.ndarray, "H W"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
