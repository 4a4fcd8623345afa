"""The decoder transformer: embeddings and positions in, hidden states out. Knows neither modality nor objective."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import Mask
from omniform.kernels.rope import rotary_angles
from omniform.modeling.block import Block
from omniform.modeling.config import DecoderConfig
from omniform.modeling.experts import Routes, RoutingTally
from omniform.modeling.layers import KeyValueCache, RMSNorm


class Decoder(nn.Module):
    """Transformer in the manner of Llama (arXiv:2302.13971), with three-axis rotary positions; norms as in `Block`.

    After the last block a norm brings the sum of all that blocks have added to one scale for the heads. Blocks with
    post-norm end in such a norm themselves, so no other follows them.

    Args:
        n_experts: number of modalities, where each has feed-forward layers of its own; else None.
    """

    def __init__(self, config: DecoderConfig, n_experts: int | None = None) -> None:
        super().__init__()
        self.config, self.n_experts = config, n_experts
        self.blocks = nn.ModuleList(Block(config, layer, n_experts) for layer in range(config.n_layers))
        self.norm = nn.Identity() if config.norm == "post" else RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        embeddings: Float[Tensor, "B N D"],
        position_ids: Int[Tensor, "B N 3"],
        mask: Mask,
        cache: KeyValueCache | None = None,
        expert_ids: Int[Tensor, "B N"] | None = None,
        tally: RoutingTally | None = None,
        conditions: Float[Tensor, "B N D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of the N rows given.

        Args:
            mask: what those rows may attend to: each other, or the cached rows followed by each other.
            cache: keys and values of earlier rows.
            expert_ids: which expert each of the N rows goes through, 0 to n_experts - 1; read only where modalities
                have their own.
            tally: is told what routers choose; only where there are routers.
            conditions: what modulates each row, where `config.timestep` is "adaln"; zeros leave it alone.
        """
        routing: Routes | RoutingTally | None = tally
        if self.n_experts is not None:
            assert expert_ids is not None, "a decoder with experts needs to know the expert of each row"
            routing = Routes.of(expert_ids, self.n_experts)
        rotary = rotary_angles(position_ids, self.config.dim_per_head, self.config.rope_theta)
        hidden = embeddings
        for block in self.blocks:
            hidden = block(hidden, rotary, mask, cache, routing, conditions)
        return self.norm(hidden)
