"""How far two sounds are apart, and pictures of them: plain functions with fixed settings, the same for every codec."""

import math

import numpy as np
from jaxtyping import Float
from PIL import Image

from omniform.tokenizers.codecs.spectrogram import mel_filters

# Samples per window: 16, 32 and 64 ms at 16 kHz.
RESOLUTIONS = (256, 512, 1024)
N_MELS, MEL_WINDOW, MEL_HOP = 64, 512, 160
FLOOR_DB = -60.0  # below the loudest band of the original: what is quieter is silence
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from quiet to loud
_ENLARGED = 2


def spectrum(samples: Float[np.ndarray, "N"], window: int, hop: int) -> Float[np.ndarray, "T F"]:
    """Return the magnitudes of Hann windows, each `hop` samples after the one before, of a sound in silence."""
    padded = np.pad(np.asarray(samples, dtype=np.float64), (window // 2, window))
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(samples) + 1 : hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return np.abs(np.fft.rfft(windows * hann, axis=1))


def mel_levels(samples: Float[np.ndarray, "N"], rate: int) -> Float[np.ndarray, "T M"]:
    """Return levels in dB of the N_MELS bands of `mel_filters`.

    0 dB is a magnitude of 1; nothing is below -200 dB.
    """
    bands = mel_filters(MEL_WINDOW, N_MELS, rate).numpy()
    return 20 * np.log10(np.maximum(spectrum(samples, MEL_WINDOW, MEL_HOP) @ bands, 1e-10))


def log_mel_distance(sound: Float[np.ndarray, "N"], original: Float[np.ndarray, "N"], rate: int) -> float:
    """Return the mean absolute difference of levels of mel bands, in dB.

    Both are held above FLOOR_DB from the loudest band of the original: how silent a silence is does not count.
    """
    of_sound, of_original = mel_levels(sound, rate), mel_levels(original, rate)
    floor = of_original.max() + FLOOR_DB
    return float(np.abs(np.maximum(of_sound, floor) - np.maximum(of_original, floor)).mean())


def spectral_convergence(sound: Float[np.ndarray, "N"], original: Float[np.ndarray, "N"]) -> float:
    """Return the norm of the difference of magnitudes over the norm of the original's, averaged over RESOLUTIONS.

    Source: Parallel WaveGAN (arXiv:1910.11480), section 2.2, at several resolutions. Windows are a quarter of their
    length apart. 1 is what silence scores; of a silent original it is 0 for silence, else infinite.
    """
    ratios = []
    for window in RESOLUTIONS:
        of_sound, of_original = (spectrum(samples, window, window // 4) for samples in (sound, original))
        missed, norm = np.linalg.norm(of_sound - of_original), np.linalg.norm(of_original)
        ratios.append(float(missed / norm) if norm else (math.inf if missed else 0.0))
    return float(np.mean(ratios))


def si_sdr(sound: Float[np.ndarray, "N"], original: Float[np.ndarray, "N"]) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB; infinite where the sound is the original, scaled.

    Source: arXiv:1811.02508, section 2, on samples of mean 0. It compares wave forms: of a decoder that makes up
    phases it says little of what is heard. -infinite where one of the two is silent.
    """
    x, y = (np.asarray(samples, dtype=np.float64) - np.mean(samples) for samples in (original, sound))
    power = x @ x
    if power == 0 or y @ y == 0:
        return -math.inf
    target = (x @ y) / power * x
    rest = (y - target) @ (y - target)
    if rest <= np.finfo(np.float64).eps ** 2 * (y @ y):
        return math.inf
    return 10 * math.log10((target @ target) / rest) if target @ target else -math.inf


def spectrogram_picture(sounds: list[Float[np.ndarray, "N"]], rate: int) -> Image.Image:
    """Return the mel levels of sounds beside each other, high bands above, on one scale: from FLOOR_DB below the
    loudest band of the first to that."""
    levels = [mel_levels(samples, rate) for samples in sounds]
    loudest = levels[0].max()
    panels = []
    for level in levels:
        shade = np.clip((level.T[::-1] - loudest - FLOOR_DB) / -FLOOR_DB, 0, 1)
        stops = np.linspace(0, 1, len(_COLOURS))
        panels.append(np.stack([np.interp(shade, stops, channel) for channel in zip(*_COLOURS, strict=True)], axis=-1))
        panels.append(np.full((N_MELS, 4, 3), 128.0))
    picture = Image.fromarray(np.concatenate(panels[:-1], axis=1).round().astype(np.uint8))
    return picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED), Image.Resampling.NEAREST)
