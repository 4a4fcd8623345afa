"""A discriminator of sounds by their short-time spectra at several resolutions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from omniform.tokenizers.codecs.adversarial import Discriminator
from omniform.tokenizers.codecs.spectrogram import stft


class SpectrogramDiscriminator(Discriminator):
    """Sounds -> features and scores of the real and imaginary parts of their spectra.

    Source: the MS-STFT discriminator of EnCodec (Défossez et al. 2022), arXiv:2210.13438, section 3.4. Deviations: no
    weight normalisation and no dilation; the hinge is averaged over all places of all resolutions, so that those with
    more places count more.

    Args:
        n_ffts: samples per window, each resolution with layers of its own.
        widths: channels of each layer, which halves the number of frequencies.
    """

    def __init__(self, n_ffts: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.n_ffts = tuple(n_ffts)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(before, after, (3, 5), (1, 2), (1, 2)) for before, after in pairwise((2, *widths)))
            for _ in n_ffts
        )
        self.scores = nn.ModuleList(nn.Conv2d(widths[-1], 1, 3, padding=1) for _ in n_ffts)

    def forward(self, items: Float[Tensor, "B 1 N"]) -> list[Float[Tensor, "B *_"]]:
        """Return the features of every layer of every resolution, and the scores of all places (B, S) as the last
        entry."""
        features, scores = [], []
        for n_fft, layers, score in zip(self.n_ffts, self.layers, self.scores, strict=True):
            with torch.autocast(items.device.type, enabled=False):
                spectra = stft(items[:, 0], n_fft, n_fft // 4)
                image = torch.stack([spectra.real, spectra.imag], 1) * (16 / n_fft**0.5)
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                image = F.leaky_relu(layer(image), 0.2)
                features.append(image)
            scores.append(score(image).flatten(1))
        return [*features, torch.cat(scores, 1)]
