"""Handwritten digits: the drawings that scikit-learn ships, enlarged, and how copies of them are altered.

They are the 1797 of the UCI optical digits test set (CC BY 4.0), 8 x 8 with 17 grey levels, by 13 writers one after the
other. Who wrote which is not recorded, but runs of labels show 14 blocks; validation and test take whole blocks at the
end, as a proxy for writers that training never saw.
"""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from PIL import Image

from omniform.data.schema import DataError
from omniform.kernels.keyed_noise import keyed_uniform, stream

IMAGE_SIZE = 16
SPLIT_ROWS = {"train": range(1415), "validation": range(1415, 1545), "test": range(1545, 1797)}
# First row of each block.
WRITER_BLOCKS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
# How far a training copy may be turned (degrees), enlarged or shrunk, and moved (pixels).
MAX_ROTATION, MAX_SCALING, MAX_SHIFT = 10.0, 0.1, 1.0

Warp = dict[str, float | list[float]]


def load_digit_images() -> tuple[UInt8[np.ndarray, "1797 16 16"], npt.NDArray[np.int64]]:
    """Return all images, enlarged by bicubic interpolation, ink 255 on 0, and their digits.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits-world needs scikit-learn: install omniform[demo]") from error
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    return np.stack(images), digits.target.astype(np.int64)


def rows_by_digit(labels: npt.NDArray[np.int64], split: str) -> list[list[int]]:
    """Return the rows of a split that show each digit."""
    return [[row for row in SPLIT_ROWS[split] if labels[row] == digit] for digit in range(10)]


def altered(
    images: UInt8[np.ndarray, "R H W"], row: int, copy: int, seed: int
) -> tuple[UInt8[np.ndarray, "H W"], Warp]:
    """Return a copy of an image, 0 as it is, and how it differs: the arguments of `warped`."""
    image, rotation, scale, shift = images[row], 0.0, 1.0, [0.0, 0.0]
    if copy:
        turn, size, *move = 2 * keyed_uniform(seed, stream("digits/warp"), row, copy, np.arange(4)) - 1
        rotation, scale = round(MAX_ROTATION * float(turn), 3), round(1 + MAX_SCALING * float(size), 3)
        shift = [round(MAX_SHIFT * float(pixels), 3) for pixels in move]
        image = warped(image, rotation, scale, shift)
    return image, {"rotation": rotation, "scale": scale, "shift": shift}


def warped(
    image: UInt8[np.ndarray, "H W"], rotation: float, scale: float, shift: Sequence[float]
) -> UInt8[np.ndarray, "H W"]:
    """Return the image turned about its centre, scaled and then moved, by bicubic interpolation.

    Args:
        rotation: degrees, clockwise as seen.
        shift: pixels to the right and down.
    """
    height, width = image.shape
    x, y = (width - 1) / 2, (height - 1) / 2
    cosine, sine = np.cos(np.radians(rotation)) / scale, np.sin(np.radians(rotation)) / scale
    # Pillow asks where each output pixel comes from, and puts pixel centres at halves.
    from_x, from_y = x + 0.5 + shift[0], y + 0.5 + shift[1]
    matrix = (
        *(cosine, sine, x + 0.5 - cosine * from_x - sine * from_y),
        *(-sine, cosine, y + 0.5 + sine * from_x - cosine * from_y),
    )
    size = (width, height)
    return np.asarray(Image.fromarray(image).transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))


def png_bytes(image: UInt8[np.ndarray, "H W"]) -> bytes:
    """Return a grey PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
