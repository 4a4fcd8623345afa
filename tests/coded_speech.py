"""Speech of several codes a frame for tests: a vocabulary, parts, and what a perfect model says."""

from collections.abc import Sequence

import torch

from omniform.inference.session import Plan, Session
from omniform.modeling.codebooks import Codebooks
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import CodedObjective, Objective
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import Part, Role
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

TEXT_SIZE, BLOCK = 20, 4
GRIDS = dict.fromkeys(("text", "speech"))


def coded_objectives(**settings: int) -> dict[str, CodedObjective]:
    """One objective of each layout; `settings` are those of the last."""
    return {
        "flattened": NextToken(),
        "delayed": NextToken(codebooks="delayed"),
        "parallel": CoarseToFine(**{"block_size": BLOCK, "steps": 3, **settings}),
    }


def coded_vocabulary(n_codebooks: int, size: int) -> Vocabulary:
    """Text, and speech of several codebooks."""
    return Vocabulary(TEXT_SIZE, {"speech": Discrete(size, n_codebooks)}, ["speech"])


def frames_of(n_frames: int, n_codebooks: int, size: int, seed: int) -> torch.Tensor:
    """Random codes (T, Q)."""
    return torch.randint(0, size, (n_frames, n_codebooks), generator=torch.Generator().manual_seed(seed))


def coded_part(frames: torch.Tensor, role: Role) -> Part:
    """A part of speech."""
    return Part("speech", Tokens(frames.flatten(), tuple(frames.shape)), role)


def coded_model(objective: Objective, vocabulary: Vocabulary, seed: int = 0) -> UnifiedModel:
    """Random weights, large enough for attention to matter."""
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=32, rope_theta=100.0)
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    torch.manual_seed(seed)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives), vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.eval()


def speech_session(
    context: Sequence[Part], chosen: SamplingSettings, to: Sequence[str] = ("speech",), *, seed: int = 0
) -> Session:
    """A session that makes speech, with an empty condition beside it where there is guidance."""
    dropped: list[Part] | None = [] if chosen.guidance_scale != 1 else None
    return Session(context, dropped, Plan(tuple(to), dict.fromkeys(to, chosen), seed, max_rows=1000))


def codebooks_of(objective: Objective, vocabulary: Vocabulary) -> Codebooks:
    """The codebooks of speech as an objective lays them out."""
    found = Codebooks.of("speech", vocabulary, objective.layout)
    assert found is not None
    return found
