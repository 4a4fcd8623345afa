"""Pictures made as vectors: what was learnt comes back, alone, in batches, and as the context of what follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Plan, Session
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import LoadedModel, build_vocabulary, load_model_folder, save_model_folder
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.flow import Flow
from omniform.modeling.objectives.gmm import Gmm
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Latents, Modality
from omniform.tokenizers.image_latents import ImagePatchesConfig, ImagePatchesTokenizer
from omniform.tokenizers.text import SentencePieceTokenizer

PICTURES = {
    "left": torch.tensor([[[1.0, -1.0], [1.0, -1.0]]]).repeat_interleave(2, -1).repeat_interleave(2, -2),
    "top": torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]).repeat_interleave(2, -1).repeat_interleave(2, -2),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Modality[Any]]:
    patches = ImagePatchesTokenizer(ImagePatchesConfig(channels=1, image_size=4, patch_size=2))
    return {"text": SentencePieceTokenizer.train([*PICTURES], vocab_size=265), "image": patches}


@pytest.fixture(scope="module", params=["input", "adaln"])
def learnt(request: pytest.FixtureRequest, tokenizers: dict[str, Modality[Any]]) -> Model:
    """A model that knows two pictures by their names, and their names by the pictures."""
    decoder = DecoderConfig(
        dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0, timestep=request.param
    )
    config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Flow(steps=8)})
    torch.manual_seed(0)
    network = UnifiedModel(config, build_vocabulary(tokenizers))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.0)
    documents = []
    for name, picture in PICTURES.items():
        word, image = tokenizers["text"].encode(name), tokenizers["image"].encode(picture)
        documents += [
            [Part("text", word, Role.CONTEXT), Part("image", image, Role.TARGET), Part("text", word, Role.TARGET)],
            [Part("image", image, Role.CONTEXT), Part("text", word, Role.TARGET)],
        ]
    for step in range(300 if request.param == "input" else 700):  # modulation begins at 0
        built = [
            MultimodalSequence.build(parts, network.vocabulary, config.objectives, noise_key=100 * step + 10 * n + copy)
            for n, parts in enumerate(documents)
            for copy in range(2)
        ]
        batch = corrupt(
            pack([[s] for s in built], max(map(len, built)), network.vocabulary), network.vocabulary, config.objectives
        )
        found = network(batch)
        optimizer.zero_grad()
        sum(found[term] / max(batch.counts[term], 1) for term in found).backward()  # type: ignore[union-attr]
        optimizer.step()
    return Model(LoadedModel(network, tokenizers, {"max_sequence_length": 64}))


def drawn(reply: Any, model: Model) -> torch.Tensor:
    tokenizer: Any = model.tokenizers["image"]
    return tokenizer.from_pil(reply.images[0])


@pytest.mark.parametrize("name", [*PICTURES])
def test_what_was_learnt_is_drawn_and_read(name: str, learnt: Model) -> None:
    assert (drawn(learnt.generate(name, to="image", seed=1), learnt) - PICTURES[name]).abs().max() < 0.35
    tokenizer: Any = learnt.tokenizers["image"]
    picture = tokenizer.to_pil(PICTURES[name])
    assert learnt.generate(picture, to="text", temperature=0).text == name
    both = learnt.generate(name, to=["image", "text"], seed=1)
    assert (drawn(both, learnt) - PICTURES[name]).abs().max() < 0.35
    assert both.text == name


def test_replies_in_a_batch_are_those_alone_within_rounding(learnt: Model) -> None:
    together = learnt.generate_batch([*PICTURES] * 2, to="image", seed=[1, 2, 3, 4])
    for reply, name, seed in zip(together, [*PICTURES] * 2, (1, 2, 3, 4), strict=True):
        alone = learnt.generate(name, to="image", seed=seed)
        assert (drawn(reply, learnt) - drawn(alone, learnt)).abs().max() < 0.01
    assert drawn(together[0], learnt).ne(drawn(together[2], learnt)).any()
    kept = learnt.generate_batch([*PICTURES], to="image", seed=[1, 2], batch_invariant=True)
    for reply, name, seed in zip(kept, PICTURES, (1, 2), strict=True):
        assert torch.equal(drawn(reply, learnt), drawn(learnt.generate(name, to="image", seed=seed), learnt))


def test_half_a_picture_is_drawn_anew_and_the_other_stays(learnt: Model) -> None:
    tokenizer: Any = learnt.tokenizers["image"]
    mask = Image.new("L", (4, 4))
    mask.paste(255, (0, 2, 4, 4))
    for name, other in (("left", "top"), ("top", "left")):
        # What the mask hides says nothing: patches see no further than themselves.
        given = tokenizer.to_pil(PICTURES[name])
        [reply] = learnt.generate_batch([name], to="image", image=given, mask=mask, seed=[4])
        assert reply.images[0].crop((0, 0, 4, 2)).tobytes() == given.crop((0, 0, 4, 2)).tobytes()
        assert (drawn(reply, learnt) - PICTURES[name]).abs().max() < 0.35
        spoilt = Image.composite(tokenizer.to_pil(PICTURES[other]), given, mask)
        mended = learnt.generate(name, to="image", image=spoilt, mask=mask, seed=4)
        assert mended.images[0].tobytes() == reply.images[0].tobytes()
    varied = learnt.generate("left", to="image", image=tokenizer.to_pil(PICTURES["left"]), strength=0.5, seed=1)
    assert (drawn(varied, learnt) - PICTURES["left"]).abs().max() < 0.35


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_flow_is_drawn_as_euler_steps_over_whole_documents(
    attention: str, tokenizers: dict[str, Modality[Any]]
) -> None:
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    objectives = {"text": NextToken(), "image": Flow(attention=attention)}  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives), build_vocabulary(tokenizers)).eval()
    model = Model(LoadedModel(network, tokenizers, {"max_sequence_length": 64}))
    word, n_steps = tokenizers["text"].encode("left"), 3
    values = KeyedDraw(5, 0, 0, SamplingSettings()).normal(0, torch.arange(4), 4)
    for step in range(n_steps):
        parts = [Part("text", word, Role.CONTEXT), Part("image", Latents(values, (2, 2)), Role.TARGET)]
        sequence = MultimodalSequence.build(parts, network.vocabulary, objectives)
        batch = pack([[sequence]], len(sequence), network.vocabulary)
        held = replace(batch.vectors["image"], times=torch.full((4,), 1 - step / n_steps))
        rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
        with torch.no_grad():
            hidden = network.hidden(*rows, batch.pattern, vectors={"image": held})[0]
            values = values - network.outputs(hidden[held.rows], "image") / n_steps
    tokenizer: Any = tokenizers["image"]
    expected = tokenizer.decode(Latents(values, (2, 2)))
    found = drawn(model.generate("left", to="image", seed=5, steps=n_steps), model)
    torch.testing.assert_close(found, expected, atol=1.5 / 255, rtol=0)  # the picture is of whole greys


def test_guidance_steps_and_a_stored_model_change_what_they_should(learnt: Model, tmp_path: Path) -> None:
    plain = learnt.generate("left", to="image", seed=3)
    guided = learnt.generate("left", to="image", seed=3, guidance_scale=2.0)
    assert drawn(plain, learnt).ne(drawn(guided, learnt)).any()
    n_steps = [
        event.n_steps for event in learnt.stream("left", to="image", seed=3, steps=5) if hasattr(event, "n_steps")
    ]
    assert n_steps == [5] * 5
    network = learnt.network
    save_model_folder(
        tmp_path / "model",
        network.config,
        network.state_dict(),
        learnt.tokenizers,
        generation_config={"max_sequence_length": 64},
        card="",
    )
    again = Model(load_model_folder(tmp_path / "model"))
    assert torch.equal(drawn(again.generate("left", to="image", seed=3), again), drawn(plain, learnt))


def test_settings_for_the_other_parts_of_a_reply_do_not_reach_vectors(tokenizers: dict[str, Modality[Any]]) -> None:
    objectives = {"text": NextToken(), "image": Gmm(components=2)}
    vocabulary = build_vocabulary(tokenizers)
    chosen = SamplingSettings(temperature=0.5, top_k=1, top_p=0.1)
    session = Session([], None, Plan(("image",), {"image": chosen}, seed=0, max_rows=64))
    session.open_span((2, 2), vocabulary, objectives)
    assert session.span is not None
    assert session.span.settings == SamplingSettings(temperature=0.5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0.5}, "temperature does not apply to image, generated as vectors"),
        ({"top_k": 5}, "top_k does not apply to image"),
        ({"max_new_tokens": 3}, "max_new_tokens does not apply to image"),
    ],
)
def test_what_does_not_apply_to_vectors_is_refused(learnt: Model, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        learnt.generate("left", to="image", **keywords)
