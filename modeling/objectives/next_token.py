"""Autoregression: every content is predicted from the row before it, the first from the begin marker."""

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
from omniform.tokenizers.codebook_layout import LayoutKind


@plain_dataclass(frozen=True)
class CodedState(SpanState):
    """A span of several codebooks that grows row by row.

    Attributes:
        n_frames: how many it has, once it has ended; until then the most that it may have.
    """

    codebooks: Codebooks | None = None
    n_frames: int = 0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class NextToken(CodedObjective):
    """Next-token prediction with teacher forcing; one token and one commit per step.

    Of several codebooks a row holds one code, or one of each, as `codebooks` says, and is predicted whole from the row
    before it: its codes are drawn independently of each other (MusicGen, arXiv:2306.05284, section 2.2).

    Attributes:
        codebooks: how rows take the codes of a modality of several codebooks, "flattened" unless given: "flattened" one
            after the other, frame after frame; "delayed" one of each codebook in a row, each a row later than the last.
        input_dropout: probability with which training hides a content, by the mask id, from the predictions after it:
            a span then leans on what comes before it more than on itself (word dropout, arXiv:1511.06349; deviation:
            what ends the span is never hidden). Parts after the span read it with its gaps, which
            nothing generated has: it is meant for spans that come last.
    """

    kind: Literal["next_token"] = "next_token"
    weight: float = Field(default=1.0, gt=0)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    codebooks: Literal["flattened", "delayed"] | None = None

    bidirectional: ClassVar[bool] = False
    corrupts: ClassVar[bool] = False
    shift: ClassVar[int] = -1
    commits: ClassVar[bool] = True

    @property
    def layout(self) -> LayoutKind:
        """As `codebooks` says."""
        return self.codebooks or "flattened"

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Hide some contents from those after them, and count every one."""
        token_ids = targets.token_ids
        if self.input_dropout:
            spans = targets.span_index
            drawn = keyed_uniform(
                stream("next_token.input"), targets.noise_keys[spans], targets.span_numbers[spans], targets.positions
            )
            last = targets.lengths - 1
            if targets.codebooks is not None:  # codes of later codebooks may follow the end, which is of the first
                last = np.zeros_like(targets.lengths)
                first = targets.codebooks == 0
                np.maximum.at(last, spans[first], targets.positions[first])
            hidden = (drawn < self.input_dropout) & (targets.positions != last[spans])
            token_ids = np.where(hidden, mask_id, token_ids)
        return Corrupted(token_ids, np.ones(len(token_ids), dtype=np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open an empty span of at most `length` contents; `steps` does not apply.

        Contents to keep are put where they belong as the span grows, so a new content sees those before it alone.
        """
        return SpanState(torch.zeros(0, dtype=torch.int64), 0, length, kept=kept)

    def begin_coded(self, length: int, steps: int | None, mask_id: int, codebooks: Codebooks) -> SpanState:
        """Open an empty span of as many whole frames as `length` rows hold; `steps` does not apply."""
        n_frames, rows = codebooks.layout.n_frames(length), torch.zeros(0, codebooks.layout.n_codebooks)
        n_steps = codebooks.layout.n_steps(n_frames)
        return CodedState(rows.to(torch.int64), 0, n_steps, codebooks=codebooks, n_frames=n_frames)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R *Q"]:
        """The newest row, or the begin marker before the first."""
        return state.token_ids[-1:] if state.step else torch.tensor([begin_id])

    def asked(self, state: SpanState) -> Asked:
        """The codes of the next row."""
        assert isinstance(state, CodedState)
        frames = _frames(state)
        codebooks = ((frames >= 0) & (frames < state.n_frames)).nonzero().flatten()
        return Asked(torch.zeros_like(codebooks), codebooks)

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Append one token, the one that is kept in its place if there is one; or one row of several."""
        if isinstance(state, CodedState):
            return self._append_row(state, logits, end_id, draw)
        if state.kept is not None and not state.kept.wanted[state.step]:
            content = state.kept.token_ids[state.step : state.step + 1]
        else:
            content = draw.tokens(logits, state.step, torch.tensor([state.step]))[0] + first_id
        token_ids = torch.cat([state.token_ids, content])
        step = state.step + 1
        done = step == state.n_steps or int(token_ids[-1]) == end_id
        return replace(state, token_ids=token_ids, step=step, done=done)

    def _append_row(self, state: CodedState, logits: Float[Tensor, "P W"], end_id: int | None, draw: Draw) -> SpanState:
        """Append one row. The span ends with the frame before which the first codebook ends, once all others have
        theirs too; where there is no room for another frame an end stands, as it will when the span is read."""
        assert state.codebooks is not None
        assert end_id is not None
        frames, codebooks, n_frames = _frames(state), self.asked(state).codebooks, state.n_frames
        row = torch.full_like(frames, NOTHING)
        if len(codebooks):
            choices, _ = draw.tokens(logits, state.step, frames[codebooks] * len(frames) + codebooks)
            row[codebooks] = state.codebooks.chosen(choices, codebooks)
        if frames[0] == n_frames:
            row[0] = end_id
        if row[0] == end_id:
            n_frames = int(frames[0])
        step = state.step + 1
        done = step >= state.codebooks.layout.n_steps(n_frames)
        token_ids = torch.cat([state.token_ids, row[None]])
        return replace(state, token_ids=token_ids, step=step, done=done, n_frames=n_frames)


def _frames(state: CodedState) -> Int[Tensor, "Q"]:
    """Return which frame's code the next row has of each codebook, as if the span went on."""
    assert state.codebooks is not None
    return state.codebooks.layout.at(torch.tensor(state.step))
