"""Lookup-free and residual quantization against brute force over all codes, and against vector-quantize-pytorch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniform.tokenizers.codecs.fsq import FSQ, FSQConfig
from omniform.tokenizers.codecs.lfq import LFQ, LFQConfig
from omniform.tokenizers.codecs.residual import Residual, ResidualConfig
from omniform.tokenizers.codecs.vq import VQEMA, VQEMAConfig

SEEDS = st.integers(0, 2**16)


def latents_of(seed: int, dim: int, *, n: int = 3, spread: float = 1.0) -> Tensor:
    """Random latents (n, dim, 4, 4)."""
    return torch.randn(n, dim, 4, 4, generator=torch.Generator().manual_seed(seed)) * spread


def learnt(seed: int, size: int = 12, dim: int = 3) -> VQEMA:
    """A codebook in use, of vectors of all sizes."""
    quantizer = VQEMA(VQEMAConfig(codebook_size=size, dim=dim))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.1, 1.5, size)[:, None]
    quantizer.codebook.copy_(F.normalize(torch.randn(size, dim, generator=generator), dim=1) * sizes)
    quantizer.average_use.fill_(3.0)
    quantizer.average_sum.copy_(quantizer.codebook * 3)
    return quantizer.eval()


def brute_force_entropies(latents: Tensor, temperature: float) -> tuple[float, float]:
    """The mean entropy of p(code | vector) and the entropy of mean p, over all 2^D codes."""
    dim = latents.shape[1]
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), dtype=torch.float64)
    vectors = latents.double().permute(0, 2, 3, 1).reshape(-1, dim)
    p = (-torch.cdist(vectors, corners).square() / temperature).softmax(1)
    return tuple(float(torch.special.entr(q).sum(-1).mean()) for q in (p, p.mean(0)))


@given(seed=SEEDS, bits=st.integers(1, 5), temperature=st.floats(0.3, 3))
def test_the_entropy_of_each_vector_is_that_over_all_codes(seed: int, bits: int, temperature: float) -> None:
    latents = latents_of(seed, bits, spread=0.7)
    per_vector, of_mean = brute_force_entropies(latents, temperature)
    penalty = LFQ(LFQConfig(bits=bits, temperature=temperature))(latents).losses["entropy"].item() / len(latents)
    # Of the mean, the sum over bits is an upper bound.
    assert penalty <= per_vector - of_mean + 1e-4
    if bits == 1:
        assert penalty == pytest.approx(per_vector - of_mean, abs=1e-4)


@given(seed=SEEDS, temperature=st.floats(0.3, 3))
def test_the_entropy_penalty_is_exact_where_bits_are_independent(seed: int, temperature: float) -> None:
    # Every combination of the values of three channels: their mean distribution is a product.
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) * 0.7
    vectors = torch.cartesian_prod(*values).T.view(1, 3, 8, 8)
    per_vector, of_mean = brute_force_entropies(vectors, temperature)
    penalty = LFQ(LFQConfig(bits=3, temperature=temperature))(vectors).losses["entropy"].item()
    assert penalty == pytest.approx(per_vector - of_mean, abs=1e-4)


def test_decided_and_varied_vectors_have_the_least_entropy_penalty_at_18_bits() -> None:
    lfq = LFQ(LFQConfig(bits=18))
    assert lfq.codebook_size == 2**18
    codes = torch.arange(2**18)[:: 2**8].view(1, 32, 32)
    best = lfq(lfq.code_vectors(torch.cat([codes, 2**18 - 1 - codes])) * 20)
    assert best.losses["entropy"].item() == pytest.approx(-2 * 18 * math.log(2), rel=1e-5)
    undecided = torch.zeros(2, 18, 4, 4, requires_grad=True)
    assert lfq(undecided).losses["entropy"].item() == pytest.approx(0, abs=1e-4)
    same = torch.full((2, 18, 4, 4), 20.0)
    assert lfq(same).losses["entropy"].item() == pytest.approx(0, abs=1e-3)
    lfq(torch.full_like(undecided, 30.0).requires_grad_()).losses["entropy"].backward()


@given(seed=SEEDS, bits=st.integers(1, 6))
def test_lfq_is_that_of_the_reference(seed: int, bits: int) -> None:
    latents = latents_of(seed, bits)
    ours = LFQ(LFQConfig(bits=bits, temperature=1.0))
    theirs = reference.LFQ(dim=bits, codebook_size=2**bits, commitment_loss_weight=1.0)
    quantized = ours(latents)
    (vectors, codes, _), losses = theirs(latents, inv_temperature=1.0, return_loss_breakdown=True)
    torch.testing.assert_close(quantized.latents, vectors)
    assert ours.code_vectors(quantized.codes).equal(quantized.latents.sign())
    # They number the bits from the other end.
    digits = quantized.codes[..., None] >> torch.arange(bits)
    assert (digits % 2 * 2 ** torch.arange(bits - 1, -1, -1)).sum(-1).equal(codes.long())
    assert quantized.losses["commitment"].item() / len(latents) == pytest.approx(losses.commitment.item(), rel=1e-4)
    per_vector, _ = brute_force_entropies(latents, 1.0)
    assert losses.per_sample_entropy.item() == pytest.approx(per_vector, abs=2e-3)


@pytest.mark.parametrize("levels", [(3,), (8, 8), (8, 5, 3)])
@given(seed=SEEDS)
def test_fsq_is_that_of_the_reference(levels: tuple[int, ...], seed: int) -> None:
    fsq, latents = FSQ(levels), latents_of(seed, len(levels))
    quantized = fsq(latents)
    vectors, codes = reference.FSQ(list(levels))(latents)
    # The reference stretches the outermost intervals by 0.2 %, which matters near the border of two values only.
    scaled = fsq.bound(latents) * (torch.tensor(levels).view(-1, 1, 1) // 2)
    clear = ((scaled - scaled.floor() - 0.5).abs() > 0.02).all(1)
    assert clear.any()
    assert quantized.codes[clear].equal(codes.long()[clear])
    torch.testing.assert_close(quantized.latents.movedim(1, -1)[clear], vectors.movedim(1, -1)[clear])


@given(seed=SEEDS, depth=st.integers(2, 4))
def test_residual_vq_is_that_of_the_reference(seed: int, depth: int) -> None:
    base = learnt(seed)
    ours = Residual(base, depth).eval()
    theirs = reference.ResidualVQ(dim=3, codebook_size=12, num_quantizers=depth, shared_codebook=True).eval()
    theirs.layers[0]._codebook.embed.data.copy_(base.codebook[None])
    latents = latents_of(seed + 1, 3, spread=0.5)
    quantized = ours(latents)
    vectors, codes, _ = theirs(latents.permute(0, 2, 3, 1).reshape(len(latents), 16, 3))
    assert quantized.codes.view(len(latents), 16, depth).equal(codes)
    torch.testing.assert_close(quantized.latents.flatten(2).mT, vectors)


@given(seed=SEEDS, depth=st.integers(2, 4))
def test_residual_lfq_is_that_of_the_reference(seed: int, depth: int) -> None:
    ours = ResidualConfig(depth=depth, base=LFQConfig(bits=4)).build()
    theirs = reference.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=depth).eval()
    latents = latents_of(seed, 4)
    vectors, _, _ = theirs(latents.permute(0, 2, 3, 1).reshape(len(latents), 16, 4))
    torch.testing.assert_close(ours(latents).latents.flatten(2).mT, vectors)


@pytest.mark.parametrize("levels", [(3,), (5, 3), (8, 8), (4, 6)])
@given(seed=SEEDS, depth=st.integers(2, 3))
def test_depths_of_fsq_are_finer_and_finer_digits(levels: tuple[int, ...], seed: int, depth: int) -> None:
    base = FSQConfig(levels=levels).build()
    latents = latents_of(seed, len(levels))
    left = (Residual(base, depth)(latents).latents - base.bound(latents)).abs()
    counts = torch.tensor(levels).view(-1, 1, 1)
    if all(n % 2 for n in levels):  # the interval that rounds to one value is divided evenly
        assert (left <= 0.501 * counts.float() ** (1 - depth) / (counts // 2)).all()
    shallower = base(latents) if depth == 2 else Residual(base, depth - 1)(latents)
    assert (left <= (shallower.latents - base.bound(latents)).abs() + 1e-6).all()


@pytest.mark.parametrize("kind", ["fsq", "lfq", "vq_ema"])
@given(seed=SEEDS, depth=st.integers(2, 4))
@settings(max_examples=30)
def test_residual_codes_decode_to_what_was_quantized(kind: str, seed: int, depth: int) -> None:
    base = {"fsq": FSQ((5, 4, 3)), "lfq": LFQ(LFQConfig(bits=3)), "vq_ema": learnt(seed)}[kind]
    quantizer = Residual(base, depth).eval()
    assert (quantizer.codebook_size, quantizer.dim, quantizer.depth) == (base.codebook_size, 3, depth)
    latents = latents_of(seed, 3).requires_grad_()
    quantized = quantizer(latents)
    assert quantized.codes.shape == (3, 4, 4, depth)
    torch.testing.assert_close(quantizer.code_vectors(quantized.codes), quantized.latents)
    assert list(quantized.losses) == list(quantizer.loss_terms)
    # The first code is the base's own, and any code of the range decodes.
    assert quantized.codes[..., 0].equal(base(latents).codes)
    draw = torch.randint(quantizer.codebook_size, (2, 4, 4, depth), generator=torch.Generator().manual_seed(seed))
    assert quantizer.code_vectors(draw).isfinite().all()
    weights = torch.randn(3, 3, 4, 4)
    (quantized.latents * weights).sum().backward()
    straight = latents.grad.clone()
    latents.grad = None
    (base.bound(latents) * weights).sum().backward()
    torch.testing.assert_close(straight, latents.grad)


@given(seed=SEEDS)
def test_commitment_of_residual_vq_sums_over_partial_sums(seed: int) -> None:
    # RQ-VAE: the distance from the latents to the sum of the first d vectors, over all d.
    quantizer = Residual(learnt(seed), 3).eval()
    latents = latents_of(seed + 1, 3)
    quantized = quantizer(latents)
    partial = torch.zeros_like(latents)
    expected = 0.0
    for chosen in quantized.codes.unbind(-1):
        partial = partial + quantizer.base.code_vectors(chosen)
        expected += (latents - partial).square().mean((1, 2, 3)).sum().item()
    assert quantized.losses["commitment"].item() == pytest.approx(expected, rel=1e-4)


def test_a_shared_codebook_learns_from_every_depth() -> None:
    alone, base = (VQEMA(VQEMAConfig(codebook_size=32, dim=2)) for _ in range(2))
    quantizer = Residual(base, 2)
    for seed in range(60):
        latents = latents_of(seed, 2, n=8)
        error_alone = (latents - alone(latents).latents).square().mean()
        quantized = quantizer(latents)
        error = (latents - quantized.latents).square().mean()
    assert (int(alone.n_updates), int(base.n_updates)) == (60, 120)
    assert error < 0.7 * error_alone
    assert len(quantized.codes[..., 1].unique()) > 4
