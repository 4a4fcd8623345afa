"""Many sessions through one model, in step: commit what is final, then step the open spans until they close."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from omniform.inference.branch import Branch
from omniform.inference.cache import KVCache
from omniform.inference.session import OpenSpan, Session
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Asked
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence


@dataclass(frozen=True)
class SpanStep:
    """A session's open span after one more step.

    Attributes:
        session: place of the session among those that run together.
    """

    session: int
    span: OpenSpan


class Engine:
    """Runs sessions on a model.

    Args:
        fixed_grids: by modality, the grid of a generated span, or None where it ends itself.
    """

    def __init__(self, model: UnifiedModel, fixed_grids: Mapping[str, tuple[int, ...] | None]) -> None:
        self.model, self.fixed_grids = model, fixed_grids
        self.n_active = 0

    def run(self, sessions: Sequence[Session]) -> Iterator[list[SpanStep]]:
        """Generate the spans of every session, yielding those that each forward pass advanced.

        Closing the iterator frees the sessions' memory.
        """
        self.n_active += len(sessions)
        try:
            cache = KVCache()
            while not all(session.done for session in sessions):
                self._choose(sessions, cache)
                for modality in self.model.vocabulary.names:
                    if any(session.upcoming == modality for session in sessions):
                        yield from self._run_spans(sessions, modality, cache)
        finally:
            self.n_active -= len(sessions)

    def _choose(self, sessions: Sequence[Session], cache: KVCache) -> None:
        """Let the sessions whose next span is the model's choice choose it."""
        choosing = [session for session in sessions if session.upcoming is None and not session.done]
        if not choosing:
            return
        vocabulary, objectives = self.model.vocabulary, self.model.config.objectives
        branches = [branch for session in sessions for branch in session.branches]
        rows = [
            branch.unread(vocabulary, objectives) if session in choosing and branch.grows else None
            for session in sessions
            for branch in session.branches
        ]
        hidden = self._forward(branches, rows, cache, commit=True)
        chosen_by = {id(session.branches[0]): session for session in choosing}
        for place, (branch, new) in enumerate(zip(branches, rows, strict=True)):
            if new is not None:
                logits = self._next_span_logits(hidden[place, len(new) - 1])
                chosen_by[id(branch)].choose(logits, self.fixed_grids, vocabulary, objectives)

    def _run_spans(self, sessions: Sequence[Session], modality: str, cache: KVCache) -> Iterator[list[SpanStep]]:
        """Run the spans of the sessions whose next one is of `modality`, in step; the others wait."""
        vocabulary, objectives = self.model.vocabulary, self.model.config.objectives
        objective = objectives[modality]
        branches = [branch for session in sessions for branch in session.branches]
        for session in sessions:
            if session.upcoming == modality:
                session.open_span(self.fixed_grids[modality], vocabulary, objectives)
        for place, branch in enumerate(branches):
            if branch.stale:
                cache.forget(place)
                branch.stale = False
        rows: list[MultimodalSequence | None]
        while any(session.span for session in sessions):
            # What stands before the span; later the blocks of it that are done, of objectives that have blocks.
            rows = [branch.pending() if session.span else None for session in sessions for branch in session.branches]
            self._forward(branches, rows, cache, commit=True)
            rows, asked = [], list[Asked | None]()
            for session in sessions:
                rows += session.step_rows(vocabulary) if session.span else [None] * len(session.branches)
                asked += [session.asked() if session.span else None] * len(session.branches)
            hidden = self._forward(branches, rows, cache, commit=objective.commits)
            logits = iter(self._outputs(hidden, branches, rows, asked, modality))
            steps = []
            for place, session in enumerate(sessions):
                if session.span:
                    step = session.advance([next(logits) for _ in session.branches], vocabulary)
                    steps.append(SpanStep(place, step))
            yield steps

    @torch.inference_mode()
    def _forward(
        self,
        branches: Sequence[Branch],
        rows: Sequence[MultimodalSequence | None],
        cache: KVCache,
        *,
        commit: bool,
    ) -> Float[Tensor, "B N D"]:
        """Forward the rows of each branch after those that it has in the cache; shorter ones are padded."""
        lengths = [0 if new is None else len(new) for new in rows]
        device = next(self.model.parameters()).device
        if not max(lengths):
            return torch.empty(len(rows), 0, self.model.config.decoder.dim, device=device)
        batch = pack([[] if new is None else [new] for new in rows], max(lengths), self.model.vocabulary)
        new_pattern = batch.pattern.to(device)
        token_ids, modality_ids = batch.token_ids.to(device), batch.modality_ids.to(device)
        span_positions, position_ids = batch.span_positions.to(device), batch.position_ids.to(device)
        vectors = {name: held.to(device) for name, held in batch.vectors.items()}
        coded = {name: held.to(device) for name, held in batch.coded.items()}
        given = (token_ids, modality_ids, span_positions, position_ids, cache.covering(new_pattern))
        hidden = self.model.hidden(*given, cache, vectors, coded=coded)
        if commit:
            cache.commit(new_pattern)
            for branch, length in zip(branches, lengths, strict=True):
                branch.n_committed += length
        return hidden

    @torch.inference_mode()
    def _outputs(
        self,
        hidden: Float[Tensor, "B N D"],
        branches: Sequence[Branch],
        rows: Sequence[MultimodalSequence | None],
        asked: Sequence[Asked | None],
        modality: str,
    ) -> Sequence[Float[Tensor, "R W"]]:
        """Return what the span's objective reads of each branch that has rows, on the CPU in fp32."""
        found, codebooks = [], []
        for place, (branch, new, of_codes) in enumerate(zip(branches, rows, asked, strict=True)):
            if new is not None:
                own = hidden[place, len(new) - branch.n_read(len(new)) : len(new)]
                found.append(own if of_codes is None else own[of_codes.rows.to(own.device)])
                codebooks += [] if of_codes is None else [of_codes.codebooks.to(own.device)]
        outputs = self.model.outputs(torch.cat(found), modality, torch.cat(codebooks) if codebooks else None)
        return outputs.float().cpu().split([len(one) for one in found])

    @torch.inference_mode()
    def _next_span_logits(self, hidden: Float[Tensor, "D"]) -> Float[Tensor, "W"]:
        """Return the logits of what may follow a span, on the CPU in fp32."""
        return self.model.logits(hidden, self.model.vocabulary.next_span_range).float().cpu()
