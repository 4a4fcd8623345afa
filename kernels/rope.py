"""Rotary position embedding over three axes (time, height, width).

Pair i of the K/2 rotated pairs turns with the angle of axis i mod 3, all at the frequencies of ordinary 1-d RoPE
(arXiv:2104.09864). Rows whose three coordinates are equal, as in text, therefore see exactly 1-d RoPE. The idea of
per-axis sections is M-RoPE's (Qwen2-VL, arXiv:2409.12191); sections are interleaved here rather than contiguous, so
that every axis gets high and low frequencies.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(
    position_ids: Int[Tensor, "B L 3"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B 1 L K"], Float[Tensor, "B 1 L K"]]:
    """Return cosines and sines in fp32, each pair's angle repeated in both halves of the head dimension.

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number: rotary embedding turns pairs")
    pairs = torch.arange(head_dim // 2, device=position_ids.device)
    frequencies = theta ** (-2.0 * pairs.float() / head_dim)
    angles = position_ids[..., pairs % 3].float() * frequencies  # (B, L, K/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "B H L K"], cosines: Float[Tensor, "B 1 L K"], sines: Float[Tensor, "B 1 L K"]
) -> Float[Tensor, "B H L K"]:
    """Turn pair (i, i + K/2) of every head by its angle; computed in fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cosines + turned * sines).to(x.dtype)


def rotate_reference(
    x: Float[Tensor, "B H L K"], position_ids: Int[Tensor, "B L 3"], theta: float
) -> Float[Tensor, "B H L K"]:
    """The same as a product of complex numbers, pair by pair: what `rotate` is tested against."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for pair in range(half):
        angle = position_ids[:, None, :, pair % 3].double() * theta ** (-2.0 * pair / x.shape[-1])
        value = torch.complex(x[..., pair].double(), x[..., pair + half].double()) * torch.polar(
            torch.ones_like(angle), angle
        )
        out[..., pair], out[..., pair + half] = value.real.to(x.dtype), value.imag.to(x.dtype)
    return out
