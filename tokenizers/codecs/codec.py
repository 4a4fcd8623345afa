"""What every codec is: an encoder, a quantizer at every place of its grid, and a decoder."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from omniform.tokenizers.codecs.quantizer import Quantizer, mean_per_item


class Codec(nn.Module):
    """Items -> a grid of codes -> items: images (B, C, H, W), or whatever has channels first and then its axes.

    Args:
        encoder: items -> latents of `quantizer.dim` channels.
        decoder: code vectors -> items.
    """

    # Of the reconstruction; the quantizer's come after them.
    reconstruction_terms: tuple[str, ...] = ("reconstruction",)

    def __init__(self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    @property
    def loss_terms(self) -> tuple[str, ...]:
        """Names of the losses that `forward` returns, in their order."""
        return (*self.reconstruction_terms, *self.quantizer.loss_terms)

    def forward(self, items: Float[Tensor, "B C *S"]) -> dict[str, Float[Tensor, ""]]:
        """Return the loss terms, each summed over items: those of the reconstruction, and those of the quantizer."""
        return self.reconstruct(items)[1]

    def reconstruct(
        self, items: Float[Tensor, "B C *S"]
    ) -> tuple[Float[Tensor, "B C *S"], dict[str, Float[Tensor, ""]]]:
        """Return what the codes of items decode to, not clamped and with gradients, and the loss terms."""
        quantized = self.quantizer(self.encoder(items))
        reconstruction = self.decoder(quantized.latents).float()
        return reconstruction, {**self.reconstruction_losses(reconstruction, items), **quantized.losses}

    def reconstruction_losses(
        self, reconstruction: Float[Tensor, "B C *S"], items: Float[Tensor, "B C *S"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the losses of `reconstruction_terms`, each summed over items: here the mean squared error."""
        return {"reconstruction": mean_per_item(F.mse_loss(reconstruction, items, reduction="none")).sum()}

    def encode(self, items: Float[Tensor, "B C *S"]) -> Int[Tensor, "B *places"]:
        """Return the codes of items in [-1, 1]; residual quantization gives several at each place."""
        return self.quantizer(self.encoder(items)).codes

    def decode(self, codes: Int[Tensor, "B *places"]) -> Float[Tensor, "B C *S"]:
        """Return the items of codes, clamped to [-1, 1]."""
        return self.decoder(self.quantizer.code_vectors(codes)).clamp(-1, 1)
