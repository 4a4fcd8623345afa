"""Folders of images as people have them become shards: every file is kept, or left out for a reason that is counted."""

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
from image_folders import captions, contents, fill, picture, reasons
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.from_folder import FolderOptions, from_folder
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.verify import verify


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
