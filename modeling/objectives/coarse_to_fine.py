"""Masked prediction level by level: spans of several codes a frame are filled in from the coarsest codebook on.

Source: SoundStorm (arXiv:2305.09636), whose decoding of a level is that of MaskGIT (arXiv:2202.04200).
"""

from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.codebooks import NOTHING, Codebooks
from omniform.modeling.objectives.base import Asked, CodedObjective, Corrupted, Draw, Kept, SpanState, TargetSpans
from omniform.modeling.objectives.masked import Schedule, counted_mask, n_undecided
from omniform.tokenizers.codebook_layout import LayoutKind


@plain_dataclass(frozen=True)
class LevelState(SpanState):
    """A span being filled in, one level of one block at a time.

    Attributes:
        level: codebook that is being decided; those before it are, and of those after it rows hold nothing.
        steps: of the first level of a block, at most.
    """

    codebooks: Codebooks | None = None
    level: int = 0
    steps: int = 1


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class CoarseToFine(CodedObjective):
    """Masked prediction of one codebook at a time, from what is known of the coarser ones.

    Training draws a level for each span, uniformly, and a time. Rows hold the codes of coarser levels, the level itself
    but for the gamma(t) of its codes that are masked and predicted, at least one, and nothing of finer levels.

    Deviations from SoundStorm: spans end themselves, and so are filled up with ends, which the first level learns as
    any code; no part of a span is left clean as a prompt, since a voice to go on from is a part of its own here; the
    temperature and truncation of finer levels are those of the first, where theirs are decided greedily.

    Attributes:
        block_size: see `Objective`: rows that are learnt and decided together. A span that goes on after so many is
            produced block after block, all levels of one before the next.
        schedule: gamma, of training and of decoding; see `masked_fraction`.
        steps: passes over the first level of each block unless the request says otherwise; never more than its rows.
        finer_steps: passes over each of the other levels; never more than frames.
        choice_temperature: see `Masked`.
    """

    kind: Literal["coarse_to_fine"] = "coarse_to_fine"
    weight: float = Field(default=1.0, gt=0)
    block_size: int = Field(ge=1)
    schedule: Schedule = "cosine"
    steps: int = Field(default=8, ge=1)
    finer_steps: int = Field(default=1, ge=1)
    choice_temperature: float = Field(default=4.5, ge=0)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    @property
    def layout(self) -> LayoutKind:
        """All codes of a frame in one row."""
        return "parallel"

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mask codes of one level of each span by keyed numbers, and leave out those of finer ones."""
        assert targets.codebooks is not None, "refused by the model"
        drawn = keyed_uniform(targets.noise_keys, stream("coarse_to_fine/level"), targets.span_numbers)
        levels = np.floor(drawn * targets.n_codebooks).astype(np.int64)[targets.span_index]
        own = targets.codebooks == levels
        of_level = replace(
            targets,
            token_ids=targets.token_ids[own],
            rows=targets.rows[own],
            span_index=targets.span_index[own],
            positions=targets.positions[own],
            lengths=np.bincount(targets.span_index[own], minlength=len(targets.lengths)),
            codebooks=targets.codebooks[own],
        )
        hidden = np.zeros_like(own)
        hidden[own] = counted_mask(of_level, self.schedule)
        shown = np.where(targets.codebooks > levels, NOTHING, targets.token_ids)
        return Corrupted(np.where(hidden, mask_id, shown), hidden.astype(np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Refuse: there is one codebook.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.kind} is for spans of several codebooks: use masked")

    def begin_coded(self, length: int, steps: int | None, mask_id: int, codebooks: Codebooks) -> SpanState:
        """Open a span of at most `length` rows, all of them masks of the first level."""
        rows = torch.full((length, codebooks.layout.n_codebooks), NOTHING)
        rows[:, 0] = mask_id
        steps = steps or self.steps
        return LevelState(rows, 0, min(steps, self.block_size, length), codebooks=codebooks, steps=steps)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R *Q"]:
        """The rows of the block that is open: they see each other."""
        return state.token_ids[self._open_block(state)]

    def asked(self, state: SpanState) -> Asked:
        """The codes of the level that are masked."""
        assert isinstance(state, LevelState)
        assert state.codebooks is not None
        of_level = state.token_ids[self._open_block(state), state.level]
        rows = (of_level == state.codebooks.vocabulary.mask).nonzero().flatten()
        return Asked(rows, torch.full_like(rows, state.level))

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "P W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Draw every masked code of the level, and leave gamma(1 - (step + 1) / n_steps) of them masked, those of the
        lowest confidence.

        When none is left the next level begins, of frames before the first end; after the last level the next block,
        unless the span has ended.
        """
        assert isinstance(state, LevelState)
        assert state.codebooks is not None
        assert end_id is not None, "refused by the model"
        (rows, codebooks), block, level = self.asked(state), self._open_block(state), state.level
        held = state.token_ids[block].clone()
        positions = (block.start + rows) * held.shape[1] + level
        choices, log_probability = draw.tokens(logits, state.step, positions)
        n_wanted = len(held) if level == 0 else int(held[:, 0].ne(end_id).sum())
        left = 1 - (state.step + 1) / state.n_steps
        noise = self.choice_temperature * left * draw.gumbel(state.step, positions)
        n_left = min(n_undecided(self.schedule, state.step, state.n_steps, n_wanted), len(rows) - 1)
        again = draw.smallest(log_probability.double() + noise, n_left)
        held[rows, level] = state.codebooks.chosen(choices, codebooks).masked_fill(again, mask_id)
        changed = replace(state, token_ids=_with(state.token_ids, block, held), step=state.step + 1)
        return changed if again.any() else self._next_level(changed, held, end_id, mask_id)

    def _next_level(self, state: LevelState, held: Int[Tensor, "R Q"], end_id: int, mask_id: int) -> SpanState:
        block = self._open_block(state)
        ends = held[:, 0].eq(end_id).nonzero().flatten()
        n_frames = int(ends[0]) if len(ends) else len(held)
        held[n_frames:, 0] = end_id  # as in training, nothing but ends follows one
        level = state.level + 1
        if level < held.shape[1] and n_frames:
            held[:n_frames, level] = mask_id
            token_ids = _with(state.token_ids, block, held)
            return replace(state, token_ids=token_ids, level=level, step=0, n_steps=min(self.finer_steps, n_frames))
        token_ids = _with(state.token_ids, block, held)
        if len(ends) or block.stop == len(token_ids):
            return replace(state, token_ids=token_ids[: block.stop], done=True)
        n_steps = min(state.steps, self.block_size, len(token_ids) - block.stop)
        return replace(state, token_ids=token_ids, level=0, step=0, n_steps=n_steps, n_final=block.stop)

    def _open_block(self, state: SpanState) -> slice:
        return slice(state.n_final, min(state.n_final + self.block_size, len(state.token_ids)))


def _with(rows: Int[Tensor, "N Q"], block: slice, held: Int[Tensor, "R Q"]) -> Int[Tensor, "N Q"]:
    """Return the rows of a span with others in a block."""
    return torch.cat([rows[: block.start], held, rows[block.stop :]])
