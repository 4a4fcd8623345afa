"""A convolutional codec whose codes see no further than a stated margin around their own cell."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from omniform.tokenizers.codecs.codec import Codec
from omniform.tokenizers.codecs.quantizer import Quantizer


class LocalCodec(Codec):
    """Images -> a grid of codes, each of one window -> images.

    The encoder reads the window of every cell at once and goes on at each place alone: normalisation is over channels,
    never over places, so that like windows get like codes wherever they stand. Beyond the image, windows see its
    edge repeated. The decoder looks around: each convolution of 3 x 3 adds a place of its own resolution.

    Args:
        channels: of an image.
        cell: pixels per side of the area that one code stands for.
        margin: pixels on each side of its cell that a code sees.
        widths: channels at each resolution of the decoder, finest first; the encoder has the last of them.
        n_blocks: residual blocks of the encoder, and at each resolution of the decoder.
    """

    def __init__(
        self, channels: int, cell: int, margin: int, widths: Sequence[int], n_blocks: int, quantizer: Quantizer
    ) -> None:
        patch = cell // 2 ** (len(widths) - 1)
        window = cell + 2 * margin
        encoder = [
            nn.Conv2d(channels, widths[-1], window, cell, margin, padding_mode="replicate" if margin else "zeros"),
            *(_Residual(widths[-1], 1) for _ in range(n_blocks)),
            *_norm_act(widths[-1]),
            nn.Conv2d(widths[-1], quantizer.input_dim, 1),
        ]
        decoder: list[nn.Module] = [nn.Conv2d(quantizer.dim, widths[-1], 3, padding=1)]
        for place, width in reversed(list(enumerate(widths))):
            decoder += [_Residual(width, 3) for _ in range(n_blocks)]
            if place:
                decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(width, widths[place - 1], 3, padding=1)]
        decoder += [
            *_norm_act(widths[0]),
            nn.Conv2d(widths[0], channels * patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
        ]
        super().__init__(nn.Sequential(*encoder), quantizer, nn.Sequential(*decoder))


class _Residual(nn.Module):
    """Two convolutions beside an identity, each after a norm and an activation (arXiv:1603.05027)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_norm_act(width),
            nn.Conv2d(width, width, kernel, padding=kernel // 2),
            *_norm_act(width),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return hidden + self.layers(hidden)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place."""

    def forward(self, hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        channels_last = hidden.permute(0, 2, 3, 1)
        normal = F.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normal.permute(0, 3, 1, 2).to(hidden.dtype)


def _norm_act(width: int) -> list[nn.Module]:
    return [_ChannelNorm(width), nn.SiLU()]
