"""The training loop: one straight line for the model and for every tokenizer."""

import copy
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from omniform.errors import OmniformError
from omniform.modeling.folder import commit
from omniform.training import random_state
from omniform.training.checkpoint import (
    Progress,
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from omniform.training.config import FitConfig
from omniform.training.engine import WEIGHTS, Engine
from omniform.training.metrics import MetricsLog
from omniform.training.optim import EMA, learning_rate_at
from omniform.training.run_folder import CHECKPOINTS, is_first_process, resume_command
from omniform.training.step import train_step
from omniform.training.task import Task

Preview = Callable[[nn.Module, int], None]


def fit(task: Task, config: FitConfig, out: Path, *, result: str = "model", preview: Preview | None = None) -> Path:
    """Train to the last step, going on from the newest checkpoint in `out`, and write the result.

    Args:
        out: run folder, opened with `open_run_folder`.
        result: name of the folder in `out` that `task.save` writes, from the averaged weights where the run keeps them.
        preview: called on the first rank with a plain copy of the module, holding those weights, and the step, every
            `log.samples_every` steps and after the last one; what it draws from global random generators does not
            touch the run.

    Returns:
        The result's folder.

    Raises:
        OmniformError: a step does not divide over the ranks, the checkpoints belong to another module, or too many
            steps in a row were not finite.
        SystemExit: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    checkpoints = out / CHECKPOINTS
    config.check_loss_terms(task.term_weights)
    # ZeRO takes the module apart: samples and the result come from a copy, which the first rank keeps.
    replica = copy.deepcopy(task.module) if is_first_process() else None
    engine = Engine(task.module, config)
    # One rank looks: with --fresh another could look before the folder is emptied, and leave the others waiting.
    if engine.on_first_rank(lambda: _is_finished(checkpoints, config.steps) and (out / result).exists()):
        engine.close()
        return out / result
    random_state.seed_everything(config.seed, engine.rank)
    progress, notices = _resume(checkpoints, engine, task)
    log = MetricsLog(out, engine, list(task.term_weights), first_step=progress.step, steps=config.steps)

    with closing(log), StopSignals() as signals:
        for notice in notices:
            log.note(notice)
        while progress.step < config.steps:
            step = progress.step
            place = config.stage_at(step)
            stage = None if place is None else config.stages[place]
            weights = {**task.term_weights, **({} if stage is None else stage.loss_weights)}
            lr = learning_rate_at(config, step)
            started = time.monotonic()
            batches = task.micro_batches(step, engine.rank, engine.world_size)
            data_seconds = time.monotonic() - started

            ends_window = (step + 1) % config.log.every == 0 or step + 1 in {config.steps, *config.stage_starts}
            outcome = train_step(
                engine,
                weights,
                batches,
                lr,
                stop=signals.received is not None,
                gradient_norms=config.log.gradient_norms and ends_window,
            )
            figures = task.after_step(engine.sum_over_ranks, skipped=outcome.update.skipped)
            progress = _advance(progress, outcome.update.skipped, outcome.n_tokens)
            log.add(outcome, data_seconds)
            step = progress.step

            # An entry of the log is of one stage.
            if ends_window:
                values = {"lr": lr, "grad_norm": outcome.update.grad_norm, "skipped": progress.n_skipped, **figures}
                values |= {f"grad_norm/{term}": norm for term, norm in outcome.gradient_norms.items()}
                log.write(step, weights, None if stage is None else stage.name, values)
            if progress.n_skipped_in_a_row >= config.optim.skip_limit:
                raise OmniformError(
                    f"the gradient was not finite in {progress.n_skipped_in_a_row} steps in a row, up to step {step}: "
                    "training stopped; lower optim.lr, raise optim.warmup_steps or look at the data"
                )
            if step % config.checkpoint.every == 0 or step == config.steps or outcome.stop:
                stored = replace(progress, position=task.position(step))
                save_checkpoint(checkpoints, engine, stored, keep=config.checkpoint.keep)
            if outcome.stop:
                number = max(engine.gather_objects(signals.received or 0))
                log.note(
                    f"stopped by {signal.Signals(number).name} after step {step}, checkpoint written; "
                    f"continue with: {resume_command()}"
                )
                engine.close()
                raise SystemExit(128 + number)
            every = config.log.samples_every
            if preview is not None and every and (step % every == 0 or step == config.steps):
                _export(engine, replica)
                if replica is not None:
                    state = random_state.capture()
                    preview(replica.eval(), step)
                    random_state.restore(state)

    _export(engine, replica)
    if replica is not None:
        draft = out / f".{result}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        task.save(draft, replica.eval())
        commit(draft, out / result)
    engine.close()
    return out / result


def _is_finished(checkpoints: Path, steps: int) -> bool:
    return any(path.name == f"step-{steps}" for path in complete_checkpoints(checkpoints))


def _resume(checkpoints: Path, engine: Engine, task: Task) -> tuple[Progress, list[str]]:
    path, notices = engine.on_first_rank(lambda: newest_checkpoint(checkpoints))
    if path is None:
        return Progress(), notices
    progress, differences = load_checkpoint(path, engine)
    if progress.position is not None:
        task.restore(progress.position)
    notices.append(f"resumed from {path}")
    if differences:
        notices.append(f"the layout changed ({', '.join(differences)}): equal weights, but not bit-identical from here")
    return progress, notices


def _advance(progress: Progress, skipped: bool, n_tokens: float) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        n_skipped=progress.n_skipped + skipped,
        n_skipped_in_a_row=progress.n_skipped_in_a_row + 1 if skipped else 0,
        n_tokens=progress.n_tokens + n_tokens,
    )


@torch.no_grad()
def _export(engine: Engine, replica: nn.Module | None) -> None:
    """Copy the weights, or their average where there is one, into the first rank's `replica`; collective."""
    stored = {} if replica is None else replica.state_dict()
    for key in (WEIGHTS, EMA) if EMA in engine.state_keys else (WEIGHTS,):
        for name, value in engine.read(key):
            if name in stored:
                stored[name].copy_(value)
    for name, buffer in engine.buffers().items():
        if name in stored:
            stored[name].copy_(buffer)


class StopSignals:
    """While open, SIGINT and SIGTERM are noted instead of ending the process; a second SIGINT ends it at once.

    Attributes:
        received: number of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
