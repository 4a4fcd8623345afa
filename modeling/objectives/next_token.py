"""Autoregression: every content is predicted from the row before it, the first from the begin marker."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.objectives.base import Corrupted, Draw, Kept, Objective, SpanState, TargetSpans


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class NextToken(Objective):
    """Next-token prediction with teacher forcing; one token and one commit per step.

    Attributes:
        input_dropout: probability with which training hides a content, by the mask id, from the predictions after it:
            a span then leans on what comes before it more than on itself (word dropout, arXiv:1511.06349; deviation:
            the last content, which ends the span, is never hidden). Parts after the span read it with its gaps, which
            nothing generated has: it is meant for spans that come last.
    """

    kind: Literal["next_token"] = "next_token"
    weight: float = Field(default=1.0, gt=0)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)

    bidirectional: ClassVar[bool] = False
    corrupts: ClassVar[bool] = False
    shift: ClassVar[int] = -1
    commits: ClassVar[bool] = True

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Hide some contents from those after them, and count every one."""
        token_ids = targets.token_ids
        if self.input_dropout:
            spans = targets.span_index
            drawn = keyed_uniform(
                stream("next_token.input"), targets.noise_keys[spans], targets.span_numbers[spans], targets.positions
            )
            hidden = (drawn < self.input_dropout) & (targets.positions < targets.lengths[spans] - 1)
            token_ids = np.where(hidden, mask_id, token_ids)
        return Corrupted(token_ids, np.ones(len(token_ids), dtype=np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open an empty span of at most `length` contents; `steps` does not apply.

        Contents to keep are put where they belong as the span grows, so a new content sees those before it alone.
        """
        return SpanState(torch.zeros(0, dtype=torch.int64), 0, length, kept=kept)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The newest content, or the begin marker before the first."""
        return state.token_ids[-1:] if state.step else torch.tensor([begin_id])

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Append one token, the one that is kept in its place if there is one."""
        if state.kept is not None and not state.kept.wanted[state.step]:
            content = state.kept.token_ids[state.step : state.step + 1]
        else:
            content = draw.tokens(logits, state.step, torch.tensor([state.step]))[0] + first_id
        token_ids = torch.cat([state.token_ids, content])
        step = state.step + 1
        done = step == state.n_steps or int(token_ids[-1]) == end_id
        return replace(state, token_ids=token_ids, step=step, done=done)
