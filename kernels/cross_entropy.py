"""Cross-entropy with the optional z-loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Float[Tensor, "M W"], labels: Int[Tensor, "M"], z_loss: float = 0.0) -> Float[Tensor, "M"]:
    """Return -log softmax(logits)[label] + z_loss * log(Z)^2 per row, in fp32; Z is the softmax's denominator.

    Source of the z-loss: PaLM (arXiv:2204.02311), section 5; Chameleon (arXiv:2405.09818) uses 1e-5.
    """
    logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(logits, dim=-1).square()
    return losses


def cross_entropy_reference(
    logits: Float[Tensor, "M W"], labels: Int[Tensor, "M"], z_loss: float = 0.0
) -> Float[Tensor, "M"]:
    """The same by its formula, in fp64."""
    wide = logits.double()
    log_z = wide.exp().sum(-1).log()
    return log_z - wide.gather(1, labels[:, None])[:, 0] + z_loss * log_z**2
