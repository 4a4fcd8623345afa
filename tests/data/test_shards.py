"""Shards hold what was written, to the byte; webdataset reads ours and we read webdataset's; damage is never silent."""

import gc
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.data.index import index_path, index_shards
from omniform.data.schema import DataError, RawSample, RawSpan, SampleError
from omniform.data.shards import ShardReader, ShardWriter

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SPANS = st.one_of(
    st.builds(lambda text: RawSpan("text", text=text), st.text(max_size=20)),
    st.builds(
        lambda payload, extension: RawSpan("image", payload=payload, extension=extension),
        st.binary(max_size=1200),
        st.sampled_from(["png", "jpg", "webp"]),
    ),
)
CONTENTS = st.tuples(
    st.lists(SPANS, min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=5).filter(lambda key: key != "spans"), JSON_VALUES, max_size=3),
)


def png(value: int = 0) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("L", (3, 2), value).save(file, "PNG")
    return file.getvalue()


def pair(key: str, value: int = 0) -> RawSample:
    """A captioned image."""
    spans = (RawSpan("text", text=f"caption {key}"), RawSpan("image", payload=png(value), extension="png"))
    return RawSample(key, spans, {"value": value})


def write(folder: Path, samples: Sequence[RawSample], samples_per_shard: int = 3) -> Path:
    """Write samples as shards."""
    with ShardWriter(folder, samples_per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CONTENTS, min_size=1, max_size=7))
def test_written_samples_read_back_equal(tmp_path_factory: pytest.TempPathFactory, contents: list) -> None:
    samples = [RawSample(f"{i:03d}", tuple(spans), metadata) for i, (spans, metadata) in enumerate(contents)]
    first = write(tmp_path_factory.mktemp("first"), samples)
    second = write(tmp_path_factory.mktemp("second"), samples)
    reader = ShardReader(first)
    assert list(reader) == samples
    assert reader[-1] == samples[-1]
    assert reader[0:2] == samples[0:2]
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    samples = [pair(f"{i:03d}", i) for i in range(7)]
    write(tmp_path, samples)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    gc.collect()
    assert [sample["__key__"] for sample in found] == [sample.key for sample in samples]
    for theirs, ours in zip(found, samples, strict=True):
        assert {k: v for k, v in theirs.items() if not k.startswith("__")} == ours.to_members()


@pytest.mark.parametrize(("suffix", "image_format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("caption", ["txt", "json"])
def test_pairs_that_webdataset_wrote_are_read_as_they_are(
    tmp_path: Path, suffix: str, image_format: str, caption: str
) -> None:
    payload = io.BytesIO()
    Image.new("RGB", (4, 4)).save(payload, image_format)
    record = {"key": "0", "caption": "ein Bär", "url": "x", "status": "success"}
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(3):
            text = {"txt": "ein Bär"} if caption == "txt" else {}
            metadata = {} if caption == "txt" else {"json": record}
            writer.write({"__key__": f"{i:09d}", suffix: payload.getvalue(), **text, **metadata})
    index_shards(tmp_path)
    spans = (RawSpan("text", text="ein Bär"), RawSpan("image", payload=payload.getvalue(), extension=suffix))
    assert list(ShardReader(tmp_path)) == [
        RawSample(f"{i:09d}", spans, {} if caption == "txt" else record) for i in range(3)
    ]


@pytest.mark.parametrize("archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_archives_with_folders_and_long_names_are_indexed(tmp_path: Path, archive_format: int) -> None:
    folder = "part/" + "d" * 80 + "/"
    with tarfile.open(tmp_path / "a.tar", "w", format=archive_format) as archive:
        directory = tarfile.TarInfo("part/")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in [("a.txt", b"one"), ("a.PNG", png()), ("b.txt", b"two"), ("README", b"no sample")]:
            info = tarfile.TarInfo(folder + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    index_shards(tmp_path)
    samples = list(ShardReader(tmp_path))
    assert [sample.key for sample in samples] == [folder + "a", folder + "b"]
    assert samples[0].spans == (RawSpan("text", text="one"), RawSpan("image", payload=png(), extension="png"))


def test_an_index_may_live_elsewhere(tmp_path: Path) -> None:
    shards, indexes = tmp_path / "shards", tmp_path / "indexes"
    write(shards, [pair("a")])
    index_path(shards / "000000.tar").unlink()
    index_shards(shards, indexes)
    assert [path.name for path in shards.iterdir()] == ["000000.tar"]
    assert ShardReader(shards, indexes)[0] == pair("a")


def test_an_unindexed_source_is_refused_by_naming_the_command(tmp_path: Path) -> None:
    write(tmp_path, [pair("a")])
    index_path(tmp_path / "000000.tar").unlink()
    with pytest.raises(DataError, match=f"has no index.*omniform data index {tmp_path}"):
        ShardReader(tmp_path)


def test_a_shard_cut_anywhere_is_refused_by_reader_and_indexer(tmp_path: Path) -> None:
    write(tmp_path, [pair(f"{i:03d}", i) for i in range(3)])
    shard = tmp_path / "000000.tar"
    content = shard.read_bytes()
    last = ShardReader(tmp_path).shards[0].samples[-1]
    # Padding to tar's record size may go: two zero blocks after the last sample still end an archive.
    complete = last.offset + last.size + 1024
    for size in [*range(0, len(content), 512), 1, 511, 1535, complete - 1]:
        shard.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"000000\.tar is cut short"):
            ShardReader(tmp_path)
        if size < complete:
            with pytest.raises(
                DataError, match=r"000000\.tar is (damaged or cut short|cut short|empty|not a complete)"
            ):
                index_shards(tmp_path)


def test_a_lost_shard_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, [pair(f"{i:03d}") for i in range(4)])
    (tmp_path / "000001.tar").unlink()
    with pytest.raises(DataError, match=r"000001\.index\.json has lost its shard"):
        ShardReader(tmp_path)


def test_a_damaged_sample_is_an_error_of_that_sample_only(tmp_path: Path) -> None:
    samples = [pair(f"{i:03d}", i) for i in range(3)]
    write(tmp_path, samples)
    shard = tmp_path / "000000.tar"
    content = bytearray(shard.read_bytes())
    record = ShardReader(tmp_path).shards[0].samples[1]
    content[record.offset + 700] ^= 1
    shard.write_bytes(content)
    reader = ShardReader(tmp_path)
    assert [reader[0], reader[2]] == [samples[0], samples[2]]
    with pytest.raises(SampleError, match=r"000000\.tar: sample 001 is damaged"):
        reader[1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": b"{"}, "not JSON"),
        ({"json": b"[" * 100_000}, "not JSON"),
        ({"json": b"[]"}, "holds a list"),
        ({"json": b'{"spans": []}'}, "expected a list of spans"),
        ({"json": b'{"spans": [{"modality": "image", "file": "0.png"}]}'}, "names the file '0.png'"),
        ({"json": b'{"spans": [{"modality": "image"}]}'}, "expected a modality and either text or file"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"json": b'{"caption": "\\ud800"}'}, "position 0 is no character"),
        ({"pkl": b"cos\nsystem\n", "json": b'{"caption": null}'}, "expected a json with 'spans'"),
    ],
)
def test_members_that_make_no_sample_are_refused(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        RawSample.from_members("k", members)


def _archive(path: Path, infos: Sequence[tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w") as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(b"\0" * info.size))


def _member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([_member("a.txt", tarfile.SYMTYPE)], "not a plain file"),
        ([_member("a.txt", tarfile.CHRTYPE)], "not a plain file"),
        ([_member("../a.txt")], "outside of its archive"),
        ([_member("/a.txt")], "outside of its archive"),
        ([_member("a.txt"), _member("a.txt")], "the member 'txt' twice"),
        ([_member("a.txt"), _member("b.txt"), _member("a.json")], "the sample 'a' in two places"),
    ],
)
def test_archives_that_are_no_shards_are_refused(
    tmp_path: Path, members: Sequence[tarfile.TarInfo], message: str
) -> None:
    _archive(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path)
    assert not index_path(tmp_path / "x.tar").exists()


@pytest.mark.parametrize("key", ["", "a.b", "a/", "/a", "__a__"])
def test_keys_that_the_format_cannot_hold_are_refused(key: str) -> None:
    with pytest.raises(DataError, match="sample key"):
        pair(key).to_members()


def test_a_writer_never_mixes_with_shards_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, [pair("a")])
    with pytest.raises(DataError, match="holds shards already"):
        ShardWriter(tmp_path)


def test_a_failed_write_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample key"):
        write(tmp_path, [pair("a"), pair("b.c")])
    assert not [*tmp_path.glob("*.tar"), *tmp_path.glob("*.json")]


def test_the_index_is_readable_json_with_one_line_per_sample(tmp_path: Path) -> None:
    write(tmp_path, [pair("a"), pair("b")])
    text = index_path(tmp_path / "000000.tar").read_text()
    assert [sample["key"] for sample in json.loads(text)["samples"]] == ["a", "b"]
    assert [line for line in text.splitlines() if '"key": "a"' in line and '"key": "b"' not in line]
