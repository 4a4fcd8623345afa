"""Mixtures of diagonal Gaussians over one token's numbers: density, samples, and guidance between two of them.

Source: GIVT (arXiv:2312.02116), section 3.3 and appendix, in which a decoder's head gives the parameters.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omniform.modeling.objectives.base import Draw

GUIDANCE_DRAWS = 64  # candidates of which guidance takes one


def n_parameters(channels: int, components: int) -> int:
    """Return how many numbers describe a mixture: of each component its logit, mean and scales."""
    return components * (1 + 2 * channels)


@dataclass(frozen=True)
class Mixture:
    """One mixture per row.

    Attributes:
        log_weights: of the components; they sum to 1 in probability.
        scales: standard deviations.
    """

    log_weights: Float[Tensor, "M K"]
    means: Float[Tensor, "M K C"]
    scales: Float[Tensor, "M K C"]

    @classmethod
    def of(cls, outputs: Float[Tensor, "M W"], components: int, min_scale: float) -> "Mixture":
        """Read the outputs of a head.

        A scale is (x + sqrt(x^2 + 4)) / 2, positive and smooth, and `min_scale` more: the density of data that repeats
        exactly would grow without bound. Deviation: GIVT takes the larger of the two, which no gradient moves again.
        """
        channels = (outputs.shape[-1] // components - 1) // 2
        logits, means, scales = outputs.float().split([components, *[components * channels] * 2], dim=-1)
        shape = (*logits.shape, channels)
        # Of a large negative x the sum would cancel to 0.
        root = (scales.square() + 4).sqrt()
        scales = torch.where(scales < 0, 2 / (root - scales.clamp(max=0)), (scales.clamp(min=0) + root) / 2) + min_scale
        return cls(logits.log_softmax(-1), means.reshape(shape), scales.reshape(shape))

    def log_density(self, values: Float[Tensor, "M C"]) -> Float[Tensor, "M"]:
        """Return the log-density of a row's values, in nats."""
        z = (values[..., None, :] - self.means) / self.scales
        of_numbers = -0.5 * z.square() - self.scales.log() - 0.5 * math.log(2 * math.pi)
        return (self.log_weights + of_numbers.sum(-1)).logsumexp(-1)

    def sample(self, step: int, positions: Int[Tensor, "M"], draw: Draw) -> Float[Tensor, "M C"]:
        """Draw one value per row. The temperature multiplies the scales, as in GIVT; deviation: it sharpens the choice
        of the component too, so that at 0 the value is the mean of the likeliest."""
        chosen, _ = draw.tokens(self.log_weights, step, positions)
        rows = torch.arange(len(chosen))
        noise = draw.normal(step, positions, self.means.shape[-1])
        return self.means[rows, chosen] + draw.temperature * self.scales[rows, chosen] * noise


def guided_sample(
    conditional: Mixture,
    unconditional: Mixture,
    scale: float,
    step: int,
    positions: Int[Tensor, "M"],
    draw: Draw,
) -> Float[Tensor, "M C"]:
    """Draw from the density that is proportional to p_uncond(x) * (p_cond(x) / p_uncond(x)) ** scale.

    Rejection sampling with the conditional mixture, widened, as the proposal, as GIVT does for guidance; deviations: a
    fixed number of candidates, GUIDANCE_DRAWS, is drawn, and the largest ratio among them stands for the unknown bound,
    so that one is always accepted; and the scales of a vector of C numbers grow by 2 ** (1 / C), where GIVT doubles
    each, or of many numbers no candidate would lie where the density is. At temperature 0 all candidates are one.
    """
    n = GUIDANCE_DRAWS
    repeated = [
        Mixture(*(values.repeat_interleave(n, 0) for values in (m.log_weights, m.means, m.scales)))
        for m in (conditional, unconditional)
    ]
    places = (positions[:, None] * n + torch.arange(n)).flatten()
    wider = 2 ** (1 / conditional.means.shape[-1])
    wide = Mixture(repeated[0].log_weights, repeated[0].means, wider * repeated[0].scales)
    values = wide.sample(step, places, draw)
    temperature = draw.temperature or 1.0
    proposal, *cooled = (
        Mixture((m.log_weights / temperature).log_softmax(-1), m.means, m.scales * temperature).log_density(values)
        for m in (wide, *repeated)
    )
    ratios = (cooled[1] + scale * (cooled[0] - cooled[1]) - proposal).view(-1, n)
    # Accepted with probability ratio / largest ratio; the first that is accepted is taken.
    # Negative steps are no step's: whoever orders contents by such noise takes other numbers.
    log_uniform = -torch.exp(-draw.gumbel(-1 - step, places)).view(-1, n)
    accepted = ratios - ratios.amax(-1, keepdim=True) >= log_uniform
    return values.view(len(positions), n, -1)[torch.arange(len(positions)), accepted.int().argmax(-1)]
