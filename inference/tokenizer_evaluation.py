"""How well a tokenizer keeps what it encodes: rate, reconstruction, use of its codes, and a judge's word."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float

from omniform.data.sealed import write_atomically
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.judges import DigitImageJudge
from omniform.tokenizers.base import Discrete, Modality, Tokens
from omniform.tokenizers.image import ImageTokenizer
from omniform.tokenizers.registry import load_modality

N_SHOWN = 32
_SIGMA, _RADIUS = 1.5, 5  # SSIM's Gaussian window of 11 pixels


def evaluate_tokenizer(folder: Path, data_dir: Path, split: str = "test", *, out: Path | None = None) -> dict[str, Any]:
    """Encode and decode every item of a split that the tokenizer is for, and compare.

    Text: the fraction that comes back exactly. Images: mean PSNR in dB and mean SSIM over items; where samples carry a
    digit, also the accuracy of a judge before and after the round trip, fitted on the train images and their altered
    copies.

    Args:
        folder: of the tokenizer, or the run folder that holds it as tokenizer/.
        data_dir: a world, whose splits are subfolders.
        split: held-out items to encode.
        out: folder for tokenizer.json, and reconstructions.png of an image tokenizer.

    Returns:
        The content of tokenizer.json; floats of JSON.

    Raises:
        OmniformError: the tokenizer or the data cannot be read, or the split holds nothing of the modality.
    """
    in_run = folder / "tokenizer"
    tokenizer = load_modality(in_run if in_run.is_dir() else folder)
    items, digits = _read(tokenizer, data_dir / split)
    tokens = tokenizer.encode_batch(items)
    decoded = tokenizer.decode_batch(tokens)
    figures = {
        "modality": tokenizer.name,
        "kind": tokenizer.kind,
        "split": split,
        "n": len(items),
        **code_figures(tokens, tokenizer.representation),
    }
    if isinstance(tokenizer, ImageTokenizer):
        before, after = _gray(items), _gray(decoded)
        figures["bits_per_pixel"] = figures["bits_per_item"] / before[0].size
        mean_psnr = float(np.mean([psnr(a, b) for a, b in zip(before, after, strict=True)]))
        # An exact round trip has an infinite PSNR, which JSON cannot hold.
        figures["psnr_db"] = mean_psnr if math.isfinite(mean_psnr) else None
        figures["ssim"] = float(np.mean([ssim(a, b) for a, b in zip(before, after, strict=True)]))
        if digits is not None:
            train_items, train_digits = _read(tokenizer, data_dir / "train")
            judge = DigitImageJudge.fit(_gray(train_items), np.array(train_digits))
            figures["judge"] = judged_figures(judge.predict(before), judge.predict(after), np.array(digits))
    else:
        figures["characters_per_token"] = sum(map(len, items)) / max(1, sum(len(entry.codes) for entry in tokens))
        figures["exact"] = sum(a == b for a, b in zip(items, decoded, strict=True)) / len(items)
    if out is not None:
        write_atomically(out / "tokenizer.json", json.dumps(figures, indent=2).encode() + b"\n")
        if isinstance(tokenizer, ImageTokenizer):
            tokenizer.comparison(items[:N_SHOWN]).save(out / "reconstructions.png")
    return figures


def code_figures(tokens: Sequence[Tokens], representation: Discrete | Any) -> dict[str, float]:
    """Return how many tokens and bits an item takes, the fraction of codes that occur, and the perplexity
    exp(H) of how often each occurs: the number of equally used codes that would be as varied."""
    size = representation.vocab_size
    counts = torch.bincount(torch.cat([entry.codes for entry in tokens]), minlength=size).double()
    frequencies = counts[counts > 0] / counts.sum()
    per_item = float(counts.sum()) / len(tokens)
    return {
        "codebook_size": size,
        "tokens_per_item": per_item,
        "bits_per_item": per_item * math.log2(size),
        "code_use": len(frequencies) / size,
        "perplexity": float(torch.exp(-(frequencies * frequencies.log()).sum())),
    }


def judged_figures(
    before: npt.NDArray[np.int64], after: npt.NDArray[np.int64], digits: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Return what a judge says of the same images before and after the round trip, over all and per digit."""
    per_class = {
        str(digit): {
            "accuracy_before": float((before[digits == digit] == digit).mean()),
            "accuracy_after": float((after[digits == digit] == digit).mean()),
            "n": int((digits == digit).sum()),
        }
        for digit in np.unique(digits)
    }
    accuracy_before, accuracy_after = float((before == digits).mean()), float((after == digits).mean())
    return {
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "ratio": accuracy_after / accuracy_before if accuracy_before else 0.0,
        "per_class": per_class,
    }


def psnr(image: Float[np.ndarray, "H W"], other: Float[np.ndarray, "H W"], data_range: float = 2.0) -> float:
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


def _read(tokenizer: Modality, folder: Path) -> tuple[list[Any], list[int] | None]:
    """Return every item of the tokenizer's modality, and the digit of each where every sample has one."""
    items: list[Any] = []
    digits: list[Any] = []
    for sample in ShardReader(folder):
        for span in sample.spans:
            if span.modality == tokenizer.name:
                items.append(span.text if span.payload is None else tokenizer.read(span.payload))
                digits.append(sample.metadata.get("digit"))
    if not items:
        raise OmniformError(f"{folder} holds no {tokenizer.name}, which this tokenizer is for")
    return items, None if None in digits else digits


def _gray(images: Sequence[torch.Tensor]) -> Float[np.ndarray, "N H W"]:
    """Return the mean over channels."""
    return torch.stack(list(images)).mean(1).numpy()
