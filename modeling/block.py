"""The decoder block: attention, then a feed-forward layer, each added to what it reads; where the norms stand."""

from jaxtyping import Float
from torch import Tensor, nn

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

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        rotary: Rotary,
        mask: Mask,
        cache: KeyValueCache | None,
        routing: Routes | RoutingTally | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Return the rows after this block.

        Args:
            routing: the expert of each row, where modalities have their own; who is told what routers choose, if
                anyone, where there are routers.
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
            case _:
                x = x + attend(self.attention_norm(x))
                return x + feed(self.feed_forward_norm(x))


def _feed_forward(config: DecoderConfig, n_experts: int | None) -> nn.Module:
    if isinstance(config.experts, TopK):
        return TopKExperts(config, config.experts)
    return FeedForward(config) if n_experts is None else ModalityExperts(config, n_experts)
