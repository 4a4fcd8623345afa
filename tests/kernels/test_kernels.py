"""Every kernel against its reference, forward and backward, and against another library where one has it."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniform.kernels.attention import (
    WIDEST_PRODUCTS,
    DenseMask,
    DocumentBatch,
    DocumentMask,
    attention,
    attention_reference,
)
from omniform.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from omniform.kernels.rmsnorm import rms_norm, rms_norm_reference
from omniform.kernels.rope import rotary_angles, rotate, rotate_reference

# Largest error of one op in each precision: a few units in the last place of numbers near 1 to 10.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_equals_the_textbook_formula(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 7, 8), (2, kv_heads, 9, 8), (2, kv_heads, 9, 8)]
    q, k, v = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    allowed = torch.rand(2, 1, 7, 9, generator=generator) < 0.6
    allowed[..., 0] = True
    out = attention(q, k, v, DenseMask(allowed))
    expected = attention_reference(q.double(), k.double(), v.double(), allowed)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    upstream = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [7, WIDEST_PRODUCTS, WIDEST_PRODUCTS + 1])
def test_attention_of_documents_equals_the_textbook_formula(width: int, dtype: torch.dtype) -> None:
    """Plain products, for bf16 up to a width, and the fused kernel otherwise; two rows of padding get zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, width + 2, 4) for heads in (2, 1, 1)]
    q, k, v = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    allowed = torch.ones(width, width, dtype=torch.bool).tril()
    sources = torch.cat([torch.arange(width), torch.full((2,), width)])
    mask = DocumentMask((DocumentBatch(torch.arange(width)[None], allowed[None, None]),), sources)
    out = attention(q, k, v, mask)
    expected = attention_reference(*(x[:, :, :width].double() for x in (q, k, v)), allowed[None, None])
    torch.testing.assert_close(out[:, :, :width].double(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert not out[:, :, width:].any()
    upstream = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), upstream[:, :, :width].double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_uneven_head_groups_are_refused() -> None:
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="4 query heads"):
        attention(q, k, k, DenseMask(torch.ones(1, 1, 2, 2, dtype=torch.bool)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8).map(lambda n: 2 * n), st.integers(0, 10_000), st.integers(0, 2**31))
def test_rotation_equals_multiplication_of_complex_numbers(head_dim: int, furthest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, head_dim, generator=generator)
    positions = torch.randint(0, furthest + 1, (2, 5, 3), generator=generator)
    out = rotate(x, *rotary_angles(positions, head_dim, 10_000.0))
    # fp32 angles of up to 10^4 radians carry an error of 10^4 * 2^-24.
    torch.testing.assert_close(out, rotate_reference(x, positions, 10_000.0), atol=1e-5 + 3e-7 * furthest, rtol=0)


def test_scores_depend_on_position_differences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 12, generator=generator)
    positions = torch.randint(0, 50, (1, 6, 3), generator=generator)

    def scores(shift: int) -> torch.Tensor:
        angles = rotary_angles(positions + shift, 12, 10_000.0)
        return rotate(q, *angles) @ rotate(k, *angles).transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(37), atol=1e-4, rtol=0)


def test_odd_head_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        rotary_angles(torch.zeros(1, 1, 3, dtype=torch.int64), 7, 10_000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_its_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, 5, 16, generator=generator)).to(dtype)
    weight = torch.randn(16, generator=generator)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_its_formula_forward_and_backward(z_loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, 11, generator=generator)).requires_grad_()
    labels = torch.randint(0, 11, (9,), generator=generator)
    ours, expected = cross_entropy(logits, labels, z_loss), cross_entropy_reference(logits, labels, z_loss)
    torch.testing.assert_close(ours.double(), expected, atol=5e-6, rtol=0)
    (a,) = torch.autograd.grad(ours.sum(), logits)
    (b,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


SHAPES = """
import os, omniform, torch
from torch.nn import functional as F
weight = torch.randn(512, 512).bfloat16()
def held(): return int(open("/proc/self/statm").read().split()[1])
for n in range(1, 1001):
    F.linear(torch.randn(n, 512).bfloat16(), weight)
    if n == 200:
        before = held()
print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], held() - before)
"""


# Not by the most that a process has held, which on Linux begins with what its parent held.
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory held from /proc")
def test_products_of_many_shapes_hold_less_memory_than_libraries_keep_by_default() -> None:
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    grown = {}
    for capacity in (None, "1024"):
        environment = bare | (dict.fromkeys(names, capacity) if capacity else {})
        command = [sys.executable, "-c", SHAPES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        *capacities, more = done.stdout.split()
        assert capacities == [capacity or "256"] * 2  # what the environment says stands
        grown[capacity] = int(more)
    assert grown[None] < 0.8 * grown["1024"], grown
