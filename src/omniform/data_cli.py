"""The `omniform data` commands. Each body imports what it calls, so that `--help` never waits for numpy."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from omniform.console import Json, Seed, print_json
from omniform.errors import OmniformError
from omniform.inference.terminal_text import harmless

data_app = typer.Typer(help="Build, check and look at training data.", no_args_is_help=True)

IndexDir = Annotated[Path | None, typer.Option(help="Where the indexes lie, if not beside the shards.")]
DataDir = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards (.tar), or of folders of shards.")]


def _say(name: str) -> None:
    """Print what is being read as it begins: a world takes a while."""
    print(harmless(f"reading {name or '.'}"), file=sys.stderr, flush=True)


@data_app.command("build")
def data_build(
    world: Annotated[Literal["digits"], typer.Argument(metavar="WORLD", help="digits: written, spoken, moving.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Seed = 0,
) -> None:
    """Build a demo world from what installed packages ship, the same to the byte each time.

    digits takes about 220 MB and a minute: text, pictures, speech and video of the digits 0 to 9, in splits that share
    no block of writers and no voice. It needs the extra `demo`.
    """
    from omniform.data.digits import build_digits

    print(build_digits(out, seed=seed))


@data_app.command("info")
def data_info(folder: DataDir, index_dir: IndexDir = None, as_json: Json = False) -> None:
    """Print what a folder of shards is and holds: samples, spans of each modality, seconds of sound and video."""
    from omniform.data.inspect import info
    from omniform.data_report import info_as_text

    found = info(folder, index_dir, progress=_say)
    if as_json:
        print_json(found)
    else:
        print(harmless(info_as_text(found)))


@data_app.command("verify")
def data_verify(folder: DataDir, index_dir: IndexDir = None, as_json: Json = False) -> None:
    """Check every bit against the stored digests; status 1 and the names of shard and sample if one differs."""
    from omniform.data.verify import verify

    report = verify(folder, index_dir, progress=_say)
    if as_json:
        print_json(report.to_json())
    else:
        print(harmless(str(report)))
    raise typer.Exit(0 if report.ok else 1)


@data_app.command("preview")
def data_preview(
    folder: DataDir,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    n: Annotated[int, typer.Option(min=1, help="Samples of each split.")] = 16,
    index_dir: IndexDir = None,
) -> None:
    """Draw a contact sheet: pictures, waveforms, frames of videos, and captions."""
    from omniform.data.inspect import preview

    print(preview(folder, out, n, index_dir))


@data_app.command("index")
def data_index(
    folder: DataDir,
    index_dir: Annotated[Path | None, typer.Option(help="Write here (default: beside the shards).")] = None,
) -> None:
    """Write the index and digests of shards that came from elsewhere, so that they can be trained on."""
    from omniform.data.index import index_shards

    for path in index_shards(folder, index_dir):
        print(path)


@data_app.command("from-folder")
def data_from_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images with captions, and its folders.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train/, validation/ and report.json.")],
    caption_from: Annotated[
        Literal["files", "metadata", "folder"] | None,
        typer.Option(
            help="files: NAME.txt or NAME.json beside each image; metadata: metadata.csv or .jsonl at the top; folder: "
            "the name of the folder it is in. (default: metadata if there is such a table, else files)"
        ),
    ] = None,
    caption_key: Annotated[
        str | None, typer.Option(help="Key or column of the caption. (default: caption, or else text)")
    ] = None,
    captionless: Annotated[Literal["skip", "keep"], typer.Option(help="Images that have no caption.")] = "skip",
    validation: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images to hold back, by a keyed hash of their paths.")
    ] = 0.0,
    seed: Seed = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images in one .tar.")] = 2048,
    max_pixels: Annotated[int, typer.Option(min=1, max=2**26, help="Leave larger images out.")] = 2**26,
    min_size: Annotated[int, typer.Option(min=1, help="Leave out images whose shorter side has fewer pixels.")] = 1,
    max_aspect_ratio: Annotated[
        float | None,
        typer.Option(min=1, help="Leave out images whose longer side is more than this times the shorter."),
    ] = None,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Make larger images smaller, to this shorter side. (default: as they are)")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first file that cannot be used.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a folder of captioned images into shards to train on, and say what was left out and why.

    omniform data from-folder photos --out runs/photos-data --validation 0.05
    """
    from pydantic import ValidationError

    from omniform.data.from_folder import FolderOptions, from_folder

    try:
        options = FolderOptions(
            caption_from=caption_from,
            caption_key=caption_key,
            captionless=captionless,
            validation=validation,
            seed=seed,
            samples_per_shard=samples_per_shard,
            max_pixels=max_pixels,
            min_size=min_size,
            max_aspect_ratio=max_aspect_ratio,
            resize=resize,
            strict=strict,
        )
    except ValidationError as error:  # what the options above let through: inf
        wrong = [f"--{entry['loc'][0]}".replace("_", "-") + f": {entry['msg']}" for entry in error.errors()]
        raise OmniformError("; ".join(wrong)) from error
    report = from_folder(folder, out, options)
    if as_json:
        print_json(report.to_json())
    else:
        print(harmless(str(report)))


@data_app.command("encode")
def data_encode(
    folder: DataDir,
    tokenizer: Annotated[
        list[str],
        typer.Option(metavar="MODALITY=FOLDER", help="A tokenizer or its run folder; give one for each modality."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write: a token shard (.safetensors) per shard, and tokens.json.")
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes; the files are the same whatever their number.")] = 1,
    index_dir: IndexDir = None,
    as_json: Json = False,
) -> None:
    """Tokenise shards once, into a folder to train on without them; run again to continue where it stopped.

    omniform data encode runs/photos-data --out runs/photos-tokens --tokenizer text=runs/photos-text-tokenizer
    --tokenizer image=runs/photos-image-tokenizer
    """
    from omniform.data.encode_folder import encode_folder

    folders = {}
    for entry in tokenizer:
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise OmniformError(f"--tokenizer {entry}: expected MODALITY=FOLDER, such as image=runs/image-tokenizer")
        if name in folders:
            raise OmniformError(f"--tokenizer {name}=... is given twice: expected one for each modality")
        folders[name] = Path(path)
    summaries = encode_folder(folder, folders, out, index_dir=index_dir, workers=workers)
    if as_json:
        print_json(summaries)
        return
    for name, summary in summaries.items():
        tokens = ", ".join(f"{n} {modality}" for modality, n in summary["tokens"].items())
        print(harmless(f"{name}: {summary['samples']} samples, tokens: {tokens}"))
        for reason, entry in summary["failed"].items():
            print(harmless(f"  {entry['count']} cannot be decoded: {reason}: {'; '.join(entry['first'])}"))
        for modality, n in summary["left_out"].items():
            print(f"  {n} {modality} spans left out: no --tokenizer {modality}=FOLDER")
    print(out)
