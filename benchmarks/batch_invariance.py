"""What batch_invariant=True costs, and what replies risk without it: near ties, and replies that a batch changes.

100 captions to pictures, then these pictures to text, each in one batch, with the model's default settings, fp32, one
thread. The model is runs/demo/model; where that is missing, one of the same size with random weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from paired import compare, control
from torch import Tensor

from omniform.data.templates import TEST_TEMPLATES, render
from omniform.inference.generate import Model, load
from omniform.inference.protocol import Reply
from omniform.inference.sampling import NEAR_TIE
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer

TRAINED = Path("runs/demo/model")
N_PROMPTS, N_PAIRS = 100, 5
CAPTIONS = [render(template, digit) for template in TEST_TEMPLATES for digit in range(10)]


def build() -> Model:
    """Return a model of the demo's size with random weights and settings of its own, the same each time."""
    torch.manual_seed(0)
    config = ImageTokenizerConfig(channels=1, image_size=16, widths=(64, 96))
    tokenizers = {
        "text": SentencePieceTokenizer.train(CAPTIONS, vocab_size=320),
        "image": ImageTokenizer(config, config.build()),
    }
    decoder = DecoderConfig(dim=192, n_layers=4, n_heads=6, n_kv_heads=6, ffn_dim=512)
    network_config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked(steps=8)})
    settings = {"text": {"max_new_tokens": 16}, "image": {"guidance_scale": 2.0}}
    network = UnifiedModel(network_config, build_vocabulary(tokenizers))
    return Model(LoadedModel(network, tokenizers, {"max_sequence_length": 256, "modalities": settings}))


def same(reply: Reply, other: Reply) -> bool:
    """Return whether text and pictures are equal to the byte."""
    return reply.text == other.text and [p.tobytes() for p in reply.images] == [p.tobytes() for p in other.images]


def largest_difference(model: Model, prompts: Sequence[object], to: str) -> float | None:
    """Return how far a logit moves between the batch and the prompts alone; None if a reply comes out otherwise."""
    calls: list[Tensor] = []
    hook = model.network.interface.head.register_forward_hook(lambda _module, _inputs, logits: calls.append(logits))
    together = model.generate_batch(prompts, to, seed=list(range(len(prompts))))
    in_batch, alone, alike = calls[:], [], True
    for place, prompt in enumerate(prompts):
        calls.clear()
        alike &= same(model.generate(prompt, to, seed=place), together[place])
        alone.append(calls[:])
    hook.remove()
    if not alike:
        return None  # where replies have other lengths, the rows of the batch are not those of the prompts in order
    expected = [torch.cat([logits[step] for logits in alone if step < len(logits)]) for step in range(len(in_batch))]
    return max(float((found - wanted).abs().max()) for found, wanted in zip(in_batch, expected, strict=True))


def measure(model: Model, prompts: Sequence[object], to: str) -> dict[str, Any]:
    """Compare both modes on the same prompts and seeds."""

    def draw(*, batch_invariant: bool) -> list[Reply]:
        seeds = list(range(len(prompts)))
        return model.generate_batch(prompts, to, seed=seeds, batch_invariant=batch_invariant)

    together, alone = draw(batch_invariant=False), draw(batch_invariant=True)
    ratio = compare(lambda: draw(batch_invariant=False), lambda: draw(batch_invariant=True), N_PAIRS)
    near = [reply.n_near_ties for reply in together]
    changed = sum(not same(*pair) for pair in zip(together, alone, strict=True))
    moved = largest_difference(model, prompts, to)
    return {
        "ratio": ratio.ratio,
        "interval": [ratio.low, ratio.high],
        "near_ties": sum(near),
        "replies_with_near_ties": sum(map(bool, near)),
        "replies_changed": changed,
        "largest_difference": moved,
        "text": (
            f"  {to}: batch_invariant / default: {ratio}\n"
            f"    {sum(near)} near ties in {sum(map(bool, near))} of {len(near)} replies; {changed} replies changed by "
            f"the batch; largest change of a logit {'not measured' if moved is None else f'{moved:.1e}'}"
        ),
    }


def run() -> dict[str, Any]:
    """Return the ratios and counts by modality, and `text` that says it all."""
    torch.set_num_threads(1)
    trained = (TRAINED / "manifest.sha256").exists()
    model = load(TRAINED) if trained else build()
    prompts = [CAPTIONS[place % len(CAPTIONS)] for place in range(N_PROMPTS)]
    pictures = [reply.images[0] for reply in model.generate_batch(prompts, "image", seed=0)]
    calm, verdict = control(lambda: model.generate_batch(pictures, "text", seed=0), N_PAIRS)
    found = {"image": measure(model, prompts, "image"), "text": measure(model, pictures, "text")}
    text = (
        f"batch_invariance: {N_PROMPTS} prompts at once, "
        f"{f'the trained model {TRAINED}' if trained else 'a model of random weights'}, fp32, 1 thread; a near tie is "
        f"{NEAR_TIE:g} wide\n"
        + "".join(f"{result.pop('text')}\n" for result in found.values())
        + f"  control (the default against itself): {calm} -> {verdict}"
    )
    return {"trained": trained, **found, "control": calm.ratio, "text": text}


if __name__ == "__main__":
    print(run()["text"])
