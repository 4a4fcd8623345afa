"""What was learnt is what is generated, with a modality and an objective that no library file knows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.inference.generate import Model
from omniform.inference.protocol import DataPart
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Corrupted, Draw, Objective, SpanState, TargetSpans
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Discrete, Modality, Tokens


class Melody(Modality):
    """Three notes of a scale of eight."""

    kind: ClassVar[str] = "melody"
    name: ClassVar[str] = "melody"
    representation = Discrete(8)
    fixed_grid = (3,)

    def encode_batch(self, items: Sequence[str]) -> list[Tokens]:
        return [Tokens(torch.tensor(["cdefgahC".index(note) for note in item]), (3,)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        return ["".join("cdefgahC"[code] for code in t.codes.tolist()) for t in tokens]

    def read(self, payload: bytes) -> str:
        return payload.decode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()


@dataclass(frozen=True)
class AllAtOnce(Objective):
    """Every content is hidden, and all are decided in one step."""

    kind: str = "all_at_once"
    weight: float = 1.0
    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        return Corrupted(np.full_like(targets.token_ids, mask_id), np.ones(len(targets.token_ids), dtype=np.float32))

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Tensor | None = None) -> SpanState:
        return SpanState(torch.full((length,), mask_id), 0, 1)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
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
        choice, _ = draw.tokens(logits, 0, torch.arange(len(logits)))
        return SpanState(choice + first_id, 1, 1, done=True)


@pytest.fixture
def tokenizers(omni: Model) -> dict[str, Modality]:
    return {**omni.tokenizers, "melody": Melody()}


DARK, LIGHT = torch.tensor([[[-1.0, -1.0], [1.0, -1.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]])
# Each is a prompt and what follows it.
LESSONS: list[tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = [
    ([("text", "dark")], [("image", DARK), ("text", "low"), ("melody", "ccd")]),
    ([("text", "light")], [("image", LIGHT), ("text", "high"), ("melody", "ahC")]),
    ([("melody", "ccd")], [("text", "dark")]),
    ([("melody", "ahC")], [("text", "light")]),
    ([("image", DARK)], [("melody", "cde")]),
    ([("image", LIGHT), ("text", "?")], [("melody", "fga")]),
]


def learn(tokenizers: dict[str, Modality], n_steps: int) -> UnifiedModel:
    """Fit a model to the lessons until it knows them by heart."""
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    objectives = {"text": NextToken(), "image": Masked(steps=2), "melody": AllAtOnce()}
    torch.manual_seed(0)
    network = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives), build_vocabulary(tokenizers))
    documents = [
        [
            Part(modality, tokenizers[modality].encode(item), role)
            for role, half in ((Role.CONTEXT, prompt), (Role.TARGET, reply))
            for modality, item in half
        ]
        for prompt, reply in LESSONS
    ]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(n_steps):
        sequences = [
            MultimodalSequence.build(parts, network.vocabulary, objectives, noise_key=100 * step + number)
            for number, parts in enumerate(documents)
        ]
        batch = corrupt(pack([sequences], sum(map(len, sequences)), network.vocabulary), network.vocabulary, objectives)
        losses = network(batch)
        loss = torch.stack([losses[name] / max(batch.counts[name], 1.0) for name in losses]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def test_lessons_are_recited(tokenizers: dict[str, Modality]) -> None:
    """Training reads noised spans beside clean copies in packed rows; generation reads a cache: they must agree."""
    omni = Model(LoadedModel(learn(tokenizers, n_steps=250).eval(), tokenizers, {}))
    for prompt, expected in LESSONS:
        parts = [DataPart(modality, item) for modality, item in prompt]
        reply = omni.generate(parts, to=[modality for modality, _ in expected], seed=0, temperature=0)
        for part, (modality, item) in zip(reply.parts, expected, strict=True):
            assert part.modality == modality
            if modality == "image":
                assert part.data.tobytes() == omni.tokenizers["image"].to_pil(item).tobytes()
            else:
                assert part.data == item
