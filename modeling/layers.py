"""The layers of a decoder block: pre-norm attention with grouped queries, and the gated feed-forward layer."""

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
    """Grouped-query attention (arXiv:2305.13245) with rotary positions and optional QK-norm (arXiv:2302.05442)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.dim_per_head
        self.query = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B L D"], rotary: Rotary, mask: Mask, cache: KeyValueCache | None
    ) -> Float[Tensor, "B L D"]:
        q, k, v = (
            rearrange(project(x), "b l (h k) -> b h l k", k=self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        q, k = rotate(self.query_norm(q), *rotary), rotate(self.key_norm(k), *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(rearrange(attention(q, k, v, mask), "b h l k -> b l (h k)"))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B L D"], rotary: Rotary, mask: Mask, cache: KeyValueCache | None
    ) -> Float[Tensor, "B L D"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
