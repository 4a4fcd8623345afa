"""tokens.json: the sealed record that makes a folder of token shards a source, and says what they were made from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from omniform.data.index import Digest, Natural
from omniform.data.schema import DataError
from omniform.data.sealed import seal, unseal, write_atomically
from omniform.data.token_shards import TOKEN_SHARD_VERSION

RECORD = "tokens.json"
_HEAD = {"format": "omniform-tokens", "version": TOKEN_SHARD_VERSION}


def _plain_name(name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is not the name of a .safetensors file in this folder")
    return name


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class TokenFile:
    """A token shard: its name, and the digests of the shard that it was made from and of the file itself."""

    file: Annotated[str, AfterValidator(_plain_name)]
    shard_sha256: Digest
    sha256: Digest


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class TokenRecord:
    """What a folder of token shards was made from and holds.

    Attributes:
        source: digest of the raw shards.
        tokenizers: their digests, by modality.
        samples: number of all of them.
        left_out: number of spans by modality, of those without a tokenizer.
        files: one for each shard, in their order.
    """

    source: Digest
    tokenizers: Mapping[str, Digest]
    samples: Natural
    left_out: Mapping[str, Natural]
    files: Annotated[tuple[TokenFile, ...], Field(min_length=1)]

    def write(self, folder: Path) -> None:
        """Write tokens.json, the same bytes for the same record."""
        content: dict[str, Any] = {**_HEAD, **asdict(self)}
        write_atomically(folder / RECORD, seal({**content, "files": list(content["files"])}))


_RECORDS = TypeAdapter(TokenRecord)


def read_token_record(folder: Path, remedy: str) -> TokenRecord:
    """Read what `TokenRecord.write` wrote.

    Args:
        remedy: what to do about a record that cannot be used; ends the error's message.

    Raises:
        DataError: it is missing or damaged, of another version, or does not describe token shards in its folder.
    """
    content = unseal(folder / RECORD, remedy)
    head = {key: content.pop(key, None) for key in _HEAD}
    if head != _HEAD:
        raise DataError(
            f"{folder / RECORD} is of the format {head['format']!r}, version {head['version']}; expected "
            f"{_HEAD['format']!r}, version {_HEAD['version']}: {remedy}"
        )
    try:
        return _RECORDS.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise DataError(
            f"{folder / RECORD} is no record of token shards ({where}: {first['msg']}): {remedy}"
        ) from error
