"""What codes cost given their neighbours, in the comparison of tokenizers: against counting one by one."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

context_bits = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "image_tokenizers.py"))["context_bits"]


def rows(grids: list[list[list[int]]]) -> list[tuple[int | None, ...]]:
    """(code, left, upper) of every place."""
    return [
        (code, grid[i][j - 1] if j else None, grid[i - 1][j] if i else None)
        for grid in grids
        for i, line in enumerate(grid)
        for j, code in enumerate(line)
    ]


@given(seed=st.integers(0, 2**16), size=st.integers(2, 4))
def test_bits_in_context_are_those_of_counting(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, held_out = (torch.randint(size, (n, 2, 3), generator=generator) for n in (12, 5))
    known, bits = rows(train.tolist()), 0.0
    for row in rows(held_out.tolist()):
        probability = 1 / size
        for n in range(3):
            alone = [other for other in known if other[1 : n + 1] == row[1 : n + 1]]
            together = sum(other[0] == row[0] for other in alone)
            probability = (together + size * probability) / (len(alone) + size)
        bits -= math.log2(probability)
    assert context_bits(train, held_out, size) == pytest.approx(bits / 5)


def test_codes_that_neighbours_decide_cost_almost_nothing_and_random_ones_all() -> None:
    generator = torch.Generator().manual_seed(0)
    stripes = torch.arange(8).expand(500, 8, 8)
    assert context_bits(stripes, stripes, 8) < 2
    noise = torch.randint(8, (2000, 8, 8), generator=generator)
    assert context_bits(noise[:1900], noise[1900:], 8) == pytest.approx(64 * 3, rel=0.01)
    # Depth beside a place: the last axis is the one that is nearest.
    pairs = noise[:, :, :, None].expand(-1, -1, -1, 2)
    assert context_bits(pairs[:1900], pairs[1900:], 8) == pytest.approx(64 * 3, rel=0.02)
