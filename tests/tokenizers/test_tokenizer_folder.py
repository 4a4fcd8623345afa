"""Tokenizer folders: any changed bit is found, and every error says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.base import Modality, TokenizerError
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.registry import MODALITIES, load_modality
from omniform.tokenizers.text import SentencePieceTokenizer


@pytest.fixture(scope="module", params=MODALITIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of each kind."""
    if request.param == "sentencepiece":
        tokenizer: Modality = SentencePieceTokenizer.train(["one two three four"], vocab_size=270)
    else:
        config = ImageTokenizerConfig(widths=(8,), patch_size=4)
        tokenizer = ImageTokenizer(config, config.build())
    path = tmp_path_factory.mktemp(request.param)
    tokenizer.save(path)
    return path


def changed(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_the_registry_loads_each_kind(folder: Path) -> None:
    tokenizer = load_modality(folder)
    assert type(tokenizer) is MODALITIES[tokenizer.kind]


def test_the_folder_of_the_run_serves_as_well_and_so_does_its_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "tokenizer")
    assert load_modality(str(tmp_path / "run")).representation == load_modality(folder).representation


@given(data=st.data())
def test_any_flipped_bit_is_found(folder: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        file.write_bytes(damaged)
        with pytest.raises(TokenizerError):
            load_modality(folder)
    finally:
        file.write_bytes(content)


def test_files_that_are_missing_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere/config.json cannot be read.*omniform tokenizer train"):
        load_modality(tmp_path / "nowhere")
    payload = json.loads((folder / "config.json").read_text())["payload"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / payload).unlink()
    with pytest.raises(TokenizerError, match=payload):
        load_modality(copy)


def test_records_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[dict[str, object]], object], str]] = [
        (lambda r: r.update(kind="abacus"), "kind 'abacus', expected one of"),
        (lambda r: r.update(format_version=99), "format 99"),
        (lambda r: r.pop("sha256"), "expected the keys"),
        (lambda r: r.update(payload="../other"), "damaged"),
        (lambda r: r.update(config={"more": 1}), "damaged"),
    ]
    for number, (change, message) in enumerate(cases):
        copy = shutil.copytree(folder, tmp_path / str(number))
        changed(copy, change)
        with pytest.raises(TokenizerError, match=message):
            load_modality(copy)
