"""The token cache holds exactly what the tokenizers give and is bound to its data and tokenizers."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from omniform.data.encode import BATCH_SIZE
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.token_shards import tokenizer_digest
from omniform.data.token_source import TokenSource
from omniform.tokenizers.base import Modality


def assert_equal_to_tokenizers(source: TokenSource, tokenizers: dict[str, Modality]) -> None:
    """Compare every span with encoding it alone."""
    for number, sample in enumerate(ShardReader(source.folder)):
        if number in source.failures:
            assert source.spans(number) == []
            continue
        assert [name for name, _ in source.spans(number)] == [
            s.modality for s in sample.spans if s.modality in tokenizers
        ]
        for place, span in enumerate(s for s in sample.spans if s.modality in tokenizers):
            tokenizer = tokenizers[span.modality]
            expected = tokenizer.encode(tokenizer.read(span.payload or (span.text or "").encode()))
            found = source.tokens(number, place)
            assert (found.codes.tolist(), found.grid) == (expected.codes.tolist(), expected.grid)
            assert source.spans(number)[place] == (span.modality, len(expected.codes))


def test_tokens_are_those_of_the_tokenizers_and_the_cache_has_fixed_bytes(
    tmp_path: Path, tokenizers: dict[str, Modality], write_pairs: Callable[..., Path]
) -> None:
    n_samples = 2 * BATCH_SIZE + 7
    folder = write_pairs(tmp_path / "data", n_samples, per_shard=n_samples - 5)
    source = TokenSource(folder, tokenizers, tmp_path / "cache")
    assert len(source) == n_samples
    assert not source.failures
    assert_equal_to_tokenizers(source, tokenizers)
    assert_equal_to_tokenizers(TokenSource(folder, tokenizers, tmp_path / "cache"), tokenizers)
    TokenSource(folder, tokenizers, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_samples_that_fail_leave_counted_holes_and_change_no_other(
    tmp_path: Path, tokenizers: dict[str, Modality], write_pairs: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pairs(tmp_path / "data", 30, {3: b"long", 7: b"\xff\xff", 29: b""}, per_shard=20)
    shard = folder / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[ShardReader(folder).shards[0].samples[11].offset + 600] ^= 4
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        source = TokenSource(folder, tokenizers, tmp_path / "cache")
    assert sorted(source.failures) == [3, 7, 11, 29]
    assert "000000.tar: sample 00003: 4 bytes, expected 2" in source.failures[3].message
    assert "sample 00007: above ff00" in source.failures[7].message
    assert "sample 00011 is damaged" in source.failures[11].message
    assert "4 of 30 samples cannot be decoded: 3 x cannot be used: 000000.tar: sample 00003: 4 bytes" in caplog.text
    assert "1 x damaged, or not a sample: 000000.tar: sample 00011 is damaged" in caplog.text
    intact = TokenSource(write_pairs(tmp_path / "intact", 30, per_shard=20), tokenizers, tmp_path / "cache")
    for number in set(range(30)) - set(source.failures):
        assert source.tokens(number, 1).codes.tolist() == intact.tokens(number, 1).codes.tolist()


def test_an_interrupted_run_continues_with_the_missing_shards(
    tmp_path: Path, tokenizers: dict[str, Modality], write_pairs: Callable[..., Path]
) -> None:
    folder = write_pairs(tmp_path / "data", 50, per_shard=20)
    TokenSource(folder, tokenizers, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 3
    before = files[1].read_bytes()
    files[1].unlink()
    image = type(tokenizers["image"])()
    source = TokenSource(folder, {**tokenizers, "image": image}, tmp_path / "cache")
    assert image.n_encoded in (20, 10)  # type: ignore[attr-defined]
    assert files[1].read_bytes() == before
    assert_equal_to_tokenizers(source, tokenizers)


def test_another_tokenizer_or_other_data_never_meets_old_tokens(
    tmp_path: Path,
    tokenizers: dict[str, Modality],
    turned_tokenizers: dict[str, Modality],
    write_pairs: Callable[..., Path],
) -> None:
    assert tokenizer_digest(tokenizers["image"]) != tokenizer_digest(turned_tokenizers["image"])
    first = TokenSource(write_pairs(tmp_path / "data", 10), tokenizers, tmp_path / "cache")
    second = TokenSource(tmp_path / "data", turned_tokenizers, tmp_path / "cache")
    third = TokenSource(write_pairs(tmp_path / "other", 10, {0: b"\1\2"}), tokenizers, tmp_path / "cache")
    assert_equal_to_tokenizers(first, tokenizers)
    assert_equal_to_tokenizers(second, turned_tokenizers)
    assert_equal_to_tokenizers(third, tokenizers)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


def test_a_damaged_or_swapped_cache_file_is_refused_by_name(
    tmp_path: Path, tokenizers: dict[str, Modality], write_pairs: Callable[..., Path]
) -> None:
    folder = write_pairs(tmp_path / "data", 40, per_shard=20)
    TokenSource(folder, tokenizers, tmp_path / "cache")
    first, second = sorted((tmp_path / "cache").glob("*.safetensors"))
    intact = first.read_bytes()
    damaged = bytearray(intact)
    damaged[-1] ^= 1
    for content in (damaged, intact[: len(intact) // 2], second.read_bytes()):
        first.write_bytes(content)
        with pytest.raises(DataError, match=f"{first.name} .*remove it, and it is encoded again"):
            TokenSource(folder, tokenizers, tmp_path / "cache")
    first.write_bytes(intact)
    TokenSource(folder, tokenizers, tmp_path / "cache")


def test_modalities_without_a_tokenizer_are_left_out(
    tmp_path: Path, tokenizers: dict[str, Modality], write_pairs: Callable[..., Path]
) -> None:
    text_only = {"text": tokenizers["text"]}
    source = TokenSource(write_pairs(tmp_path / "data", 5), text_only, tmp_path / "cache")
    assert_equal_to_tokenizers(source, text_only)
