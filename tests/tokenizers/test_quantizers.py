"""Quantizers against slow oracles: FSQ's closed form, and a learnt codebook moved one vector at a time."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from omniform.tokenizers.codecs.fsq import FSQ
from omniform.tokenizers.codecs.vq import VQEMA, VQEMAConfig

LEVELS = [(3,), (8, 8), (4, 4, 4), (8, 5, 3)]
HERE = Path(__file__).parent


def fsq_oracle(value: float, levels: int) -> float:
    """One channel of arXiv:2309.15505, section 3 and appendix A.1, before rounding."""
    reach = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.0 if levels % 2 else 0.5
    return math.tanh(value + math.atanh(offset / reach)) * reach - offset


def on_grid(vectors: Tensor) -> Tensor:
    """Lay vectors (N, D) on a grid (1, D, N, 1)."""
    return vectors.T[None, :, :, None]


def off_grid(latents: Tensor) -> Tensor:
    """Undo `on_grid`."""
    return latents[0, :, :, 0].T


def learnt_codebook(seed: int, size: int = 6, dim: int = 3, **settings: float) -> VQEMA:
    """A codebook in use: no code is dead."""
    quantizer = VQEMA(VQEMAConfig(codebook_size=size, dim=dim, **settings))
    generator = torch.Generator().manual_seed(seed)
    quantizer.average_use.uniform_(2, 5, generator=generator)
    quantizer.average_sum.normal_(generator=generator)
    quantizer.codebook.copy_(quantizer.average_sum / quantizer.average_use[:, None])
    return quantizer


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_codes_and_vectors_are_in_bijection(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    assert fsq.codebook_size == math.prod(levels)
    codes = torch.arange(fsq.codebook_size)
    vectors = off_grid(fsq.code_vectors(codes.view(1, -1, 1)))
    # The codebook of the paper: every combination of evenly spaced values per channel, within [-1, 1].
    steps = [[(digit - n // 2) / (n // 2) for digit in range(n)] for n in levels]
    expected = torch.tensor(list(itertools.product(*steps)))
    assert sorted(vectors.tolist()) == sorted(expected.tolist())
    # The latents that are bounded onto a vector choose its code.
    counts = torch.tensor(levels)
    reach, offset = (counts - 1) * (1 - 1e-3) / 2, 0.5 * (counts % 2 == 0)
    bounded = ((vectors * (counts // 2) + offset) / reach).clamp(-1 + 1e-6, 1 - 1e-6)
    latents = torch.atanh(bounded) - torch.atanh(offset / reach)
    assert fsq(on_grid(latents)).codes.flatten().equal(codes)


@pytest.mark.parametrize("levels", LEVELS)
@given(values=st.lists(st.floats(-6, 6, width=32), min_size=3, max_size=3))
def test_fsq_rounds_as_the_paper_says(levels: tuple[int, ...], values: list[float]) -> None:
    values = values[: len(levels)]
    bounded = [fsq_oracle(value, n) for value, n in zip(values, levels, strict=True)]
    assume(all(abs(b - math.floor(b) - 0.5) > 1e-4 for b in bounded))  # float32 may round a tie either way
    quantized = FSQ(levels)(torch.tensor(values).view(1, -1, 1, 1))
    expected = [round(b) / (n // 2) for b, n in zip(bounded, levels, strict=True)]
    assert quantized.latents.flatten().tolist() == pytest.approx(expected)
    assert FSQ(levels).code_vectors(quantized.codes).flatten().tolist() == pytest.approx(expected)
    assert quantized.losses == {}


def test_fsq_maps_zero_to_zero_and_reaches_every_level() -> None:
    for n in range(3, 10):
        latents = torch.linspace(-9, 9, 4001).view(1, 1, -1, 1)
        assert FSQ((n,))(latents).codes.unique().tolist() == list(range(n))
        assert FSQ((n,))(torch.zeros(1, 1, 1, 1)).latents.item() == 0


@pytest.mark.parametrize("levels", LEVELS)
def test_the_gradient_of_fsq_passes_straight_through_rounding(levels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, len(levels), 3, 3, requires_grad=True)
    weights = torch.randn(2, len(levels), 3, 3)
    (FSQ(levels)(latents).latents * weights).sum().backward()
    counts = torch.tensor(levels).view(-1, 1, 1)
    reach, offset = (counts - 1) * (1 - 1e-3) / 2, 0.5 * (counts % 2 == 0)
    slope = reach * (1 - torch.tanh(latents.detach() + torch.atanh(offset / reach)) ** 2) / (counts // 2)
    torch.testing.assert_close(latents.grad, slope * weights)


@given(seed=st.integers(0, 2**16), n=st.integers(1, 40))
def test_the_nearest_code_is_the_nearest_by_brute_force(seed: int, n: int) -> None:
    quantizer = learnt_codebook(seed).eval()
    vectors = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1))
    distances = [[sum((a - b) ** 2 for a, b in zip(v, c, strict=True)) for c in quantizer.codebook] for v in vectors]
    chosen = quantizer(on_grid(vectors))
    expected = [row.index(min(row)) for row in distances]
    assert chosen.codes.flatten().tolist() == expected
    torch.testing.assert_close(off_grid(chosen.latents), quantizer.codebook[expected])
    squares = sum(min(row) for row in distances)
    assert chosen.losses["commitment"].item() == pytest.approx(float(squares) / (n * 3), rel=1e-4)


@given(seed=st.integers(0, 2**16), n=st.integers(1, 40), decay=st.floats(0.5, 0.99))
def test_an_update_moves_each_code_to_the_average_of_what_chose_it(seed: int, n: int, decay: float) -> None:
    quantizer = learnt_codebook(seed, decay=decay)
    use, total = quantizer.average_use.tolist(), quantizer.average_sum.tolist()
    vectors = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + 1))
    choice = quantizer(on_grid(vectors)).codes.flatten().tolist()
    for code in range(6):
        own = [v for v, c in zip(vectors.tolist(), choice, strict=True) if c == code]
        use[code] = decay * use[code] + (1 - decay) * len(own)
        total[code] = [decay * t + (1 - decay) * sum(v[d] for v in own) for d, t in enumerate(total[code])]
        expected = [t / use[code] for t in total[code]]
        assert quantizer.codebook[code].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert quantizer.average_use.tolist() == pytest.approx(use, rel=1e-4)


def test_nothing_is_learnt_in_evaluation_or_from_vectors_that_are_not_finite() -> None:
    quantizer = learnt_codebook(0)
    quantizer.average_use[0] = 0.1  # dead
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    quantizer.eval()(torch.randn(2, 3, 2, 2))
    assert all(buffer.equal(before[name]) for name, buffer in quantizer.named_buffers())
    quantizer.train()(torch.full((2, 3, 2, 2), math.nan))
    assert all(b.equal(before[name]) for name, b in quantizer.named_buffers() if name != "n_updates")


def test_the_gradient_passes_the_codebook_unchanged() -> None:
    quantizer = learnt_codebook(1)
    latents, weights = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2)
    (quantizer(latents).latents * weights).sum().backward()
    assert latents.grad is not None
    assert latents.grad.equal(weights)


def test_dead_codes_are_set_on_vectors_of_the_batch_and_live_ones_are_not() -> None:
    quantizer = learnt_codebook(2, decay=0.999)
    quantizer.average_use[[1, 4]] = 0.5
    live = quantizer.codebook[[0, 2, 3, 5]].clone()
    far = torch.randn(50, 3, generator=torch.Generator().manual_seed(3)) + 100
    codes = quantizer(on_grid(far)).codes
    assert set(codes.unique().tolist()) == {1, 4}  # only the restarted ones lie where the vectors are
    assert (torch.cdist(quantizer.codebook[[1, 4]], far).amin(1) < 1).all()
    torch.testing.assert_close(quantizer.codebook[[0, 2, 3, 5]], live)


def test_the_first_batch_initialises_the_codebook_and_every_code_comes_into_use() -> None:
    quantizer = VQEMA(VQEMAConfig(codebook_size=16, dim=2, decay=0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        vectors = torch.randn(256, 2, generator=generator)
        codes = quantizer(on_grid(vectors)).codes
    assert codes.unique().numel() == 16
    # 16 codes leave far less than the variance, which is what one code would leave.
    error = (vectors - quantizer.codebook[codes.flatten()]).square().sum(1).mean()
    assert error < 0.25 * vectors.square().sum(1).mean()


def test_two_ranks_keep_the_codebook_of_one_process_with_all_vectors(tmp_path: Path) -> None:
    script, store = HERE / "two_rank_codebook.py", tmp_path / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), store, tmp_path / f"{rank}.pt"], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, buffer in first["ranks"].items():
        assert buffer.equal(second["ranks"][name])
        torch.testing.assert_close(buffer, first["alone"][name])
    assert first["restarted"].equal(second["restarted"])
