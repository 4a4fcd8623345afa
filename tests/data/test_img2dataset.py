"""Shards in the layout of img2dataset 1.47 are read as they are, from a folder that nothing is written to."""

import gc
import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.index import index_shards
from omniform.data.inspect import info, preview
from omniform.data.shards import ShardReader
from omniform.data.token_source import TokenSource
from omniform.data.verify import verify
from omniform.tokenizers.base import Modality
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig

CAPTIONS = ("one", "", None, "ü", "  four ")


def image(file_format: str, red: int) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (red, 0, 0)).save(file, file_format)
    return file.getvalue()


def download(folder: Path, encode_format: str = "jpg", *, save_caption: bool = True) -> Path:
    """Write what `img2dataset --output_format webdataset` leaves: tars of what it got, and side files about the rest.

    Its sample writer gives webdataset's writer the image, then an empty `txt` where there is no caption, then `json`.
    """
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number, caption in enumerate(CAPTIONS):
                key = f"{shard:05d}{number:04d}"
                meta = {"url": f"https://example.org/{key}", "caption": caption, "key": key, "status": "success"}
                meta |= {"error_message": None, "width": 16, "height": 16, "exif": "{}", "sha256": "0" * 64}
                payload = image({"jpg": "JPEG"}.get(encode_format, encode_format), 50 * number)
                sample = {"__key__": key, encode_format: payload}
                if save_caption:
                    sample["txt"] = "" if caption is None else caption
                writer.write({**sample, "json": json.dumps(meta, indent=4)})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 a table of all samples, the failed ones too PAR1")
        (folder / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": 6, "successes": 5, "failed_to_download": 1})
        )
    return folder


@pytest.mark.parametrize("encode_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("save_caption", [True, False])
def test_a_download_is_read_from_where_it_lies(tmp_path: Path, encode_format: str, save_caption: bool) -> None:
    folder, indexes = download(tmp_path / "download", encode_format, save_caption=save_caption), tmp_path / "indexes"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = CliRunner().invoke(app, ["data", "index", str(folder), "--index-dir", str(indexes)])
    assert done.stdout.split() == [str(indexes / f"0000{shard}.index.json") for shard in range(2)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    samples = list(ShardReader(folder, indexes))
    texts = [[span.text for span in sample.spans if span.modality == "text"] for sample in samples]
    assert texts == [["one"], [], [], ["ü"], ["  four "]] * 2
    assert [sample.spans[-1].payload for sample in samples[:5]] == [
        image({"jpg": "JPEG"}.get(encode_format, encode_format), 50 * number) for number in range(5)
    ]
    assert samples[7].metadata["url"] == "https://example.org/000010002"
    assert verify(folder, indexes).ok
    summary = info(folder, indexes)["splits"]["download"]
    assert (summary["samples"], summary["uncaptioned"], summary["spans"]) == (10, 4, {"image": 10, "text": 6})
    preview(folder, tmp_path / "sheet.png", index_dir=indexes)
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)


def test_txt_counts_before_json(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, text, caption in (("a", "text", "json"), ("b", " \n", "json"), ("c", None, "json"), ("d", "text", 7)):
            texts = {} if text is None else {"txt": text}
            writer.write({"__key__": key, "png": image("PNG", 0), **texts, "json": json.dumps({"caption": caption})})
    index_shards(tmp_path)
    assert [sample.spans[0].text for sample in ShardReader(tmp_path)] == ["text", "json", "json", "text"]


def test_images_that_cannot_be_read_are_counted_by_reason(
    tmp_path: Path, tokenizers: dict[str, Modality], caplog: pytest.LogCaptureFixture
) -> None:
    payloads = {
        "a": image("PNG", 0),
        "b": b"",
        "c": image("JPEG", 9)[:-30],
        "d": b"<html>",
        "e": image("JPEG", 9)[:-20],
    }
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, payload in payloads.items():
            writer.write({"__key__": key, "jpg": payload, "txt": key})
    index_shards(tmp_path)
    config = ImageTokenizerConfig(image_size=16, widths=(8, 8))
    source = TokenSource(tmp_path, {**tokenizers, "image": ImageTokenizer(config, config.build())}, tmp_path / "cache")
    assert {number: failure.reason for number, failure in source.failures.items()} == {
        1: "empty file",
        2: "damaged image",
        3: "not an image of a known format",
        4: "damaged image",
    }
    assert "4 of 5 samples cannot be decoded: 2 x damaged image: 0.tar: sample c: " in caplog.text
    assert "1 x empty file: 0.tar: sample b: " in caplog.text
    found = info(tmp_path)["splits"][tmp_path.name]["unreadable"]  # of headers alone
    assert found["empty file"] == {"count": 1, "first": [f"{tmp_path}/0.tar, sample b"]}
    assert {problem.sample for problem in verify(tmp_path).problems} == {"b", "c", "d", "e"}
    preview(tmp_path, tmp_path / "sheet.png")
    gc.collect()
