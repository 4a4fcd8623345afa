"""The public face of generation: `load` a model folder, then `generate`, `generate_batch` or `stream`."""

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omniform.errors import OmniformError
from omniform.inference.editing import parse_edits
from omniform.inference.engine import Engine
from omniform.inference.event_stream import EventStream
from omniform.inference.filling import parse_filling
from omniform.inference.part_items import item_of
from omniform.inference.protocol import (
    ANY,
    ContentPart,
    Done,
    Event,
    Reply,
    Request,
    Targets,
    TextPart,
    check_each_once,
    parse_prompt,
    parse_seeds,
    parse_targets,
)
from omniform.inference.room import fit
from omniform.inference.sampling import sampling_settings
from omniform.inference.session import Plan, Session
from omniform.modeling.codebooks import Codebooks
from omniform.modeling.config import parse_config
from omniform.modeling.folder import LoadedModel, load_model_folder
from omniform.modeling.generation_config import GenerationConfig, SamplingSettings
from omniform.modeling.sequence import Part, Role, document_length

SESSIONS_AT_ONCE = 128


def load(folder: str | Path, device: str | torch.device = "cpu") -> "Model":
    """Load a model folder and verify every file of it.

    Raises:
        OmniformError: no such folder, or one that is incomplete, damaged or of another format.
    """
    return Model(load_model_folder(Path(folder)), device)


class Model:
    """A model with its tokenizers, ready to generate.

    `generate`, `generate_batch` and `stream` take the same keywords: `generate` says which.
    """

    def __init__(self, loaded: LoadedModel, device: str | torch.device = "cpu") -> None:
        self.network, self.tokenizers = loaded.model.to(device).eval(), loaded.tokenizers
        grids = {name: tokenizer.fixed_grid for name, tokenizer in self.tokenizers.items()}
        self.engine = Engine(self.network, grids)
        config = parse_config(GenerationConfig, json.dumps(loaded.generation_config), source="generation_config.json")
        ways = {name for found in config.through.values() for name in (*found, *found.values())} | {*config.through}
        if unknown := {*config.modalities, *ways} - set(self.modalities):
            raise OmniformError(
                f"generation_config.json has settings for {', '.join(sorted(unknown))}, but this model has "
                f"{', '.join(self.modalities)}"
            )
        self.max_sequence_length = config.max_sequence_length
        self.defaults = {name: config.modalities.get(name, SamplingSettings()) for name in self.modalities}
        self.through = config.through
        self._fewest = {
            name: 1 if (codebooks := self._codebooks(name)) is None else codebooks.fewest for name in self.modalities
        }

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads and generates."""
        return self.network.vocabulary.names

    def generate(self, prompt: object, to: str | Sequence[str] = "text", **keywords: Any) -> Reply:
        """Answer one prompt.

        What is not given comes from the model's generation_config.json, and a value that is given holds for every
        part of the reply that it applies to.

        Args:
            prompt: text, a PIL image, an `Audio`, a `Video`, a part, a list of these, or a chat; see `parse_prompt`.
            to: modality to generate, or an ordered list of them; "any" lets the model choose what comes next until it
                ends the document, if it has learnt to.
            max_parts: most parts of a reply to "any"; 8 unless given.
            image: a picture to be drawn anew in part, for to="image"; the prompt may be [] then.
            mask: what of `image` to draw anew: a picture of its size, black where it stays. Every token that touches
                the rest is new, and pixels under black come back as they were. Unless given, what is transparent.
            strength: instead of a mask, the fraction of the picture's tokens to draw anew, chosen by the seed.
            max_new_tokens: most tokens of a text or of speech, its end included; see `SamplingSettings`. Unless given
                also bounded by the room that is left.
            temperature, top_k, top_p, guidance_scale, steps: see `SamplingSettings`. A default guidance_scale is not
                applied to an empty prompt, which leaves nothing to guide towards.
            suffix: what stands after the prompt: the reply is the text between the two, by a model that has learnt to
                fill in the middle. With [] for a prompt it begins the text.
            mode: the mode of the model's denoisers in which a text goes on; see `omniform.modeling.denoisers`.
            negative_prompt: what guidance pushes away from, in any form of a prompt; nothing unless given.
            batch_invariant: run every prompt by itself, so that its reply is the same to the byte in any batch. Else
                replies in a batch may differ from those alone where two choices are closer than the rounding of logits.
            direct: go straight to what is asked for where the model's `GenerationConfig.through` names a way, as edits
                always do. What lies on a way is sampled by the model's own settings, whatever is given here; its
                guidance, if it has any, leads away from `negative_prompt` too.
            seed: integer in [0, 2**63); drawn anew unless given, and told in the reply.
            callback: called with every `Event` as it happens.

        Raises:
            OmniformError: a prompt, modality or keyword that this model cannot take.
        """
        return self.generate_batch([prompt], to, **keywords)[0]

    def generate_batch(
        self,
        prompts: Sequence[object],
        to: str | Sequence[str] = "text",
        *,
        seed: int | Sequence[int] | None = None,
        batch_invariant: bool = False,
        callback: Callable[[Event], None] | None = None,
        **keywords: Any,
    ) -> list[Reply]:
        """Answer many prompts, in their order.

        Args:
            seed: one per prompt, each with the result of `generate` with that seed; or one for all, whose prompts
                are then different samples of it: repeat a prompt to sample it several times.
            image, mask: one for all, or a list with one per prompt.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise OmniformError(f"prompts is a {type(prompts).__name__}, expected a list of prompts")
        replies = {}
        at_once = 1 if batch_invariant else SESSIONS_AT_ONCE
        deltas = callback is not None
        for event in self._events(prompts, to, seed, keywords, at_once=at_once, deltas=deltas):
            if callback is not None:
                callback(event)
            if isinstance(event, Done):
                replies[event.prompt] = event.reply
        return [replies[place] for place in range(len(prompts))]

    def stream(
        self, prompt: object, to: str | Sequence[str] = "text", *, seed: int | None = None, **keywords: Any
    ) -> Iterator[Event]:
        """Answer one prompt as events: TextDelta and SpanProgress, PartDone after each part, Done at the end.

        The prompt and keywords are checked at once. Leaving the loop stops the work and frees its memory.
        """
        keywords.pop("batch_invariant", None)  # one prompt runs by itself already
        return self._events([prompt], to, seed, keywords)

    def targets(self, to: str | Sequence[str], max_parts: int | None = None) -> Targets:
        """Return which parts a reply to `to` has, in any form that `generate` takes.

        Raises:
            OmniformError: a modality that the model has not, or "any" for a model that has not learnt to choose.
        """
        targets = parse_targets(to, max_parts)
        for modality in targets.names or ():
            self._require(modality, "asked for")
        if targets.names is None and not self.network.config.next_span_weight:
            raise OmniformError(
                f'to is "{ANY}", but this model has not learnt what follows a part (model.next_span_weight is 0): name '
                "the parts in order, such as text, then image"
            )
        return targets

    @torch.inference_mode()
    def text_logits(self, token_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """Return next-token logits over the text tokenizer's ids, for plain causal text.

        Raises:
            OmniformError: not a matrix of integers, no column, or an id that is not of the text tokenizer.
        """
        if not isinstance(token_ids, Tensor):
            raise OmniformError(
                f"token_ids is a {type(token_ids).__name__}, expected a tensor of ids (B, L), such as "
                'model.tokenizers["text"].encode("a seven").codes[None]'
            )
        if token_ids.ndim != 2 or not token_ids.numel() or token_ids.is_floating_point():
            raise OmniformError(
                f"token_ids has shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}, expected integers of "
                "shape (B, L) with at least one row and column"
            )
        return self.network.text_logits(token_ids)

    def _events(
        self,
        prompts: Sequence[object],
        to: str | Sequence[str],
        seed: int | Sequence[int] | None,
        keywords: Mapping[str, Any],
        *,
        at_once: int = SESSIONS_AT_ONCE,
        deltas: bool = True,
    ) -> Iterator[Event]:
        """Check everything now; the work happens as the result is iterated."""
        requests = self._requests(prompts, to, seed, keywords)
        bounded = keywords.get("max_new_tokens") is not None
        sessions = [self._session(request, bounded=bounded) for request in requests]
        return EventStream(self.engine, self.tokenizers).run(requests, sessions, at_once, deltas=deltas)

    def _requests(
        self,
        prompts: Sequence[object],
        to: str | Sequence[str],
        seed: int | Sequence[int] | None,
        keywords: Mapping[str, Any],
    ) -> list[Request]:
        given = {name: value for name, value in keywords.items() if value is not None}
        negative = given.pop("negative_prompt", None)
        targets = self.targets(to, max_parts=given.pop("max_parts", None))
        seeds = parse_seeds(seed, len(prompts), fresh=secrets.randbits(63))
        if not isinstance(direct := given.pop("direct", False), bool):
            raise OmniformError(f"direct is {direct!r}, expected True or False")
        gap = [given.pop(name, None) for name in ("mode", "suffix")]
        wanted = [given.pop(name, None) for name in ("image", "mask", "strength")]
        edits = parse_edits(*wanted, names=targets.names, seeds=seeds, tokenizer=self.tokenizers.get("image"))
        modalities = targets.names or self.modalities
        self._check_keywords(given, modalities)
        asked = {
            name: sampling_settings("generate", **{**vars(self.defaults[name]), **given}) for name in set(modalities)
        }
        if negative is not None and all(chosen.guidance_scale == 1 for chosen in asked.values()):
            raise OmniformError("negative_prompt has no effect at guidance_scale 1: give a guidance_scale above 1")
        dropped = () if negative is None else self._parse(negative)
        parsed, requests = [self._parse(prompt) for prompt in prompts], []
        given_modalities = [[part.modality for part in parts] for parts in parsed]
        filling = parse_filling(
            *gap, config=self.network.config, to=targets.names, settings=asked, prompts=given_modalities
        )
        for parts, edit, (own_seed, sample) in zip(parsed, edits, seeds, strict=True):
            if not parts and targets.names is None:
                raise OmniformError("the prompt is empty, but what comes next is chosen by what came before: give one")
            if not parts and not dropped and given.get("guidance_scale", 1) != 1:
                raise OmniformError(
                    f"guidance_scale is {given['guidance_scale']}, but the prompt holds no condition that guidance "
                    "could push towards: give a prompt, or guidance_scale=1"
                )
            between = None if direct or edit is not None or filling is not None else targets.way(parts, self.through)
            through = {} if between is None else {between: self.defaults[between]}
            own_targets = Targets((*through, *(targets.names or ())), targets.max_parts + 1) if through else targets
            guided = any(chosen.guidance_scale != 1 for chosen in (*through.values(), *asked.values()))
            own_dropped = dropped if guided and (parts or dropped) else None
            if self.network.config.subsets:
                check_each_once(parts, own_dropped or (), own_targets)
            requests.append(Request(parts, own_targets, asked, own_dropped, own_seed, sample, edit, through, filling))
        return requests

    def _check_keywords(self, given: Mapping[str, Any], modalities: Sequence[str]) -> None:
        objectives, names = self.network.config.objectives, ", ".join(modalities)
        if "steps" in given and all(objectives[name].commits for name in modalities):
            raise OmniformError(f"steps does not apply to {names}, generated token by token: leave it out")
        for setting in given:
            if all(setting in objectives[name].ignores for name in modalities):
                raise OmniformError(f"{setting} does not apply to {names}, generated as vectors: leave it out")
        self._check_steps(given.get("steps"), modalities)
        if "max_new_tokens" in given and all(self.engine.fixed_grids[name] for name in modalities):
            raise OmniformError(f"max_new_tokens does not apply to {names}, of fixed size: leave it out")

    def _check_steps(self, steps: Any, modalities: Sequence[str]) -> None:
        for name in modalities:
            grid, objective = self.engine.fixed_grids[name], self.network.config.objectives[name]
            if not isinstance(steps, int) or steps < 1 or grid is None or objective.commits or objective.continuous:
                continue
            most = objective.begin(math.prod(grid), steps, self.network.vocabulary.mask).n_steps
            if most < steps:
                raise OmniformError(f"steps is {steps}, but {name} has {math.prod(grid)} tokens: give at most {most}")

    def _parse(self, prompt: object) -> tuple[ContentPart, ...]:
        parts = parse_prompt(prompt)
        for part in parts:
            self._require(part.modality, "in the prompt")
        return parts

    def _require(self, modality: str, where: str) -> None:
        if modality not in self.modalities:
            raise OmniformError(f"modality {modality!r} {where}, but this model has {', '.join(self.modalities)}")

    def _session(self, request: Request, *, bounded: bool) -> Session:
        """Tokenise a request; `bounded`: see `fit`."""
        prompt, filling = request.prompt, request.filling
        if filling is not None:
            after = () if filling.suffix is None else (TextPart(filling.suffix),)
            prompt = (*(prompt or (TextPart(""),)), *after)
        context = self._encode(prompt)
        if filling is not None:
            context = filling.context(context)
        dropped = None if request.dropped is None else self._encode(request.dropped)
        subsets = bool(self.network.config.subsets)
        # Where there are subsets, a span that is filled in place has two markers while it is open.
        n_context = max(self._n_rows(context), self._n_rows(dropped or [])) + int(subsets)
        grids, longest = self.engine.fixed_grids, self.max_sequence_length
        settings, through = fit(request, n_context, longest, grids, self._fewest, bounded=bounded)
        plan = Plan(
            request.to.names,
            settings,
            request.seed,
            self.max_sequence_length,
            request.sample,
            request.to.max_parts,
            None if request.edit is None else request.edit.tokens,
            None if request.edit is None else request.edit.wanted,
            through,
            None if filling is None else filling.opening,
            subsets=subsets,
        )
        return Session(context, dropped, plan)

    def _codebooks(self, modality: str) -> Codebooks | None:
        return Codebooks.of(modality, self.network.vocabulary, self.network.config.objectives[modality].layout)

    def _n_rows(self, parts: Sequence[Part]) -> int:
        described = [(part.modality, len(part.tokens), part.role) for part in parts]
        return document_length(described, self.network.vocabulary, self.network.config.objectives)

    def _encode(self, parts: Sequence[ContentPart]) -> list[Part]:
        """Tokenise parts, unless they are known before to be too long: hours of sound take minutes to encode."""
        tokenizers, room = [self.tokenizers[part.modality] for part in parts], self.max_sequence_length
        coded = [self._codebooks(part.modality) for part in parts]
        most = [room if codebooks is None else codebooks.n_codes(room) for codebooks in coded]
        items = [item_of(part, tokenizer, n) for part, tokenizer, n in zip(parts, tokenizers, most, strict=True)]
        counts = [tokenizer.n_tokens(item) or 0 for item, tokenizer in zip(items, tokenizers, strict=True)]
        counts = [n if books is None else books.n_rows(n) for n, books in zip(counts, coded, strict=True)]
        if sum(counts) > room:
            told = ", ".join(f"{part.modality} {count}" for part, count in zip(parts, counts, strict=True) if count)
            raise OmniformError(
                f"prompt too long: it takes {sum(counts)} or more of this model's {room} tokens ({told}): shorten it"
            )
        prefix = self.network.config.given == "bidirectional"
        with torch.inference_mode():
            return [
                Part(part.modality, tokenizer.encode(item), Role.CONTEXT, prefix=prefix)
                for part, tokenizer, item in zip(parts, tokenizers, items, strict=True)
            ]
