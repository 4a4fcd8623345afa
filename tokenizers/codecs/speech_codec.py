"""A codec of speech: what its encoder, quantizer and decoder are trained on."""

from jaxtyping import Float
from torch import Tensor

from omniform.tokenizers.codecs.codec import Codec
from omniform.tokenizers.codecs.quantizer import Quantizer, mean_per_item
from omniform.tokenizers.codecs.spectral_loss import SpectralDistance
from omniform.tokenizers.codecs.speech_decoder import SpeechDecoder
from omniform.tokenizers.codecs.speech_encoder import SpeechEncoder


class SpeechCodec(Codec):
    """Samples (B, 1, N) -> a code, or several, per frame (B, T) -> samples; N is a multiple of the samples per frame.

    At the ends of what it is given it sees silence, layer by layer. The frames `encoder.margin` from an end, and the
    samples `decoder.margin` frames from one, are the same wherever the ends are.

    Args:
        rate: samples per second.
    """

    reconstruction_terms = (*SpectralDistance.terms, "waveform")
    encoder: SpeechEncoder
    decoder: SpeechDecoder

    def __init__(self, encoder: SpeechEncoder, quantizer: Quantizer, decoder: SpeechDecoder, rate: int) -> None:
        super().__init__(encoder, quantizer, decoder)
        self.distance = SpectralDistance(rate)

    def reconstruction_losses(
        self, reconstruction: Float[Tensor, "B 1 N"], items: Float[Tensor, "B 1 N"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the terms of `SpectralDistance`, and `waveform`, the mean absolute difference of samples."""
        distances = self.distance(reconstruction[:, 0], items[:, 0])
        return {
            **{term: distance.sum() for term, distance in distances.items()},
            "waveform": mean_per_item((reconstruction - items).abs()).sum(),
        }
