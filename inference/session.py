"""One request being generated: its rows so far and its open span."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from omniform.inference.sampling import KeyedDraw, guide
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.base import Objective, SpanState
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.vocabulary import Vocabulary


class Branch:
    """One sequence of a session: the conditional one, or its copy without the condition.

    Attributes:
        n_committed: leading rows of the sequence that the cache holds.
    """

    def __init__(self, context: Sequence[Part]) -> None:
        self.parts = list(context)
        self.n_committed = 0
        self._layout: MultimodalSequence | None = None
        self._first_row = 0

    def open(self, target: Part, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> None:
        """Lay out the rows of a span to be generated; `target` holds as many codes as it may get."""
        self._layout = MultimodalSequence.build([*self.parts, target], vocabulary, objectives)
        # A committing objective forwards the begin marker itself: the first content is predicted from it.
        self._first_row = self._layout.spans[-1].start - int(objectives[target.modality].commits)

    def pending(self) -> MultimodalSequence:
        """Return the final rows before the open span's own that the cache does not hold yet, whole spans together."""
        return self._rows(self._first_row - self.n_committed)

    def step_rows(self, token_ids: Tensor) -> MultimodalSequence:
        """Return the next rows of the open span, holding `token_ids`."""
        return dataclasses.replace(self._rows(len(token_ids)), token_ids=token_ids.numpy())

    def _rows(self, count: int) -> MultimodalSequence:
        assert self._layout is not None
        cut = slice(self.n_committed, self.n_committed + count)
        arrays = ("token_ids", "position_ids", "block_ids", "bidirectional", "private")
        return MultimodalSequence(**{name: getattr(self._layout, name)[cut] for name in arrays}, spans=())


@dataclass
class OpenSpan:
    """The span being generated.

    Attributes:
        number: place among the generated spans of the session.
        grid: of its tokens, or None where it ends itself.
    """

    modality: str
    number: int
    grid: tuple[int, ...] | None
    objective: Objective
    settings: SamplingSettings
    draw: KeyedDraw
    state: SpanState


class Session:
    """One request being generated.

    Args:
        context: the prompt's parts.
        dropped: what stands in their place in the copy that guidance reads; None without guidance.
        settings: by modality to be generated.
        seed, sample: see `KeyedDraw`.

    Attributes:
        n_near_ties: of the spans that are closed; see `KeyedDraw`.
    """

    def __init__(
        self,
        context: Sequence[Part],
        dropped: Sequence[Part] | None,
        settings: Mapping[str, SamplingSettings],
        seed: int,
        sample: int = 0,
    ) -> None:
        self.branches = [Branch(context)] + ([] if dropped is None else [Branch(dropped)])
        self.generated: list[Tokens] = []
        self.span: OpenSpan | None = None
        self.n_near_ties = 0
        self._settings, self._seed, self._sample = settings, seed, sample

    def open_span(
        self,
        modality: str,
        grid: tuple[int, ...] | None,
        vocabulary: Vocabulary,
        objectives: Mapping[str, Objective],
    ) -> None:
        """Open the next span, of a fixed grid or of free length."""
        settings, objective = self._settings[modality], objectives[modality]
        shape = (settings.max_new_tokens,) if grid is None else grid
        codes = torch.zeros(shape, dtype=torch.int64).flatten()
        for branch in self.branches:
            branch.open(Part(modality, Tokens(codes, shape), Role.TARGET), vocabulary, objectives)
        number = len(self.generated)
        draw = KeyedDraw(self._seed, self._sample, number, settings)
        state = objective.begin(len(codes), settings.steps, vocabulary.mask)
        self.span = OpenSpan(modality, number, grid, objective, settings, draw, state)

    def advance(self, logits: Sequence[Float[Tensor, "R W"]], vocabulary: Vocabulary) -> OpenSpan:
        """Take one step of the open span, given the logits of each branch; close the span when it is done."""
        span = self.span
        assert span is not None
        scale = span.settings.guidance_scale
        guided = logits[0] if len(logits) == 1 or scale == 1 else guide(logits[0], logits[1], scale)
        ids = vocabulary.target_range(span.modality)
        end_id = vocabulary.end if span.grid is None else None
        span.state = span.objective.step(span.state, guided, ids.start, end_id, vocabulary.mask, span.draw)
        if span.state.done:
            self._close(span, vocabulary)
        return span

    def _close(self, span: OpenSpan, vocabulary: Vocabulary) -> None:
        contents = span.state.token_ids
        if span.grid is None and len(contents) and int(contents[-1]) == vocabulary.end:
            contents = contents[:-1]
        codes = vocabulary.to_codes(span.modality, contents)
        tokens = Tokens(codes, (len(codes),) if span.grid is None else span.grid)
        self.generated.append(tokens)
        self.n_near_ties += span.draw.n_near_ties
        for branch in self.branches:
            branch.parts.append(Part(span.modality, tokens, Role.CONTEXT))
        self.span = None
