import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from omniform.kernels.keyed_noise import keyed_bits, keyed_gumbel, keyed_permutation, keyed_uniform, stream

KEYS = st.integers(0, 2**63 - 1)


@given(KEYS, st.integers(1, 50), st.integers(1, 20))
def test_each_number_depends_on_its_own_keys_alone(seed: int, rows: int, columns: int) -> None:
    together = keyed_bits(seed, np.arange(rows)[:, None], np.arange(columns))
    for row in range(rows):
        for column in range(columns):
            assert keyed_bits(seed, row, column) == together[row, column]


def test_order_of_keys_matters_and_streams_differ() -> None:
    assert keyed_bits(1, 2) != keyed_bits(2, 1)
    assert keyed_bits(1, stream("a")) != keyed_bits(1, stream("b"))


@pytest.mark.parametrize("axis", ["seed", "last key"])
def test_uniform_numbers_pass_kolmogorov_smirnov_and_show_no_serial_correlation(axis: str) -> None:
    n = np.arange(100_000)
    numbers = keyed_uniform(n, 7) if axis == "seed" else keyed_uniform(7, n)
    assert ((numbers > 0) & (numbers < 1)).all()
    # The keys are fixed, so these p-values are constants of the algorithm, not chances of failure.
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(len(n))


def test_gumbel_noise_has_the_standard_gumbel_distribution() -> None:
    assert stats.kstest(keyed_gumbel(3, np.arange(100_000)), "gumbel_r").pvalue > 1e-3


@given(st.integers(0, 500), KEYS, KEYS)
def test_permutation_holds_every_index_once_and_repeats(size: int, seed: int, epoch: int) -> None:
    order = keyed_permutation(size, seed, epoch)
    assert sorted(order) == list(range(size))
    assert (order == keyed_permutation(size, seed, epoch)).all()


def test_a_key_that_is_not_integral_is_refused() -> None:
    with pytest.raises(TypeError, match="integral"):
        keyed_bits(1.5)


def test_bits_are_what_they_were_when_first_released() -> None:
    """Data order and samples of every stored run follow from these bits: they may never change."""
    assert [int(x) for x in keyed_bits(0, np.arange(3))] == [
        2558736989570252433,
        4964578127960768432,
        15415986080105920549,
    ]
