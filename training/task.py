"""What the training loop asks of the thing that is trained. The model and every tokenizer are Tasks of one loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to one forward pass.

    Attributes:
        inputs: the module's single argument: a tensor, something with `.to(device)` that returns the moved thing, or
            a mapping or sequence of these.
        counts: for each loss term, how many items (or how much weight) its loss sum is over; 0 where it is absent.
            Known before the forward pass, because each sum is divided by the count of all ranks and micro-batches.
        n_tokens: tokens (or pixels, or samples) that this micro-batch holds, for throughput only.
    """

    inputs: Any
    counts: Mapping[str, float]
    n_tokens: int


@runtime_checkable
class Task(Protocol):
    """A module, its loss terms, its data, and how to store the result.

    Attributes:
        module: `forward(inputs)` returns `{term: loss SUM}`: every term of `term_weights` on every call, in one fixed
            order and through the same submodules, so that no rank of ZeRO-3 waits for a gather that another never
            starts. Its buffers must hold the same numbers on every rank after each step.
        term_weights: weight of each loss term in the total loss.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def term_weights(self) -> Mapping[str, float]: ...

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step` (from 0): a pure function of the arguments and the config.

        Every rank returns the same number at every step: the engine's accumulation.
        """
        ...

    def after_step(self, sum_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool) -> dict[str, float]:
        """Change in the module what no gradient changes, the same on every rank; return figures for the log.

        Args:
            sum_over_ranks: returns the sum of a small CPU tensor over ranks; every rank must call it alike.
            skipped: the step's gradient was not finite, and the weights stayed as they were.
        """
        ...

    def position(self, step: int) -> dict[str, Any]:
        """Return the data position before `step` as JSON: it goes into the checkpoint."""
        ...

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from what `position` returned.

        Raises:
            OmniformError: the position belongs to other data.
        """
        ...

    def save(self, folder: Path, module: nn.Module) -> None:
        """Write the usable result (a model or tokenizer folder) from `module`, a plain fp32 copy of `self.module`."""
        ...
