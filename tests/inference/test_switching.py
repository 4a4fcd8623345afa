"""Constrained switching: whatever the weights, what is asked for comes in that order, and every part can be decoded."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.protocol import ContentPart, ImagePart, SpeechPart, TextPart, VideoPart
from omniform.inference.sampling import sampling_settings, truncated_log_probs
from omniform.inference.session import Plan, Session
from omniform.modeling.codebooks import NOTHING
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.sequence import Part, Role
from omniform.tokenizers.base import Modality, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig

NAMES = ("text", "image", "speech", "video")
ORDERS = [order for n in (1, 2, 3) for order in itertools.product(NAMES, repeat=n)]
N_CODES = 5  # rows of speech, of whose codes two make a frame: flattened, a span can end within one
FRAME_SAMPLES = 1280
OBJECTIVES: dict[str, dict[str, Objective]] = {
    "usual": {"text": NextToken(), "image": Masked(steps=3), "speech": NextToken(), "video": Masked(steps=2)},
    "turned": {
        "text": Masked(steps=4, order="random"),
        "image": NextToken(),
        "speech": CoarseToFine(block_size=4, steps=3),
        "video": NextToken(),
    },
}


@dataclass(frozen=True)
class Case:
    """What one session is asked for."""

    order: tuple[str, ...] | None
    settings: SamplingSettings
    context: list[Part]
    dropped: list[Part] | None
    seed: int


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Modality]:
    """Codecs of random weights and the text tokenizer of 8 letters, 256 bytes and `unknown`."""
    torch.manual_seed(0)
    image = ImageTokenizerConfig(patch_size=8, widths=(8,), quantizer=FSQConfig(levels=(4, 3)))
    two_codes = ResidualConfig(depth=2, base=FSQConfig(levels=(3, 3)))
    speech = SpeechTokenizerConfig(width=8, n_blocks=1, frame_samples=FRAME_SAMPLES, quantizer=two_codes)
    video = VideoTokenizerConfig(patch_size=16, widths=(8,), time_strides=(), quantizer=FSQConfig(levels=(3, 5)))
    return {
        "text": SentencePieceTokenizer.train(["one digit"], vocab_size=265),
        "image": ImageTokenizer(image, image.build()),
        "speech": SpeechTokenizer(speech, speech.build()),
        "video": VideoTokenizer(video, video.build()),
    }


@pytest.fixture(
    params=[("usual", "shared", 0.3), ("turned", "modality", 0.3), ("usual", "modality", 30.0)],
    ids=["usual", "turned", "extreme"],
)
def omni(request: pytest.FixtureRequest, tokenizers: dict[str, Modality]) -> Model:
    """Random weights; the extreme ones give logits in the ten thousands."""
    objectives, experts, std = request.param
    decoder = DecoderConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, experts=experts)
    config = ModelConfig(decoder=decoder, objectives=OBJECTIVES[objectives], next_span_weight=0.1)
    torch.manual_seed(1)
    network = UnifiedModel(config, build_vocabulary(tokenizers))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    return Model(LoadedModel(network, tokenizers, {"max_sequence_length": 400}))


def all_settings() -> list[SamplingSettings]:
    """Return every combination of ordinary and extreme values."""
    grid = itertools.product((0.0, 1e-6, 1.0, 1e6), (None, 1, 3), (None, 5e-324, 0.6), (1.0, 0.0, 1e6))
    return [
        SamplingSettings(
            max_new_tokens=N_CODES,
            temperature=temperature,
            top_k=k,
            top_p=p,
            guidance_scale=scale,
            steps=(None, 99)[number % 2],
        )
        for number, (temperature, k, p, scale) in enumerate(grid)
    ]


def cases(omni: Model) -> Iterator[Case]:
    """Yield one case per combination of settings, the orders and prompts in turn; each seventh order is the model's."""
    tokens = {
        "text": omni.tokenizers["text"].encode("one"),
        "image": omni.tokenizers["image"].encode(torch.zeros(1, 16, 16)),
        "speech": Tokens(torch.tensor([1, 2, 3, 4]), (2, 2)),
        "video": omni.tokenizers["video"].encode(torch.zeros(1, 9, 32, 32)),
    }
    orders, prompts = itertools.cycle(ORDERS), itertools.cycle([(), *((name,) for name in NAMES), ("text", "image")])
    for seed, settings in enumerate(all_settings()):
        context = [Part(name, tokens[name], Role.CONTEXT) for name in next(prompts)]
        order = None if seed % 7 == 0 and context else next(orders)
        dropped: list[Part] | None = None if settings.guidance_scale == 1 else context[1:]
        yield Case(order, settings, context, dropped, seed)


def test_every_draw_is_an_id_of_its_span_and_every_part_decodes(omni: Model) -> None:
    vocabulary, asked = omni.network.vocabulary, list(cases(omni))
    n_ids, found = 0, set()
    for first in range(0, len(asked), 60):
        group = asked[first : first + 60]
        sessions = [
            Session(
                case.context,
                case.dropped,
                Plan(case.order, dict.fromkeys(NAMES, case.settings), case.seed, max_rows=150, max_parts=3),
            )
            for case in group
        ]
        for steps in omni.engine.run(sessions):
            for step in steps:
                ids, state = vocabulary.target_range(step.span.modality), step.span.state
                known = state.token_ids != vocabulary.mask
                decided = state.token_ids[known & (state.token_ids != NOTHING)]
                assert known.all() or not state.done
                assert bool(((decided >= ids.start) & (decided < ids.stop)).all())
                assert state.step <= state.n_steps
        for case, session in zip(group, sessions, strict=True):
            parts = session.branches[0].parts[len(case.context) :]
            order = tuple(part.modality for part in parts)
            assert session.done
            assert order == case.order or (case.order is None and 1 <= len(order) <= 3)
            found.add(order)
            for part in parts:
                grid = omni.engine.fixed_grids[part.modality]
                n_codes, n_codebooks = len(part.tokens.codes), vocabulary.n_codebooks(part.modality)
                assert part.tokens.grid == grid or (grid is None and n_codes <= N_CODES * n_codebooks)
                n_ids += n_codes
                codes = part.tokens.codes.view(part.tokens.grid) if n_codebooks > 1 else part.tokens.codes
                assert vocabulary.to_ids(part.modality, codes).numel() == n_codes
    assert n_ids > 800
    assert set(ORDERS) <= found


def check(part: ContentPart, tokenizer: Modality) -> None:
    """Check a part of a reply as its user meets it."""
    match part:
        case TextPart():
            assert part.text.encode().decode() == part.text
            # Text is text: made into ids and back it is the same, so it holds no symbol of the model's own.
            assert tokenizer.decode(tokenizer.encode(part.text)) == part.text
        case ImagePart():
            assert part.image.size == (16, 16)
        case SpeechPart():
            samples = torch.as_tensor(part.audio.samples)
            assert len(samples) in [FRAME_SAMPLES * n for n in range(N_CODES + 1)]
            assert bool((samples.isfinite() & (samples.abs() <= 1)).all())
        case VideoPart():
            assert len(part.video.frames) == 9
        case _:
            raise AssertionError(f"{part.modality} came as {type(part).__name__}")


@pytest.mark.parametrize("order", [("speech", "text", "image"), ("video", "text", "speech"), ("text",) * 3, "any"])
def test_replies_are_what_was_asked_for_in_that_order(omni: Model, order: str | tuple[str, ...]) -> None:
    prompts = ["one", "digit one", "\N{SNOWMAN} <begin:image> <end>"]
    to = order if isinstance(order, str) else list(order)
    for temperature in (1e-6, 1.0, 1e6):
        keywords = {"max_parts": 3} if order == "any" else {}
        replies = omni.generate_batch(prompts, to, seed=3, temperature=temperature, max_new_tokens=N_CODES, **keywords)
        for reply in replies:
            got = tuple(part.modality for part in reply.parts)
            assert got == order or order == "any"
            for part in reply.parts:
                check(part, omni.tokenizers[part.modality])


@given(
    logits=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=9),
    settings=st.sampled_from(all_settings()),
    barred=st.booleans(),
)
def test_whatever_the_settings_there_is_a_distribution_over_what_is_allowed(
    logits: list[float], settings: SamplingSettings, barred: bool
) -> None:
    given_logits = torch.tensor([logits])
    if barred:
        given_logits[0, 0] = -torch.inf
    probabilities = truncated_log_probs(given_logits, settings).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-4)
    assert not barred or probabilities[0, 0] == 0
    if settings.temperature < 1e-3:  # the likeliest is never cut
        assert probabilities[0, given_logits.argmax()] > 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 1e-9, "0, which takes the likeliest token, or at least 1e-6"),
        ("temperature", 1e7, "less than or equal to 1000000"),
        ("guidance_scale", 1e7, "less than or equal to 1000000"),
    ],
)
def test_settings_whose_logits_would_leave_the_range_of_numbers_are_refused(
    name: str, value: float, expected: str
) -> None:
    with pytest.raises(OmniformError, match=f"{name} is {value}, expected {expected}"):
        sampling_settings("generate", **{name: value})
