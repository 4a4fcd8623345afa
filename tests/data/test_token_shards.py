"""A folder of token shards holds what the tokenizers give, whatever number of processes wrote it, and nothing else is
taken for it."""

import io
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from omniform.cli import app
from omniform.data.encode_folder import encode_folder
from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import seal
from omniform.data.shards import ShardReader, ShardWriter
from omniform.data.token_record import RECORD
from omniform.data.token_shards import TokenShard, read_token_shard, tokenizer_digest, write_token_shard
from omniform.data.token_source import TokenSource, count_samples
from omniform.modeling.folder import build_vocabulary
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.base import Latents
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.video_writing import video_bytes

N_SAMPLES = 11


FOUR = ("text", "image", "speech", "video")


def of(folders: dict[str, Path], *names: str) -> dict[str, Path]:
    """Only some folders."""
    return {name: folders[name] for name in names or FOUR}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of four modalities in three shards; the picture of one is damaged."""
    folder = tmp_path_factory.mktemp("raw") / "data"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, 4) as writer:
        for n in range(N_SAMPLES):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(picture, "PNG")
            sound = torch.from_numpy(rng.uniform(-1, 1, 4000 + 500 * n).astype(np.float32))
            clip = rng.integers(0, 256, (9, 32, 32, 1), dtype=np.uint8)
            spans = (
                RawSpan("text", text=f"sample {n}"),
                RawSpan("image", payload=picture.getvalue()[: 40 if n == 6 else None], extension="png"),
                RawSpan("speech", payload=audio_bytes(sound, 16000, "wav"), extension="wav"),
                RawSpan("video", payload=video_bytes(clip, 8, "gif"), extension="gif"),
            )
            writer.write(RawSample(f"{n:03d}", spans, {"n": n}))
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.stat().st_size
    }


@pytest.fixture(scope="module")
def encoded(shards: Path, tokenizer_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, encoded by one process."""
    out = tmp_path_factory.mktemp("encoded") / "tokens"
    summary = encode_folder(shards, of(tokenizer_folders), out)["data"]
    assert (summary["shards"], summary["samples"]) == (3, N_SAMPLES)
    assert summary["spans"] == {**dict.fromkeys(sorted(FOUR), N_SAMPLES), "image": N_SAMPLES - 1}
    assert summary["failed"]["damaged image"]["count"] == 1
    assert "000001.tar: sample 006" in summary["failed"]["damaged image"]["first"][0]
    return out


def test_tokens_are_those_of_the_tokenizers(shards: Path, encoded: Path, tokenizer_folders: dict[str, Path]) -> None:
    tokenizers = {name: load_modality(tokenizer_folders[name]) for name in FOUR}
    source = TokenSource(encoded, tokenizers, Path("unused"))
    assert len(source) == count_samples(encoded) == count_samples(shards) == N_SAMPLES
    assert list(source.failures) == [6]
    assert source.spans(6) == []
    assert source.describe(6) == f"{encoded}/000001.safetensors, sample 006"
    for number, sample in enumerate(ShardReader(shards)):
        for place, span in enumerate(sample.spans if number != 6 else []):
            tokenizer = tokenizers[span.modality]
            expected = tokenizer.encode(tokenizer.read(span.payload or (span.text or "").encode()))
            found = source.tokens(number, place)
            assert (found.codes.tolist(), found.grid) == (expected.codes.tolist(), expected.grid)
            assert source.spans(number)[place] == (span.modality, len(expected.codes))


def test_an_interrupted_run_continues_with_what_is_missing(
    shards: Path, encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    for name in ("000000.safetensors", "000002.safetensors"):
        (out / name).write_bytes((encoded / name).read_bytes())
    (out / "000001.safetensors.123.partial").write_bytes(b"half of a file")
    encode_folder(shards, of(tokenizer_folders), out)
    assert written(out) == written(encoded)
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("encoded")] == [
        f"encoded {shards}/000001.tar (4 samples)"
    ]
    encode_folder(shards, of(tokenizer_folders), out)
    assert "encoded" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def world(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of the same shards."""
    folder = tmp_path_factory.mktemp("world")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for path in shards.iterdir():
            (folder / split / path.name).write_bytes(path.read_bytes())
    return folder


class Terminal:
    """A terminal at which somebody presses Ctrl-C as soon as the first shard is encoded."""

    def __init__(self) -> None:
        self.pressed = False

    def isatty(self) -> bool:
        """It takes plain lines."""
        return False

    def flush(self) -> None:
        """It keeps nothing back."""

    def write(self, text: str) -> None:
        """Every process of the terminal gets the signal."""
        if text.startswith("encoded") and not self.pressed:
            self.pressed = True
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_of_several_processes_leaves_whole_files_of_the_same_bytes(
    world: Path, tokenizer_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers, out = of(tokenizer_folders, "text", "speech"), tmp_path / "tokens"
    encode_folder(world, tokenizers, tmp_path / "expected")
    expected = written(tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Terminal())
        with pytest.raises(KeyboardInterrupt):
            encode_folder(world, tokenizers, out, workers=2)
    assert not multiprocessing.active_children()
    left = written(out)
    # One shard was done, and each worker may have done one that nobody waited for.
    assert 1 <= len(left) <= 3
    assert left.items() <= expected.items()
    encode_folder(world, tokenizers, out)
    assert written(out) == expected


def test_training_gets_the_same_rows_as_from_raw_shards(
    shards: Path, encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizers = {name: load_modality(tokenizer_folders[name]) for name in FOUR}
    objectives = {"text": NextToken(), "image": Masked(), "speech": NextToken(), "video": Masked()}
    tasks = {f"{given}->{learnt}": 1.0 for given, learnt in itertools.permutations(FOUR, 2)}

    def open_data(path: Path) -> TrainingData:
        config = DataConfig(sources=(SourceConfig(path=path, name="x", tasks=tasks),), row_length=512)
        vocabulary = build_vocabulary(tokenizers)
        return TrainingData(
            config, tokenizers, vocabulary, objectives, seed=0, cache_dir=tmp_path / "cache", rows_per_step=4
        )

    raw, tokens = open_data(shards), open_data(encoded)
    assert raw.digest == tokens.digest  # so a run may go on from either
    assert [len(tally) for data in (raw, tokens) for tally in data.holes.values()] == [1, 1]
    for step in range(3):
        pairs = zip(raw.rows(step), tokens.rows(step), strict=True)
        for ours, theirs in pairs:
            assert [s.token_ids.tolist() for s in ours] == [s.token_ids.tolist() for s in theirs]
            assert [s.noise_key for s in ours] == [s.noise_key for s in theirs]


def test_tokens_of_another_tokenizer_are_refused_by_name_and_both_hashes(
    encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs, ours = (tokenizer_digest(load_modality(tokenizer_folders[name])) for name in ("image", "other image"))
    other = {"image": load_modality(tokenizer_folders["other image"])}
    with pytest.raises(DataError, match=f"image tokens of the tokenizer {theirs}, .* {ours}: "):
        TokenSource(encoded, other, tmp_path)


def test_modalities_that_were_left_out_are_refused_where_a_run_needs_them(
    shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    summary = encode_folder(shards, of(tokenizer_folders, "text"), out)["data"]
    assert summary["left_out"] == {"image": N_SAMPLES, "speech": N_SAMPLES, "video": N_SAMPLES}
    both = {name: load_modality(tokenizer_folders[name]) for name in ("text", "image")}
    with pytest.raises(DataError, match=f"without a tokenizer for 'image', which {N_SAMPLES} spans"):
        TokenSource(out, both, tmp_path)
    with pytest.raises(DataError, match="other data or of other tokenizers: give another --out"):
        encode_folder(shards, of(tokenizer_folders), out)


def test_damage_is_refused_and_named(encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    text = {"text": load_modality(tokenizer_folders["text"])}
    names = sorted(written(encoded))
    assert names == ["000000.safetensors", "000001.safetensors", "000002.safetensors", RECORD]

    def refused(change: Callable[[Path], object]) -> str:
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for name, content in written(encoded).items():
            (copy / name).write_bytes(content)
        change(copy)
        with pytest.raises(DataError) as caught:
            TokenSource(copy, text, tmp_path)
        return str(caught.value)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    for name in names:
        assert f"{name} is " in refused(lambda copy, name=name: flip(copy / name))
        assert "encode` again" in refused(lambda copy, name=name: flip(copy / name))
    assert "000001.safetensors is missing" in refused(lambda copy: (copy / "000001.safetensors").unlink())
    swapped = refused(
        lambda copy: (copy / "000000.safetensors").write_bytes((copy / "000002.safetensors").read_bytes())
    )
    assert "000000.safetensors" in swapped

    def age(copy: Path) -> None:
        record = json.loads((copy / RECORD).read_bytes())
        del record["sha256"]
        (copy / RECORD).write_bytes(seal({**record, "version": 2}))

    assert "version 2; expected" in refused(age)


def test_a_damaged_token_shard_is_not_sealed(
    shards: Path, encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    content = (encoded / "000001.safetensors").read_bytes()
    (out / "000001.safetensors").write_bytes(content[:-9])
    with pytest.raises(DataError, match=r"000001\.safetensors is damaged .*: remove it, and it is encoded again"):
        encode_folder(shards, of(tokenizer_folders), out)
    assert RECORD not in written(out)
    (out / "000001.safetensors").unlink()
    encode_folder(shards, of(tokenizer_folders), out)
    assert written(out) == written(encoded)


def test_continuous_tokens_are_kept_to_the_bit(
    shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    patches = load_modality(tokenizer_folders["patches"])
    encode_folder(shards, {"image": tokenizer_folders["patches"]}, tmp_path / "tokens")
    source = TokenSource(tmp_path / "tokens", {"image": patches}, tmp_path)
    for number, sample in enumerate(ShardReader(shards)):
        if number == 6:
            continue
        expected = patches.encode(patches.read(sample.spans[1].payload or b""))
        assert isinstance(expected, Latents)
        found = source.tokens(number, 0)
        assert isinstance(found, Latents)
        assert torch.equal(found.values, expected.values)
        assert found.grid == expected.grid
        assert source.spans(number) == [("image", len(expected.values))]


def test_the_command_encodes_each_split_and_says_what_it_could_not(
    world: Path, encoded: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = [f"--tokenizer={name}={path}" for name, path in of(tokenizer_folders).items()]
    result = CliRunner().invoke(app, ["data", "encode", str(world), *options, "--out", str(tmp_path / "tokens")])
    assert result.exit_code == 0, result.output
    assert f"train: {N_SAMPLES} samples" in result.output
    assert "1 cannot be decoded: damaged image" in result.output
    for split in ("train", "validation"):
        assert written(tmp_path / "tokens" / split) == written(encoded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "image"], "expected MODALITY=FOLDER"),
        (["--tokenizer", "image={text}"], "expected one for image"),
        (["--tokenizer", "text={text}", "--tokenizer", "text={text}"], "given twice"),
        (["--tokenizer", "text=nowhere"], "nowhere"),
    ],
)
def test_wrong_tokenizers_are_refused_before_anything_is_written(
    shards: Path, tokenizer_folders: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [argument.format(text=tokenizer_folders["text"]) for argument in arguments]
    result = CliRunner().invoke(app, ["data", "encode", str(shards), *given, "--out", str(tmp_path / "tokens")])
    assert result.exit_code != 0
    assert message in f"{result.output}{result.exception}"
    assert not (tmp_path / "tokens").exists()


IDENTITY = {"version": 1, "shard_sha256": "a", "tokenizers": {"text": "b"}}


def shard_of(keys: tuple[str, ...], metadata: tuple[Any, ...]) -> TokenShard:
    """Samples without spans."""
    spans = {name: np.zeros(0, dtype=np.int32) for name in ("sample", "modality", "length")}
    spans["grid"] = np.zeros((0, 3), dtype=np.int32)
    return TokenShard(keys, metadata, ("text",), spans, {"text": np.zeros(0, dtype=np.int32)}, {}, ())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=3), max_size=4))
def test_metadata_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, metadata: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "metadata.safetensors"
    write_token_shard(path, shard_of(tuple(map(str, range(len(metadata)))), tuple(metadata)), IDENTITY)
    assert list(read_token_shard(path, IDENTITY, "").metadata) == metadata


def test_metadata_may_be_larger_than_a_header_can_be(tmp_path: Path) -> None:
    path, metadata = tmp_path / "x.safetensors", tuple({"caption": "word " * 7_000} for _ in range(3_000))
    write_token_shard(path, shard_of(tuple(map(str, range(3_000))), metadata), IDENTITY)
    assert path.stat().st_size > 100_000_000
    assert read_token_shard(path, IDENTITY, "").metadata == metadata


@pytest.mark.parametrize("metadata", [(3,), ({}, {}), (), ("label",), ([],), (None,)])
def test_metadata_that_is_not_one_object_for_each_sample_is_refused(tmp_path: Path, metadata: tuple[Any, ...]) -> None:
    write_token_shard(tmp_path / "x.safetensors", shard_of(("0",), metadata), IDENTITY)
    with pytest.raises(DataError, match=r"is damaged \(its metadata is not one object for each of 1 samples\): remove"):
        read_token_shard(tmp_path / "x.safetensors", IDENTITY, "remove it")


@pytest.mark.parametrize("part", ["header", "samples"])
def test_a_changed_label_and_json_that_is_nested_too_deep_are_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "x.safetensors"
    write_token_shard(path, shard_of(("0",), ({"digit": 7},)), IDENTITY)
    content = path.read_bytes()
    assert content.count(b'"digit": 7') == 1
    path.write_bytes(content.replace(b'"digit": 7', b'"digit": 1'))
    with pytest.raises(DataError, match="does not hold what it should"):
        read_token_shard(path, IDENTITY, "")

    write_token_shard(path, shard_of(("0",), ({"digit": 7},)), IDENTITY)
    nested = b"[" * 200_000
    with safe_open(path, "np") as file:
        head, arrays = file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}
    if part == "header":
        head["omniform"] = nested.decode()
    else:
        arrays["samples.json"] = np.frombuffer(nested, dtype=np.uint8)
    save_file(arrays, path, head)
    with pytest.raises(DataError, match=r"is damaged .*recursion"):
        read_token_shard(path, IDENTITY, "")


def test_training_fills_its_cache_with_the_same_bytes_whatever_the_number_of_workers(
    world: Path, tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizers = {name: load_modality(tokenizer_folders[name]) for name in FOUR}
    sources = tuple(
        SourceConfig(path=world / split, tasks={"text->image": 1.0, "speech->text": 1.0})
        for split in ("train", "validation")
    )
    objectives = {"text": NextToken(), "speech": NextToken(), "image": Masked(), "video": Masked()}
    loaders = [
        TrainingData(
            DataConfig(sources, row_length=400),
            tokenizers,
            build_vocabulary(tokenizers),
            objectives,
            seed=0,
            cache_dir=tmp_path / str(workers),
            encoding_workers=workers,
            rows_per_step=2,
        )
        for workers in (1, 3)
    ]
    # Both splits hold the same shards, so the second finds its tokens made.
    assert len(list((tmp_path / "1").glob("*.safetensors"))) == 3
    assert written(tmp_path / "1") == written(tmp_path / "3")
    assert loaders[0].digest == loaders[1].digest
