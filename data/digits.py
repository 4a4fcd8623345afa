"""digits-world: ten digits written, spoken and moving, with captions, built offline from what packages ship."""

import bisect
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from tqdm import tqdm

from omniform.data.digit_media import COUNTS, SplitMedia
from omniform.data.digit_scenes import KINDS, scene_samples
from omniform.data.handwritten_digits import (
    SPLIT_ROWS,
    WRITER_BLOCKS,
    altered,
    load_digit_images,
    png_bytes,
    rows_by_digit,
)
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import unseal
from omniform.data.shards import ShardWriter
from omniform.data.templates import TEST_DOCUMENTS, TEST_TEMPLATES, TRAIN_DOCUMENTS, TRAIN_TEMPLATES, render
from omniform.data.verify import MANIFEST, verify, write_manifest
from omniform.kernels.keyed_noise import keyed_bits, keyed_permutation, stream

VERSION = 4
IMAGE_SOURCE = {
    "name": "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part)",
    "licence": "CC BY 4.0",
    "attribution": "E. Alpaydin, C. Kaynak; UCI Machine Learning Repository, doi:10.24432/C50P49",
}
SPEECH_SOURCE = {
    "name": "speech rendered on this machine by espeak-ng (the copy in espeakng-loader)",
    "licence": "the program and its voices: GPL-3.0-or-later",
    "attribution": "espeak-ng contributors, https://github.com/espeak-ng/espeak-ng",
}
# Pictures of a document, and how many documents of each kind begin with an image: with each of its first copies.
FEWEST_PICTURES, MOST_PICTURES, DOCUMENT_COPIES = 2, 4, 2


def build_digits(out: Path, seed: int = 0, copies: int = 16, *, media: bool = True, limit: int | None = None) -> Path:
    """Write digits-world to `out`; the same arguments give the same bytes. Nothing is left behind on an error.

    For each SPLIT of train, validation and test, with drawings and voices that no other split has, and wordings that
    test alone has:

        SPLIT                   text, image: a caption and a drawing
        SPLIT-documents         texts and drawings in turns, two to four of each, that count up or name what is shown
        SPLIT-find              image, text, location: two digits, and where one of them is
        SPLIT-draw              text, location, image: a digit to draw in a box
        SPLIT-text              text, text: two captions of one digit (train and test alone)
        SPLIT-speech            text, speech: a caption and a spoken digit
        SPLIT-video             text, video: a caption that says digit and motion, and a clip
        SPLIT-concepts          text, image, speech, video of one digit, and none says how the clip moves
        SPLIT-moving-concepts   text, image, speech, video of one digit and motion, which text and speech say
        SPLIT-continued         video, video: a clip, and the one that goes on from its last frame
        SPLIT-stories           like documents, of drawings, sounds and clips

    A training image appears `copies` times: once as it is, the others turned, scaled and moved a little, and each with
    the next of the templates. Some digits and motions come together in one split alone: `moving_digits.HELD_OUT_PAIRS`.
    A world that is there already, complete and of the same recipe, is left as it is.

    Args:
        seed: chooses how copies and clips differ, templates, and what comes together.
        copies: of each training image, at least 1.
        media: False leaves out all folders with speech and video.
        limit: at most so many of each in those folders and of the scenes: of the ways in which a voice says a word, of
            the clips of a digit and motion, and so on; at least 1.

    Raises:
        DataError: `copies` or `limit` is out of range, a package is missing, or `out` holds something else.
    """
    if not out.name or out.name == "..":
        raise DataError(f"{out} cannot be built anew: give the name of a folder that may be created")
    if copies < 1:
        raise DataError(f"copies is {copies}, expected at least 1: the first is the image as it is")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected at least 1, or None for the whole world")
    recipe = {
        "format": "omniform-world",
        "world": "digits",
        "version": VERSION,
        "seed": seed,
        "copies": copies,
        "media": media,
        "limit": limit,
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
        for name, samples in _folders(images, labels, seed, copies, media, limit):
            counts[name] = _write(partial / name, samples)
            if not sys.stderr.isatty():
                print(f"{name}: {counts[name]} samples", file=sys.stderr, flush=True)
        sources = [IMAGE_SOURCE, *([SPEECH_SOURCE] if media else [])]
        write_manifest(partial, {**recipe, "samples": counts, "sources": sources})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _folders(
    images: UInt8[np.ndarray, "R H W"],
    labels: npt.NDArray[np.int64],
    seed: int,
    copies: int,
    media: bool,
    limit: int | None,
) -> Iterator[tuple[str, Iterator[RawSample]]]:
    """Yield the folders of the world and their samples."""
    for split in SPLIT_ROWS:
        if media:
            counts = COUNTS[split].at_most(limit)
            made = SplitMedia(split, seed, images, labels, copies if split == "train" else 1, counts)
            yield f"{split}-speech", made.speech_samples()
            yield f"{split}-video", made.video_samples()
            yield f"{split}-concepts", made.concept_samples()
            yield f"{split}-moving-concepts", made.moving_concept_samples()
            yield f"{split}-continued", made.continued_samples()
            yield f"{split}-stories", made.story_samples()
        yield split, _image_samples(images, labels, split, seed, copies)
        yield f"{split}-documents", _document_samples(images, labels, split, seed, copies)
        for kind in KINDS:
            scenes = scene_samples(kind, images, labels, split, seed, copies if split == "train" else 1, limit)
            yield f"{split}-{kind}", scenes
    # Each test prompt stands once: an answer is right if it names the digit, in whatever words.
    yield "train-text", _text_samples(TRAIN_TEMPLATES, TRAIN_TEMPLATES)
    yield "test-text", _text_samples(TEST_TEMPLATES, TRAIN_TEMPLATES[:1])


def _image_samples(
    images: UInt8[np.ndarray, "R H W"], labels: npt.NDArray[np.int64], split: str, seed: int, copies: int
) -> Iterator[RawSample]:
    templates = TEST_TEMPLATES if split == "test" else TRAIN_TEMPLATES
    for row in SPLIT_ROWS[split]:
        order = keyed_permutation(len(templates), seed, stream("digits/template"), row)
        for copy in range(copies if split == "train" else 1):
            drawing, warp = altered(images, row, copy, seed)
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
            yield RawSample(f"{row:04d}-{copy}", (caption, _picture(drawing)), metadata)


def _document_samples(
    images: UInt8[np.ndarray, "R H W"], labels: npt.NDArray[np.int64], split: str, seed: int, copies: int
) -> Iterator[RawSample]:
    if split != "train":
        copies = 1
    rows_of = rows_by_digit(labels, split)
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
                    drawing, _ = altered(images, its_row, its_copy, seed)
                    spans += [RawSpan("text", text=text), _picture(drawing)]
                metadata = {
                    "kind": kind,
                    "digits": digits,
                    "rows": rows,
                    "copies": chosen_copies,
                    "templates": [template.first, template.following],
                }
                yield RawSample(f"{kind}-{row:04d}-{copy}", tuple(spans), metadata)


def _picture(drawing: UInt8[np.ndarray, "H W"]) -> RawSpan:
    return RawSpan("image", payload=png_bytes(drawing), extension="png")


def _text_samples(prompts: tuple[str, ...], answers: tuple[str, ...]) -> Iterator[RawSample]:
    for digit in range(10):
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(answers):
                if prompt != answer:
                    spans = (RawSpan("text", text=render(prompt, digit)), RawSpan("text", text=render(answer, digit)))
                    yield RawSample(f"{digit}-{i}-{j}", spans, {"digit": digit, "template": prompt, "answer": answer})


def _write(folder: Path, samples: Iterator[RawSample]) -> int:
    listed = list(tqdm(samples, desc=folder.name, unit="sample", disable=None, leave=False))
    # A fixed shuffle: the data set's own order runs through one writer after the other.
    order = np.argsort(keyed_bits(stream("digits/order"), np.arange(len(listed))), kind="stable")
    with ShardWriter(folder) as writer:
        for place in order:
            writer.write(listed[place])
    return len(listed)
