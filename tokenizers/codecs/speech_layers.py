"""Layers that speech encoders and decoders share; none of them sees farther in time than it says."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

DILATIONS = (1, 3)  # of the residual units at each resolution of samples
_KERNEL = 7


class ConvNeXtBlock(nn.Module):
    """Mix each channel over 7 frames, then the channels of each frame.

    Source: ConvNeXt (Liu et al. 2022), arXiv:2201.03545, in one dimension as in Vocos (Siuzdak 2023),
    arXiv:2306.00814, section 3.2. Deviations: three times as wide inside instead of four, and the tanh form of GELU.

    Attributes:
        margin: frames on each side that a frame depends on.
    """

    margin = _KERNEL // 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix_frames = nn.Conv1d(width, width, _KERNEL, padding=self.margin, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 3 * width)
        self.narrow = nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, frames: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return frames of the same shape."""
        mixed = self.norm(self.mix_frames(frames.transpose(1, 2)).transpose(1, 2))
        return frames + self.scale * self.narrow(F.gelu(self.widen(mixed), approximate="tanh"))


def blocks(width: int, n_blocks: int) -> nn.Sequential:
    """Return so many blocks, and the norm that closes them."""
    return nn.Sequential(*(ConvNeXtBlock(width) for _ in range(n_blocks)), nn.LayerNorm(width))


class ResidualUnit(nn.Module):
    """A dilated convolution of 3 samples beside the identity; a sample depends on `dilation` others on each side."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dilated = nn.Conv1d(width, width // 2, 3, padding=dilation, dilation=dilation)
        self.joined = nn.Conv1d(width // 2, width, 1)

    def forward(self, samples: Float[Tensor, "B C N"]) -> Float[Tensor, "B C N"]:
        """Return samples of the same shape."""
        normed = self.norm(samples.transpose(1, 2)).transpose(1, 2)
        return samples + self.joined(F.elu(self.dilated(F.elu(normed))))


class LatentNorm(nn.Module):
    """Bring each channel of the latents to mean 0 and variance 1.

    In training these are the mean and variance of the batch, over items and time; afterwards a constant of the codec,
    their moving average, so that a latent depends on no other. Without it the bounds of finite scalar quantization
    saturate in the first steps, and a few codes are all that is ever used.

    Source: batch normalisation (Ioffe and Szegedy 2015), arXiv:1502.03167, without its affine part. All ranks keep the
    same moving average, of all their batches; each batch is normalised alone.

    Args:
        decay: of the moving averages.
    """

    mean: Float[Tensor, "D"]
    variance: Float[Tensor, "D"]

    def __init__(self, dim: int, decay: float = 0.95) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, latents: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Normalise; in training mode also follow the batch."""
        if not self.training:
            return (latents - self.mean) / (self.variance + 1e-5).sqrt()
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.to(self.mean.dtype)
            variance, mean = torch.var_mean(latents, (0, 1), correction=0)
            self._follow(mean.detach(), variance.detach())
            return (latents - mean) / (variance + 1e-5).sqrt()

    def _follow(self, mean: Float[Tensor, "D"], variance: Float[Tensor, "D"]) -> None:
        moments = torch.stack([mean, variance])
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        if moments.isfinite().all():  # others come from a step that the trainer will skip
            self.mean.lerp_(moments[0], 1 - self.decay)
            self.variance.lerp_(moments[1], 1 - self.decay)
