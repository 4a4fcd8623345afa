"""digits-world is deterministic, and what it holds out is held out."""

import hashlib
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import transform
from sklearn.datasets import load_digits

from omniform.data import digits
from omniform.data.digits import build_digits
from omniform.data.handwritten_digits import load_digit_images
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.templates import TEST_DOCUMENTS, TEST_TEMPLATES, TRAIN_DOCUMENTS, TRAIN_TEMPLATES, WORDS, render


def pixels(payload: bytes | None) -> np.ndarray:
    """Decode an image member."""
    return np.asarray(Image.open(io.BytesIO(payload or b"")))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a world."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds have twenty drawings in each split."""
    monkeypatch.setattr(digits, "SPLIT_ROWS", {split: rows[:20] for split, rows in digits.SPLIT_ROWS.items()})


def test_the_same_recipe_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    files, again = contents(world), contents(build_digits(tmp_path / "again", seed=3, copies=3, limit=2))
    assert files.keys() == again.keys()
    assert [name for name in files if files[name] != again[name]] == []


@pytest.mark.usefixtures("few_rows")
def test_another_seed_gives_another_world(tmp_path: Path) -> None:
    one, other = (contents(build_digits(tmp_path / str(n), seed=n, copies=3, media=False)) for n in (3, 4))
    assert one.keys() == other.keys()
    assert [name for name in ("train", "train-documents") if other[f"{name}/000000.tar"] in one.values()] == []


# Of seed 3 and three copies, as version 2 had them: figures that were measured on these folders stay comparable.
VERSION_2 = {
    "test": "0357a3385f6c6e29",
    "test-documents": "584fd572ec400318",
    "test-text": "bdab2f99030fcf0c",
    "train": "71f3e87211367397",
    "train-documents": "602a2f32de2b3692",
    "train-text": "53fe780be1321909",
    "validation": "7aec0ac8db99b395",
    "validation-documents": "dfbe41184a8e2ff2",
}


def content_digest(folder: Path) -> str:
    """Digest what the samples hold, in their order, but not how files of pictures are compressed."""
    digest = hashlib.sha256()
    for sample in ShardReader(folder):
        said = [sample.key, dict(sample.metadata), [span.text for span in sample.spans]]
        digest.update(json.dumps(said, sort_keys=True).encode())
        for span in sample.spans:
            if span.payload is not None:
                digest.update(pixels(span.payload).tobytes())
    return digest.hexdigest()[:16]


def test_texts_and_pictures_are_those_of_version_2(world: Path) -> None:
    assert {folder: content_digest(world / folder) for folder in VERSION_2} == VERSION_2


@pytest.mark.usefixtures("few_rows")
def test_a_finished_world_is_left_alone_and_anything_else_is_refused(tmp_path: Path) -> None:
    finished = build_digits(tmp_path / "finished", seed=3, media=False)
    before = contents(finished)
    assert build_digits(finished, seed=3, media=False) == finished
    assert contents(finished) == before
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    (damaged / "test" / "000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged, remove it and build it again: test/000000\.tar"):
        build_digits(damaged, seed=3, media=False)
    shutil.rmtree(damaged)
    with pytest.raises(DataError, match="remove it or choose another folder"):
        build_digits(finished, seed=5, media=False)
    shutil.rmtree(finished)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="remove it or choose another folder"):
        build_digits(tmp_path)
    with pytest.raises(DataError, match=r"\. cannot be built anew"):
        build_digits(Path("."))
    with pytest.raises(DataError, match="copies is 0"):
        build_digits(tmp_path / "new", copies=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_splits_hold_their_rows_and_templates_only(world: Path) -> None:
    rows: dict[str, Counter] = {}
    for split, templates in (("train", TRAIN_TEMPLATES), ("validation", TRAIN_TEMPLATES), ("test", TEST_TEMPLATES)):
        samples = list(ShardReader(world / split))
        rows[split] = Counter(sample.metadata["row"] for sample in samples)
        for sample in samples:
            digit = sample.metadata["digit"]
            assert sample.spans[0].text in {render(template, digit) for template in templates}
            assert sample.spans[0].text == render(sample.metadata["template"], digit)
    assert rows["train"] == dict.fromkeys(range(1415), 3)
    assert rows["validation"] == dict.fromkeys(range(1415, 1545), 1)
    assert rows["test"] == dict.fromkeys(range(1545, 1797), 1)
    assert not set(TRAIN_TEMPLATES) & set(TEST_TEMPLATES)
    blocks = {split: {s.metadata["writer_block"] for s in ShardReader(world / split)} for split in rows}
    assert not blocks["train"] & (blocks["test"] | blocks["validation"])


def test_images_are_the_real_ones_and_copies_differ_from_them_as_their_metadata_say(world: Path) -> None:
    images, labels = load_digit_images()
    assert images.shape == (1797, 16, 16)
    # Averaging 2 x 2 pixels undoes the enlargement up to bicubic overshoot and rounding: each is its own nearest row.
    small = images.reshape(1797, 8, 2, 8, 2).mean((2, 4)) * (16 / 255)
    originals = load_digits()
    distances = ((small[:50, None] - originals.images[None]) ** 2).sum((2, 3))
    assert (distances.argmin(1) == np.arange(50)).all()
    warps: dict[int, set] = {}
    for sample in ShardReader(world / "train")[:400]:
        row, metadata, found = sample.metadata["row"], sample.metadata, pixels(sample.spans[1].payload)
        assert metadata["digit"] == labels[row] == originals.target[row]
        if metadata["copy"] == 0:
            np.testing.assert_array_equal(found, images[row])
        # scikit-image's warp of the original, by what the metadata say, as the reference; its cubic kernel is another.
        centre = np.array([7.5, 7.5])
        forward = (
            transform.AffineTransform(translation=-centre)
            + transform.AffineTransform(scale=metadata["scale"], rotation=np.radians(metadata["rotation"]))
            + transform.AffineTransform(translation=centre + metadata["shift"])
        )
        expected = transform.warp(images[row] / 255.0, forward.inverse, order=3)
        inner = (slice(2, 14), slice(2, 14))  # kernels of different width see the border differently
        assert np.abs(found / 255.0 - expected)[inner].mean() < 0.03
        assert np.corrcoef(found[inner].ravel(), expected[inner].ravel())[0, 1] > 0.98
        warp = (metadata["rotation"], metadata["scale"], *metadata["shift"])
        assert abs(warp[0]) <= 10
        assert 0.9 <= warp[1] <= 1.1
        assert max(map(abs, warp[2:])) <= 1
        assert warp not in warps.setdefault(row, set())
        warps[row].add(warp)
    for sample in ShardReader(world / "test"):
        np.testing.assert_array_equal(pixels(sample.spans[1].payload), images[sample.metadata["row"]])


def test_text_pairs_name_one_digit_twice(world: Path) -> None:
    for split, prompts in (("train-text", TRAIN_TEMPLATES), ("test-text", TEST_TEMPLATES)):
        samples = list(ShardReader(world / split))
        pairs = {(s.metadata["digit"], s.metadata["template"], s.metadata["answer"]) for s in samples}
        assert len(pairs) == len(samples)
        for sample in samples:
            digit, prompt, answer = (sample.metadata[key] for key in ("digit", "template", "answer"))
            assert (prompt in prompts, answer in TRAIN_TEMPLATES) == (True, True)
            assert [span.text for span in sample.spans] == [render(prompt, digit), render(answer, digit)]


def named(text: str | None) -> set[int]:
    """Return the digits that a text names."""
    words = re.findall(r"\w+", text or "")
    return {WORDS.index(w) if w in WORDS else int(w) for w in words if w in WORDS or w.isdigit()}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_documents_say_and_show_what_their_metadata_say_with_pictures_of_their_split(world: Path, split: str) -> None:
    pictures = {
        (s.metadata["row"], s.metadata["copy"]): (s.spans[1].payload, s.metadata["digit"])
        for s in ShardReader(world / split)
    }
    templates = {(t.kind, t.first, t.following) for t in (TEST_DOCUMENTS if split == "test" else TRAIN_DOCUMENTS)}
    documents = list(ShardReader(world / f"{split}-documents"))
    for document in documents:
        kind, digits, (first, following) = (document.metadata[key] for key in ("kind", "digits", "templates"))
        assert (kind, first, following) in templates
        assert [span.modality for span in document.spans] == ["text", "image"] * len(digits)
        texts, shown = document.spans[::2], document.spans[1::2]
        expected = [render(following if place else first, digit) for place, digit in enumerate(digits)]
        assert [span.text for span in texts] == expected
        assert [named(span.text) for span in texts[1:]] == [{digit} for digit in digits[1:]]
        assert named(texts[0].text) == ({digits[0]} if kind == "counting" else set())
        assert digits == [(digits[0] + place * (kind == "counting")) % 10 for place in range(len(digits))]
        places = zip(document.metadata["rows"], document.metadata["copies"], strict=True)
        assert [(span.payload, d) for span, d in zip(shown, digits, strict=True)] == [pictures[p] for p in places]
    assert Counter(len(d.spans) // 2 for d in documents).keys() == {2, 3, 4}
    begun = Counter((d.metadata["kind"], d.metadata["rows"][0]) for d in documents)
    assert begun == dict.fromkeys(((k, r) for k in ("counting", "naming") for r, _ in pictures), 1 + (split == "train"))


def test_documents_of_the_test_split_begin_and_go_on_in_words_of_their_own() -> None:
    for texts in (lambda t: t.first, lambda t: t.following):
        assert not {texts(t) for t in TRAIN_DOCUMENTS} & {texts(t) for t in TEST_DOCUMENTS}
    known, used = (
        {word for t in templates for word in f"{t.first} {t.following}".split()}
        for templates in (TRAIN_DOCUMENTS, TEST_DOCUMENTS)
    )
    assert used <= known


@pytest.mark.parametrize("template", TRAIN_TEMPLATES + TEST_TEMPLATES)
def test_every_caption_names_its_digit_and_no_other(template: str) -> None:
    for digit in range(10):
        assert named(render(template, digit)) == {digit}
    assert not re.search(r"\ba (eight|8)", render(template, 8))
