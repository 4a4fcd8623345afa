"""Captions beside images, in tables and in the names of folders, found or counted."""

import csv
import io
import json
from pathlib import Path

import pytest
from image_folders import captions, fill, picture, reasons

from omniform.data.from_folder import FolderOptions, from_folder
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader


def test_captions_lie_beside_the_images(tmp_path: Path) -> None:
    photos = fill(
        tmp_path / "photos",
        {
            **{"a.jpg": picture("JPEG"), "a.txt": "\ufeffein Bär \n"},
            **{"deep/er/b.PNG": picture(), "deep/er/b.json": '{"caption": "two", "text": "no"}'},
            **{"c.webp": picture("WEBP"), "c.json": '{"text": "three", "width": 8}'},
            **{"d.png": picture(), "d.txt": "from text", "d.json": '{"caption": "from json"}'},
            **{"e.png": picture(), "e.txt": " \n", "e.json": '{"caption": "blank text does not count"}'},
            **{"f.png": picture(), "g.png": picture(), "g.json": "{}", "h.png": picture(), "h.txt": "\n"},
        },
    )
    report = from_folder(photos, tmp_path / "out")
    assert captions(tmp_path / "out") == {
        "a.jpg": "ein Bär",
        "c.webp": "three",
        "d.png": "from text",
        "e.png": "blank text does not count",
        "deep/er/b.PNG": "two",
    }
    assert reasons(report) == {"no caption": ["f.png", "g.png", "h.png"]}
    assert (report.read, report.kept) == (8, {"train": 5, "validation": 0})
    assert report.other_files == {".json": 5, ".txt": 4}
    for sample in ShardReader(tmp_path / "out" / "train"):
        assert sample.spans[-1].payload == (photos / sample.metadata["file"]).read_bytes()
    kept = from_folder(photos, tmp_path / "all", FolderOptions(captionless="keep"))
    assert kept.noted.to_json()["no caption"] == {"count": 3, "first": ["f.png", "g.png", "h.png"]}
    assert captions(tmp_path / "all")["h.png"] is None
    own = from_folder(photos, tmp_path / "own", FolderOptions(caption_key="text"))
    assert captions(tmp_path / "own")["deep/er/b.PNG"] == "no"
    assert own.kept["train"] == 4


ROWS = [{"file_name": "a.png", "text": "one, with a comma"}, {"file_name": "./in/b.png", "text": "zwei\nZeilen"}]


def csv_table(rows: list[dict[str, str]]) -> str:
    """Rows as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_stand_in_one_table(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS, {"file_name": "lost.png", "text": "no such image"}, {"file_name": "c.png", "text": ""}]
    rows += [{"file_name": name, "text": "not kept"} for name in ("cut.png", "small.png")]
    table = csv_table(rows) if kind == "csv" else "".join(json.dumps(row) + "\n\n" for row in rows)
    images = {name: picture() for name in ("a.png", "in/b.png", "c.png", "d.png")}
    images |= {"cut.png": picture()[:50], "small.png": picture(size=(2, 2))}
    photos = fill(tmp_path / "photos", {**images, f"metadata.{kind}": table, "a.txt": "not this one"})
    report = from_folder(photos, tmp_path / "out", FolderOptions(min_size=3))
    assert captions(tmp_path / "out") == {"a.png": "one, with a comma", "in/b.png": "zwei\nZeilen"}
    assert reasons(report) == {
        "no caption": ["c.png", "d.png"],
        "damaged image": ["cut.png"],
        "smaller than asked for": ["small.png"],
    }
    assert str(report.unused_rows) == "1 x rows of the table without an image: lost.png"
    from_folder(photos, tmp_path / "files", FolderOptions(caption_from="files"))
    assert captions(tmp_path / "files") == {"a.png": "not this one"}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"metadata.csv": "file_name,caption\na.png,x\n./a.png,y\n"}, "line 3: './a.png' stands there twice"),
        ({"metadata.csv": "file_name,title\na.png,x\n"}, "has the columns file_name, title: expected .*--caption-key"),
        ({"metadata.csv": ""}, "has the columns none"),
        ({"metadata.csv": b"file_name,text\na.png,\xff\n"}, "cannot be read: .*utf-8"),
        ({"metadata.csv": "file_name,text\na.png," + "x" * 200_000}, "cannot be read: field larger"),
        ({"metadata.csv": "file_name,text\n,x\n"}, "line 2: no `file_name`"),
        ({"metadata.jsonl": "[]\n"}, "line 1: a list"),
        ({"metadata.jsonl": "{"}, "cannot be read"),
        ({"metadata.jsonl": '{"file_name": ' + "1" * 5000 + "}"}, "cannot be read: .*digits"),
        ({"metadata.jsonl": '{"text": "x"}'}, "line 1: no `file_name`"),
        ({"metadata.jsonl": '{"file_name": "\\ud800", "text": "x"}'}, "no image could be kept"),
        ({"metadata.jsonl": "", "metadata.csv": ""}, "holds metadata.csv and metadata.jsonl"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, tables: dict, message: str) -> None:
    photos = fill(tmp_path / "photos", {"a.png": picture(), **tables})
    with pytest.raises(DataError, match=message):
        from_folder(photos, tmp_path / "out")
    with pytest.raises(DataError, match="holds neither"):
        from_folder(
            fill(tmp_path / "none", {"a.png": picture()}), tmp_path / "out", FolderOptions(caption_from="metadata")
        )
    assert not (tmp_path / "out").exists()


def test_a_caption_of_a_table_has_the_bound_of_every_caption(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": "x" * (2**20 + more)} for name, more in (("a", 1), ("b", 0))]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    photos = fill(tmp_path / "photos", {"a.png": picture(), "b.png": picture(), "metadata.jsonl": table})
    assert reasons(from_folder(photos, tmp_path / "out")) == {"caption too long": ["a.png"]}
    assert list(captions(tmp_path / "out")) == ["b.png"]


def test_captions_are_names_of_folders(tmp_path: Path) -> None:
    photos = fill(
        tmp_path / "photos", {"golden_retriever/1.png": picture(), "x/cat/2.png": picture(), "3.png": picture()}
    )
    report = from_folder(photos, tmp_path / "out", FolderOptions(caption_from="folder"))
    assert captions(tmp_path / "out") == {"golden_retriever/1.png": "golden retriever", "x/cat/2.png": "cat"}
    assert reasons(report) == {"no caption": ["3.png"]}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.txt": b"\xff\xfeh\0"}, "caption is not UTF-8"),
        ({"a.txt": "x" * (2**20 + 1)}, "caption: file too large"),
        ({"a.json": "{"}, "caption file is not JSON"),
        ({"a.json": "[" * 100_000}, "caption file is not JSON"),
        ({"a.json": '["caption"]'}, "caption file is not JSON"),
        ({"a.json": '{"caption": ["one", "two"]}'}, "caption is not text"),
        ({"a.json": '{"caption": "\\ud800"}'}, "caption is not text"),
    ],
)
def test_captions_that_cannot_be_read_are_counted_or_end_it(tmp_path: Path, files: dict, reason: str) -> None:
    photos = fill(tmp_path / "photos", {"a.png": picture(), **files, "b.png": picture(), "b.txt": "b"})
    assert reasons(from_folder(photos, tmp_path / "out")) == {reason: ["a.png"]}
    with pytest.raises(DataError, match=f"a.(png|txt|json): {reason}"):
        from_folder(photos, tmp_path / "strict", FolderOptions(strict=True))
    assert not (tmp_path / "strict").exists()


def test_the_longest_names_have_captions_too(tmp_path: Path) -> None:
    name = "x" * 251  # with .png a name can be no longer, and with .json it would be
    photos = fill(tmp_path / "photos", {f"{name}.png": picture(), "y" * 251 + ".png": picture(), f"{name}.txt": "x"})
    assert reasons(from_folder(photos, tmp_path / "out")) == {"no caption": ["y" * 251 + ".png"]}
    assert captions(tmp_path / "out") == {f"{name}.png": "x"}
