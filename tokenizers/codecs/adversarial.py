"""Training of a codec against a discriminator: sharper images, and a distance in features instead of pixels."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from omniform.tokenizers.codecs.codec import Codec
from omniform.tokenizers.codecs.quantizer import mean_per_item

GENERATOR_TERMS = ("adversarial", "features")


class Discriminator(nn.Module):
    """Tells real items from reconstructions."""

    @abstractmethod
    def forward(self, items: Float[Tensor, "B C *S"]) -> list[Float[Tensor, "B c *s"]]:
        """Return the features of every layer, and scores as the last entry: above 0 for real ones, below 0 for
        reconstructions."""


class PatchDiscriminator(Discriminator):
    """Images -> one score per patch: above 0 for real ones, below 0 for reconstructions.

    Source: pix2pix (Isola et al. 2017), arXiv:1611.07004, section 3.2.2. Deviation: no norms, because those of a batch
    would make the score of an image depend on the others and on how a step is divided.

    Args:
        channels: of an image.
        widths: channels of each layer, which halves the resolution.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 4, 2, 1) for before, after in pairwise((channels, *widths))
        )
        self.score = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, items: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B c h w"]]:
        """Return the features of every layer, and the scores (B, 1, h, w) as the last entry."""
        features = []
        for layer in self.layers:
            items = F.leaky_relu(layer(items), 0.2)
            features.append(items)
        return [*features, self.score(items)]


class AdversarialCodec(nn.Module):
    """A codec and its discriminator as one module, whose loss terms one optimizer can add up and step on.

    The codec's terms see the discriminator with its parameters detached, and the discriminator's term sees detached
    reconstructions: each parameter gets the gradient of its own side alone, as if the two were trained in turns. Both
    sides step at once, from the same state.

    Source: hinge losses as in Geometric GAN (Lim and Ye 2017), arXiv:1705.02894; `features`, the squared distance of
    discriminator features, from VAE/GAN (Larsen et al. 2015), arXiv:1512.09300, section 2.3, here the mean over layers
    and beside the error of pixels, not instead of it.
    """

    def __init__(self, codec: Codec, discriminator: Discriminator) -> None:
        super().__init__()
        self.codec = codec
        self.discriminator = discriminator

    def forward(self, items: Float[Tensor, "B C *S"]) -> dict[str, Float[Tensor, ""]]:
        """Return the codec's loss terms, then `adversarial`, `features` and `discriminator`; each summed over items.

        The discriminator's is max(0, 1 - score) of items + max(0, 1 + score) of reconstructions.
        """
        reconstruction, losses = self.codec.reconstruct(items)
        *features, scores = self.discriminator(torch.cat([items, reconstruction.detach()]))
        real, fake = scores.float().chunk(2)
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        *of_fake, score = torch.func.functional_call(self.discriminator, frozen, (reconstruction,))
        of_real = [feature.detach().chunk(2)[0] for feature in features]
        distances = [mean_per_item((a.float() - b.float()).square()) for a, b in zip(of_fake, of_real, strict=True)]
        return {
            **losses,
            "adversarial": -mean_per_item(score.float()).sum(),
            "features": torch.stack(distances).mean(0).sum(),
            "discriminator": (mean_per_item(F.relu(1 - real)) + mean_per_item(F.relu(1 + fake))).sum(),
        }
