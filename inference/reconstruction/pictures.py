"""How far two pictures are apart: PSNR and SSIM."""

import math

import numpy as np
from jaxtyping import Float

from omniform.errors import OmniformError

_SIGMA, _RADIUS = 1.5, 5  # SSIM's Gaussian window of 11 pixels


def psnr(image: Float[np.ndarray, "*S"], other: Float[np.ndarray, "*S"], data_range: float = 2.0) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal images."""
    error = float(np.mean((image.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(image: Float[np.ndarray, "H W"], other: Float[np.ndarray, "H W"], data_range: float = 2.0) -> float:
    """Return the mean structural similarity over all places where the window of 11 x 11 pixels fits.

    Source: Image Quality Assessment (Wang et al. 2004), IEEE TIP 13(4), equation 13, with its Gaussian window
    (sigma 1.5) and constants K1 = 0.01, K2 = 0.03.

    Raises:
        OmniformError: the images are smaller than the window.
    """
    if min(image.shape) <= 2 * _RADIUS:
        raise OmniformError(f"SSIM of {image.shape} pixels: expected at least {2 * _RADIUS + 1} per side")
    x, y = image.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _windowed_mean(x), _windowed_mean(y)
    var_x, var_y = _windowed_mean(x * x) - mean_x**2, _windowed_mean(y * y) - mean_y**2
    covariance = _windowed_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (var_x + var_y + c2)))


def _windowed_mean(image: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H-10 W-10"]:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    rows = np.lib.stride_tricks.sliding_window_view(image, len(weights), axis=0) @ weights
    return np.lib.stride_tricks.sliding_window_view(rows, len(weights), axis=1) @ weights
