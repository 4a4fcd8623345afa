"""Masked image generation after a long prompt: over the cached prefix, against recomputing the whole sequence.

A decoder of 8 layers, D 256, random weights; 128 text tokens, then 64 image codes in 16 steps, guidance 3 (two rows),
fp32, one thread. Both give the same codes, which is checked first.
"""

from typing import Any

import torch
from paired import compare, control

from omniform.inference.engine import Engine
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Plan, Session
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

TEXT, GRID, STEPS, SEED = 128, (8, 8), 16, 0
SETTINGS = SamplingSettings(guidance_scale=3.0, steps=STEPS)


def build() -> UnifiedModel:
    """Return the model, the same each time."""
    torch.manual_seed(0)
    decoder = DecoderConfig(dim=256, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=704)
    config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked(steps=STEPS)})
    return UnifiedModel(config, Vocabulary(1024, {"image": Discrete(256)})).eval()


def cached(model: UnifiedModel, prompt: Part) -> list[int]:
    """Generate as `omniform generate` does."""
    session = Session([prompt], [], Plan(("image",), {"image": SETTINGS}, SEED, max_rows=1024))
    for _ in Engine(model, {"text": None, "image": GRID}).run([session]):
        pass
    return session.generated[0].codes.tolist()


@torch.inference_mode()
def uncached(model: UnifiedModel, prompt: Part) -> list[int]:
    """Generate with a forward pass over prompt and image, both guidance rows in one batch, in every step."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    n_codes = GRID[0] * GRID[1]
    target = Part("image", Tokens(torch.zeros(n_codes, dtype=torch.int64), GRID), Role.TARGET)
    sequences = [MultimodalSequence.build(parts, vocabulary, objectives) for parts in ([prompt, target], [target])]
    batch = pack([[sequence] for sequence in sequences], max(map(len, sequences)), vocabulary)
    objective, ids = objectives["image"], vocabulary.target_range("image")
    state = objective.begin(n_codes, STEPS, vocabulary.mask)
    draw = KeyedDraw(SEED, 0, 0, SETTINGS)
    while not state.done:
        token_ids = batch.token_ids.clone()
        for row, sequence in enumerate(sequences):
            start = sequence.spans[-1].start
            token_ids[row, start : start + n_codes] = state.token_ids
        hidden = model.hidden(token_ids, batch.modality_ids, batch.span_positions, batch.position_ids, batch.pattern)
        rows = [hidden[i, s.spans[-1].start : s.spans[-1].start + n_codes] for i, s in enumerate(sequences)]
        conditional, unconditional = model.logits(torch.cat(rows), ids).split(n_codes)
        logits = objective.guide(conditional, unconditional, SETTINGS.guidance_scale)
        state = objective.step(state, logits, ids.start, None, vocabulary.mask, draw)
    return vocabulary.to_codes("image", state.token_ids).tolist()


def run() -> dict[str, Any]:
    """Return the ratio, and `text` that says it all."""
    torch.set_num_threads(1)
    model = build()
    prompt = Part("text", Tokens(torch.arange(TEXT) % 1024, (TEXT,)), Role.CONTEXT)
    if cached(model, prompt) != uncached(model, prompt):
        raise RuntimeError("the two ways give different codes: nothing was timed")
    calm, verdict = control(lambda: cached(model, prompt), n_pairs=11)
    ratio = compare(lambda: cached(model, prompt), lambda: uncached(model, prompt), n_pairs=11)
    n_codes = GRID[0] * GRID[1]
    text = (
        f"generation: {TEXT} text tokens, then {n_codes} image codes in {STEPS} steps with guidance, 8 layers, D 256, "
        "fp32, 1 thread\n"
        "  equal work: the same codes\n"
        f"  recomputing everything / cached prefix: {ratio}\n"
        f"  image codes per second: {n_codes / ratio.seconds[0]:,.0f} cached, {n_codes / ratio.seconds[1]:,.0f} not\n"
        f"  control (against itself): {calm} -> {verdict}"
    )
    return {"ratio": ratio.ratio, "interval": [ratio.low, ratio.high], "control": calm.ratio, "text": text}


if __name__ == "__main__":
    print(run()["text"])
