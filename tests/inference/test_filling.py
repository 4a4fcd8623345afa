"""Gaps that `generate` fills: what is forwarded is what training showed, and what was learnt comes back."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.denoisers import Denoiser, Given, Middle, Prefix, Spans
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Tokens


def with_denoisers(omni: Model, denoisers: dict[str, Denoiser]) -> Model:
    """The same model with modes; its special ids have had their weights all along."""
    config = ModelConfig(
        decoder=omni.network.config.decoder, objectives=omni.network.config.objectives, denoisers=denoisers
    )
    network = UnifiedModel(config, build_vocabulary(omni.tokenizers, config.modes))
    network.load_state_dict(omni.network.state_dict())
    return Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))


def codes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


CASES: list[tuple[Denoiser, str | None, bool]] = [
    (Prefix(), None, False),
    (Spans(), None, False),
    (Middle(), " e", False),
    (Middle(suffix_first_rate=1.0), " e", True),
    (Middle(), "", False),
]


@pytest.mark.parametrize("how", ["causal", "bidirectional", "learnt"])
@pytest.mark.parametrize(("denoiser", "suffix", "suffix_first"), CASES)
@pytest.mark.parametrize("prompt", ["ab c", []])
def test_greedy_replies_are_what_the_rows_of_training_predict(
    omni: Model, denoiser: Denoiser, suffix: str | None, suffix_first: bool, how: Given, prompt: Any
) -> None:
    """One pass over the document that training would build gives every token of the reply."""
    denoiser = replace(denoiser, given=how)  # type: ignore[type-var]
    model = with_denoisers(omni, {"m": denoiser})
    reply = model.generate(prompt, mode="m", suffix=suffix, temperature=0, top_k=1, max_new_tokens=9)
    network, text = model.network, reply.text
    pieces = [codes(prompt or "")] + ([] if suffix is None else [codes(suffix)])
    given = denoiser.context("text", pieces, "m", suffix_first=suffix_first)
    # The reply is not UTF-8: its codes are read off the logits, one after the other.
    filled = torch.zeros(0, dtype=torch.int64)
    while len(filled) < 9:
        target = Part("text", Tokens(filled, (len(filled),)), Role.TARGET, "gap:0")
        sequence = MultimodalSequence.build([*given, target], network.vocabulary, network.config.objectives)
        batch = pack([[sequence]], len(sequence), network.vocabulary)
        with torch.inference_mode():
            rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
            hidden = network.hidden(*rows, batch.pattern)[0]
            logits = network.logits(hidden, network.vocabulary.target_range("text"))
        row = sequence.spans[-1].start - 1 + len(filled)
        token = logits[row].argmax()
        if token == network.vocabulary.end:
            break
        filled = torch.cat([filled, token[None]])
    assert text == bytes(filled.tolist()).decode(errors="replace")


def test_a_batch_of_fillings_replies_as_its_prompts_alone(omni: Model) -> None:
    model = with_denoisers(omni, {"s": Prefix(), "fill": Middle()})
    prompts: list[Any] = ["a", [], "seven"]
    every: list[dict[str, Any]] = [{"mode": "s"}, {"suffix": "xyz"}, {"mode": "fill", "suffix": ""}]
    for keywords in every:
        together = model.generate_batch(prompts, seed=[1, 2, 3], max_new_tokens=9, **keywords)
        alone = [
            model.generate(p, seed=s, max_new_tokens=9, **keywords) for p, s in zip(prompts, [1, 2, 3], strict=True)
        ]
        assert [reply.text for reply in together] == [reply.text for reply in alone]
    # Without a gap to fill the same weights reply as ever.
    assert model.generate("a", seed=1, max_new_tokens=9).text == omni.generate("a", seed=1, max_new_tokens=9).text


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "x"}, r"asks in the mode 'x', which this model has not learnt; its modes are s, m"),
        ({"mode": "m"}, "mode m fills what stands between prompt and suffix: give a suffix"),
        ({"mode": "s", "suffix": "b"}, "mode s fills what comes after a text: leave suffix out"),
        ({"suffix": 3}, "suffix is a int, expected a string"),
        ({"suffix": "b", "to": "image"}, 'suffix is for a reply of one text: give to="text"'),
        ({"suffix": "b", "to": ["text", "text"]}, "for a reply of one text"),
        ({"suffix": "b", "prompt": ["a", "b"]}, "for a prompt of one text"),
        ({"suffix": "b", "guidance_scale": 2.0}, "does not go with guidance"),
        ({"suffix": "b" * 60}, "too long"),
    ],
)
def test_what_cannot_be_filled_is_refused(omni: Model, keywords: dict[str, Any], message: str) -> None:
    model = with_denoisers(omni, {"s": Prefix(), "fill": Middle(mode="m")})
    with pytest.raises(OmniformError, match=message):
        model.generate(**{"prompt": "a", **keywords})


def test_of_denoisers_that_share_a_mode_the_one_that_fits_answers(omni: Model) -> None:
    both = with_denoisers(omni, {"a": Middle(mode="x", given="causal"), "b": Prefix(mode="x", given="causal")})
    plain = with_denoisers(omni, {"b": Prefix(mode="x", given="causal")})
    keywords = {"mode": "x", "seed": 1, "max_new_tokens": 9}
    assert both.generate("a", **keywords).text == plain.generate("a", **keywords).text
    assert both.generate("a", suffix="b", **keywords).parts


def test_a_model_without_modes_says_so(omni: Model) -> None:
    for keywords in ({"suffix": "b"}, {"mode": "fill"}):
        with pytest.raises(OmniformError, match=r"has not learnt; it has no modes: leave .* out, or train one"):
            omni.generate("a", **keywords)


TEXTS = ("bakery", "smudge", "flight")


def test_what_was_learnt_is_filled_in(omni: Model) -> None:
    """Texts learnt by heart in two modes: their ends follow their beginnings, their middles stand between the two."""
    denoisers: dict[str, Denoiser] = {"s": Prefix(), "fill": Middle(given="causal")}
    decoder = DecoderConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=128, rope_theta=100.0)
    config = ModelConfig(decoder=decoder, objectives=omni.network.config.objectives, denoisers=denoisers)
    torch.manual_seed(0)
    network = UnifiedModel(config, build_vocabulary(omni.tokenizers, config.modes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    vocabulary, objectives = network.vocabulary, config.objectives
    for step in range(250):
        sequences = [
            MultimodalSequence.build(d.parts("text", codes(text), mode, 1000 * step + number), vocabulary, objectives)
            for number, text in enumerate(TEXTS * 2)
            for mode, d in denoisers.items()
        ]
        batch = corrupt(pack([[s] for s in sequences], max(map(len, sequences)), vocabulary), vocabulary, objectives)
        loss = network(batch)["text"] / batch.counts["text"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = Model(LoadedModel(network.eval(), omni.tokenizers, {}))
    for text in TEXTS:
        for cut in (2, 3):
            assert model.generate(text[:cut], mode="s", temperature=0).text == text[cut:]
            assert model.generate(text[:cut], suffix=text[cut + 2 :], temperature=0).text == text[cut : cut + 2]
