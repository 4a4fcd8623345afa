"""What every image codec is: an encoder, a quantizer at every place of its grid, and a decoder."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.tokenizers.codecs.quantizer import Quantizer


class Codec(nn.Module):
    """Images -> a grid of codes -> images.

    Args:
        encoder: images -> latents of `quantizer.dim` channels.
        decoder: code vectors -> images.
    """

    def __init__(self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    def forward(self, pixels: Float[Tensor, "B C H W"]) -> dict[str, Float[Tensor, ""]]:
        """Return the loss terms, each summed over images: mean squared error, and those of the quantizer."""
        return self.reconstruct(pixels)[1]

    def reconstruct(
        self, pixels: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B C H W"], dict[str, Float[Tensor, ""]]]:
        """Return what the codes of images decode to, not clamped and with gradients, and the loss terms."""
        quantized = self.quantizer(self.encoder(pixels))
        reconstruction = self.decoder(quantized.latents).float()
        error = F.mse_loss(reconstruction, pixels, reduction="none")
        return reconstruction, {"reconstruction": error.mean((1, 2, 3)).sum(), **quantized.losses}

    def encode(self, pixels: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w *Q"]:
        """Return the codes of images in [-1, 1]; residual quantization gives several at each place."""
        return self.quantizer(self.encoder(pixels)).codes

    def decode(self, codes: Int[Tensor, "B h w *Q"]) -> Float[Tensor, "B C H W"]:
        """Return the images of codes, clamped to [-1, 1]."""
        return self.decoder(self.quantizer.code_vectors(codes)).clamp(-1, 1)
