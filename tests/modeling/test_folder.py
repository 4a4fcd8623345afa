import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniform.errors import OmniformError
from omniform.modeling.config import ModelConfig, TopK
from omniform.modeling.folder import (
    LoadedModel,
    ModelFolderError,
    build_vocabulary,
    load_model_folder,
    save_model_folder,
    write_manifest,
)
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.base import Discrete, Modality, Tokens
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder
from omniform.tokenizers.registry import MODALITIES


class _Stored(Modality):
    """A tokenizer that is nothing but a size that it stores."""

    def __init__(self, size: int) -> None:
        self.representation = Discrete(size)

    def encode_batch(self, items: Sequence[Tokens]) -> list[Tokens]:
        return list(items)

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[Tokens]:
        return list(tokens)

    def read(self, payload: bytes) -> bytes:
        return payload

    def save(self, folder: Path) -> None:
        size = self.representation.vocab_size
        write_tokenizer_folder(folder, self.kind, {"size": size}, ("codes.bin", bytes(size)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(read_tokenizer_folder(folder, cls.kind)[0]["size"])


class StoredText(_Stored):
    kind: ClassVar[str] = "stored_text"
    name: ClassVar[str] = "text"
    fixed_grid = None


class StoredImage(_Stored):
    kind: ClassVar[str] = "stored_image"
    name: ClassVar[str] = "image"
    fixed_grid = (2, 2)


@pytest.fixture
def folder(tmp_path: Path, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored model of random weights."""
    monkeypatch.setitem(MODALITIES, "stored_text", StoredText)
    monkeypatch.setitem(MODALITIES, "stored_image", StoredImage)
    return _save(tmp_path / "model", model_config, seed=0)


def _save(folder: Path, config: ModelConfig, seed: int, codebook: int = 8) -> Path:
    tokenizers = {"text": StoredText(50), "image": StoredImage(codebook)}
    torch.manual_seed(seed)
    model = UnifiedModel(config, build_vocabulary(tokenizers))
    settings = {"modalities": {"image": {"steps": 3}}}
    save_model_folder(folder, config, model.state_dict(), tokenizers, generation_config=settings, card="# toy\n")
    return folder


def test_what_is_saved_loads_bit_identically_and_saves_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    loaded = load_model_folder(folder)
    stored = load_file(folder / "model.safetensors")
    assert loaded.model.state_dict().keys() == stored.keys()
    assert all(torch.equal(w, stored[name]) for name, w in loaded.model.state_dict().items())
    save_model_folder(
        tmp_path / "again",
        loaded.model.config,
        loaded.model.state_dict(),
        loaded.tokenizers,
        generation_config=loaded.generation_config,
        card="# toy\n",
    )
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_experts_are_stored_and_a_folder_that_does_not_name_them_has_none(
    folder: Path, model_config: ModelConfig, tmp_path: Path
) -> None:
    with_experts = replace(model_config, decoder=replace(model_config.decoder, experts="modality"))
    names = load_model_folder(_save(tmp_path / "experts", with_experts, seed=0)).model.state_dict()
    assert {f"decoder.blocks.1.feed_forward.experts.{number}.up.weight" for number in range(2)} <= names.keys()
    record = json.loads((folder / "config.json").read_text())
    newer = {"experts": "shared", "norm": "pre", "init": None}
    assert {key: record["model"]["decoder"].pop(key) for key in newer} == newer
    (folder / "config.json").write_text(json.dumps(record))
    write_manifest(folder)
    older = load_model_folder(folder).model
    assert older.config == model_config
    assert not any("experts" in name for name in older.state_dict())


def test_routers_are_stored_with_their_biases(folder: Path, model_config: ModelConfig, tmp_path: Path) -> None:
    """`folder` registers the tokenizers."""
    choice = TopK(n=4, k=2, bias_rate=0.1)
    config = replace(model_config, decoder=replace(model_config.decoder, experts=choice, norm="sub_ln"))
    tokenizers = {"text": StoredText(50), "image": StoredImage(8)}
    torch.manual_seed(0)
    model = UnifiedModel(config, build_vocabulary(tokenizers)).eval()
    for moves in range(3):
        model.balance_routers(torch.tensor([[9, 0, 3, 0], [0, moves, 5, 7]]))
    save_model_folder(tmp_path / "routed", config, model.state_dict(), tokenizers, generation_config={}, card="")
    loaded = load_model_folder(tmp_path / "routed").model
    assert loaded.config == config
    assert loaded.decoder.blocks[0].feed_forward.bias_steps.tolist() == [-3, 3, 0, 3]
    before = model.state_dict()
    assert loaded.state_dict().keys() == before.keys()
    assert all(w.dtype == before[n].dtype and torch.equal(w, before[n]) for n, w in loaded.state_dict().items())


def test_a_flipped_bit_anywhere_is_refused_and_the_file_is_named(folder: Path) -> None:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(ModelFolderError, match=r"damaged|manifest"):
                load_model_folder(folder)
        path.write_bytes(content)
    assert isinstance(load_model_folder(folder), LoadedModel)


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused_even_with_a_matching_manifest(
    folder: Path, tmp_path: Path, model_config: ModelConfig
) -> None:
    other = _save(tmp_path / "other", model_config, seed=0, codebook=9)
    (folder / "vocabulary.json").write_bytes((other / "vocabulary.json").read_bytes())
    write_manifest(folder)
    with pytest.raises(ModelFolderError, match="not of one model"):
        load_model_folder(folder)


def test_an_edited_vocabulary_is_refused_by_its_own_hash(folder: Path) -> None:
    record = json.loads((folder / "vocabulary.json").read_text())
    record["text_size"] += 1
    (folder / "vocabulary.json").write_text(json.dumps(record))
    write_manifest(folder)
    with pytest.raises(OmniformError, match="hashes to"):
        load_model_folder(folder)


def test_a_tokenizer_of_the_same_size_but_other_content_is_refused(folder: Path) -> None:
    path = folder / "tokenizers" / "image"
    write_tokenizer_folder(path, "stored_image", {"size": 8}, ("codes.bin", b"\1" * 8))
    write_manifest(folder)
    with pytest.raises(ModelFolderError, match="not the tokenizer that the model was trained with"):
        load_model_folder(folder)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("decoder.norm.weight")
    save_file(weights, folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(ModelFolderError, match=r"decoder\.norm\.weight"):
        load_model_folder(folder)


@pytest.mark.parametrize("missing", ["config.json", "manifest.sha256", "model.safetensors"])
def test_missing_and_added_files_are_named(folder: Path, missing: str) -> None:
    content = (folder / missing).read_bytes()
    (folder / missing).unlink()
    with pytest.raises(ModelFolderError, match=missing.replace(".", r"\.")):
        load_model_folder(folder)
    (folder / missing).write_bytes(content)
    (folder / "extra.py").write_text("print('never run')")
    with pytest.raises(ModelFolderError, match=r"extra\.py"):
        load_model_folder(folder)


def test_another_format_version_is_refused(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["format_version"] += 1
    (folder / "config.json").write_text(json.dumps(record))
    write_manifest(folder)
    with pytest.raises(ModelFolderError, match="version 2"):
        load_model_folder(folder)


def test_no_folder_says_what_to_expect(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no model folder"):
        load_model_folder(tmp_path / "none")


def test_a_tokenizer_is_told_from_a_model(folder: Path, tmp_path: Path) -> None:
    tokenizer = folder / "tokenizers" / "text"
    shutil.copytree(tokenizer, tmp_path / "run" / "tokenizer")
    for given in (tokenizer, tmp_path / "run"):
        with pytest.raises(ModelFolderError, match=f"{given} holds a tokenizer .* and no model: give the folder of a"):
            load_model_folder(given)


def test_the_folder_around_a_model_is_told_from_the_model(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"{folder.parent} is no model folder.*give {folder}$"):
        load_model_folder(folder.parent)


def test_every_file_is_as_readable_as_the_umask_says(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes["config.json"]}


def test_saving_again_replaces_the_whole_folder(folder: Path, model_config: ModelConfig) -> None:
    before = (folder / "model.safetensors").read_bytes()
    _save(folder, model_config, seed=1)
    assert (folder / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    load_model_folder(folder)


@pytest.mark.parametrize("record", [{"model": 3}, {"tokenizers": ["text"]}, {"tokenizers": {"../text": "0"}}])
def test_a_config_that_no_model_has_is_refused(folder: Path, record: dict) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | record))
    write_manifest(folder)
    with pytest.raises(ModelFolderError, match="plain names"):
        load_model_folder(folder)
