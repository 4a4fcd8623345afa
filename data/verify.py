"""Check data against its digests and name whatever changed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from omniform.data.index import SampleRecord, ShardIndex, index_path, index_shard, read_index, shard_folders
from omniform.data.schema import DataError, SampleError
from omniform.data.sealed import seal, unseal, write_atomically
from omniform.data.shards import read_sample
from omniform.modeling.folder import file_digest
from omniform.tokenizers.audio_files import read_audio, read_audio_header
from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.image_files import read_picture
from omniform.tokenizers.video_files import read_video

MANIFEST = "manifest.json"
SOUND_RATE = 16_000
_MAX_FRAMES = 10**6


@dataclass(frozen=True)
class ListedFile:
    """A file of a manifest: its path below the folder with /, its size in bytes and its digest."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written: in which file, in which sample (None if in no one's bytes), and what."""

    file: str
    sample: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.sample is None else f', sample {self.sample}'}: {self.message}"


@dataclass
class Report:
    """What `verify` looked at and found."""

    n_shards: int = 0
    n_samples: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        verdict = "all as written" if self.ok else f"{len(self.problems)} problems"
        summary = f"{self.n_shards} shards, {self.n_samples} samples: {verdict}"
        return "\n".join([*map(str, self.problems), summary])


def verify(folder: Path, index_dir: Path | None = None, *, progress: Callable[[str], None] | None = None) -> Report:
    """Check every shard, index and manifest under `folder`, and that every sample can be read and its images, sounds
    and videos decoded.

    Any changed bit is found: the manifest and each index carry their own digest, and hold those of everything else.

    Args:
        progress: called with the name of what is read next: MANIFEST, whose files are digested, then each folder.

    Raises:
        DataError: there is nothing to verify.
    """
    report = Report()
    progress = progress or (lambda name: None)
    folders = [folder] if (folder / MANIFEST).exists() else shard_folders(folder)
    if (folder / MANIFEST).exists():
        progress(MANIFEST)
        report.problems += _manifest_problems(folder)
        folders = sorted({path.parent for path in folder.glob("*/*.tar")})
    for shard_folder in folders:
        progress(shard_folder.name)
        indexes = None if index_dir is None else index_dir / shard_folder.relative_to(folder)
        seen: dict[str, Path] = {}
        for shard in sorted(shard_folder.glob("*.tar")):
            report.n_shards += 1
            problems = list(_shard_problems(shard, indexes, report, seen))
            report.problems += [Problem(_name(folder, shard), sample, message) for sample, message in problems]
    return report


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write a sealed manifest: what `about` says, and the size and digest of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [ListedFile(_name(folder, path), path.stat().st_size, file_digest(path)) for path in paths]
    write_atomically(folder / MANIFEST, seal({**about, "files": [asdict(file) for file in files]}))


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _manifest_problems(folder: Path) -> list[Problem]:
    try:
        files = unseal(folder / MANIFEST, "build the data again").get("files")
        listed = TypeAdapter(list[ListedFile]).validate_python(files)
    except (DataError, ValidationError) as error:
        return [Problem(MANIFEST, None, str(error))]
    problems = []
    for entry in listed:
        path = folder / entry.path
        if not path.is_file():
            problems.append(Problem(entry.path, None, "is missing, but the manifest lists it"))
        elif file_digest(path) != entry.sha256:
            problems.append(Problem(entry.path, None, "does not match its digest in the manifest"))
    extra = {_name(folder, path) for path in folder.glob("*/*.tar")} - {entry.path for entry in listed}
    return problems + [Problem(path, None, "is not listed in the manifest") for path in sorted(extra)]


def _shard_problems(
    shard: Path, index_dir: Path | None, report: Report, seen: dict[str, Path]
) -> Iterator[tuple[str | None, str]]:
    try:
        index = read_index(shard, index_dir)
    except DataError as error:
        yield _first_difference(shard, index_path(shard, index_dir)), str(error)
        return
    report.n_samples += len(index.samples)
    n_damaged, size = 0, shard.stat().st_size
    whole = [record for record in index.samples if record.offset + record.size <= size]
    for record in whole:
        if record.key in seen:
            yield record.key, f"its key is also in {seen[record.key].name}: make keys unique"
        seen[record.key] = shard
        message = _sample_problem(index, record)
        if message is not None:
            n_damaged += 1
            yield record.key, message
    if size != index.size:
        lost = [record.key for record in index.samples if record.offset + record.size > size]
        state = f"cut short, {len(lost)} samples from here on are lost" if size < index.size else "longer than indexed"
        yield lost[0] if lost else None, f"{state}: the file has {size} bytes, its index says {index.size}"
    elif not n_damaged and file_digest(shard) != index.sha256:
        yield None, "bytes that belong to no sample (directories or the end-of-archive mark) do not match the digest"


def _sample_problem(index: ShardIndex, record: SampleRecord) -> str | None:
    try:
        sample = read_sample(index, record)
        for span in sample.spans:
            if span.payload is not None:
                _decode(span.modality, span.payload)
    except (SampleError, TokenizerError) as error:
        return str(error).removeprefix(f"sample {record.key}").lstrip(": ")
    return None


def _decode(modality: str, payload: bytes) -> None:
    if modality == "image":
        read_picture(payload, "RGB")
    elif modality == "speech":
        decode_sound(payload)
    elif modality == "video":
        read_video(payload, fps=None, max_frames=_MAX_FRAMES, fit=lambda picture: picture.resize((1, 1)))


def decode_sound(payload: bytes) -> Float[Tensor, "N"]:
    """Decode a sound file at its own rate, or SOUND_RATE if that is higher: a small file may state any rate, and to be
    looked at or listened through it needs no more.
    """
    return read_audio(payload, min(read_audio_header(payload).rate, SOUND_RATE))


def _first_difference(shard: Path, stored: Path) -> str | None:
    """Return the sample whose record in a damaged index differs from what the shard gives, if there is one."""
    try:
        index = index_shard(shard)
        damaged = stored.read_bytes()
    except (DataError, OSError):
        return None
    lines, expected = damaged.split(b"\n"), index.to_bytes().split(b"\n")
    first = next((i for i, pair in enumerate(zip(lines, expected, strict=False)) if pair[0] != pair[1]), len(lines))
    records_start = expected.index(b'"samples": [') + 1 if index.samples else len(expected)
    place = first - records_start
    return index.samples[place].key if 0 <= place < len(index.samples) else None
