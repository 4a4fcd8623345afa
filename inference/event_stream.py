"""What happens while requests are answered, as events: text that grows, steps, parts and whole replies."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from omniform.inference.engine import Engine, SpanStep
from omniform.inference.part_items import part_of
from omniform.inference.protocol import (
    ContentPart,
    Done,
    Event,
    ImagePart,
    PartDone,
    Reply,
    Request,
    SpanProgress,
    TextDelta,
    TextPart,
)
from omniform.inference.session import Session
from omniform.tokenizers.base import Modality, Tokens


@dataclass(frozen=True)
class EventStream:
    """Turns the steps of sessions into events.

    Attributes:
        tokenizers: by modality.
    """

    engine: Engine
    tokenizers: Mapping[str, Modality[Any]]

    def run(
        self, requests: Sequence[Request], sessions: Sequence[Session], at_once: int, *, deltas: bool
    ) -> Iterator[Event]:
        """Run the session of each request, `at_once` of them together, and yield what happens as it does.

        Args:
            deltas: tell of texts while they grow too.
        """
        for first in range(0, len(sessions), at_once):
            group = slice(first, first + at_once)
            yield from self._run(requests[group], sessions[group], first, deltas)

    def _run(
        self, requests: Sequence[Request], sessions: Sequence[Session], first: int, deltas: bool
    ) -> Iterator[Event]:
        """Run sessions together and turn their steps into events; `first` is the place of the first prompt."""
        parts: list[list[ContentPart]] = [[] for _ in sessions]
        told = [""] * len(sessions)
        open_replies = set(range(len(sessions)))
        for steps in itertools.chain(self.engine.run(sessions), [[]]):
            for step in steps:
                state, span = step.span.state, step.span
                number = span.number - len(requests[step.session].through)
                if number < 0:
                    continue
                if span.grid is not None:
                    yield SpanProgress(span.modality, state.step, state.n_steps, number, first + step.session)
                elif deltas and span.modality == "text" and not state.done:
                    text = self._text_so_far(step)
                    if len(text) > len(told[step.session]):
                        yield TextDelta(text[len(told[step.session]) :], number, first + step.session)
                        told[step.session] = text
            finished = [step for step in steps if step.span.state.done]
            for step, part in zip(finished, self._decode(finished, sessions), strict=True):
                place, number = first + step.session, step.span.number - len(requests[step.session].through)
                parts[step.session].append(part)
                if number < 0:
                    continue
                if isinstance(part, TextPart):
                    rest = part.text[len(told[step.session]) :]
                    if rest:
                        yield TextDelta(rest, number, place)
                    told[step.session] = ""
                edit = requests[step.session].edit
                if edit is not None and isinstance(part, ImagePart):
                    part = parts[step.session][-1] = ImagePart(edit.compose(part.image))
                yield PartDone(part, number, place)
            # A session that chooses to end does so between two steps.
            for number in sorted(number for number in open_replies if sessions[number].done):
                open_replies.remove(number)
                found, n_through = tuple(parts[number]), len(requests[number].through)
                n_near_ties = sessions[number].n_near_ties
                reply = Reply(found[n_through:], requests[number].seed, n_near_ties, found[:n_through])
                yield Done(reply, first + number)

    def _text_so_far(self, step: SpanStep) -> str:
        """Return the text of an open span, less a last character whose bytes may not all be there yet."""
        state = step.span.state
        codes = state.token_ids if step.span.objective.commits else state.token_ids[: state.n_final]
        return self.tokenizers["text"].decode(Tokens(codes, (len(codes),))).rstrip("\N{REPLACEMENT CHARACTER}")

    def _decode(self, finished: Sequence[SpanStep], sessions: Sequence[Session]) -> list[ContentPart]:
        """Decode the spans that closed in one step, which are of one modality.

        Each by itself: decoded in a batch, the same codes can give pixels that rounding has turned.
        """
        if not finished:
            return []
        modality = finished[0].span.modality
        tokenizer: Modality[Any] = self.tokenizers[modality]
        tokens = [sessions[step.session].generated[step.span.number] for step in finished]
        with torch.inference_mode():
            items = [tokenizer.decode(one) for one in tokens]
        parts = [part_of(item, modality, tokenizer) for item in items]
        ended = [bool((step.span.state.token_ids == self.engine.model.vocabulary.end).any()) for step in finished]
        return [
            replace(part, finish_reason="end" if end else "length") if isinstance(part, TextPart) else part
            for part, end in zip(parts, ended, strict=True)
        ]
