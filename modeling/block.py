"""The decoder block: attention, then a feed-forward layer, each added to what it reads; where the norms stand."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from omniform.kernels.attention import Mask
from omniform.modeling.config import DecoderConfig, TopK
from omniform.modeling.experts import ModalityExperts, Routes, RoutingTally, TopKExperts
from omniform.modeling.layers import Attention, FeedForward, KeyValueCache, RMSNorm, Rotary


class Block(nn.Module):
    """Attention, then a feed-forward layer: twice x + f(x), with norms where `config.norm` says.

    pre         x + f(norm(x)) (arXiv:2002.04745)
    post        norm(x + f(x)) (arXiv:1706.03762)
    sandwich    x + norm(f(norm(x))) (CogView, arXiv:2105.13290)
    sub_ln      x + f(norm(x)), and inside f a norm before its last projection (Magneto, arXiv:2210.06423)
    hybrid      y = norm(x + attention(x)), then y + feed_forward(y), and inside attention norms of queries, keys and
                values (HybridNorm, arXiv:2503.04598; not its variant HybridNorm*, whose first block differs)

    Deviations: every norm is an RMSNorm; queries and keys are normalised as well where `qk_norm` says so, and dropout
    comes after all norms of f.

    With `config.timestep` "adaln", what f reads of rows that have a time is scaled and shifted by it, after its norm;
    see `Modulation`.

    Args:
        n_experts: number of modalities, where each has a feed-forward layer of its own; else None.
    """

    def __init__(self, config: DecoderConfig, layer: int, n_experts: int | None = None) -> None:
        super().__init__()
        self.norm, sandwich = config.norm, config.norm == "sandwich"
        # Of HybridNorm's two norms of a block the first is inside attention.
        self.attention_norm = nn.Identity() if config.norm == "hybrid" else RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.attention_out_norm = RMSNorm(config.dim, config.norm_eps) if sandwich else nn.Identity()
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = _feed_forward(config, n_experts)
        self.feed_forward_out_norm = RMSNorm(config.dim, config.norm_eps) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = Modulation(config.dim) if config.timestep == "adaln" else None

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        rotary: Rotary,
        mask: Mask,
        cache: KeyValueCache | None,
        routing: Routes | RoutingTally | None = None,
        conditions: Float[Tensor, "B L D"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Return the rows after this block.

        Args:
            routing: the expert of each row, where modalities have their own; who is told what routers choose, if
                anyone, where there are routers.
            conditions: what modulates each row; zeros leave it alone.
        """

        def attend(rows: Tensor) -> Tensor:
            return self.dropout(self.attention_out_norm(self.attention(rows, rotary, mask, cache)))

        def feed(rows: Tensor) -> Tensor:
            fed = self.feed_forward(rows) if routing is None else self.feed_forward(rows, routing)
            return self.dropout(self.feed_forward_out_norm(fed))

        match self.norm:
            case "post":
                x = self.attention_norm(x + attend(x))
                return self.feed_forward_norm(x + feed(x))
            case "hybrid":
                x = self.feed_forward_norm(x + attend(x))
                return x + feed(x)
            case _ if self.modulation is not None and conditions is not None:
                scale, shift, feed_scale, feed_shift = self.modulation(conditions)
                x = x + attend(torch.addcmul(shift, self.attention_norm(x), 1 + scale))
                return x + feed(torch.addcmul(feed_shift, self.feed_forward_norm(x), 1 + feed_scale))
            case _:
                x = x + attend(self.attention_norm(x))
                return x + feed(self.feed_forward_norm(x))


class Modulation(nn.Module):
    """Scales and shifts of a block's two sublayers, from what is known of each row besides its contents.

    Source: adaLN of DiT (arXiv:2212.09748), with weights of 0 to begin with, so that it changes nothing then;
    deviations: each row has its own condition, there is no bias, so that rows without one stay as they are, and no gate
    on the residual, which those rows would need too.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 4 * dim, bias=False)

    def forward(self, conditions: Float[Tensor, "B L D"]) -> tuple[Float[Tensor, "B L D"], ...]:
        return self.project(F.silu(conditions)).chunk(4, dim=-1)


def _feed_forward(config: DecoderConfig, n_experts: int | None) -> nn.Module:
    if isinstance(config.experts, TopK):
        return TopKExperts(config, config.experts)
    return FeedForward(config) if n_experts is None else ModalityExperts(config, n_experts)
