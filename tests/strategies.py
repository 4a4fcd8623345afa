"""Small documents for tests: makers of parts, and hypothesis strategies over them."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from omniform.modeling.sequence import Part, Role
from omniform.tokenizers.base import Tokens

TEXT_SIZE, CODEBOOK = 50, 8


def text_part(codes: Sequence[int], role: Role) -> Part:
    """A text part of given codes."""
    return Part("text", Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),)), role)


def image_part(codes: Sequence[int], role: Role, grid: tuple[int, int] = (2, 2)) -> Part:
    """An image part of given codes."""
    return Part("image", Tokens(torch.tensor(codes, dtype=torch.int64), grid), role)


ROLES = st.sampled_from([Role.CONTEXT, Role.TARGET])
TEXT_PARTS = st.builds(text_part, st.lists(st.integers(0, TEXT_SIZE - 1), max_size=5), ROLES)
IMAGE_PARTS = st.builds(image_part, st.lists(st.integers(0, CODEBOOK - 1), min_size=4, max_size=4), ROLES)
DOCUMENTS = st.lists(st.one_of(TEXT_PARTS, IMAGE_PARTS), min_size=1, max_size=4)
