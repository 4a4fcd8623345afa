"""What a batch may change of a reply: nothing if it is batch invariant, else only what a counted near tie explains."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.inference.generate import Model
from omniform.inference.protocol import ImagePart, Reply, TextPart
from omniform.inference.sampling import NEAR_TIE, KeyedDraw, near_tie_bound
from omniform.modeling.generation_config import SamplingSettings

N_SEEDS = 200
PICTURE = Image.new("L", (2, 2), 200)
PROMPTS: list[Any] = [
    "a seven",
    PICTURE,
    "x" * 23,
    ["like", PICTURE, "but round"],
    "7",
    [],
    ["b" * 11, PICTURE, PICTURE],
]


def contents(reply: Reply) -> list[bytes]:
    """Every byte of a reply."""
    found = []
    for part in reply.parts:
        if isinstance(part, ImagePart):
            found.append(part.image.tobytes())
        else:
            assert isinstance(part, TextPart)
            found.append(f"{part.text} {part.finish_reason}".encode())
    return found


def batches(n_places: int, seed: int) -> list[list[int]]:
    """Cut 0 .. n_places - 1, shuffled, into batches of 1 to 40."""
    order = list(range(n_places))
    shuffled = random.Random(seed)
    shuffled.shuffle(order)
    cut = []
    while order:
        size = shuffled.randint(1, 40)
        cut.append(order[:size])
        order = order[size:]
    return cut


def generate_in(model: Model, batch: list[int], **keywords: Any) -> list[Reply]:
    prompts = [PROMPTS[place % len(PROMPTS)] for place in batch]
    return model.generate_batch(prompts, seed=[1000 + place for place in batch], **keywords)


def test_a_batch_invariant_reply_is_the_same_to_the_byte(omni: Model) -> None:
    keywords = {
        "to": ["image", "text"],
        "max_new_tokens": 3,
        "guidance_scale": 3.0,
        "negative_prompt": ["a dull", PICTURE],
        "batch_invariant": True,
    }
    alone = [contents(generate_in(omni, [place], **keywords)[0]) for place in range(N_SEEDS)]
    assert len({str(one) for one in alone}) > N_SEEDS / 2
    for batch in batches(N_SEEDS, seed=0):
        together = generate_in(omni, batch, **keywords)
        assert [contents(reply) for reply in together] == [alone[place] for place in batch]


@pytest.mark.parametrize("coarse", [False, True], ids=["real rounding", "the coarsest allowed"])
def test_a_reply_that_a_batch_changes_has_a_near_tie(omni: Model, coarse: bool) -> None:
    n_places, n_changed, n_calm = 40, 0, 0
    keywords: dict[str, Any] = {"max_new_tokens": 5}
    if coarse:
        noise = torch.Generator().manual_seed(0)
        # Logits so close together that rounding turns a choice in many replies, at the temperature that goes with it.
        keywords["temperature"] = 0.004
        with torch.no_grad():
            omni.network.interface.head.weight.mul_(0.004)

        def blur(_module: object, _arguments: object, logits: torch.Tensor) -> torch.Tensor:
            return logits + NEAR_TIE * (torch.rand(logits.shape, generator=noise) - 0.5)

        omni.network.interface.head.register_forward_hook(blur)
    for target in ({"to": ["image", "text"]}, {"to": "text", "top_k": 6, "top_p": 0.9}):
        alone = [generate_in(omni, [place], **target, **keywords)[0] for place in range(n_places)]
        for batch in batches(n_places, seed=1):
            replies = generate_in(omni, batch, **target, **keywords)
            for reply, solo in zip(replies, (alone[place] for place in batch), strict=True):
                changed = contents(reply) != contents(solo)
                assert not changed or (reply.n_near_ties and solo.n_near_ties)
                n_changed += changed
                n_calm += not reply.n_near_ties
    assert n_calm > n_places / 4
    assert n_changed or not coarse


def perturbed(settings: SamplingSettings, logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Logits that differ by less than a near tie is wide, as rounding, guidance and temperature would move them."""
    half = near_tie_bound(settings) * (settings.temperature or 1.0) / 2
    return logits + half * (2 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) - 1)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    spacing=st.sampled_from([1.0, 1e-2, NEAR_TIE]),
    chosen=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_k=st.sampled_from([None, 1, 4]),
        top_p=st.sampled_from([None, 0.5, 0.95]),
        guidance_scale=st.sampled_from([1.0, 4.0]),
    ),
)
def test_choices_without_a_near_tie_survive_rounding(seed: int, spacing: float, chosen: SamplingSettings) -> None:
    positions = torch.arange(5)
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) * spacing
    draw = KeyedDraw(seed, 0, 0, chosen)
    choice, log_probability = draw.tokens(logits, 0, positions)
    kept, sure = draw.smallest(log_probability, 2), draw.above(log_probability, math.log(0.3))
    for other in range(5):
        turned = KeyedDraw(seed, 0, 0, chosen)
        turned_choice, turned_log_probability = turned.tokens(perturbed(chosen, logits, other), 0, positions)
        if not draw.n_near_ties:
            assert torch.equal(turned_choice, choice)
            assert torch.equal(turned.smallest(turned_log_probability, 2), kept)
            assert torch.equal(turned.above(turned_log_probability, math.log(0.3)), sure)


def test_near_ties_are_counted() -> None:
    positions, logits = torch.arange(3), torch.tensor([[0.0, 5.0, 5.0 + NEAR_TIE / 2], [0.0, 5.0, 6.0], [9.0, 0, 0]])
    draw = KeyedDraw(0, 0, 0, SamplingSettings(temperature=0))
    draw.tokens(logits, 0, positions)
    assert draw.n_near_ties == 1
    draw.smallest(torch.tensor([0.5, 0.5 + NEAR_TIE, 2.0, float("inf")]), 1)
    assert draw.n_near_ties == 2
    draw.smallest(torch.tensor([0.5, 0.5 + NEAR_TIE, 2.0, float("inf")]), 2)
    draw.smallest(torch.tensor([0.5, 0.5]), 0)
    draw.smallest(torch.tensor([0.5, 0.5]), 2)
    draw.tokens(torch.zeros(3, 1), 0, positions)
    assert draw.n_near_ties == 2
    assert draw.above(torch.tensor([-1.0 + NEAR_TIE / 2, 0.0, -2.0]), -1.0).tolist() == [True, True, False]
    assert draw.n_near_ties == 3


def test_cuts_that_rounding_could_move_are_near_ties() -> None:
    logits, positions = torch.tensor([[3.0, 1.0 + NEAR_TIE / 2, 1.0]]), torch.arange(1)
    for k, expected in ((1, 0), (2, 1), (3, 0)):
        draw = KeyedDraw(0, 0, 0, SamplingSettings(temperature=0, top_k=k))
        draw.tokens(logits, 0, positions)
        assert draw.n_near_ties == expected
    at_the_cut = float(torch.tensor([2.0, 1.0, 0.0]).softmax(0)[0])
    for p, expected in ((at_the_cut, 1), (at_the_cut - 0.01, 0), (at_the_cut + 0.01, 0)):
        draw = KeyedDraw(0, 0, 0, SamplingSettings(temperature=0, top_p=p))
        draw.tokens(torch.tensor([[2.0, 1.0, 0.0]]), 0, positions)
        assert draw.n_near_ties == expected
