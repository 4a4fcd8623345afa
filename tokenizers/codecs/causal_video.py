"""A convolutional codec of videos in which nothing depends on a later frame."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.tokenizers.codecs.codec import Codec
from omniform.tokenizers.codecs.quantizer import Quantizer, mean_per_item

Past = dict[nn.Module, Float[Tensor, "B C t H W"]]
"""The last inputs of each layer that looks back; empty before the first frame."""


class CausalVideoCodec(Codec):
    """Videos of 1 + k * temporal_rate frames -> 1 + k grids of codes -> videos.

    A convolution in time sees its own step and those before. Before its first frame, every video stood still: each
    layer repeats the first of its inputs. So the first grid holds the first frame alone, an image is a video of one
    frame, and a video that stands still has the same codes at all times. Norms are over the channels of one place, so
    that they carry nothing through time or space.

    Patches of pixels and frames become channels first, so that no convolution runs at the full resolution. Each
    further width halves the grid in the encoder and doubles it in the decoder.

    Source: MAGVIT-v2 (Yu et al. 2023), arXiv:2310.05737, section 3.2. Deviations: the past is the first frame repeated,
    as in CogVideoX (arXiv:2408.06072, section 2.1 has it for the encoder), where MAGVIT-v2 has zeros; patches of frames
    too; norms over channels instead of groups of channels of a frame; no adaptive norms in the decoder.

    Args:
        channels: of a frame.
        patch: frames and pixels per side of a patch.
        widths: channels at each resolution, finest first.
        time_strides: for each width after the first, 2 where time is halved too, else 1.
        n_blocks: residual blocks at each resolution, in encoder and decoder each.
        local: each code sees the square of pixels that it stands for and nothing around it. What stands in a square
            then has one code wherever else something moves, which makes codes easy to predict; a wide encoder spreads
            what it has to say over all codes. The decoder looks around either way.
    """

    reconstruction_terms = ("reconstruction", "bright")
    encoder: "CausalSequential"
    decoder: "CausalSequential"

    def __init__(
        self,
        channels: int,
        patch: tuple[int, int],
        widths: Sequence[int],
        time_strides: Sequence[int],
        n_blocks: int,
        quantizer: Quantizer,
        *,
        local: bool = False,
    ) -> None:
        around = 1 if local else 3
        down: list[nn.Module] = [CausalConv3d(channels, widths[0], patch, patch)]
        for place, width in enumerate(widths):
            if place:
                stride = time_strides[place - 1]
                down.append(CausalConv3d(widths[place - 1], width, (2 * stride - 1, 2 if local else 3), (stride, 2)))
            down += [_Residual(width, around) for _ in range(n_blocks)]
        down += [*_norm_act(widths[-1]), CausalConv3d(widths[-1], quantizer.input_dim, (1, 1))]
        up: list[nn.Module] = [CausalConv3d(quantizer.dim, widths[-1], (2, 3))]
        for place, width in reversed(list(enumerate(widths))):
            up += [_Residual(width) for _ in range(n_blocks)]
            if place:
                up.append(_Enlarge(width, widths[place - 1], (time_strides[place - 1], 2)))
        up += [*_norm_act(widths[0]), _Enlarge(widths[0], channels, patch)]
        super().__init__(CausalSequential(*down), quantizer, CausalSequential(*up))
        self.temporal_rate = patch[0] * math.prod(time_strides)

    def reconstruction_losses(
        self, reconstruction: Float[Tensor, "B C T H W"], items: Float[Tensor, "B C T H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the mean squared error, and as `bright` the same with each value weighed by how bright it is in the
        item: 0 where black, 1 where white. What moves before a dark field is a small part of its values."""
        error = F.mse_loss(reconstruction, items, reduction="none")
        return {
            "reconstruction": mean_per_item(error).sum(),
            "bright": mean_per_item(error * (items + 1) / 2).sum(),
        }

    def encode(self, items: Float[Tensor, "B C T H W"]) -> Int[Tensor, "B t *places"]:
        """Return the codes of videos in [-1, 1], step by step as `encode_step` does: those of a video do not depend,
        not by a bit, on how long it is."""
        past: Past = {}
        steps = [items[:, :, :1], *items[:, :, 1:].split(self.temporal_rate, 2)]
        return torch.cat([self.encode_step(step, past) for step in steps if step.shape[2]], 1)

    def encode_step(self, frames: Float[Tensor, "B C T H W"], past: Past) -> Int[Tensor, "B 1 *places"]:
        """Return the codes of the first frame, where `past` is empty, or of the `temporal_rate` frames that come next;
        leave in `past` what the next step needs."""
        return self.quantizer(self.encoder(frames, past)).codes

    def decode(self, codes: Int[Tensor, "B t *places"]) -> Float[Tensor, "B C T H W"]:
        """Return the videos of codes, clamped to [-1, 1], step by step as `decode_step` does."""
        past: Past = {}
        return torch.cat([self.decode_step(step, past) for step in codes.split(1, 1)], 2)

    def decode_step(self, codes: Int[Tensor, "B 1 *places"], past: Past) -> Float[Tensor, "B C T H W"]:
        """Return the frames of the codes of one step: the first, or `temporal_rate` that come next."""
        return self.decoder(self.quantizer.code_vectors(codes), past).clamp(-1, 1)


class CausalConv3d(nn.Module):
    """A convolution over time and space that looks back in time, and around with zeros in space.

    Args:
        kernel: length in time, and in each axis of space.
        stride: likewise.
    """

    def __init__(self, before: int, after: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        (in_time, in_space), (every, apart) = kernel, stride
        margin = (in_space - apart + 1) // 2
        self.conv = nn.Conv3d(
            before, after, (in_time, in_space, in_space), (every, apart, apart), padding=(0, margin, margin)
        )
        self.n_before, self.n_kept = in_time - 1, in_time - every

    def forward(self, steps: Float[Tensor, "B C T H W"], past: Past) -> Float[Tensor, "B D t h w"]:
        """Go on from `past`, and leave there what the steps after these need."""
        before = past[self] if self in past else steps[:, :, :1].expand(-1, -1, self.n_before, -1, -1)
        seen = torch.cat([before, steps], 2)
        past[self] = seen[:, :, seen.shape[2] - self.n_kept :]
        convolved: Tensor = self.conv(seen)
        return convolved


class CausalSequential(nn.Sequential):
    """Layers one after the other; those that look back share one past."""

    def forward(self, steps: Float[Tensor, "B C T H W"], past: Past | None = None) -> Float[Tensor, "B D t h w"]:
        """Return what the layers make of a whole video, or of the steps that follow those of `past`."""
        past = {} if past is None else past
        for layer in self:
            looks_back = isinstance(layer, (CausalConv3d, _Residual, _Enlarge))
            steps = layer(steps, past) if looks_back else layer(steps)
        return steps


class _Enlarge(nn.Module):
    """More steps and places of fewer channels: those that each becomes, made by one convolution.

    Of the first step, only the last of its frames is kept: the others would lie before the video.
    """

    def __init__(self, before: int, after: int, factors: tuple[int, int]) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(before, after * factors[0] * factors[1] ** 2, (2, 3))

    def forward(self, steps: Float[Tensor, "B C t h w"], past: Past) -> Float[Tensor, "B D T H W"]:
        starts = self.conv not in past
        (in_time, in_space), wide = self.factors, self.conv(steps, past)
        wide = wide.unflatten(1, (-1, in_time, in_space, in_space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        wide = wide.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return wide[:, :, in_time - 1 :] if starts else wide


class _Residual(nn.Module):
    """Two convolutions beside an identity, each after a norm and an activation (arXiv:1603.05027)."""

    def __init__(self, width: int, around: int = 3) -> None:
        super().__init__()
        self.layers = CausalSequential(
            *_norm_act(width),
            CausalConv3d(width, width, (2, around)),
            *_norm_act(width),
            CausalConv3d(width, width, (1, around)),
        )

    def forward(self, steps: Float[Tensor, "B C T H W"], past: Past) -> Float[Tensor, "B C T H W"]:
        return steps + self.layers(steps, past)


class _ChannelNorm(nn.Module):
    """Divides the channels of each place by their root mean square (arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, steps: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        exact = torch.promote_types(steps.dtype, torch.float32)
        scale = (steps.square().mean(1, keepdim=True, dtype=exact) + 1e-6).rsqrt()
        return (steps * scale * self.weight.view(-1, 1, 1, 1)).to(steps.dtype)


def _norm_act(width: int) -> list[nn.Module]:
    return [_ChannelNorm(width), nn.SiLU()]
