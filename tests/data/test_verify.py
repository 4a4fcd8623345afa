"""Any flipped bit is found and named: the shard, and the sample whose bytes hold it."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.data.digits import build_digits
from omniform.data.index import index_path
from omniform.data.inspect import info, preview
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.sealed import seal, unseal
from omniform.data.shards import ShardReader, ShardWriter
from omniform.data.verify import verify


def write(folder: Path, n_samples: int = 5) -> Path:
    """Write two shards of texts."""
    with ShardWriter(folder, 3) as writer:
        for i in range(n_samples):
            writer.write(RawSample(f"k{i}", (RawSpan("text", text=f"text {i}"),), {"n": i}))
    return folder


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_byte_of_a_shard_is_found_and_named(tmp_path: Path) -> None:
    write(tmp_path)
    assert verify(tmp_path).ok
    shard = tmp_path / "000000.tar"
    records = ShardReader(tmp_path).shards[0].samples
    # Every byte of the first sample and of the end-of-archive mark's start, then a stride through the rest.
    stop = records[-1].offset + records[-1].size
    positions = [*range(records[0].size), *range(records[0].size, shard.stat().st_size, 13), stop, stop + 1023]
    for place, position in enumerate(positions):
        flip(shard, position, place % 8)
        owners = [r.key for r in records if r.offset <= position < r.offset + r.size]
        named = [(problem.file, problem.sample) for problem in verify(tmp_path).problems]
        assert named == [("000000.tar", owners[0] if owners else None)]
        flip(shard, position, place % 8)
    assert verify(tmp_path).ok


def test_every_flipped_bit_of_an_index_is_found_and_named(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = index_path(tmp_path / "000000.tar")
    lines = path.read_bytes().split(b"\n")
    position = 0
    for line in lines:
        for _ in range(len(line) + 1):
            if position == path.stat().st_size:
                break
            flip(path, position, position % 8)
            problems = verify(tmp_path).problems
            keys = [key for key in ("k0", "k1") if f'"key": "{key}"'.encode() in line]
            assert [(problem.file, problem.sample) for problem in problems] == [
                ("000000.tar", keys[0] if keys else None)
            ]
            flip(path, position, position % 8)
            position += 1
    assert verify(tmp_path).ok


ANYTHING = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.just([]) | st.just({})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sealed_index_of_anything_else_is_no_surprise(tmp_path: Path, data: st.DataObject) -> None:
    shard = tmp_path / "000000.tar"
    if not shard.exists():
        write(tmp_path, 2)
    path = index_path(shard)
    intact = path.read_bytes()
    content = json.loads(intact)
    del content["sha256"]
    place = content
    for key in data.draw(st.sampled_from([(), ("samples",), ("samples", 0), ("samples", 1, "members")])):
        place = place[key]
    key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(ANYTHING)
    else:
        del place[key]
    path.write_bytes(seal(content))
    # A member may be missing, or have another name: a sample without it is another sample, not a damaged index.
    try:
        with contextlib.suppress(DataError):
            assert all(isinstance(sample, RawSample) for sample in ShardReader(tmp_path))
    finally:
        path.write_bytes(intact)


def test_an_index_that_reaches_out_of_its_sample_or_shard_is_refused(tmp_path: Path) -> None:
    path = index_path(write(tmp_path, 2) / "000000.tar")
    intact = json.loads(path.read_bytes())
    del intact["sha256"]
    for wrong in ({"members": {"json": [512, 2**20]}}, {"size": 2**60}, {"offset": 2**60}):
        first, second = intact["samples"]
        path.write_bytes(seal({**intact, "samples": [first, {**second, **wrong}]}))
        with pytest.raises(DataError, match=r"places sample 'k1' or a member of it outside .*omniform data index"):
            ShardReader(tmp_path)


@pytest.mark.parametrize("files", [None, 3, [3], [{"path": "x"}], [{"path": 1, "size": 1, "sha256": ""}]])
def test_a_manifest_of_anything_else_is_a_problem(tmp_path: Path, files: object) -> None:
    write(tmp_path / "train")
    (tmp_path / "manifest.json").write_bytes(seal({"files": files}))
    assert [problem.file for problem in verify(tmp_path).problems] == ["manifest.json"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small digits-world."""
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_a_world_is_found(world: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(p for p in world.rglob("*") if p.is_file())))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, position, bit)
    try:
        report = verify(world)
        shard = path.relative_to(world).as_posix().replace(".index.json", ".tar")
        assert not report.ok
        assert shard in {problem.file for problem in report.problems}
    finally:
        flip(path, position, bit)


def test_an_intact_world_passes_and_every_bit_of_its_manifest_counts(world: Path) -> None:
    read: list[str] = []
    report = verify(world, progress=read.append)
    assert report.ok
    assert read == ["manifest.json", *sorted({path.parent.name for path in world.glob("*/*.tar")})]
    manifest = world / "manifest.json"
    counts = json.loads(manifest.read_bytes())["samples"]
    assert (report.n_shards, report.n_samples) == (len(list(world.glob("*/*.tar"))), sum(counts.values()))
    content = manifest.read_bytes()
    try:
        for position in range(len(content)):
            flip(manifest, position, position % 8)
            with pytest.raises(DataError, match="damaged"):
                unseal(manifest, "build again")
            flip(manifest, position, position % 8)
    finally:
        manifest.write_bytes(content)


def test_missing_and_foreign_shards_of_a_world_are_named(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    (copy / "validation" / "000000.tar").unlink()
    write(copy / "extra")
    named = {problem.file for problem in verify(copy).problems}
    assert named == {"validation/000000.tar", "extra/000000.tar", "extra/000001.tar"}


def test_a_cut_shard_is_named_with_the_first_sample_it_lost(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "000000.tar"
    record = ShardReader(tmp_path).shards[0].samples[2]
    shard.write_bytes(shard.read_bytes()[: record.offset])
    problems = verify(tmp_path).problems
    assert [(problem.file, problem.sample) for problem in problems] == [("000000.tar", "k2")]
    assert "cut short, 1 samples from here on are lost" in problems[0].message


def test_intact_bytes_that_make_no_sample_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(RawSample("k", (RawSpan("image", payload=b"no image", extension="png"),)))
    problems = verify(tmp_path).problems
    assert [problem.sample for problem in problems] == ["k"]
    assert "not a whole PNG" in problems[0].message


def test_a_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar shards"):
        verify(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        verify(tmp_path / "nowhere")


SEALABLE = st.dictionaries(
    st.text(max_size=4).filter(lambda key: key != "sha256"),
    st.integers() | st.text(max_size=5) | st.lists(st.dictionaries(st.text(max_size=3), st.integers()), max_size=3),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=SEALABLE, data=st.data())
def test_sealed_json_opens_only_as_written(tmp_path: Path, content: dict, data: st.DataObject) -> None:
    path = tmp_path / "sealed.json"
    path.write_bytes(seal(content))
    assert unseal(path, "") == content
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    with pytest.raises(DataError, match="damaged"):
        unseal(path, "")


def test_info_counts_what_was_written_and_preview_draws_it(world: Path, tmp_path: Path) -> None:
    read: list[str] = []
    facts = info(world, progress=read.append)
    assert read == list(facts["splits"])
    assert {name: split["samples"] for name, split in facts["splits"].items()} == json.loads(
        (world / "manifest.json").read_text()
    )["samples"]
    assert facts["splits"]["test"]["spans"] == {"image": 252, "text": 252}
    assert sum(facts["splits"]["train"]["digits"].values()) == 1415
    sheet = Image.open(preview(world, tmp_path / "sheet.png", n=4))
    assert sheet.width == 4 * 136 + 8
    assert sheet.convert("L").getextrema() == (0, 255)
    with pytest.raises(DataError, match=r"ends in \.png"):
        preview(world, tmp_path / "sheet.txt")
