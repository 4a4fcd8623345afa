"""Folders of images as people have them become shards: every file is kept, or left out for a reason that is counted."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.from_folder import FolderOptions, FolderReport, from_folder
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.verify import verify


def picture(
    file_format: str = "PNG", size: tuple[int, int] = (8, 6), colour: object = "red", **settings: object
) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file, file_format, **settings)
    return file.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files by their relative paths."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(out: Path, split: str = "train") -> dict[str, str | None]:
    """Caption by file name."""
    return {
        sample.metadata["file"]: next((span.text for span in sample.spans if span.modality == "text"), None)
        for sample in ShardReader(out / split)
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reasons(report: FolderReport) -> dict[str, list[str]]:
    """Names by reason, where all are shown."""
    entries = report.skipped.to_json().items()
    assert all(entry["count"] == len(entry["first"]) for _, entry in entries)
    return {reason: entry["first"] for reason, entry in entries}


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


def bomb() -> bytes:
    """A PNG that says it has 60000 x 60000 pixels."""
    content = bytearray(picture())
    content[16:24] = (60_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    return bytes(content)


def test_odd_files_are_kept_or_counted(tmp_path: Path) -> None:
    upright = Image.Exif()
    upright[0x0112] = 6
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("lime", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    images = {
        "animated.gif": animated.getvalue(),
        "bomb.png": bomb(),
        "cut.jpg": picture("JPEG", (64, 64))[:-40],
        "empty.png": b"",
        "named.jpg": picture(),
        "page.png": b"<!DOCTYPE html><title>404",
        "small.bmp": picture("BMP", (3, 9)),
        "thin.tif": picture("TIFF", (90, 8)),
        "turned.jpg": picture("JPEG", (40, 8), exif=upright),
    }
    photos = fill(
        tmp_path / "photos", {**images, "large.png": b"\x89PNG", "photo.heic": b"x", ".DS_Store": b"", "._a.png": b""}
    )
    with (photos / "large.png").open("r+b") as file:
        file.truncate(2**28)  # a hole: it takes no disk
    for name in [*images, "large.png"]:
        fill(photos, {f"{name.partition('.')[0]}.txt": f"caption of {name}"})
    options = FolderOptions(min_size=5, max_aspect_ratio=10)
    report = from_folder(photos, tmp_path / "out", options)
    assert reasons(report) == {
        "too many pixels": ["bomb.png"],
        "damaged image": ["cut.jpg"],
        "empty file": ["empty.png"],
        "file too large": ["large.png"],
        "not an image of a known format": ["page.png"],
        "smaller than asked for": ["small.bmp"],
        "longer and thinner than asked for": ["thin.tif"],
    }
    assert report.noted.to_json() == {
        "the first of several pictures in one file": {"count": 1, "first": ["animated.gif"]},
        "a name that ends like another format": {"count": 1, "first": ["named.jpg"]},
    }
    assert report.other_files == {".txt": 10, "hidden": 2, ".heic": 1}
    assert [sample.spans[1].extension for sample in ShardReader(tmp_path / "out" / "train")] == ["gif", "png", "jpg"]
    assert (report.read, report.kept["train"]) == (10, 3)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_json()
    assert "1 x too many pixels: bomb.png" in str(report)
    fewer = from_folder(photos, tmp_path / "fewer", FolderOptions(max_pixels=100, caption_from="files"))
    assert fewer.skipped.to_json()["too many pixels"]["first"] == ["bomb.png", "cut.jpg", "thin.tif", "turned.jpg"]


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


def test_links_and_pipes_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    secret = fill(tmp_path / "secret", {"s.png": picture(), "s.txt": "secret"})
    photos = fill(tmp_path / "photos", {f"{name}.png": picture() for name in "abc"})
    fill(photos, {"a.txt": "a", "d.txt": "d", "e.txt": "e", "f.txt": "f", "g.txt": "g"})
    (photos / "b.txt").symlink_to(secret / "s.txt")
    (photos / "d.png").symlink_to(secret / "s.png")
    (photos / "e.png").symlink_to("a.png")
    (photos / "f.png").symlink_to("nowhere.png")
    (photos / "folder").symlink_to(secret)
    (photos / "loop").symlink_to(".")
    os.mkfifo(photos / "g.png")
    os.mkfifo(photos / "c.txt")
    report = from_folder(photos, tmp_path / "out")
    assert captions(tmp_path / "out") == {"a.png": "a", "e.png": "e"}
    assert reasons(report) == {
        "caption: link out of the folder": ["b.png"],
        "caption: not a plain file": ["c.png"],
        "link out of the folder": ["d.png"],
        "cannot be read": ["f.png"],
        "not a plain file": ["g.png"],
        "link to a folder": ["folder", "loop"],
    }
    fill(photos, {"d.txt": ""})
    (photos / "metadata.csv").symlink_to(secret / "s.txt")
    with pytest.raises(DataError, match="link out of the folder"):
        from_folder(photos, tmp_path / "other")


def test_names_of_any_bytes_are_kept_apart(tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos", {"ü.png": picture(), "ü.txt": "u", "a.b.png": picture(), "a.b.txt": "dots"})
    raw = os.fsencode(photos) + b"/\xff\x1b[31m"
    for suffix, content in ((b".png", picture()), (b".txt", b"raw")):
        Path(os.fsdecode(raw + suffix)).write_bytes(content)
    from_folder(photos, tmp_path / "out")
    assert captions(tmp_path / "out") == {"a.b.png": "dots", "ü.png": "u", "\\udcff\\x1b[31m.png": "raw"}
    assert verify(tmp_path / "out").ok


def test_the_longest_names_have_captions_too(tmp_path: Path) -> None:
    name = "x" * 251  # with .png a name can be no longer, and with .json it would be
    photos = fill(tmp_path / "photos", {f"{name}.png": picture(), "y" * 251 + ".png": picture(), f"{name}.txt": "x"})
    assert reasons(from_folder(photos, tmp_path / "out")) == {"no caption": ["y" * 251 + ".png"]}
    assert captions(tmp_path / "out") == {f"{name}.png": "x"}


def test_no_name_forges_a_line_of_the_report(tmp_path: Path) -> None:
    files = {"a\nskipped: 9 x.png": b"", "b\u2028.png": picture(), "c.\r\x1b[2J": b"", "d.png": picture(), "d.txt": "d"}
    report = from_folder(fill(tmp_path / "photos", files), tmp_path / "out")
    assert reasons(report) == {"empty file": ["a\\nskipped: 9 x.png"], "no caption": ["b\\u2028.png"]}
    assert report.other_files == {".\\r\\x1b[2j": 1, ".txt": 1}
    assert len(str(report).splitlines()) == 4


def test_rare_endings_are_counted_together(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{copy}.{n:02d}x": b"" for n in range(25) for copy in range(2 if n < 19 else 1)}
    photos = fill(tmp_path / "photos", {**files, "a.png": picture(), "a.txt": "a", "b.txt": "", "c.txt": "", ".d": b""})
    counts = from_folder(photos, tmp_path / "out").other_files
    assert next(iter(counts)) == ".txt"
    assert counts == {".txt": 3, **{f".{n:02d}x": 2 for n in range(19)}, "other endings": 6, "hidden": 1}


def many(folder: Path, names: range) -> Path:
    """One image and caption for each number."""
    files = {f"{n % 7}/{n}.png": picture(colour=n % 256) for n in names}
    return fill(folder, {**files, **{f"{n % 7}/{n}.txt": f"number {n}" for n in names}})


def test_the_same_folder_gives_the_same_bytes_and_new_files_move_none(tmp_path: Path) -> None:
    options = FolderOptions(validation=0.25, seed=3, samples_per_shard=20)
    for copy in ("one", "two"):
        from_folder(many(tmp_path / copy / "photos", range(200)), tmp_path / copy / "out", options)
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")
    validation = set(captions(tmp_path / "one" / "out", "validation"))
    assert 30 < len(validation) < 70  # 50 +- 3 standard deviations
    assert len(list((tmp_path / "one" / "out" / "validation").glob("*.tar"))) == -(-len(validation) // 20)
    train_names = set(captions(tmp_path / "one" / "out"))
    assert not validation & train_names
    from_folder(many(tmp_path / "one" / "photos", range(200, 260)), tmp_path / "more", options)
    assert validation <= set(captions(tmp_path / "more", "validation"))
    assert train_names <= set(captions(tmp_path / "more"))
    from_folder(tmp_path / "two" / "photos", tmp_path / "seed", FolderOptions(validation=0.25, seed=4))
    assert validation != set(captions(tmp_path / "seed", "validation"))
    keys = [s.key for split in ("train", "validation") for s in ShardReader(tmp_path / "one" / "out" / split)]
    assert len(set(keys)) == 200


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for n in range(40):  # 1 MB each, in one shard
        Image.fromarray(noise).save(tmp_path / f"{n}.bmp")
    tracemalloc.start()
    try:
        from_folder(tmp_path, tmp_path.with_name("out"), FolderOptions(captionless="keep"))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 90), height=st.integers(1, 90), resize=st.integers(1, 60))
def test_resizing_makes_larger_images_smaller_and_upright(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, resize: int
) -> None:
    folder = tmp_path_factory.mktemp("resize")
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {"a.png": picture(size=(width, height), colour=90), "b.jpg": picture("JPEG", (width, height), exif=turned)}
    fill(folder / "photos", {**files, "a.txt": "a", "b.txt": "b"})
    report = from_folder(folder / "photos", folder / "out", FolderOptions(resize=resize))
    for sample, size in zip(ShardReader(folder / "out" / "train"), ((width, height), (height, width)), strict=True):
        payload = sample.spans[1].payload or b""
        if min(size) <= resize:
            assert payload == files[sample.metadata["file"]]
            continue
        stored = Image.open(io.BytesIO(payload))
        assert stored.format == {"a.png": "PNG", "b.jpg": "JPEG"}[sample.metadata["file"]]
        assert stored.mode == {"a.png": "L", "b.jpg": "RGB"}[sample.metadata["file"]]
        assert stored.size == tuple(max(1, round(side * resize / min(size))) for side in size)
        assert not stored.getexif()
    assert report.noted.to_json().get("resized", {"count": 0})["count"] == 2 * (min(width, height) > resize)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A job in the background ignores SIGINT, and its children inherit that; a handler they do not."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    many(tmp_path / "photos", range(1500))
    command = [sys.executable, "-m", "omniform.cli", "data", "from-folder", "photos", "--out", "out"]
    with subprocess.Popen([*command, "--samples-per-shard", "10"], cwd=tmp_path, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert running.stderr.readline().endswith(b"image 1\n")  # of 1500
        running.send_signal(signal.SIGINT)
        running.communicate()
    assert running.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_nothing_is_left_after_an_error_and_nothing_is_overwritten(tmp_path: Path) -> None:
    photos = many(tmp_path / "photos", range(12))
    fill(photos, {"6/broken.png": b"no"})
    with pytest.raises(DataError, match=r"6/broken\.png: 2 bytes are not"):
        from_folder(photos, tmp_path / "out", FolderOptions(samples_per_shard=3, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "out").mkdir()
    from_folder(photos, tmp_path / "out")
    with pytest.raises(DataError, match="exists and is not empty"):
        from_folder(photos, tmp_path / "out")
    left = fill(tmp_path, {f".new.{os.getpid()}.partial/train/000000.tar": b"of a run that was killed"})
    from_folder(photos, left / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "out")
    with pytest.raises(DataError, match="lies in"):
        from_folder(photos, photos / "shards")
    with pytest.raises(DataError, match="is not a folder"):
        from_folder(photos / "0" / "0.png", tmp_path / "x")


def test_what_came_into_the_folder_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    many(tmp_path / "photos", range(500))
    command = [sys.executable, "-m", "omniform.cli", "data", "from-folder", "photos", "--out", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert running.stderr.readline().endswith(b"image 1\n")  # of 500
        fill(tmp_path / "out", {"thesis.txt": "precious"})
        assert b"out: Directory not empty" in running.communicate()[1]
    assert running.returncode == 2
    assert contents(tmp_path / "out") == {"thesis.txt": b"precious"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "photos"}


@pytest.mark.parametrize(
    "wrong", [{"validation": 1.5}, {"validation": float("nan")}, {"max_pixels": 2**40}, {"size": 3}]
)
def test_options_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        FolderOptions(**wrong)


def test_the_command_reports_and_fails_where_nothing_is_kept(tmp_path: Path) -> None:
    photos = many(tmp_path / "photos", range(5))
    fill(photos, {"bad.png": b"no", "bad.txt": "x"})
    command = ["data", "from-folder", str(photos), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["kept"] == {"train": 5, "validation": 0}
    nothing = fill(tmp_path / "nothing", {"bad.png": b"no", "b.png": picture()})
    done = CliRunner().invoke(app, ["data", "from-folder", str(nothing), "--out", str(tmp_path / "none")])
    assert done.exit_code != 0
    assert "no image could be kept\n2 images read, 0 kept" in str(done.exception)
    assert not (tmp_path / "none").exists()
