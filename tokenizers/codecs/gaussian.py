"""The bottleneck of a variational autoencoder: a normal distribution at every place instead of a code."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from omniform.tokenizers.base import Continuous
from omniform.tokenizers.codecs.quantizer import Quantized, Quantizer, along_channels

_LOG_VARIANCE = (-30.0, 20.0)
_DECAY = 0.98


class GaussianBottleneck(Quantizer):
    """Takes a mean and a log-variance per channel; training decodes a draw, everything else the mean.

    Its `codes` are real vectors: the means, moved and scaled per channel to mean 0 and variance 1 over what training
    showed, which is what objectives on continuous tokens expect. The loss `kl` is the divergence of the distributions
    from the standard normal, in nats, divided by the number of latent values of an item.

    Source: Auto-Encoding Variational Bayes (Kingma and Welling 2013), arXiv:1312.6114, appendix B; log-variances are
    clamped as in Latent Diffusion (Rombach et al. 2021), arXiv:2112.10752, whose one scale for all channels, measured
    on the first batch, is here one per channel, a moving average over steps.

    Args:
        dim: channels of the latents.
    """

    loss_terms = ("kl",)
    average_mean: Float[Tensor, "D"]
    average_square: Float[Tensor, "D"]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("average_mean", torch.zeros(dim))
        self.register_buffer("average_square", torch.ones(dim))

    @property
    def representation(self) -> Continuous:
        """Real vectors of `dim` channels."""
        return Continuous(self.dim)

    @property
    def input_dim(self) -> int:
        """A mean and a log-variance per channel."""
        return 2 * self.dim

    def choose(self, latents: Float[Tensor, "B 2D *S"]) -> Quantized:
        """Draw from the distributions when training, else take the means; `codes` are the normalised means."""
        with torch.autocast(latents.device.type, enabled=False):
            mean, log_variance = latents.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(*_LOG_VARIANCE)
            drawn = mean
            if self.training:
                drawn = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
                self._follow(mean.detach())
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
            return Quantized(drawn, self._normalised(mean), {"kl": divergence.flatten(1).mean(1).sum()})

    def code_vectors(self, codes: Float[Tensor, "B D *S"]) -> Float[Tensor, "B D *S"]:
        """Undo the normalisation."""
        mean, scale = self._moments(codes)
        return codes * scale + mean

    def _normalised(self, means: Float[Tensor, "B D *S"]) -> Float[Tensor, "B D *S"]:
        mean, scale = self._moments(means)
        return (means - mean) / scale

    def _moments(self, like: Float[Tensor, "B D *S"]) -> tuple[Float[Tensor, "D *_"], Float[Tensor, "D *_"]]:
        variance = (self.average_square - self.average_mean.square()).clamp(min=1e-6)
        return along_channels(self.average_mean, like), along_channels(variance.sqrt(), like)

    def _follow(self, means: Float[Tensor, "B D *S"]) -> None:
        values = means.transpose(0, 1).flatten(1)
        moments = torch.stack([values.mean(1), values.square().mean(1)])
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        if moments.isfinite().all():  # a step with others is one that the trainer will skip
            self.average_mean.lerp_(moments[0], 1 - _DECAY)
            self.average_square.lerp_(moments[1], 1 - _DECAY)
