"""Prompts that are read as one block: what is forwarded is what training showed, in any batch and part after part."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from omniform.inference.generate import Model
from omniform.modeling.folder import LoadedModel
from omniform.modeling.model import UnifiedModel
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Tokens

KEYWORDS: dict[str, Any] = {"temperature": 0, "top_k": 1, "max_new_tokens": 8}


@pytest.fixture
def prefix(omni: Model) -> Model:
    """The same weights in a model that reads prompts in both directions."""
    config = replace(omni.network.config, given="bidirectional", next_span_weight=0.0)
    network = UnifiedModel(config, omni.network.vocabulary)
    network.load_state_dict(omni.network.state_dict())
    return Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))


def picture(shade: int) -> Image.Image:
    return Image.new("L", (2, 2), shade)


@pytest.mark.parametrize("prompt", [["a seven"], [picture(80)], ["ab", picture(200)], [picture(10), "c"]])
def test_greedy_replies_are_what_the_rows_of_training_predict(prefix: Model, prompt: list[Any]) -> None:
    """One pass over the document that training would build gives every token of the reply."""
    network, vocabulary, text = prefix.network, prefix.network.vocabulary, prefix.tokenizers["text"]
    given = []
    for item in prompt:
        modality = "text" if isinstance(item, str) else "image"
        tokenizer: Any = prefix.tokenizers[modality]
        tokens = tokenizer.encode(item if isinstance(item, str) else tokenizer.from_pil(item))
        given.append(Part(modality, tokens, Role.CONTEXT, prefix=True))
    filled = torch.zeros(0, dtype=torch.int64)
    while len(filled) < KEYWORDS["max_new_tokens"]:
        target = Part("text", Tokens(filled, (len(filled),)), Role.TARGET)
        sequence = MultimodalSequence.build([*given, target], vocabulary, network.config.objectives)
        batch = pack([[sequence]], len(sequence), vocabulary)
        with torch.inference_mode():
            rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
            logits = network.outputs(network.hidden(*rows, batch.pattern)[0], "text")
        token = logits[sequence.spans[-1].start - 1 + len(filled)].argmax()
        if token == vocabulary.end:
            break
        filled = torch.cat([filled, token[None]])
    reply = prefix.generate(prompt, **KEYWORDS)
    assert reply.text == text.decode(Tokens(filled, (len(filled),)))


def test_a_batch_replies_as_its_prompts_alone(prefix: Model) -> None:
    prompts: list[Any] = ["a", ["seven", picture(80)], [picture(10), "b", picture(99)]]
    together = prefix.generate_batch(prompts, ["text", "image"], seed=[1, 2, 3], max_new_tokens=6)
    for prompt, seed, reply in zip(prompts, (1, 2, 3), together, strict=True):
        alone = prefix.generate(prompt, ["text", "image"], seed=seed, max_new_tokens=6)
        assert (reply.text, reply.images[0].tobytes()) == (alone.text, alone.images[0].tobytes())


def test_it_is_told_by_the_reply(omni: Model, prefix: Model) -> None:
    """The same weights read the same prompt otherwise."""
    prompts = [f"{word} {word}" for word in ("one", "two", "three", "four")]
    replies = [model.generate_batch(prompts, **KEYWORDS) for model in (omni, prefix)]
    assert [reply.text for reply in replies[0]] != [reply.text for reply in replies[1]]
