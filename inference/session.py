"""One request being generated: its rows so far and its open span."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from omniform.inference.branch import Branch, SubsetBranch
from omniform.inference.sampling import KeyedDraw
from omniform.modeling.codebooks import Codebooks, CodedRows
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.base import Asked, CodedObjective, Kept, Objective, SpanState
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Latents, Tokens
from omniform.tokenizers.vocabulary import Vocabulary


@dataclass
class OpenSpan:
    """The span being generated.

    Attributes:
        number: place among the generated spans of the session.
        grid: of its tokens, or None where it ends itself.
        opening: see `Part`.
        codebooks: of its modality; None where there is one.
    """

    modality: str
    number: int
    grid: tuple[int, ...] | None
    opening: str | None
    codebooks: Codebooks | None
    objective: Objective
    settings: SamplingSettings
    draw: KeyedDraw
    state: SpanState


@dataclass(frozen=True)
class Plan:
    """What a session generates, and how.

    Attributes:
        to: modality of each part, in order; None where the model chooses.
        settings: by modality that may be generated.
        seed: see `KeyedDraw`; so is `sample`.
        max_rows: most rows of prompt and reply together.
        max_parts: most parts where the model chooses.
        kept: tokens of an item that the first part is an edit of; None for a new one.
        wanted: which of those tokens are to be new.
        through: settings of the first parts by modality, in place of `settings`, as many as there are.
        opening: the marker that opens the first part, in place of the begin marker.
        subsets: the model learnt subsets, and reads as it did then; see `SubsetBranch`.
    """

    to: tuple[str, ...] | None
    settings: Mapping[str, SamplingSettings]
    seed: int
    max_rows: int
    sample: int = 0
    max_parts: int = 1
    kept: Tokens | Latents | None = None
    wanted: Bool[Tensor, "N"] | None = None
    through: Mapping[str, SamplingSettings] = dataclasses.field(default_factory=dict)
    opening: str | None = None
    subsets: bool = False


class Session:
    """One request being generated.

    Args:
        context: the prompt's parts.
        dropped: what stands before each span in the branch that guidance leads away from; None without guidance.
        plan: what is to be generated, and how.

    Attributes:
        generated: tokens of the spans that are closed.
        upcoming: modality of the span to open next; None while that is not chosen, and when the session is done.
        done: nothing more is generated.
        n_near_ties: of the choices so far, those of the open span left out; see `KeyedDraw`.
    """

    def __init__(self, context: Sequence[Part], dropped: Sequence[Part] | None, plan: "Plan") -> None:
        kind = SubsetBranch if plan.subsets else Branch
        self.branches = [kind(context)] + ([] if dropped is None else [kind(dropped, grows=False)])
        self.plan = plan
        self.generated: list[Tokens | Latents] = []
        self.span: OpenSpan | None = None
        self.upcoming = plan.to[0] if plan.to else None
        self.done = False
        self.n_near_ties = 0

    def choose(
        self,
        logits: Float[Tensor, "W"],
        fixed_grids: Mapping[str, tuple[int, ...] | None],
        vocabulary: Vocabulary,
        objectives: Mapping[str, Objective],
    ) -> None:
        """Choose which span comes next, or that none does, among those that the room that is left can hold whole.

        Args:
            logits: over `vocabulary.next_span_range`.
        """
        room = self._room(vocabulary, objectives)
        needed = {
            name: _least(name, vocabulary, objectives[name]) if grid is None else 1 + math.prod(grid)
            for name, grid in fixed_grids.items()
        }
        ids = {vocabulary.begin(name): name for name, rows in needed.items() if rows <= room}
        first_id = vocabulary.next_span_range.start
        allowed = [*ids, *([vocabulary.end] if self.generated or not ids else [])]
        barred = torch.ones_like(logits, dtype=torch.bool)
        barred[torch.tensor(allowed) - first_id] = False
        # The choice is a token like those of text; its noise takes the step before the span's first.
        draw = KeyedDraw(self.plan.seed, self.plan.sample, len(self.generated), self.plan.settings["text"])
        choice, _ = draw.tokens(logits.masked_fill(barred, -math.inf)[None], -1, torch.zeros(1, dtype=torch.int64))
        self.n_near_ties += draw.n_near_ties
        self.upcoming = ids.get(int(choice) + first_id)
        self.done = self.upcoming is None

    def open_span(
        self, grid: tuple[int, ...] | None, vocabulary: Vocabulary, objectives: Mapping[str, Objective]
    ) -> None:
        """Open the upcoming span, of a fixed grid or of free length."""
        assert self.upcoming is not None
        modality, plan, self.upcoming = self.upcoming, self.plan, None
        objective = objectives[modality]
        settings = (plan.through if len(self.generated) < len(plan.through) else plan.settings)[modality]
        usual = SamplingSettings()
        settings = dataclasses.replace(settings, **{name: getattr(usual, name) for name in objective.ignores})
        codebooks = Codebooks.of(modality, vocabulary, objective.layout)
        if grid is None:  # a begin marker and an end take their rows
            taken = 1 + (1 if codebooks is None else codebooks.n_end_rows)
            room = self._room(vocabulary, objectives) - taken
            settings = dataclasses.replace(settings, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
        shape = (settings.max_new_tokens,) if grid is None else grid
        if codebooks is not None:
            shape = (codebooks.layout.n_frames(settings.max_new_tokens), codebooks.layout.n_codebooks)
        length, channels = math.prod(shape), vocabulary.channels_of(modality)
        unknown: Tokens | Latents
        if channels is None:
            unknown = Tokens(torch.zeros(length, dtype=torch.int64), shape)
        else:
            unknown = Latents(torch.zeros(length, channels), shape)
        opening = None if self.generated else plan.opening
        for branch in self.branches:
            # Its rows as they are read once it is done, with no second copy of anything.
            branch.open(Part(modality, unknown, Role.CONTEXT, opening), vocabulary, objectives)
        number = len(self.generated)
        draw = KeyedDraw(plan.seed, plan.sample, number, settings)
        kept = None
        if plan.kept is not None:
            assert plan.wanted is not None
            if isinstance(plan.kept, Tokens):
                kept = Kept(plan.wanted, vocabulary.to_ids(modality, plan.kept.codes))
            else:
                kept = Kept(plan.wanted, torch.full((length,), vocabulary.mask), plan.kept.values)
        if codebooks is None:
            state = objective.begin(length, settings.steps, vocabulary.mask, kept)
        else:
            assert isinstance(objective, CodedObjective)
            state = objective.begin_coded(settings.max_new_tokens, settings.steps, vocabulary.mask, codebooks)
        self.span = OpenSpan(modality, number, grid, opening, codebooks, objective, settings, draw, state)

    def _room(self, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> int:
        return self.plan.max_rows - max(branch.n_rows(vocabulary, objectives) for branch in self.branches)

    def step_rows(self, vocabulary: Vocabulary) -> list[MultimodalSequence]:
        """Return, for each branch, the rows to forward for the next step of the open span."""
        span = self.span
        assert span is not None
        token_ids = span.objective.inputs(span.state, vocabulary.begin(span.modality, span.opening))
        channels = vocabulary.channels_of(span.modality)
        held = None if channels is None else span.objective.vectors(span.state, channels, span.draw)
        vectors, coded = {} if held is None else {span.modality: held}, {}
        if token_ids.ndim == 2:
            coded = {span.modality: CodedRows(torch.arange(len(token_ids)), token_ids)}
            token_ids = torch.full((len(token_ids),), vocabulary.mask)
        return [branch.step_rows(token_ids, vectors, coded) for branch in self.branches]

    def asked(self) -> Asked | None:
        """Return which codes of those rows the next step is about; None where rows hold one content."""
        span = self.span
        assert span is not None
        if span.codebooks is None:
            return None
        assert isinstance(span.objective, CodedObjective)
        return span.objective.asked(span.state)

    def advance(self, logits: Sequence[Float[Tensor, "R W"]], vocabulary: Vocabulary) -> OpenSpan:
        """Take one step of the open span, given the model's outputs for each branch; close the span when it is done.

        Args:
            logits: at the last rows of each branch, as many as its `n_read` says.
        """
        span = self.span
        assert span is not None
        scale = span.settings.guidance_scale
        logits = [branch.outputs(found) for branch, found in zip(self.branches, logits, strict=True)]
        guided = logits[0] if len(logits) == 1 or scale == 1 else span.objective.guide(logits[0], logits[1], scale)
        ids = vocabulary.target_range(span.modality)
        end_id = vocabulary.end_of(span.modality)
        span.state = span.objective.step(span.state, guided, ids.start, end_id, vocabulary.mask, span.draw)
        if span.state.done:
            self._close(span, vocabulary)
        elif span.state.n_final:
            for branch in self.branches:
                branch.settle(span.modality, span.state.token_ids[: span.state.n_final])
        return span

    def _close(self, span: OpenSpan, vocabulary: Vocabulary) -> None:
        contents = span.state.token_ids
        end_id = vocabulary.end_of(span.modality)
        # An objective that fills a span in place can put its end anywhere.
        if span.codebooks is None and end_id is not None:
            ends = contents.eq(end_id).nonzero().flatten()
            contents = contents[: int(ends[0])] if len(ends) else contents
        tokens: Tokens | Latents
        if span.codebooks is not None:
            frames = span.codebooks.restore(contents)
            tokens = Tokens(frames.flatten(), tuple(frames.shape))
        elif span.state.values is None:
            codes = vocabulary.to_codes(span.modality, contents)
            tokens = Tokens(codes, (len(codes),) if span.grid is None else span.grid)
        else:
            assert span.grid is not None
            tokens = Latents(span.state.values, span.grid)
        self.generated.append(tokens)
        self.n_near_ties += span.draw.n_near_ties
        for branch in self.branches:
            branch.close(Part(span.modality, tokens, Role.CONTEXT, span.opening))
        self.span = None
        n_done, to = len(self.generated), self.plan.to
        self.done = n_done == (self.plan.max_parts if to is None else len(to))
        if to is not None and not self.done:
            self.upcoming = to[n_done]


def _least(modality: str, vocabulary: Vocabulary, objective: Objective) -> int:
    """Return the rows of the shortest span of free length that holds anything."""
    codebooks = Codebooks.of(modality, vocabulary, objective.layout)
    return 1 + (2 if codebooks is None else codebooks.n_rows(codebooks.layout.n_codebooks))
