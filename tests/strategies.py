"""Small documents for tests: makers of parts, and hypothesis strategies over them."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from omniform.modeling.objectives.base import TargetSpans
from omniform.modeling.sequence import Part, Role
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

TEXT_SIZE, CODEBOOK, SPEECH_CODEBOOK = 50, 8, 6


def text_part(codes: Sequence[int], role: Role) -> Part:
    """A text part of given codes."""
    return Part("text", Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),)), role)


def image_part(codes: Sequence[int], role: Role, grid: tuple[int, int] = (2, 2)) -> Part:
    """An image part of given codes."""
    return Part("image", Tokens(torch.tensor(codes, dtype=torch.int64), grid), role)


def speech_part(codes: Sequence[int], role: Role) -> Part:
    """A speech part of given codes, of free length."""
    return Part("speech", Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),)), role)


def video_part(codes: Sequence[int], role: Role) -> Part:
    """A video part of given codes, on two frames of 2 x 2."""
    return Part("video", Tokens(torch.tensor(codes, dtype=torch.int64), (2, 2, 2)), role)


ROLES = st.sampled_from([Role.CONTEXT, Role.TARGET])
TEXT_PARTS = st.builds(text_part, st.lists(st.integers(0, TEXT_SIZE - 1), max_size=5), ROLES)
IMAGE_PARTS = st.builds(image_part, st.lists(st.integers(0, CODEBOOK - 1), min_size=4, max_size=4), ROLES)
SPEECH_PARTS = st.builds(speech_part, st.lists(st.integers(0, SPEECH_CODEBOOK - 1), max_size=5), ROLES)
VIDEO_PARTS = st.builds(video_part, st.lists(st.integers(0, CODEBOOK - 1), min_size=8, max_size=8), ROLES)
DOCUMENTS = st.lists(st.one_of(TEXT_PARTS, IMAGE_PARTS), min_size=1, max_size=4)
FOUR_MODALITIES = st.lists(st.one_of(TEXT_PARTS, IMAGE_PARTS, SPEECH_PARTS, VIDEO_PARTS), min_size=1, max_size=4)


def four_modalities() -> Vocabulary:
    """Text, images, speech of free length, and videos."""
    sizes = {"image": Discrete(CODEBOOK), "speech": Discrete(SPEECH_CODEBOOK), "video": Discrete(CODEBOOK)}
    return Vocabulary(TEXT_SIZE, sizes, ["speech"])


def vector_spans(lengths: list[int], channels: int = 3, first_key: int = 0) -> TargetSpans:
    """Spans of random vectors, each of a sample of its own."""
    total = sum(lengths)
    values = torch.randn(total, channels, generator=torch.Generator().manual_seed(7))
    return TargetSpans(
        token_ids=np.full(total, 999),
        rows=np.arange(total),
        span_index=np.repeat(np.arange(len(lengths)), lengths),
        positions=np.concatenate([np.arange(n) for n in lengths]),
        lengths=np.array(lengths),
        noise_keys=np.arange(first_key, first_key + len(lengths), dtype=np.uint64),
        span_numbers=np.zeros(len(lengths), dtype=np.int64),
        values=values,
    )
