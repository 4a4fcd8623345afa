"""The layers of a decoder block: attention with grouped queries, the gated feed-forward layer, and their norm."""

from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from omniform.kernels.attention import Mask, attention
from omniform.kernels.rmsnorm import rms_norm
from omniform.kernels.rope import rotate
from omniform.modeling.config import DecoderConfig

Rotary = tuple[Float[Tensor, "B 1 L K"], Float[Tensor, "B 1 L K"]]


@runtime_checkable
class KeyValueCache(Protocol):
    """What attention needs of a cache: it keeps nothing of a forward pass unless its owner commits the rows."""

    def extend(
        self, layer: int, k: Float[Tensor, "B G N K"], v: Float[Tensor, "B G N K"]
    ) -> tuple[Float[Tensor, "B G L K"], Float[Tensor, "B G L K"]]:
        """Return the layer's cached keys and values followed by the new rows'."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions and optional QK-norm (arXiv:2302.05442).

    With `norm: hybrid` values are normalised per head too (arXiv:2503.04598); with `norm: sub_ln` all that the heads
    read is, before it is projected out (arXiv:2210.06423).
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.dim_per_head
        self.query = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.value_norm = RMSNorm(self.head_dim, config.norm_eps) if config.norm == "hybrid" else nn.Identity()
        width = config.n_heads * self.head_dim
        self.inner_norm = RMSNorm(width, config.norm_eps) if config.norm == "sub_ln" else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B L D"], rotary: Rotary, mask: Mask, cache: KeyValueCache | None
    ) -> Float[Tensor, "B L D"]:
        q, k, v = (
            rearrange(project(x), "b l (h k) -> b h l k", k=self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        q, k, v = rotate(self.query_norm(q), *rotary), rotate(self.key_norm(k), *rotary), self.value_norm(v)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(self.inner_norm(rearrange(attention(q, k, v, mask), "b h l k -> b l (h k)")))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202); with `norm: sub_ln` normalised before it is projected out (arXiv:2210.06423)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.inner_norm = RMSNorm(config.ffn_dim, config.norm_eps) if config.norm == "sub_ln" else nn.Identity()

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.down(self.inner_norm(F.silu(self.gate(x)) * self.up(x)))
