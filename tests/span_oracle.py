"""Spans for tests of objectives, and a draw that takes what a perfect model says."""

from typing import get_args

import numpy as np
import torch

from omniform.modeling.objectives.base import TargetSpans
from omniform.modeling.objectives.masked import Schedule

MASK, FIRST, END = 999, 100, 150
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class OracleDraw:
    """A draw that takes the likeliest token, with noise from a seeded generator for the confidence."""

    temperature, guidance_scale = 1.0, 1.0

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, logits: torch.Tensor, step: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = logits.log_softmax(-1).max(-1)
        return best.indices, best.values

    def gumbel(self, step: int, positions: torch.Tensor) -> torch.Tensor:
        return -torch.log(-torch.log(torch.rand(len(positions), generator=self.generator)))

    def normal(self, step: int, positions: torch.Tensor, channels: int) -> torch.Tensor:
        return torch.randn(len(positions), channels, generator=self.generator)

    def subset(self, candidates: torch.Tensor, count: int, step: int) -> torch.Tensor:
        noise = torch.rand(len(candidates), generator=self.generator).masked_fill(~candidates, 2)
        return self.smallest(noise, count)

    def above(self, scores: torch.Tensor, bound: float) -> torch.Tensor:
        return scores > bound

    def smallest(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        order = sorted(range(len(scores)), key=lambda place: float(scores[place]))
        return torch.tensor([place in order[:count] for place in range(len(scores))], dtype=torch.bool)


def spans(lengths: list[int], first_key: int = 0) -> TargetSpans:
    """Spans of ids that count up from FIRST, each with a key of its own."""
    total = sum(lengths)
    index = np.repeat(np.arange(len(lengths)), lengths)
    return TargetSpans(
        token_ids=np.arange(total) % 50 + FIRST,
        rows=np.arange(total),
        span_index=index,
        positions=np.concatenate([np.arange(n) for n in lengths]),
        lengths=np.array(lengths),
        noise_keys=np.arange(first_key, first_key + len(lengths), dtype=np.uint64),
        span_numbers=np.zeros(len(lengths), dtype=np.int64),
    )
