"""A codec with a margin: what a code sees, and what a changed code changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniform.tokenizers.base import Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig

SIZE, CELL = 24, 4
MARGINS = [0, 1, 3, 6]


def build(margin: int | None) -> ImageTokenizer:
    """Cells of 4 x 4 pixels, with so many codes that hardly any change of the latents is lost."""
    torch.manual_seed(0)
    config = ImageTokenizerConfig(
        image_size=SIZE, widths=(16, 24), margin=margin, quantizer=FSQConfig(levels=(301, 301, 301))
    )
    return ImageTokenizer(config, config.build())


def changed(tokenizer: ImageTokenizer, row: int, column: int) -> Tensor:
    """Which codes (6, 6) change when one pixel does."""
    image = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    other = image.clone()
    other[0, row, column] = -other[0, row, column].sign()
    before, after = (tokens.codes.view(6, 6) for tokens in tokenizer.encode_batch([image, other]))
    return before != after


@pytest.mark.parametrize("margin", MARGINS)
@given(row=st.integers(0, SIZE - 1), column=st.integers(0, SIZE - 1))
def test_a_pixel_changes_the_codes_within_the_margin_and_no_other(margin: int, row: int, column: int) -> None:
    first = torch.arange(0, SIZE, CELL)
    near_row = (first - margin <= row) & (row < first + CELL + margin)
    near_column = (first - margin <= column) & (column < first + CELL + margin)
    assert changed(build(margin), row, column).equal(near_row[:, None] & near_column)


def test_without_a_margin_codes_see_pixels_from_corner_to_corner() -> None:
    seen = changed(build(None), 0, 0)  # a few latents change by less than a level
    assert seen.float().mean() > 0.6
    assert seen[-1, -1]


@pytest.mark.parametrize("margin", MARGINS)
def test_like_windows_get_like_codes_wherever_they_stand(margin: int) -> None:
    tokenizer = build(margin)
    tile = torch.rand(1, CELL, CELL, generator=torch.Generator().manual_seed(2)) * 2 - 1
    flat, repeated = torch.full((1, SIZE, SIZE), 0.3), tile.repeat(1, 6, 6)
    assert len(tokenizer.encode(flat).codes.unique()) == 1  # at the border too
    inner = tokenizer.encode(repeated).codes.view(6, 6)[2:-2, 2:-2]
    assert len(inner.unique()) == 1


def test_a_code_changes_only_pixels_near_its_cell() -> None:
    # Two convolutions of 3 x 3 at each of two resolutions, and one more at the finer: 2 cells and 3 patches of 2.
    tokenizer = build(0)
    codes = torch.randint(301**3, (36,), generator=torch.Generator().manual_seed(3))
    other = codes.clone()
    other[0] = 0
    before, after = tokenizer.decode_batch([Tokens(c, (6, 6)) for c in (codes, other)])
    reach = CELL + 2 * CELL + 3 * 2
    assert (before != after)[0, :CELL, :CELL].any()
    assert before[0, reach:].equal(after[0, reach:])
    assert before[0, :, reach:].equal(after[0, :, reach:])
