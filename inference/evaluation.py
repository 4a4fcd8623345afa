"""The any-to-any suite: what a model generates from held-out data, scored by judges that it never trained with."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniform.data.sealed import write_atomically
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.document_evaluation import evaluate_documents
from omniform.inference.evaluation_cells import CellScorer
from omniform.inference.evaluation_items import CELLS, World
from omniform.inference.evaluation_samples import told
from omniform.inference.evaluation_shares import score_here, score_in_processes
from omniform.inference.generate import Model

HELD_OUT = ("validation", "test")


def evaluate_any_to_any(
    model: Model,
    data_dir: Path,
    *,
    split: str = "test",
    cells: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    second_judge: bool | None = None,
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
    direct: bool = False,
    out: Path | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Score a model on digits-world: one part in, one part out, from each modality to each.

    What every figure means is in docs/evaluation.md.

    Judges are fitted on train items or on nothing of the world. The ceiling of a cell is what the judge reaches on real
    held-out items by the same criterion: of the targets, or of the sources where text is generated.

    Args:
        data_dir: the world's folder, with its splits.
        split: held-out items to prompt with: choose settings on "validation", report "test".
        cells: "SOURCE->TARGET" each; all that model and world have unless given.
        limit: use only so many items per cell, as many of each digit and motion as can be; all unless given, of speech
            SPEECH_LIMIT.
        second_judge: whether Whisper hears SECOND_JUDGE_LIMIT of the replies in speech too; unless given, where it is
            installed and there is no limit.
        sampling: keywords of `generate` by target modality, over the model's defaults.
        direct: let no reply go by way of another modality; see `GenerationConfig.through`.
        workers: processes that score at the same time, each on one thread and with all that the judges need in memory;
            sums over another number of threads may round otherwise.
        out: metrics.json to write; samples.json, with the first replies, is written beside it.

    Returns:
        The content of metrics.json. Without `cells`, and where the model has learnt what follows a part, also
        "documents": see `evaluate_documents`.

    Raises:
        OmniformError: an unknown cell, or one that model or world cannot serve; a split that is not held out; data that
            is not there or has no digits to score by; a judge that is not installed or cannot judge what the
            tokenizers make, before anything is generated; or a folder as `out`.
    """
    if split not in HELD_OUT:
        raise OmniformError(f"split is {split!r}, expected a held-out one: {' or '.join(HELD_OUT)}")
    if unknown := [cell for cell in cells or () if cell not in CELLS]:
        raise OmniformError(f"unknown cells {', '.join(unknown)}, expected some of {', '.join(CELLS)}")
    if out is not None and out.is_dir():
        raise OmniformError(f"out is the folder {out}, expected a file to write, such as {out / 'metrics.json'}")
    if not (data_dir / "train").is_dir():
        raise OmniformError(
            f"{data_dir} holds no world: expected the folder that `omniform data build` or the demo made"
        )
    ShardReader(data_dir / "train")
    if workers < 1:
        raise OmniformError(f"{workers} workers, expected at least 1")
    world = World(model.tokenizers, data_dir, split)
    make_suite = functools.partial(CellScorer, model, world, seed, limit, second_judge)
    missing = {cell: reason for cell in cells or CELLS if (reason := world.why_not(cell)) is not None}
    if model.network.config.subsets:
        same = [cell for cell in cells or CELLS if len({*cell.split("->")}) == 1]
        missing = dict.fromkeys(same, "the model learnt subsets, in which each modality comes once") | missing
    if missing and (cells is not None or len(missing) == len(CELLS)):
        reasons = "; ".join(f"{cell}: {reason}" for cell, reason in missing.items())
        raise OmniformError(f"cells that cannot be scored: {reasons}")
    served = [cell for cell in cells or CELLS if cell not in missing]
    suite = make_suite()
    keywords = {name: {"direct": direct, **(sampling or {}).get(name, {})} for name in model.modalities}
    if workers == 1:
        scored = score_here(suite, served, keywords)
    else:
        scored = score_in_processes(make_suite, served, keywords, workers)
    metrics: dict[str, Any] = {"suite": "any-to-any", "split": split, "seed": seed, "cells": scored.cells}
    metrics["missing"] = [{"cell": cell, "reason": reason} for cell, reason in missing.items()]
    metrics["judges"], metrics["copies"] = scored.judges, scored.copies
    documents = data_dir / f"{split}-documents"
    if cells is None and model.network.config.next_span_weight and "image" in model.modalities and documents.exists():
        metrics["documents"], continued = evaluate_documents(model, documents, suite.digits_of, seed=seed, limit=limit)
        if out is not None:
            entries = [
                {
                    **vars(document),
                    "prompt": [told(model, part) for part in document.prompt],
                    "reply": [told(model, part) for part in document.reply],
                }
                for document in continued
            ]
            write_atomically(out.with_name("documents.json"), json.dumps(entries, indent=1).encode() + b"\n")
    if out is not None:
        write_atomically(out.with_name("samples.json"), json.dumps(scored.samples, indent=1).encode() + b"\n")
        write_atomically(out, json.dumps(metrics, indent=2).encode() + b"\n")
    return metrics
