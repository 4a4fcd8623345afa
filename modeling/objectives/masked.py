"""Masked (absorbing discrete diffusion) prediction: a span is filled in over a few parallel steps.

Sources: MaskGIT (arXiv:2202.04200), as used in one decoder with text by Show-o (arXiv:2408.12528); MDLM
(arXiv:2406.07524) for the weights under which the loss bounds the likelihood; ReMDM (arXiv:2503.00307) for taking
decisions of low confidence back; for text LLaDA (arXiv:2502.09992) and MMaDA (arXiv:2505.15809), for its blocks BD3-LM
(arXiv:2503.09573), for the threshold Fast-dLLM (arXiv:2505.22618).

Text is learnt as LLaDA does with `schedule: linear, masking: independent, weighting: elbo`: t is uniform in
[`EARLIEST_TIME`, 1], contents are masked with probability t, and their losses are weighted by 1 / t. `block_size` cuts
it into blocks, each with a time of its own and clean copies of those before it to read (BD3-LM). The last block is
filled up with ends, which are learnt like all else, so that the model knows where a text ends. Produced block after
block, those that are done are read from the cache. Deviation from LLaDA: a block never sees those after it; one block
as long as the longest text is LLaDA's model, without its blocks of decoding.
"""

import math
from dataclasses import replace
from typing import ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.objectives.base import Corrupted, Draw, Kept, Objective, SpanState, TargetSpans

Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt"]
Times = TypeVar("Times", float, npt.NDArray[np.float64])
EARLIEST_TIME = 1e-3  # where the weights of the likelihood bound, which grow as 1 / t, are cut off


def masked_fraction(t: Times, schedule: Schedule = "cosine") -> Times:
    """Return gamma(t), the fraction masked at time t, from 0 (data) to 1 (noise).

    The functions of MaskGIT's section 3.2 and appendix at their argument r = 1 - t; its cosine cos(pi r / 2) is
    sin(pi t / 2).
    """
    match schedule:
        case "cosine":
            return np.sin(np.pi * t / 2)
        case "linear":
            return t
        case "square":
            return 1 - (1 - t) ** 2
        case "cubic":
            return 1 - (1 - t) ** 3
        case "sqrt":
            return 1 - np.sqrt(1 - t)


def masking_rate(t: Times, schedule: Schedule = "cosine") -> Times:
    """Return gamma'(t), how fast contents are masked at time t."""
    match schedule:
        case "cosine":
            return np.pi / 2 * np.cos(np.pi * t / 2)
        case "linear":
            return 1 + 0 * t
        case "square":
            return 2 * (1 - t)
        case "cubic":
            return 3 * (1 - t) ** 2
        case "sqrt":
            return 0.5 / np.sqrt(1 - t)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Masked(Objective):
    """Masked prediction with parallel decoding.

    Training draws t uniformly per span and masks contents; only masked contents are predicted, each at its own row.

    Attributes:
        schedule: gamma, of training and of decoding; see `masked_fraction`.
        masking: "count" masks ceil(gamma(t) * n) contents, at least one (MaskGIT); "independent" masks each content
            with probability gamma(t) (MDLM), perhaps none.
        weighting: "uniform" counts all masked contents alike; "elbo" weights them by gamma'(t) / gamma(t), under which
            the loss bounds the negative log-likelihood (MDLM, equation 10), in nats per content; times below
            `EARLIEST_TIME` are left out, which lowers it by the fraction gamma of that time. The bound is the same for
            all schedules, and with "sqrt" the weights have no finite variance: choose another.
        order: what a decoding step decides: "confidence" the contents with the highest probability, "random" any, as
            the reverse process of MDLM does.
        remask: decided contents compete with the new ones, and the least confident are masked again (after ReMDM's
            confidence at the time of decision; deviation: their number follows `schedule`, so that steps stay as many).
        steps: decoding steps unless the request says otherwise, of each block where there are blocks; never more than
            contents to decide.
        choice_temperature: scale of the Gumbel noise on the confidence; it falls linearly to 0 over the steps
            (MaskGIT, appendix; not compounded from step to step).
        threshold: a step also decides everything whose probability is above this, beyond what `schedule` asks for, so
            that a span may take fewer steps (Fast-dLLM, which has no schedule). None decides no more than that.
        block_size: see `Objective`; for spans of free length. Production ends with the block in which an end comes up.
            The last one is shorter where the largest length is no multiple of it, as no block is in training.
    """

    kind: Literal["masked"] = "masked"
    weight: float = Field(default=1.0, gt=0)
    schedule: Schedule = "cosine"
    masking: Literal["count", "independent"] = "count"
    weighting: Literal["uniform", "elbo"] = "uniform"
    order: Literal["confidence", "random"] = "confidence"
    remask: bool = False
    steps: int = Field(default=8, ge=1)
    choice_temperature: float = Field(default=4.5, ge=0)
    threshold: float | None = Field(default=None, gt=0, lt=1)
    block_size: int | None = Field(default=None, ge=1)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_weighting(self) -> "Masked":
        if self.weighting == "elbo" and self.masking == "count":
            raise ValueError(
                "weighting is elbo with masking count, whose counts the weights do not fit: choose masking: independent"
            )
        return self

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mask contents by keyed numbers, one per content, as the span's time asks for."""
        if self.masking == "count":
            hidden = counted_mask(targets, self.schedule)
            return Corrupted(np.where(hidden, mask_id, targets.token_ids), hidden.astype(np.float32))
        times, content_keys = _keyed(targets)
        times = EARLIEST_TIME + (1 - EARLIEST_TIME) * times
        fractions = masked_fraction(times, self.schedule)
        hidden = content_keys < fractions[targets.span_index]
        token_ids = np.where(hidden, mask_id, targets.token_ids)
        if self.weighting == "uniform":
            return Corrupted(token_ids, hidden.astype(np.float32))
        # The mean over times in [EARLIEST_TIME, 1] stands for an integral over that interval.
        weights = (1 - EARLIEST_TIME) * masking_rate(times, self.schedule) / fractions
        loss_weights = np.where(hidden, weights[targets.span_index], 0).astype(np.float32)
        return Corrupted(token_ids, loss_weights, count=float(len(token_ids)))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open a span of `length` masks, or of the contents to keep and masks for the others.

        Raises:
            ValueError: contents to keep in a span that has blocks, which is of free length.
        """
        if kept is not None and self.block_size is not None:
            raise ValueError("a span with blocks is not edited: leave block_size out, or keep nothing")
        token_ids = torch.full((length,), mask_id)
        if kept is not None:
            token_ids = torch.where(kept.wanted, token_ids, kept.token_ids)
        n_steps = min(steps or self.steps, int((token_ids == mask_id).sum()), self.block_size or length)
        return SpanState(token_ids, 0, n_steps, kept=kept, confidence=torch.zeros(length, dtype=torch.float64))

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span, or the block that is open: masks and decided contents see each other."""
        return state.token_ids[self._open_block(state)]

    def _open_block(self, state: SpanState) -> slice:
        length = len(state.token_ids)
        return slice(state.n_final, min(state.n_final + (self.block_size or length), length))

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Draw every masked content, and leave gamma(1 - (step + 1) / n_steps) of the contents to decide masked.

        Each step leaves at least one less than the step before, and the last one none: then the next block opens, if
        there is one and none ended the span.
        """
        assert state.confidence is not None
        block = self._open_block(state)
        positions = torch.arange(len(state.token_ids))[block]
        token_ids = state.token_ids[block]
        masked = token_ids == mask_id
        choice, log_probability = draw.tokens(logits[masked], state.step, positions[masked])
        wanted = torch.ones_like(masked) if state.kept is None else state.kept.wanted[block]
        left = 1 - (state.step + 1) / state.n_steps
        n_wanted, n_masked = int(wanted.sum()), int(masked.sum())
        n_left = n_undecided(self.schedule, state.step, state.n_steps, n_wanted)
        confidence = state.confidence[block].masked_scatter(masked, log_probability.double())
        candidates = wanted if self.remask else masked
        if self.threshold is not None:
            # What the model says, whatever the temperature and the truncation under which the choice was drawn.
            said = logits[masked].log_softmax(-1).gather(-1, choice[:, None])[:, 0]
            sure = draw.above(confidence.masked_scatter(masked, said.double()), math.log(self.threshold))
            candidates = candidates & ~sure
        n_left = min(n_left, n_masked - 1, int(candidates.sum()))
        if self.order == "random":
            remask = draw.subset(candidates, n_left, state.n_final + state.step)
        else:
            noise = self.choice_temperature * left * draw.gumbel(state.step, positions)
            remask = draw.smallest((confidence + noise).masked_fill(~candidates, math.inf), n_left)
        token_ids = token_ids.masked_scatter(masked, choice + first_id).masked_fill(remask, mask_id)
        before, after = slice(0, block.start), slice(block.stop, None)
        all_ids = torch.cat([state.token_ids[before], token_ids, state.token_ids[after]])
        confidence = torch.cat([state.confidence[before], confidence, state.confidence[after]])
        changed = replace(state, token_ids=all_ids, step=state.step + 1, confidence=confidence)
        if remask.any():
            return changed
        ended = self.block_size is not None and end_id is not None and bool((token_ids == end_id).any())
        if ended or block.stop == len(all_ids):
            stop = block.stop
            return replace(changed, token_ids=all_ids[:stop], done=True, confidence=confidence[:stop])
        return replace(changed, n_final=block.stop, step=0, n_steps=min(state.n_steps, len(all_ids) - block.stop))


def n_undecided(schedule: Schedule, step: int, n_steps: int, n_wanted: int) -> int:
    """Return how many of `n_wanted` contents stay masked after a step, counted from 0: gamma(1 - (step + 1) / n_steps)
    of them, and whatever that rounds to, one for each step to come."""
    left = masked_fraction(1 - (step + 1) / n_steps, schedule)
    return max(math.floor(left * n_wanted), n_steps - step - 1)


def counted_mask(targets: TargetSpans, schedule: Schedule) -> npt.NDArray[np.bool_]:
    """Return which contents to hide: ceil(gamma(t) * n) of each span, at least one, with t uniform by keyed numbers;
    all of those of which nothing may be shown."""
    times, content_keys = _keyed(targets)
    n_masked = np.clip(np.ceil(masked_fraction(times, schedule) * targets.lengths), 1, targets.lengths)
    if targets.all_hidden is not None:
        n_masked = np.where(targets.all_hidden, targets.lengths, n_masked)
    hidden: npt.NDArray[np.bool_] = _ranks(content_keys, targets) < n_masked[targets.span_index]
    return hidden


def _keyed(targets: TargetSpans) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return a uniform number for each span, its time, and one for each content."""
    spans = targets.span_index
    times = keyed_uniform(targets.noise_keys, stream("masked/time"), targets.span_numbers)
    keys = (targets.noise_keys[spans], stream("masked/order"), targets.span_numbers[spans], targets.positions)
    return times, keyed_uniform(*keys)


def _ranks(keys: npt.NDArray[np.float64], targets: TargetSpans) -> npt.NDArray[np.int64]:
    """Return the place of each content's key in the order of its span's keys."""
    by_span = np.lexsort((keys, targets.span_index))
    ranks = np.empty(len(by_span), dtype=np.int64)
    first_row = np.cumsum(targets.lengths) - targets.lengths
    ranks[by_span] = np.arange(len(by_span)) - first_row[targets.span_index]  # span_index is ascending already
    return ranks
