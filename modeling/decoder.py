"""The decoder transformer: embeddings and positions in, hidden states out. Knows neither modality nor objective."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import Mask
from omniform.kernels.rope import rotary_angles
from omniform.modeling.config import DecoderConfig
from omniform.modeling.layers import Block, KeyValueCache, RMSNorm, Routes


class Decoder(nn.Module):
    """Pre-norm transformer in the manner of Llama (arXiv:2302.13971), with three-axis rotary positions.

    Args:
        n_experts: feed-forward layers per block that rows choose from; None for one that all rows share.
    """

    def __init__(self, config: DecoderConfig, n_experts: int | None = None) -> None:
        super().__init__()
        self.config, self.n_experts = config, n_experts
        self.blocks = nn.ModuleList(Block(config, layer, n_experts) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        embeddings: Float[Tensor, "B N D"],
        position_ids: Int[Tensor, "B N 3"],
        mask: Mask,
        cache: KeyValueCache | None = None,
        expert_ids: Int[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of the N rows given.

        Args:
            mask: what those rows may attend to: each other, or the cached rows followed by each other.
            cache: keys and values of earlier rows.
            expert_ids: which expert each of the N rows goes through, 0 to n_experts - 1; not read without experts.
        """
        routes = None
        if self.n_experts is not None:
            assert expert_ids is not None, "a decoder with experts needs to know the expert of each row"
            routes = Routes.of(expert_ids, self.n_experts)
        rotary = rotary_angles(position_ids, self.config.dim_per_head, self.config.rope_theta)
        hidden = embeddings
        for block in self.blocks:
            hidden = block(hidden, rotary, mask, cache, routes)
        return self.norm(hidden)
