"""One feed-forward layer for all rows against one per modality: time of a training step and of generation, in turns.

Equal work first: experts that all hold the shared layer's weights give the shared model's losses and gradients, summed
over the experts.
"""

from dataclasses import replace
from typing import Any

import torch
from paired import compare, control

from omniform.inference.engine import Engine
from omniform.inference.session import Plan, Session
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import CorruptedBatch, corrupt
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

ROWS, ROW_LENGTH, N_TEXT, STEPS = 4, 256, 12, 8
GRIDS: dict[str, tuple[int, ...] | None] = {"text": None, "image": (4, 4), "speech": None, "video": (3, 4, 4)}
VOCABULARY = Vocabulary(512, {"image": Discrete(64), "speech": Discrete(64), "video": Discrete(64)}, ["speech"])
DECODER = DecoderConfig(dim=192, n_layers=4, n_heads=6, n_kv_heads=6, ffn_dim=512)
CONFIG = ModelConfig(
    decoder=DECODER,
    objectives={"text": NextToken(), "image": Masked(steps=STEPS), "speech": NextToken(), "video": Masked(steps=STEPS)},
)
TOLERANCE = 1e-4


def build() -> tuple[UnifiedModel, UnifiedModel]:
    """Return the shared model, and the one whose experts all hold its feed-forward weights."""
    torch.manual_seed(0)
    shared = UnifiedModel(CONFIG, VOCABULARY)
    experts = UnifiedModel(replace(CONFIG, decoder=replace(DECODER, experts="modality")), VOCABULARY)
    weights = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(weights[shared_name(name)])
    return shared, experts


def shared_name(name: str) -> str:
    """Return the name that a parameter has in the shared model: that of an expert's without its number."""
    before, found, after = name.partition(".experts.")
    return f"{before}.{after.partition('.')[2]}" if found else name


def part(modality: str, role: Role) -> Part:
    """Return a part of the length that the modality has in digits-world."""
    grid = GRIDS[modality] or (N_TEXT,)
    codes = torch.randint(0, 64, (torch.Size(grid).numel(),))
    return Part(modality, Tokens(codes, grid), role)


def packed() -> CorruptedBatch:
    """Return rows full of pairs of all modalities."""
    names, rows = VOCABULARY.names, []
    for number in range(ROWS):
        row: list[MultimodalSequence] = []
        while True:
            pair = len(row) + number
            parts = [
                part(names[pair % 4], Role.CONTEXT),
                part(names[(pair // 4 + pair + 1) % 4], Role.TARGET),
            ]
            document = MultimodalSequence.build(parts, VOCABULARY, CONFIG.objectives, 100 * number + pair)
            if sum(map(len, row)) + len(document) > ROW_LENGTH:
                break
            row.append(document)
        rows.append(row)
    return corrupt(pack(rows, ROW_LENGTH, VOCABULARY), VOCABULARY, CONFIG.objectives)


def step(model: UnifiedModel, batch: CorruptedBatch) -> torch.Tensor:
    """Run a forward and a backward pass."""
    model.zero_grad()
    loss = torch.stack(list(model(batch).values())).sum()
    loss.backward()
    return loss.detach()


def generate(model: UnifiedModel, prompt: Part) -> list[list[int]]:
    """Generate a text, a picture and speech after a prompt."""
    settings = SamplingSettings(max_new_tokens=24)
    to = ("text", "image", "speech")
    session = Session([prompt], None, Plan(to, dict.fromkeys(to, settings), 0, max_rows=512))
    for _ in Engine(model, GRIDS).run([session]):
        pass
    return [tokens.codes.tolist() for tokens in session.generated]


def difference(shared: UnifiedModel, experts: UnifiedModel, batch: CorruptedBatch) -> float:
    """Return the largest difference of loss and gradients, each relative to the largest value of its tensor."""
    losses = step(shared, batch), step(experts, batch)
    summed: dict[str, torch.Tensor] = {}
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None
        summed[shared_name(name)] = summed.get(shared_name(name), torch.zeros(())) + parameter.grad
    pairs = [losses, *((p.grad, summed[name]) for name, p in shared.named_parameters() if p.grad is not None)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)


def run() -> dict[str, Any]:
    """Return the ratios, and `text` that says it all."""
    torch.set_num_threads(1)
    shared, experts = build()
    batch, prompt = packed(), part("text", Role.CONTEXT)
    error = difference(shared, experts, batch)
    if error > TOLERANCE or generate(shared, prompt) != generate(experts, prompt):
        raise RuntimeError(f"the two ways differ by {error:.1e}, expected at most {TOLERANCE}: nothing was timed")
    calm, verdict = control(lambda: step(shared, batch), n_pairs=15)
    training = compare(lambda: step(shared, batch), lambda: step(experts, batch), n_pairs=15)
    generation = compare(lambda: generate(shared, prompt), lambda: generate(experts, prompt), n_pairs=15)
    n_tokens = int((batch.pattern.document_ids >= 0).sum())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, experts)]
    text = (
        f"experts: {ROWS} rows of {ROW_LENGTH} tokens of four modalities, 4 layers, D 192, fp32, 1 thread\n"
        f"  equal work: the same ids, losses and gradients within {error:.1e}\n"
        f"  parameters: {sizes[0]:,} shared, {sizes[1]:,} with experts, {sizes[0]:,} of them active in a row\n"
        f"  training step, experts / shared: {training}\n"
        f"  tokens per second: {n_tokens / training.seconds[0]:,.0f} shared, {n_tokens / training.seconds[1]:,.0f} "
        "with experts\n"
        f"  generation, experts / shared: {generation}\n"
        f"  control (shared against itself): {calm} -> {verdict}"
    )
    return {"training": training.ratio, "generation": generation.ratio, "control": calm.ratio, "text": text}


if __name__ == "__main__":
    print(run()["text"])
