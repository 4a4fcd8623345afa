"""The decoder transformer: embeddings and positions in, hidden states out. Knows neither modality nor objective."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.kernels.attention import Mask
from omniform.kernels.rope import rotary_angles
from omniform.modeling.config import DecoderConfig
from omniform.modeling.layers import Block, KeyValueCache, RMSNorm


class Decoder(nn.Module):
    """Pre-norm transformer in the manner of Llama (arXiv:2302.13971), with three-axis rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        embeddings: Float[Tensor, "B N D"],
        position_ids: Int[Tensor, "B N 3"],
        mask: Mask,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the hidden states of the N rows given.

        Args:
            mask: what those rows may attend to: each other, or the cached rows followed by each other.
            cache: keys and values of earlier rows.
        """
        rotary = rotary_angles(position_ids, self.config.dim_per_head, self.config.rope_theta)
        hidden = embeddings
        for block in self.blocks:
            hidden = block(hidden, rotary, mask, cache)
        return self.norm(hidden)
