"""Rows that are added in parts are the rows added at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.tokenizers.growing_array import GrowingArray


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    shape=st.sampled_from([(), (3,), (2, 1, 4)]),
    kept=st.integers(0, 9),
)
def test_rows_are_those_that_were_added(sizes: list[int], shape: tuple[int, ...], kept: int) -> None:
    parts = [np.random.default_rng(size).integers(0, 256, (size, *shape), dtype=np.uint8) for size in sizes]
    whole, beginning = GrowingArray(), GrowingArray()
    for part in parts:
        whole.extend(part)
        beginning.extend(part)
    expected = np.concatenate(parts)
    assert len(whole) == len(expected)
    np.testing.assert_array_equal(beginning.finish(min(kept, len(expected))), expected[:kept])
    np.testing.assert_array_equal(whole.finish(), expected)
    assert len(whole) == 0


def test_rows_of_another_kind_and_none_at_all_are_refused() -> None:
    rows = GrowingArray()
    with pytest.raises(ValueError, match="no rows"):
        rows.finish()
    rows.extend(np.zeros((2, 3), np.uint8))
    for other in (np.zeros((2, 1), np.uint8), np.zeros((2, 3), np.int8)):
        with pytest.raises(ValueError, match="follow some of uint8"):
            rows.extend(other)
