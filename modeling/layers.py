"""The layers of a decoder block: pre-norm attention with grouped queries, and the gated feed-forward layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int
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

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Routes:
    """Which expert each row of a forward pass goes through; found once, followed by every layer.

    Attributes:
        order: rows, flat, those of the first expert first.
        counts: number of rows of each expert.
        calls: number of rows with which each expert is called; while training a row of zeros stands in for none.
        sources: where each row's result lies among those of all calls.
    """

    order: Int[Tensor, "N"]
    counts: Sequence[int]
    calls: Sequence[int]
    sources: Int[Tensor, "N"]

    @classmethod
    def of(cls, expert_ids: Int[Tensor, "*N"], n_experts: int) -> "Routes":
        """Sort the rows by the expert that each one names."""
        flat_ids = expert_ids.flatten()
        counts = flat_ids.bincount(minlength=n_experts)
        # Under ZeRO-3 all ranks gather an expert's weights together, so one without rows for it calls it all the same.
        calls = counts if torch.is_inference_mode_enabled() else counts.clamp(min=1)
        order = flat_ids.argsort(stable=True)
        added = (calls - counts).cumsum(0)
        sources = torch.empty_like(order)
        sources[order] = torch.arange(len(order), device=order.device) + added[flat_ids[order]]
        return cls(order, counts.tolist(), calls.tolist(), sources)


class ModalityExperts(nn.Module):
    """One feed-forward layer per modality, and each row through that of its own.

    Sources: the modality experts of VLMo (arXiv:2111.02358) and BAGEL (arXiv:2505.14683). Deviations: every layer has
    them, with none that VLMo's upper layers share between modalities; BAGEL has attention weights per expert too, here
    they are shared; so is the norm before the experts, whose scale each expert's own weights can undo.
    """

    def __init__(self, config: DecoderConfig, n_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(n_experts))

    def forward(self, x: Float[Tensor, "B L D"], routes: Routes) -> Float[Tensor, "B L D"]:
        rows = x.flatten(0, 1)
        # Part of the graph, so that backward passes agree between ranks too; exactly 0 whatever the row holds.
        nothing = rows[:1].masked_fill(torch.ones_like(rows[:1], dtype=torch.bool), 0.0)
        results = [
            expert(own if len(own) else nothing)
            for expert, own, n in zip(self.experts, rows[routes.order].split(routes.counts), routes.calls, strict=True)
            if n
        ]
        return torch.cat(results)[routes.sources].view_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        n_experts: number of feed-forward layers to choose from by row; None for one that all rows share.
    """

    def __init__(self, config: DecoderConfig, layer: int, n_experts: int | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config) if n_experts is None else ModalityExperts(config, n_experts)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        rotary: Rotary,
        mask: Mask,
        cache: KeyValueCache | None,
        routes: Routes | None = None,
    ) -> Float[Tensor, "B L D"]:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        normed = self.feed_forward_norm(x)
        return x + self.dropout(self.feed_forward(normed) if routes is None else self.feed_forward(normed, routes))
