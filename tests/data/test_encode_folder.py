"""What encoding a folder keeps of damaged samples, and what it refuses before it has written anything."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.data.encode import BATCH_SIZE, MAX_WAITING, encode_shard
from omniform.data.encode_folder import encode_folder
from omniform.data.folder_lock import locked
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import seal, unseal
from omniform.data.shards import ShardReader, ShardWriter
from omniform.data.token_record import RECORD
from omniform.data.token_source import TokenSource, count_samples
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.base import Discrete, Modality, Tokens
from omniform.tokenizers.registry import load_modality

THREE = ("text", "image", "speech")
# What cannot be decoded of which sample; all of sample 4 is damaged.
JUNK = {0: ("speech",), 1: ("image",), 3: ("image", "speech")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples of three modalities, with two pictures, in three shards."""
    folder = tmp_path_factory.mktemp("raw") / "data"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, 3) as writer:
        for n in range(7):
            pictures = []
            for _ in range(2):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(file, "PNG")
                pictures.append(file.getvalue())
            sound = audio_bytes(torch.from_numpy(rng.uniform(-1, 1, 3000).astype(np.float32)), 16000, "wav")
            junk = JUNK.get(n, ())
            spans = (
                RawSpan("image", payload=pictures[0], extension="png"),
                RawSpan("text", text=f"sample {n}"),
                RawSpan("speech", payload=b"junk" if "speech" in junk else sound, extension="wav"),
                RawSpan("image", payload=b"junk" if "image" in junk else pictures[1], extension="png"),
            )
            writer.write(RawSample(f"{n:03d}", spans, {"place": n}))
    shard = folder / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[ShardReader(folder).shards[1].samples[1].offset + 700] ^= 1
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def encoded(shards: Path, tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded with all three tokenizers."""
    out = tmp_path_factory.mktemp("encoded") / "tokens"
    summary = encode_folder(shards, {name: tokenizer_folders[name] for name in THREE}, out)["data"]
    assert summary["spans"] == {"image": 2 * 4, "speech": 4, "text": 6}
    assert sum(entry["count"] for entry in summary["failed"].values()) == 5
    return out


@pytest.mark.parametrize("used", [names for n in (1, 2, 3) for names in itertools.combinations(THREE, n)])
def test_a_run_has_the_same_holes_and_tokens_from_shards_and_from_tokens_of_more_modalities(
    used: tuple[str, ...], shards: Path, encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizers = {name: load_modality(tokenizer_folders[name]) for name in used}
    raw, tokens = (TokenSource(folder, tokenizers, tmp_path, labels=["place"]) for folder in (shards, encoded))
    assert raw.digest == tokens.digest
    assert raw.labels_by(["place"]) == tokens.labels_by(["place"])
    assert raw.labels_by(["place"]) == [None if n == 4 else f"[{n}]" for n in range(7)]
    assert raw.failures == tokens.failures
    assert set(raw.failures) == {4} | {n for n, junk in JUNK.items() if set(junk) & set(used)}
    for number in range(7):
        kinds = [name for name in ("image", "text", "speech", "image") if name in used]
        assert [name for name, _ in raw.spans(number)] == ([] if number in raw.failures else kinds)
        assert raw.spans(number) == tokens.spans(number)
        for place in range(len(raw.spans(number))):
            ours, theirs = raw.tokens(number, place), tokens.tokens(number, place)
            assert (ours.codes.tolist(), ours.grid) == (theirs.codes.tolist(), theirs.grid)


class Sized(Modality):
    """Items of as many elements as their text says, one code each."""

    kind, name = "sized", "text"
    representation = Discrete(2**30)
    fixed_grid = (1,)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def read(self, payload: bytes) -> Any:
        """No memory is taken."""
        return torch.zeros(1).expand(int(payload))

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Note the sizes."""
        self.batches.append([item.numel() for item in items])
        return [Tokens(torch.tensor([item.numel()]), (1,)) for item in items]

    decode_batch = save = load = None  # type: ignore[assignment]


def test_no_more_waits_than_is_stated_and_order_stays(tmp_path: Path) -> None:
    half, huge = MAX_WAITING // 2, 2**30 - 1
    sizes = [half, half, 1, huge, huge, half, 1, half, *[2] * (2 * BATCH_SIZE + 1)]
    with ShardWriter(tmp_path / "data") as writer:
        for n, size in enumerate(sizes):
            writer.write(RawSample(f"{n:04d}", (RawSpan("text", text=str(size)),)))
    tokenizer = Sized()
    found = encode_shard(ShardReader(tmp_path / "data").shards[0], {"text": tokenizer})
    assert found.content["text"].tolist() == sizes
    assert list(itertools.chain(*tokenizer.batches)) == sizes
    assert all(len(batch) == 1 or sum(batch) <= MAX_WAITING for batch in tokenizer.batches)
    assert max(map(len, tokenizer.batches)) == BATCH_SIZE


def test_tokens_of_something_else_are_refused_before_anything_is_encoded(
    shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    text = {"text": tokenizer_folders["text"]}
    encode_folder(shards, text, tmp_path / "tokens")
    for name in (RECORD, "000001.safetensors"):  # interrupted
        (tmp_path / "tokens" / name).unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    with pytest.raises(DataError, match=r"holds 2 token shards .*000000\.safetensors.*: give another --out"):
        encode_folder(shards, {**text, "speech": tokenizer_folders["speech"]}, tmp_path / "tokens")
    with ShardWriter(tmp_path / "others") as writer:
        writer.write(RawSample("a", (RawSpan("text", text="other"),)))
    with pytest.raises(DataError, match="holds 2 token shards"):
        encode_folder(tmp_path / "others", text, tmp_path / "tokens")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == before


def test_no_tokens_lie_among_shards(shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    text = {"text": tokenizer_folders["text"]}
    for split in ("train", "test"):
        with ShardWriter(tmp_path / "world" / split) as writer:
            writer.write(RawSample("a", (RawSpan("text", text=split),)))
    for folder, out in ((shards, shards), ("world", "world"), ("world/train", "world/test")):
        with pytest.raises(DataError, match="holds shards, among which no tokens can lie: give another --out"):
            encode_folder(tmp_path / folder, text, tmp_path / out)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_folder_stands_for_the_tokenizer_in_it(
    shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer").symlink_to(tokenizer_folders["text"])
    direct = encode_folder(shards, {"text": tokenizer_folders["text"]}, tmp_path / "a")
    assert encode_folder(shards, {"text": tmp_path / "run"}, tmp_path / "b") == direct
    assert (tmp_path / "a" / RECORD).read_bytes() == (tmp_path / "b" / RECORD).read_bytes()


def test_a_file_is_no_folder_to_write_to(shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=r"cannot be written to .*: give another folder"):
            encode_folder(shards, {"text": tokenizer_folders["text"]}, out)
        with pytest.raises(DataError, match="cannot be written to"), locked(out):
            pass
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"file": "/etc/x.safetensors", "shard_sha256": "0" * 64, "sha256": "0" * 64}]},
        {"files": [{"file": "../x.safetensors", "shard_sha256": "0" * 64, "sha256": "0" * 64}]},
        {"files": [{"file": "..", "shard_sha256": "0" * 64, "sha256": "0" * 64}]},
        {"files": [{"file": "x.safetensors", "shard_sha256": "0" * 64}]},
        {"files": []},
        {"files": None},
        {"left_out": None},
        {"tokenizers": {"text": 1}},
        {"samples": -1},
        {"more": 1},
    ],
)
def test_a_sealed_record_of_something_else_is_refused(
    change: dict[str, Any], encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    content = {**unseal(encoded / RECORD, ""), **change}
    (tmp_path / RECORD).write_bytes(seal({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(DataError, match=f"no record of token shards .*{next(iter(change))}"):
        TokenSource(tmp_path, {"text": load_modality(tokenizer_folders["text"])}, tmp_path)
    with pytest.raises(DataError, match="no record of token shards"):
        count_samples(tmp_path)


def test_an_index_folder_of_token_shards_is_refused(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"token shards, which have no indexes: remove index_dir \\({tmp_path}\\)"):
        TokenSource(encoded, {}, tmp_path, tmp_path)
    with pytest.raises(DataError, match="remove index_dir"):
        count_samples(encoded, tmp_path)
