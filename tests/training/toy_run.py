"""A small run as a program: python toy_run.py RUNS.json, a list of {"out": ..., keys of Toy and FitConfig}.

One process trains them one after another, so that tests pay for starting the interpreter and the process group once.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.training.config import FitConfig
from omniform.training.loop import fit
from omniform.training.run_folder import open_run_folder
from omniform.training.task import MicroBatch


class ToyModule(nn.Module):
    """Sizes are odd, so that no parameter divides evenly over two ranks; one parameter is frozen; one buffer moves."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 5), requires_grad=False)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout))
        self.value, self.label = nn.Linear(7, 1), nn.Linear(7, 3)
        self.register_buffer("n_forward", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.n_forward += 1
        hidden = self.trunk(inputs["x"] * self.frozen)
        squares = (self.value(hidden)[:, 0] - inputs["value"]).square()
        entropies = nn.functional.cross_entropy(self.label(hidden).float(), inputs["label"], reduction="none")
        labelled = inputs["labelled"]
        return {"value": squares.sum(), "label": torch.where(labelled, entropies, 0.0).sum()}


class Toy:
    """A Task on rows that are a pure function of (step, row); each fourth row has a label, none at odd steps.

    With two ranks the labelled rows are all on rank 0; with `uneven` rank 0 has a quarter of the rows, rank 1 the rest.
    At `sigterm_at` the last rank, and no other, gets a SIGTERM.
    """

    def __init__(
        self,
        rows_per_step: int,
        micro_batch_rows: int,
        dropout: float = 0.0,
        nan_steps: list[int] | None = None,
        uneven: bool = False,
        sigterm_at: int | None = None,
    ) -> None:
        torch.manual_seed(1)
        self.module: nn.Module = ToyModule(dropout)
        self.term_weights = {"value": 1.0, "label": 0.5}
        self.rows_per_step, self.micro_batch_rows = rows_per_step, micro_batch_rows
        self.nan_steps, self.uneven, self.sigterm_at = nan_steps or [], uneven, sigterm_at
        self.restored: dict | None = None

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        if step == self.sigterm_at and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        rows = list(range(self.rows_per_step))
        if self.uneven:
            cut = self.rows_per_step // 4
            mine = rows if world_size == 1 else (rows[:cut] if rank == 0 else rows[cut:])
        else:
            mine = rows[rank::world_size]
        n = -(-self.rows_per_step // (self.micro_batch_rows * world_size))
        return [self._micro_batch(step, mine[i::n]) for i in range(n)]

    def _micro_batch(self, step: int, rows: list[int]) -> MicroBatch:
        index = torch.tensor(rows)[:, None].numpy()
        x = torch.tensor(keyed_uniform(7, stream("toy"), step, index, torch.arange(5).numpy())).float() - 0.5
        if step in self.nan_steps and 0 in rows:
            x[0, 0] = float("nan")
        labelled = torch.tensor([row % 4 == 0 and step % 2 == 0 for row in rows])
        inputs = {"x": x, "value": x.sum(1).sin(), "label": (x.argmax(1) % 3), "labelled": labelled}
        return MicroBatch(inputs, {"value": len(rows), "label": float(labelled.sum())}, 5 * len(rows))

    def after_step(self, sum_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool) -> dict[str, float]:
        return {}

    def position(self, step: int) -> dict:
        return {"step": step}

    def restore(self, position: dict) -> None:
        self.restored = position

    def save(self, folder: Path, module: nn.Module) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(module.state_dict(), folder / "toy.safetensors")


def run_toy(out: Path, *, toy: dict | None = None, fresh: bool = False, preview=None, **settings) -> Toy:
    config = FitConfig(**{"name": "toy", "steps": 6, "rows_per_step": 8, **settings})
    task = Toy(config.rows_per_step, config.engine.micro_batch_rows, **(toy or {}))
    open_run_folder(out, config, fresh=fresh)
    fit(task, config, out, preview=preview)
    return task


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run_toy(Path(run.pop("out")), **run)
        except SystemExit as stopped:
            os.write(1, f"stopped with status {stopped.code}\n".encode())  # whole, beside other processes' lines
