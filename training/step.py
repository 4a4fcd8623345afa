"""One optimizer step: every micro-batch of every rank as if it were one batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omniform.errors import OmniformError
from omniform.training.engine import Engine, Update
from omniform.training.task import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss_sums: this rank's loss sum per term, in the order of the weights given, on the engine's device.
        counts: count per term over all ranks, in the same order.
        n_tokens: over all ranks.
        stop: whether any rank asked to stop.
        gradient_norms: of each term's own gradient, its weight included, before clipping; empty unless asked for.
    """

    update: Update
    loss_sums: Tensor
    counts: Tensor
    n_tokens: float
    stop: bool
    gradient_norms: Mapping[str, float] = field(default_factory=dict)


def train_step(
    engine: Engine,
    term_weights: Mapping[str, float],
    batches: list[MicroBatch],
    lr: float,
    *,
    stop: bool = False,
    gradient_norms: bool = False,
) -> StepResult:
    """Run forward and backward passes of this rank's `batches` and the optimizer step that all ranks share.

    Each term's loss sum is divided by its count over all ranks and micro-batches, so the gradient is that of one big
    batch however its items are spread. The engine averages over ranks, hence the factor world size.

    Args:
        term_weights: weight of each loss term in this step, in the module's order.
        stop: this rank's wish to end; carried to all ranks in the same message as the counts.
        gradient_norms: measure that of each term too.
    """
    if len(batches) != engine.accumulation:
        raise OmniformError(f"the task gave {len(batches)} micro-batches, expected {engine.accumulation} on every rank")
    local = [sum(batch.counts[term] for batch in batches) for term in term_weights]
    message = torch.tensor([*local, sum(b.n_tokens for b in batches), stop], dtype=torch.float64)
    *counts, n_tokens, n_stop = engine.sum_over_ranks(message).tolist()

    loss_sums = torch.zeros(len(term_weights), device=engine.device)
    apart = {term: engine.new_gradient() for term in term_weights} if gradient_norms else {}
    for batch in batches:
        losses = engine.forward(batch.inputs)
        if list(losses) != list(term_weights):
            raise OmniformError(
                f"the module returned losses {list(losses)}, expected {list(term_weights)} in this order"
            )
        total = torch.zeros((), device=engine.device)
        for (term, weight), count in zip(term_weights.items(), counts, strict=True):
            if count:
                factor = weight * engine.world_size / count
                total = total + losses[term] * factor
                if term in apart:
                    apart[term] += engine.gradient_of(term, factor)
            else:
                # Absent everywhere: it stays in the graph, so that all ranks run the same backward pass, as 0.
                total = total + torch.where(torch.zeros_like(losses[term], dtype=torch.bool), losses[term], 0.0)
        engine.backward(total)
        loss_sums += torch.stack([losses[term].detach().float() for term in term_weights])
    norms = {term: engine.norm_over_ranks(gradient) for term, gradient in apart.items()}
    all_counts = torch.tensor(counts, dtype=torch.float64)
    return StepResult(engine.step(lr), loss_sums, all_counts, n_tokens, n_stop > 0, norms)
