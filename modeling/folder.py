"""Model folders: write, verify, read. The room's one file with input and output.

config.json              ModelConfig
vocabulary.json          the id space, with its hash
model.safetensors        weights in fp32; of routers also whole numbers
tokenizers/<modality>/   what each tokenizer saved
generation_config.json   default sampling settings per modality
README.md                model card
manifest.sha256          digest of every file above
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniform.errors import OmniformError
from omniform.modeling.config import ModelConfig, dump_config, parse_config
from omniform.modeling.model import UnifiedModel
from omniform.tokenizers.base import Discrete, Modality, TokenizerError, folder_digest
from omniform.tokenizers.folder import read_kind
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.vocabulary import Vocabulary

FORMAT_VERSION = 1
MANIFEST = "manifest.sha256"


class ModelFolderError(OmniformError):
    """A model folder that is missing, incomplete, damaged or of another format."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything that a model folder holds."""

    model: UnifiedModel
    tokenizers: Mapping[str, Modality]
    generation_config: Mapping[str, Any]

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's id space."""
        return self.model.vocabulary


def build_vocabulary(tokenizers: Mapping[str, Modality], modes: Collection[str] = ()) -> Vocabulary:
    """Return the id space of a set of tokenizers: text, then the others in the order given.

    Args:
        modes: of the model's denoisers.

    Raises:
        ModelFolderError: there is no text tokenizer, or it is not discrete.
        VocabularyError: see `Vocabulary`.
    """
    sizes = {name: tokenizer.representation for name, tokenizer in tokenizers.items()}
    text = sizes.pop("text", None)
    if not isinstance(text, Discrete):
        raise ModelFolderError(f"tokenizers are {[*tokenizers]}, expected one of text, into codes, among them")
    return Vocabulary(text.vocab_size, sizes, [name for name in sizes if tokenizers[name].fixed_grid is None], modes)


def check_position_embeddings(config: ModelConfig, tokenizers: Mapping[str, Modality]) -> None:
    """Refuse learnt positions for other modalities, or for spans of free length or other lengths than the tokenizers'.

    Raises:
        ModelFolderError: the first such modality.
    """
    for name, size in config.position_embeddings.items():
        if name not in tokenizers:
            raise ModelFolderError(
                f"model.position_embeddings.{name} is for no modality of the model, whose tokenizers are for "
                f"{', '.join(sorted(tokenizers))}"
            )
        grid = tokenizers[name].fixed_grid
        if grid is None or math.prod(grid) != size:
            length = "spans of free length" if grid is None else f"{math.prod(grid)} tokens"
            advice = "leave it out" if grid is None else f"give {math.prod(grid)}"
            raise ModelFolderError(
                f"model.position_embeddings.{name} is {size}, but its tokenizer makes {length}: {advice}"
            )


def save_model_folder(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizers: Mapping[str, Modality],
    *,
    generation_config: Mapping[str, Any],
    card: str,
) -> None:
    """Write a model folder beside its place, then move it there whole; an older one is replaced at that moment.

    Args:
        weights: the model's state dict; stored in fp32, whole numbers as they are.
        tokenizers: by modality, in the order of the vocabulary.
        card: README.md of the folder.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, tokenizer in tokenizers.items():
        tokenizer.save(draft / "tokenizers" / name)
    digests = {name: folder_digest(draft / "tokenizers" / name) for name in tokenizers}
    record = {
        "format": "omniform",
        "format_version": FORMAT_VERSION,
        "model": yaml.safe_load(dump_config(config)),
        "tokenizers": digests,
    }
    _write_json(draft / "config.json", record)
    _write_json(draft / "vocabulary.json", build_vocabulary(tokenizers, config.modes).to_json())
    _write_json(draft / "generation_config.json", dict(generation_config))
    stored = {name: w.detach().float() if w.is_floating_point() else w for name, w in weights.items()}
    save_tensors({name: w.contiguous().cpu() for name, w in stored.items()}, draft / "model.safetensors")
    (draft / "README.md").write_text(card, encoding="utf-8")
    write_manifest(draft)
    commit(draft, folder)


def load_model_folder(folder: Path) -> LoadedModel:
    """Read and verify a model folder.

    Raises:
        ModelFolderError: no such folder, a file missing, changed or damaged, another format, or a vocabulary that is
            not the one of the tokenizers beside it.
    """
    if not folder.is_dir():
        raise ModelFolderError(
            f"no model folder at {folder}: expected a folder with config.json and model.safetensors, such as the "
            "model/ that `omniform train` or `omniform demo` writes"
        )
    if not (folder / MANIFEST).exists() and (folder / "model" / MANIFEST).exists():
        raise ModelFolderError(
            f"{folder} is no model folder, but the folder of a run that made one: give {folder / 'model'}"
        )
    if not (folder / MANIFEST).exists() and (kind := _tokenizer_kind(folder)) is not None:
        raise ModelFolderError(
            f"{folder} holds a tokenizer ({kind}) and no model: give the folder of a model, such as the model/ that "
            "`omniform train` or `omniform demo` writes"
        )
    verify_manifest(folder)
    record = _read_json(folder / "config.json")
    if record.get("format") != "omniform" or record.get("format_version") != FORMAT_VERSION:
        raise ModelFolderError(
            f"{folder / 'config.json'} is of format {record.get('format')!r} version {record.get('format_version')!r}, "
            f"expected 'omniform' version {FORMAT_VERSION}"
        )
    named = record.get("tokenizers")
    if (
        not isinstance(record.get("model"), dict)
        or not isinstance(named, dict)
        or not all(map(str.isidentifier, named))
    ):
        raise ModelFolderError(
            f"{folder / 'config.json'} lacks `model` or `tokenizers` by plain names: take the folder again from "
            "where it was saved"
        )
    config = parse_config(ModelConfig, json.dumps(record["model"]), source=str(folder / "config.json"))
    tokenizers = {name: load_modality(folder / "tokenizers" / name) for name in record["tokenizers"]}
    vocabulary = Vocabulary.from_json(_read_json(folder / "vocabulary.json"))
    expected = build_vocabulary(tokenizers, config.modes)
    if vocabulary != expected:
        raise ModelFolderError(
            f"{folder / 'vocabulary.json'} hashes to {vocabulary.digest()[:12]}, but the tokenizers beside it make "
            f"{expected.digest()[:12]}: weights and tokenizers are not of one model; take the folder again from where "
            "it was saved"
        )
    for name, digest in record["tokenizers"].items():
        if folder_digest(folder / "tokenizers" / name) != digest:
            raise ModelFolderError(
                f"{folder / 'tokenizers' / name} is not the tokenizer that the model was trained with"
            )
    with torch.device("meta"):
        model = UnifiedModel(config, vocabulary)
    check_position_embeddings(config, tokenizers)
    try:
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(weights, strict=True, assign=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ModelFolderError(f"{folder / 'model.safetensors'} does not fit config.json beside it: {error}") from error
    return LoadedModel(model.eval(), tokenizers, _read_json(folder / "generation_config.json"))


def _tokenizer_kind(folder: Path) -> str | None:
    """Return the kind of the tokenizer that a folder holds, itself or as the run that trained it; None without one."""
    inner = folder / "tokenizer"
    try:
        return read_kind(inner if inner.is_dir() else folder)
    except TokenizerError:
        return None


def commit(draft: Path, final: Path) -> None:
    """Flush every file of `draft` to the disk and make it appear as `final`, whole, in one rename.

    An older `final` is set aside as .NAME.retired just before that rename, and deleted once the new one is there.
    """
    for path in [*draft.rglob("*"), draft]:
        _flush(path)
    retired = final.with_name(f".{final.name}.retired")
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(final, retired)
    os.replace(draft, final)
    _flush(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as far as the user's umask lets them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)  # safetensors makes its files private


def write_manifest(folder: Path) -> None:
    """Write the sha256 of every file of a folder, in the format of `sha256sum`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    lines = [f"{file_digest(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def verify_manifest(folder: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        ModelFolderError: the manifest is missing or unreadable, or a file is missing, changed or not listed.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ModelFolderError(
            f"{folder} has no readable {MANIFEST}: expected a complete folder written by Omniform"
        ) from error
    listed = {}
    for line in text.splitlines():
        digest, gap, name = line.partition("  ")
        if not gap:
            raise ModelFolderError(f"{folder / MANIFEST} is damaged: line {line!r} is not 'digest  name'")
        listed[name] = digest
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if set(listed) != present:
        raise ModelFolderError(
            f"{folder} holds other files than its {MANIFEST} lists: missing {sorted(set(listed) - present)}, "
            f"unexpected {sorted(present - set(listed))}; take the folder again from where it was saved"
        )
    for name, digest in listed.items():
        if file_digest(folder / name) != digest:
            raise ModelFolderError(
                f"{folder / name} is damaged: its sha256 differs from {MANIFEST}; take it again from where it was saved"
            )


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, expected an object")
    return content
