"""How far apart two sounds are to the ear: differences of spectra at several resolutions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from omniform.tokenizers.codecs.spectrogram import magnitude, mel_filters, stft

# Samples per window, and bands of the mel scale: as many as the window can tell apart.
RESOLUTIONS = {256: 40, 512: 64, 1024: 80}
_FLOOR = 2e-2  # magnitudes far below it are silence; the levels of a recording with a peak of 1 reach about 100


class SpectralDistance(nn.Module):
    """Distances between spectra, averaged over RESOLUTIONS.

    `log_mel` is the mean absolute difference of log-mel spectra: quiet bands count as loud ones do, down to a floor.
    `magnitude` is the norm of the difference of magnitudes over the norm of the item's: loud bands count.

    Source: `log_mel` at several resolutions from EnCodec (Défossez et al. 2022), arXiv:2210.13438, section 3.4;
    `magnitude` is the spectral convergence of Parallel WaveGAN (Yamamoto et al. 2019), arXiv:1910.11480, section 2.2.
    Deviations: windows are half a window apart, and 1 is added to the norm of the item, which is 0 in silence.

    Args:
        rate: samples per second.
    """

    terms = ("log_mel", "magnitude")

    def __init__(self, rate: int) -> None:
        super().__init__()
        for n_fft, n_mels in RESOLUTIONS.items():
            self.register_buffer(f"filters_{n_fft}", mel_filters(n_fft, n_mels, rate), persistent=False)

    def forward(self, sounds: Float[Tensor, "B N"], items: Float[Tensor, "B N"]) -> dict[str, Float[Tensor, "B"]]:
        """Return the distance of each sound from its item, by term."""
        log_mel, convergence = [], []
        with torch.autocast(items.device.type, enabled=False):
            for n_fft in RESOLUTIONS:
                of_sound, of_item = (magnitude(stft(samples, n_fft, n_fft // 2)) for samples in (sounds, items))
                filters = self.get_buffer(f"filters_{n_fft}") * (16 / n_fft**0.5)  # of noise, as loud in every window
                difference = (of_sound @ filters + _FLOOR).log() - (of_item @ filters + _FLOOR).log()
                log_mel.append(difference.abs().mean((1, 2)))
                missed = (of_sound - of_item).square().sum((1, 2)).sqrt()
                convergence.append(missed / (of_item.square().sum((1, 2)).sqrt() + 1))
        return {"log_mel": torch.stack(log_mel).mean(0), "magnitude": torch.stack(convergence).mean(0)}
