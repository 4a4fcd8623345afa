"""A convolutional autoencoder with a quantized bottleneck. The one file that imports diffusers: its building blocks."""

from collections.abc import Sequence

from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn

from omniform.tokenizers.codecs.codec import Codec
from omniform.tokenizers.codecs.quantizer import Quantizer

_GROUP = 8  # channels that are normalised together


class ConvCodec(Codec):
    """Images -> a grid of codes -> images.

    Its norms are over groups of channels of the whole image, so every code depends on every pixel.

    Patches of pixels become channels first, so that no convolution runs at the full resolution. Each further width
    halves the grid in the encoder and doubles it in the decoder.

    Args:
        channels: of an image.
        patch_size: pixels per side of a patch.
        widths: channels at each resolution, multiples of 8.
        n_blocks: residual blocks at each resolution.
    """

    def __init__(
        self, channels: int, patch_size: int, widths: Sequence[int], n_blocks: int, quantizer: Quantizer
    ) -> None:
        patch_channels = channels * patch_size**2
        down: list[nn.Module] = [nn.PixelUnshuffle(patch_size), nn.Conv2d(patch_channels, widths[0], 3, padding=1)]
        for place, width in enumerate(widths):
            down += [_Residual(width) for _ in range(n_blocks)]
            if place + 1 < len(widths):
                # Under its default name the block would register its convolution twice.
                down.append(Downsample2D(width, use_conv=True, out_channels=widths[place + 1], name="op"))
        down += [*_norm_act(widths[-1]), nn.Conv2d(widths[-1], quantizer.input_dim, 1)]
        up: list[nn.Module] = [nn.Conv2d(quantizer.dim, widths[-1], 3, padding=1)]
        for place, width in reversed(list(enumerate(widths))):
            up += [_Residual(width) for _ in range(n_blocks)]
            if place:
                up.append(Upsample2D(width, use_conv=True, out_channels=widths[place - 1]))
        up += [*_norm_act(widths[0]), nn.Conv2d(widths[0], patch_channels, 3, padding=1), nn.PixelShuffle(patch_size)]
        super().__init__(nn.Sequential(*down), quantizer, nn.Sequential(*up))


class _Residual(ResnetBlock2D):
    """diffusers' residual block without a timestep."""

    def __init__(self, width: int) -> None:
        super().__init__(in_channels=width, temb_channels=None, groups=width // _GROUP)

    def forward(self, hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(hidden, None)


def _norm_act(width: int) -> list[nn.Module]:
    return [nn.GroupNorm(width // _GROUP, width), nn.SiLU()]
