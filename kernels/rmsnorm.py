"""Root-mean-square normalisation (arXiv:1910.07467)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*B D"]:
    """Return x / sqrt(mean(x^2) + eps) * weight, computed in fp32 and returned in x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def rms_norm_reference(x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*B D"]:
    """The same by its formula."""
    wide = x.double()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)
