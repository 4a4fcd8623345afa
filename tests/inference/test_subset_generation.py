"""Generation by a model that learnt subsets: each step reads the rows of training; what was learnt is what is made."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import (
    CODEBOOK,
    SPEECH_CODEBOOK,
    TEXT_SIZE,
    four_modalities,
    image_part,
    speech_part,
    text_part,
    video_part,
)

from omniform.errors import OmniformError
from omniform.inference.chat import Chat
from omniform.inference.engine import Engine
from omniform.inference.generate import Model
from omniform.inference.protocol import DataPart
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Plan, Session
from omniform.inference.terminal import Screen
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import Part, Role
from omniform.modeling.subsets import AnySubset, Contents, lay_out
from omniform.preview import draw_samples
from omniform.tokenizers.base import Discrete, Modality, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

GRIDS: dict[str, tuple[int, ...] | None] = {"text": None, "image": (2, 2), "speech": None, "video": (2, 2, 2)}
MAKERS: dict[str, st.SearchStrategy[Part]] = {
    name: st.lists(st.integers(0, size - 1), min_size=n or 0, max_size=n or 5).map(
        lambda codes, make=make: make(codes, Role.CONTEXT)  # type: ignore[misc]
    )
    for name, make, size, n in (
        ("text", text_part, TEXT_SIZE, None),
        ("image", image_part, CODEBOOK, 4),
        ("speech", speech_part, SPEECH_CODEBOOK, None),
        ("video", video_part, CODEBOOK, 8),
    )
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[list[Part]], list[str]]:
    """Some contexts, and what is made from each of them, in order."""
    order = draw(st.permutations(list(GRIDS)))
    n_given = draw(st.integers(0, 3))
    to = order[n_given : n_given + draw(st.integers(1, 4 - n_given))]
    contexts = [[draw(MAKERS[name]) for name in order[:n_given]] for _ in range(draw(st.integers(1, 3)))]
    return contexts, to


SETTINGS = st.builds(
    SamplingSettings,
    max_new_tokens=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    guidance_scale=st.sampled_from([1.0, 2.5]),
    steps=st.sampled_from([None, 1, 2, 4]),
)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return four_modalities()


@pytest.fixture(params=[False, True], ids=["keep", "remask"])
def model_config(model_config: ModelConfig, request: pytest.FixtureRequest) -> ModelConfig:
    return replace(
        model_config,
        objectives={
            "text": NextToken(),
            "image": Masked(steps=3, remask=request.param),
            "speech": NextToken(),
            "video": Masked(steps=2),
        },
        subsets={"any": AnySubset(input_budget=9, target_budget=9)},
        position_embeddings={"image": 4, "video": 8},
    )


def training_logits(model: UnifiedModel, known: Sequence[Part], target: str, ids: torch.Tensor) -> torch.Tensor:
    """Return what training would predict for a document that gives `known` and what is decided of `ids`."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    items = [Contents.whole(part.modality, part.tokens, vocabulary) for part in known]  # type: ignore[arg-type]
    decided = (ids != vocabulary.mask).nonzero().flatten().numpy()
    rest = np.setdiff1d(np.arange(len(ids)), decided)
    if objectives[target].commits:
        # A text so far is a document that learns it: its last row predicts what comes next.
        own = Contents(target, np.append(ids.numpy(), 0), (len(ids) + 1,), rest[:0], np.arange(len(ids) + 1))
    else:
        grid = GRIDS[target]
        assert grid is not None
        own = Contents(target, ids.numpy(), grid, decided, rest)
    sequence = lay_out([*items, own], vocabulary, objectives)
    batch = corrupt(pack([[sequence]], len(sequence), vocabulary), vocabulary, objectives)
    rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
    asked = batch.predictions[target].rows
    logits = model.logits(model.hidden(*rows, batch.pattern)[0][asked], vocabulary.target_range(target))
    if objectives[target].commits:
        return logits[-1:]
    found = torch.zeros(len(ids), logits.shape[-1])
    found[torch.from_numpy(rest)] = logits
    return found


@torch.no_grad()
def reference(
    model: UnifiedModel, context: Sequence[Part], to: Sequence[str], chosen: SamplingSettings, seed: int
) -> list[list[int]]:
    """Generate one reply from the documents of training alone."""
    vocabulary, known, generated = model.vocabulary, list(context), []
    for number, modality in enumerate(to):
        objective, ids, end_id = (
            model.config.objectives[modality],
            vocabulary.target_range(modality),
            vocabulary.end_of(modality),
        )
        shape = GRIDS[modality] or (chosen.max_new_tokens,)
        draw = KeyedDraw(seed, 0, number, chosen)
        state = objective.begin(int(np.prod(shape)), chosen.steps, vocabulary.mask)
        while not state.done:
            logits = training_logits(model, known, modality, state.token_ids)
            if chosen.guidance_scale != 1:
                without = training_logits(model, [], modality, state.token_ids)
                logits = objective.guide(logits, without, chosen.guidance_scale)
            state = objective.step(state, logits, ids.start, end_id, vocabulary.mask, draw)
        contents = [token for token in state.token_ids.tolist() if token != end_id]
        codes = vocabulary.to_codes(modality, torch.tensor(contents, dtype=torch.int64))
        known.append(Part(modality, Tokens(codes, GRIDS[modality] or (len(codes),)), Role.CONTEXT))
        generated.append(codes.tolist())
    return generated


@given(requests(), SETTINGS, st.integers(0, 2**32))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replies_are_those_of_the_documents_of_training(
    model: UnifiedModel, asked: tuple[list[list[Part]], list[str]], chosen: SamplingSettings, seed: int
) -> None:
    """Whatever is cached, batched, chained or guided; where two choices are further apart than rounding."""
    contexts, to = asked
    plan = Plan(tuple(to), dict.fromkeys(GRIDS, chosen), seed, 200, subsets=True)
    dropped: list[Part] | None = None if chosen.guidance_scale == 1 else []
    sessions = [Session(context, dropped, plan) for context in contexts]
    for _ in Engine(model, GRIDS).run(sessions):
        pass
    for context, session in zip(contexts, sessions, strict=True):
        if session.n_near_ties == 0:
            found = [tokens.codes.tolist() for tokens in session.generated if isinstance(tokens, Tokens)]
            assert found == reference(model, context, to, chosen, seed)


class Notes(Modality):
    """Words of the letters a to d, of any length."""

    kind: ClassVar[str] = "notes"
    name: ClassVar[str] = "notes"
    representation = Discrete(4)
    fixed_grid = None

    def encode_batch(self, items: Sequence[str]) -> list[Tokens]:
        return [Tokens(torch.tensor(["abcd".index(c) for c in item]), (len(item),)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        return ["".join("abcd"[code] for code in t.codes.tolist()) for t in tokens]

    def read(self, payload: bytes) -> str:
        return payload.decode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()


WORLD = {
    ("dark", "abc"): [[-1.0, -1.0], [1.0, -1.0]],
    ("light", "dd"): [[1.0, 1.0], [-1.0, 1.0]],
    ("half", "cabd"): [[1.0, -1.0], [1.0, -1.0]],
}


NETWORKS: dict[str, UnifiedModel] = {}  # learnt once for all tests


@pytest.fixture
def learnt(omni: Model) -> Model:
    """A model that knows three things, each by a word, a picture and notes, from subsets of them."""
    tokenizers: dict[str, Modality] = {**omni.tokenizers, "notes": Notes()}
    if "toy" not in NETWORKS:
        NETWORKS["toy"] = learn(tokenizers, 200).eval()
    return Model(LoadedModel(NETWORKS["toy"], tokenizers, {}))


def learn(tokenizers: dict[str, Modality], n_steps: int) -> UnifiedModel:
    subsets = [
        AnySubset(input_budget=8, target_budget=12, input_alpha=0.1),
        AnySubset(input_budget=(0, 12), target_budget=12),
        AnySubset(input_budget=0, target_budget=12),
    ]
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    objectives = {"text": NextToken(), "image": Masked(steps=3), "notes": NextToken()}
    config = ModelConfig(
        decoder=decoder,
        objectives=objectives,
        subsets={"whole": subsets[0], "parts": subsets[1], "nothing": subsets[2]},
        position_embeddings={"image": 4},
    )
    torch.manual_seed(0)
    network = UnifiedModel(config, build_vocabulary(tokenizers))
    samples = [
        {
            "text": tokenizers["text"].encode(word),
            "image": tokenizers["image"].encode(torch.tensor([picture])),
            "notes": tokenizers["notes"].encode(notes),
        }
        for (word, notes), picture in WORLD.items()
    ]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(n_steps):
        sequences = [
            subsets[key % 3].document(samples[key // 3 % 3], network.vocabulary, objectives, key)  # type: ignore[arg-type]
            for key in range(12 * step, 12 * step + 12)
        ]
        batch = corrupt(pack([sequences], sum(map(len, sequences)), network.vocabulary), network.vocabulary, objectives)
        losses = network(batch)
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / n_steps)
        loss = torch.stack([losses[name] / max(batch.counts[name], 1.0) for name in losses]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def items_of(model: Model) -> list[dict[str, Any]]:
    return [
        {"text": word, "image": torch.tensor([picture]), "notes": notes} for (word, notes), picture in WORLD.items()
    ]


def assert_is(model: Model, part: Any, item: Any) -> None:
    if part.modality == "image":
        assert part.data.tobytes() == model.tokenizers["image"].to_pil(item).tobytes()  # type: ignore[attr-defined]
    else:
        assert part.data == item


def test_every_modality_is_made_from_every_subset_in_any_order(learnt: Model) -> None:
    for names in itertools.permutations(("text", "image", "notes")):
        for n_given in (1, 2):
            for item in items_of(learnt):
                prompt = [DataPart(name, item[name]) for name in names[:n_given]]
                reply = learnt.generate(prompt, to=names[n_given:], seed=0, temperature=0)
                for part in reply.parts:
                    assert_is(learnt, part, item[part.modality])


def test_what_is_made_of_nothing_goes_together(learnt: Model) -> None:
    """Chained from no prompt, the second and third part are those of what the first happens to be."""
    replies = learnt.generate_batch([[]] * 12, to=["text", "image", "notes"], seed=3, top_p=0.9)
    known = {item["text"]: item for item in items_of(learnt)}
    found = [reply for reply in replies if reply.text in known]
    assert len(found) > 8
    assert len({reply.text for reply in found}) > 1
    for reply in found:
        for part in reply.parts:
            assert_is(learnt, part, known[reply.text][part.modality])


def test_an_edited_picture_is_completed_from_what_is_kept(learnt: Model) -> None:
    for item in items_of(learnt):
        picture = learnt.tokenizers["image"].to_pil(item["image"])  # type: ignore[attr-defined]
        for corner in range(4):
            mask = np.zeros((2, 2), dtype=np.uint8)
            mask[divmod(corner, 2)] = 255
            marred = Image.fromarray(np.where(mask, 128, np.asarray(picture)).astype(np.uint8))
            reply = learnt.generate(
                item["text"], to="image", image=marred, mask=Image.fromarray(mask), seed=0, temperature=0
            )
            assert reply.images[0].tobytes() == picture.tobytes()


def test_batches_and_guidance_change_no_sure_answer(learnt: Model) -> None:
    prompts = [DataPart("text", item["text"]) for item in items_of(learnt)]
    replies = learnt.generate_batch(prompts, to=["notes", "image"], seed=0, guidance_scale=1.5, temperature=0)
    for reply, item in zip(replies, items_of(learnt), strict=True):
        for part in reply.parts:
            assert_is(learnt, part, item[part.modality])


@pytest.mark.parametrize(
    ("prompt", "to", "keywords", "message"),
    [
        ("dark", "text", {}, "hold text, text, but this model learnt subsets .* leave out all but one text"),
        (["dark", "light"], "image", {}, "hold text, text, image, but"),
        ("dark", ["image", "image"], {}, "leave out all but one image"),
        ([], "text", {"negative_prompt": "dark", "guidance_scale": 2}, "hold text, text, but"),
        ("dark", "any", {}, "has not learnt what follows a part"),
    ],
)
def test_a_modality_comes_once(learnt: Model, prompt: Any, to: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        learnt.generate(prompt, to=to, **keywords)


def test_a_reply_by_way_of_a_modality_in_it_is_refused(learnt: Model) -> None:
    through = {"text": {"image": "notes"}}
    model = Model(LoadedModel(learnt.network, learnt.tokenizers, {"through": through}))
    assert [part.modality for part in model.generate("dark", "image", seed=0).through] == ["notes"]
    with pytest.raises(OmniformError, match="hold text, notes, image, notes, but"):
        model.generate("dark", ["image", "notes"])
    assert len(model.generate("dark", ["image", "notes"], seed=0, direct=True).parts) == 2


@pytest.mark.parametrize(("room", "fits"), [(11, False), (12, True)])
def test_rows_of_a_reply_never_exceed_the_models(learnt: Model, room: int, fits: bool) -> None:
    """Six of text and four of picture, and one begin marker each for what is decided of it and what is not."""
    model = Model(LoadedModel(learnt.network, learnt.tokenizers, {"max_sequence_length": room}))
    lengths: list[int] = []
    hook = model.network.decoder.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    if fits:
        model.generate("dark", "image", seed=0)
        assert max(lengths) == room
    else:
        with pytest.raises(OmniformError, match="too long"):
            model.generate("dark", "image", seed=0)
    hook.remove()


def test_chat_answers_what_is_typed_in_another_modality(learnt: Model, tmp_path: Path) -> None:
    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(learnt, Screen(out, notes, {}), out_dir=tmp_path, seed=0)
    assert chat.to == ["image"]
    assert chat.handle("dark")
    assert (chat.n_errors, len([*tmp_path.iterdir()])) == (0, 1)
    chat.handle("/to text")
    chat.handle("dark")
    assert chat.n_errors == 1
    assert "leave out all but one text" in notes.getvalue()


def test_samples_pass_over_prompts_that_hold_the_modality(learnt: Model, tmp_path: Path) -> None:
    loaded = LoadedModel(learnt.network, learnt.tokenizers, {})
    draw_samples(loaded, tmp_path, ["dark", "light"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images.png", "prompts.json", "text.txt"]
    picture = learnt.generate("dark", "image", seed=0).images[0]
    draw_samples(loaded, tmp_path / "of pictures", [picture])
    assert sorted(file.name for file in (tmp_path / "of pictures").iterdir()) == ["prompts.json", "text.txt"]
