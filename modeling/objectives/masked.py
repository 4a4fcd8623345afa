"""Masked (absorbing discrete diffusion) prediction: a span is filled in over a few parallel steps.

Source: MaskGIT (arXiv:2202.04200), as used in one decoder with text by Show-o (arXiv:2408.12528).
"""

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.objectives.base import Corrupted, Draw, Objective, SpanState, TargetSpans


def masked_fraction(t: float) -> float:
    """Return gamma(t) = sin(pi t / 2): the fraction masked at time t, from 0 (data) to 1 (noise).

    MaskGIT's cosine schedule cos(pi r / 2) with r = 1 - t.
    """
    return math.sin(math.pi * t / 2)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Masked(Objective):
    """Masked prediction with confidence-ordered parallel decoding.

    Training draws t uniformly per span and masks ceil(gamma(t) * n) contents, at least one; only masked contents are
    predicted, each at its own row, with equal weight.

    Attributes:
        steps: decoding steps unless the request says otherwise; never more than contents.
        choice_temperature: scale of the Gumbel noise on the confidence; it falls linearly to 0 over the steps
            (MaskGIT, appendix; not compounded from step to step).
    """

    kind: Literal["masked"] = "masked"
    weight: float = Field(default=1.0, gt=0)
    steps: int = Field(default=8, ge=1)
    choice_temperature: float = Field(default=4.5, ge=0)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mask the contents with the smallest keyed numbers, as many as the span's time asks for."""
        times = keyed_uniform(targets.noise_keys, stream("masked/time"), targets.span_numbers)
        n_masked = np.clip(np.ceil(np.sin(np.pi * times / 2) * targets.lengths), 1, targets.lengths)
        order_keys = keyed_uniform(
            targets.noise_keys[targets.span_index],
            stream("masked/order"),
            targets.span_numbers[targets.span_index],
            targets.positions,
        )
        by_span = np.lexsort((order_keys, targets.span_index))
        ranks = np.empty(len(by_span), dtype=np.int64)
        first_row = np.cumsum(targets.lengths) - targets.lengths
        ranks[by_span] = np.arange(len(by_span)) - first_row[targets.span_index]  # span_index is ascending already
        hidden = ranks < n_masked[targets.span_index]
        return Corrupted(np.where(hidden, mask_id, targets.token_ids), hidden.astype(np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int) -> SpanState:
        """Open a span of `length` masks."""
        return SpanState(torch.full((length,), mask_id), 0, min(steps or self.steps, length))

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span: masks and decided contents see each other."""
        return state.token_ids

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Draw every masked content, keep the most confident and leave gamma(1 - (step + 1) / n_steps) * n masked.

        Each step decides at least one content, and the last one all that are left.
        """
        length = len(state.token_ids)
        positions = torch.arange(length)
        choice, log_probability = draw.tokens(logits, state.step, positions)
        masked = state.token_ids == mask_id
        left = 1 - (state.step + 1) / state.n_steps
        n_left = min(math.floor(masked_fraction(left) * length), int(masked.sum()) - 1)
        # The schedule's rounding can ask for more masks than there are left to decide one by one.
        n_left = max(0, n_left) if left > 0 else 0
        confidence = log_probability + self.choice_temperature * left * draw.gumbel(state.step, positions)
        confidence = confidence.masked_fill(~masked, float("inf"))
        remask = torch.zeros(length, dtype=torch.bool)
        remask[torch.argsort(confidence, stable=True)[:n_left]] = True
        token_ids = torch.where(masked & ~remask, choice + first_id, state.token_ids)
        step = state.step + 1
        return SpanState(token_ids, step, state.n_steps, done=not bool((token_ids == mask_id).any()))
