"""Short-time spectra of sound, the way back from them, and the mel scale."""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor


def stft(samples: Float[Tensor, "B N"], n_fft: int, hop: int) -> Complex[Tensor, "B T F"]:
    """Return the spectra of Hann windows of `n_fft` samples, the t-th about the samples [t * hop, (t + 1) * hop).

    Around the sound is silence. T = N / hop, rounded down; F = n_fft / 2 + 1.
    """
    margin = n_fft - hop
    windows = F.pad(samples, (margin // 2, margin - margin // 2)).unfold(-1, n_fft, hop)
    return torch.fft.rfft(windows * _hann(n_fft, samples))


def inverse_stft(spectra: Complex[Tensor, "B T F"], hop: int) -> Float[Tensor, "B N"]:
    """Return N = T * hop samples: the windows of the spectra, weighed again, laid where `stft` took them and added up.

    It is `stft` undone wherever no window is missing; n_fft is a multiple of `hop`, at least three times as long.

    Source: Griffin and Lim (1984), "Signal estimation from modified short-time Fourier transform", equation 6, for
    windows whose squares add up to a constant.
    """
    n_fft = 2 * (spectra.shape[-1] - 1)
    windows = torch.fft.irfft(spectra, n_fft)
    windows = windows * _hann(n_fft, windows) / (3 / 8 * n_fft / hop)
    length = (windows.shape[1] - 1) * hop + n_fft
    added = F.fold(windows.transpose(1, 2), (1, length), (1, n_fft), stride=(1, hop)).flatten(1)
    start = (n_fft - hop) // 2
    return added[:, start : start + windows.shape[1] * hop]


def magnitude(spectra: Complex[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return absolute values, with a finite gradient at 0."""
    return (spectra.real.square() + spectra.imag.square() + 1e-9).sqrt()


def mel_filters(n_fft: int, n_mels: int, rate: int) -> Float[Tensor, "F M"]:
    """Return triangles of height 1 that are equally wide on the mel scale, 2595 log10(1 + Hz / 700), from 0 Hz to half
    the rate; magnitudes times them are a mel spectrum."""
    hertz = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    top = 2595 * torch.log10(torch.tensor(1 + rate / 1400, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, n_mels + 2, dtype=torch.float64) * top / 2595) - 1)
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - low) / (peak - low), (high - hertz) / (high - peak)
    return torch.minimum(rising, falling).clamp(min=0).float()


def _hann(length: int, like: Float[Tensor, "*S"]) -> Float[Tensor, "length"]:
    return torch.hann_window(length, dtype=like.dtype, device=like.device)
