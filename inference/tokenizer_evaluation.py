"""How well a tokenizer keeps what it encodes: rates, distortion, use of its codes, and a judge's word."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omniform.data.sealed import write_atomically
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.reconstruction.base import Reconstruction, token_figures
from omniform.inference.reconstruction.image import ImageReconstruction
from omniform.inference.reconstruction.judged import JUDGE, Answers, judged_figures
from omniform.inference.reconstruction.speech import SpeechReconstruction
from omniform.inference.reconstruction.text import TextReconstruction
from omniform.inference.reconstruction.video import VideoReconstruction
from omniform.tokenizers.base import Modality
from omniform.tokenizers.registry import load_modality

RECONSTRUCTIONS: dict[str, type[Reconstruction]] = {
    "text": TextReconstruction,
    "image": ImageReconstruction,
    "speech": SpeechReconstruction,
    "video": VideoReconstruction,
}
FIGURES, EXAMPLES, OVERVIEW = "tokenizer.json", "examples.json", "reconstructions"
N_SHOWN = 32
# Most examples of each kind: one of each class; what a judge knows before and not after; and by distortion.
_N_EXAMPLES = {"as it came": 10, "lost": 8, "worst": 4, "best": 4}


def evaluate_tokenizer(
    folder: Path,
    data_dir: Path,
    split: str = "test",
    *,
    subset: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Encode and decode every item of a split that the tokenizer is for, and compare.

    What is measured depends on the modality: see `figures` in the files of reconstruction/; of a modality that has none
    there, what its tokens cost and nothing else. Where every sample says a digit, judges answer before and after the
    round trip: for pictures fitted on the train pictures and their altered copies, for videos on the train pictures
    alone, for speech one that others have trained.

    Args:
        folder: of the tokenizer, or the run folder that holds it as tokenizer/.
        data_dir: a world, whose splits are subfolders. Items are those of data_dir/SPLIT, else of
            data_dir/SPLIT-MODALITY, else of the first other folder SPLIT-* that holds any.
        split: held-out items to encode.
        subset: take the items of data_dir/SPLIT-SUBSET instead.
        limit: use only so many samples, spread evenly over the folder.
        out: folder for tokenizer.json; examples.json with some items before and after in examples/, both as they came
            and the worst, and an overview of the first N_SHOWN. Those of an earlier evaluation are removed first.

    Returns:
        The content of tokenizer.json; floats of JSON.

    Raises:
        OmniformError: the tokenizer or the data cannot be read, the split holds nothing of the modality, or `out` can
            be no folder.
    """
    if out is not None:
        _prepare(out)
    tokenizer = load_modality(folder)
    source, items, about = _held_out(tokenizer, data_dir, split, subset, limit)
    figures = {
        "modality": tokenizer.name,
        "kind": tokenizer.kind,
        "split": split,
        "folder": source.name,
        "n": len(items),
    }
    if tokenizer.name in RECONSTRUCTIONS:
        reconstruction = RECONSTRUCTIONS[tokenizer.name].of(tokenizer, items, about)
        figures |= reconstruction.rates | reconstruction.figures()
        answers: dict[str, Answers] = {}
        if all("digit" in entry for entry in about):
            answers = reconstruction.answers(functools.partial(_train_pictures, data_dir / "train"))
        figures |= _judged(reconstruction, answers)
        if out is not None:
            _write_examples(out, reconstruction, answers)
    else:
        figures |= token_figures(tokenizer.encode_batch(items), tokenizer.representation)
        figures["distances"] = f"none are known for {tokenizer.name}"
    if out is not None:
        write_atomically(out / FIGURES, json.dumps(figures, indent=2).encode() + b"\n")
    return figures


def _prepare(out: Path) -> None:
    """Make a folder for results, without the examples and the overview of the evaluation before, if there was one."""
    try:
        (out / "examples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OmniformError(f"{out} cannot be a folder for results ({error.strerror}): give --out another") from error
    if (out / FIGURES).exists():
        for path in (*(out / "examples").glob("[0-9][0-9][0-9][0-9]*"), *out.glob(f"{OVERVIEW}*"), out / EXAMPLES):
            path.unlink(missing_ok=True)


def _held_out(
    tokenizer: Modality[Any], data_dir: Path, split: str, subset: str | None, limit: int | None
) -> tuple[Path, list[Any], list[Mapping[str, Any]]]:
    """Return the folder that was read, every item of the tokenizer's modality in it, and what its sample says of it."""
    folders = [data_dir / split, data_dir / f"{split}-{tokenizer.name}"]
    folders += [folder for folder in sorted(data_dir.glob(f"{split}-*")) if folder not in folders]
    searched = f"{data_dir / split} and {data_dir / split}-* hold"
    if subset is not None:
        folders = [data_dir / f"{split}-{subset}"]
        searched = f"{folders[0]} holds"
    for folder in filter(Path.is_dir, folders):
        items: list[Any] = []
        about: list[Mapping[str, Any]] = []
        reader = ShardReader(folder)
        count = len(reader) if limit is None else min(limit, len(reader))
        for place in np.linspace(0, len(reader) - 1, count).round().astype(int).tolist():
            sample = reader[place]
            for span in sample.spans:
                if span.modality == tokenizer.name:
                    items.append(span.text if span.payload is None else tokenizer.read(span.payload))
                    about.append(sample.metadata)
        if items:
            return folder, items, about
    raise OmniformError(
        f"{searched} no {tokenizer.name}, which this tokenizer is for: give the folder of a world that does"
    )


def _judged(reconstruction: Reconstruction, answers: Mapping[str, Answers]) -> dict[str, Any]:
    about = reconstruction.about
    groups = {key: [entry[key] for entry in about] for key in reconstruction.groups if all(key in e for e in about)}
    sources = [reconstruction.source(entry) for entry in about]
    return {
        name: judged_figures(said, groups if name == JUDGE else {}, None if None in sources else sources)
        for name, said in answers.items()
    }


def _train_pictures(
    folder: Path, read: Callable[[bytes], Any], altered: bool
) -> tuple[list[Any], npt.NDArray[np.int64]]:
    pictures, digits = [], []
    for sample in ShardReader(folder):
        for span in sample.spans:
            if span.modality == "image" and span.payload is not None and (altered or not sample.metadata.get("copy")):
                pictures.append(read(span.payload))
                digits.append(sample.metadata["digit"])
    if not pictures:
        raise OmniformError(f"{folder} holds no pictures to fit a judge on: build the world anew")
    return pictures, np.array(digits, dtype=np.int64)


def _write_examples(out: Path, reconstruction: Reconstruction, answers: Mapping[str, Answers]) -> None:
    distortions = reconstruction.distortions()
    told = []
    for kind, place in _chosen(distortions, answers):
        about = reconstruction.about[place]
        entry: dict[str, Any] = {"kind": kind, "place": place}
        entry |= {key: about[key] for key in ("digit", *reconstruction.groups) if key in about}
        entry |= {
            name: {side: said.name(int(vars(said)[side][place])) for side in ("right", "before", "after")}
            for name, said in answers.items()
        }
        distortion = float(distortions[place])
        entry[reconstruction.distortion_name] = distortion if np.isfinite(distortion) else None
        told.append(entry | reconstruction.write_example(place, out / "examples" / f"{place:04d}"))
    reconstruction.write_comparison(range(min(N_SHOWN, len(distortions))), out / OVERVIEW)
    write_atomically(out / EXAMPLES, json.dumps(told, indent=1).encode() + b"\n")


def _chosen(distortions: npt.NDArray[np.float64], answers: Mapping[str, Answers]) -> list[tuple[str, int]]:
    """Return (kind, place) of the examples, each place once; of equal ones the first."""
    least, most = distortions.min(), distortions.max()
    first, lost = list(range(len(distortions))), list[int]()
    if answers:
        judge = next(iter(answers.values()))
        first = np.unique(judge.right, return_index=True)[1].tolist()
        lost = sorted(
            {
                int(place)
                for said in answers.values()
                for place in np.flatnonzero((said.before == said.right) & (said.after != said.right))
            }
        )
    kinds = {
        "as it came": first,
        "lost": lost,
        "worst": [int(place) for place in np.argsort(-distortions, kind="stable") if distortions[place] > least],
        "best": [int(place) for place in np.argsort(distortions, kind="stable") if distortions[place] < most],
    }
    chosen: dict[int, str] = {}
    for kind, places in kinds.items():
        new = [place for place in places if place not in chosen][: _N_EXAMPLES[kind]]
        chosen |= dict.fromkeys(new, kind)
    return [(kind, place) for place, kind in chosen.items()]
