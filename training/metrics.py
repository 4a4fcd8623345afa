"""What a run reports while it trains: log.jsonl, tensorboard, and a progress bar or plain lines."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omniform.training.engine import Engine
from omniform.training.step import StepResult

LOG_FILE = "log.jsonl"


class MetricsLog:
    """Gathers what steps report and writes it for a window of steps at a time, from the first rank.

    A loss is the mean per item over the window's steps that were not skipped. Between writes nothing is copied off the
    device and no message is sent.

    Args:
        out: the run folder; entries of steps after `first_step` in its log are dropped, as they will be made again.
        first_step: steps already done.
        steps: steps of the whole run.
    """

    def __init__(self, out: Path, engine: Engine, terms: Sequence[str], *, first_step: int, steps: int) -> None:
        self._engine, self._terms, self._first_step, self._steps = engine, terms, first_step, steps
        self._start_window()
        if engine.rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        truncate_log(out / LOG_FILE, first_step)
        self._file = (out / LOG_FILE).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def _start_window(self) -> None:
        self._loss_sums: torch.Tensor | None = None
        self._counts = torch.zeros(len(self._terms), dtype=torch.float64)
        self._n_steps, self._n_tokens, self._data_seconds = 0, 0.0, 0.0
        self._started = time.monotonic()

    def add(self, result: StepResult, data_seconds: float) -> None:
        """Take in one step; `data_seconds` is how long its micro-batches took to make."""
        self._n_steps += 1
        self._n_tokens += result.n_tokens
        self._data_seconds += data_seconds
        if not result.update.skipped:
            sums = result.loss_sums
            self._loss_sums = sums if self._loss_sums is None else self._loss_sums + sums
            self._counts += result.counts
        if self._engine.rank == 0:
            self._bar.update()

    def write(
        self, step: int, term_weights: Mapping[str, float], stage: str | None, values: Mapping[str, float]
    ) -> None:
        """Write the window that ends after `step` steps, with further `values`; every rank must call it.

        Args:
            term_weights: of the losses in their sum, in the whole window.
            stage: name of the stage that the window's steps belong to, if the run has stages.
        """
        local = torch.zeros(len(self._counts)) if self._loss_sums is None else self._loss_sums
        sums = self._engine.sum_over_ranks(local.double())
        if self._engine.rank == 0:
            losses = {
                term: float(total / count)
                for term, total, count in zip(self._terms, sums, self._counts, strict=True)
                if count > 0
            }
            seconds = max(time.monotonic() - self._started, 1e-9)
            record: dict[str, Any] = {"step": step} if stage is None else {"step": step, "stage": stage}
            if losses:
                record["loss"] = sum(term_weights[term] * loss for term, loss in losses.items())
            record |= {f"loss/{term}": loss for term, loss in losses.items()}
            # What the losses are made of: a sum over the window was divided by its count, and weighted in `loss`.
            record |= {f"count/{t}": float(n) for t, n in zip(self._terms, self._counts, strict=True) if n > 0}
            record |= {f"weight/{term}": term_weights[term] for term in losses}
            record |= values
            record |= {
                "tokens_per_second": self._n_tokens / seconds,
                "seconds_per_step": seconds / self._n_steps,
                "data_wait": self._data_seconds / seconds,
            }
            self._report(record)
        self._start_window()

    def _report(self, record: dict[str, Any]) -> None:
        # NaN and infinities are no JSON numbers: a skipped step's gradient norm is null.
        finite = {k: v if isinstance(v, str) or abs(v) < float("inf") else None for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name not in ("step", "stage"):
                self._tensorboard.add_scalar(name, value, record["step"])
        losses = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.startswith("loss"))
        stage = f"{record['stage']}  " if "stage" in record else ""
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._bar.disable:
            eta = timedelta(seconds=round(record["seconds_per_step"] * (self._steps - record["step"])))
            norm, lr = record["grad_norm"], record["lr"]
            done = f"step {record['step']}/{self._steps}  {stage}{losses}"
            print(f"{done}  grad_norm {norm:.3f}  lr {lr:.2e}  {speed}  eta {eta}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(f"{stage}{losses}  {speed}", refresh=False)

    def note(self, message: str) -> None:
        """Print a sentence without breaking the progress bar, on the first rank."""
        if self._engine.rank == 0:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush and close every output."""
        if self._engine.rank == 0:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()


def truncate_log(path: Path, last_step: int) -> None:
    """Drop entries after `last_step`, and a line cut short by a crash, from a log; the rest stays as it is."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= last_step:
            kept.append(line)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)
