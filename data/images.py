"""Opening an image that somebody else encoded, within bounds."""

import io
import warnings

from PIL import Image

from omniform.data.schema import SampleError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26


def open_image(payload: bytes) -> Image.Image:
    """Decode an image.

    Raises:
        SampleError: not a whole PNG, JPEG or WebP image, or more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is lower
            image = Image.open(io.BytesIO(payload), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except Exception as error:  # Pillow raises almost any type on hostile bytes
        raise SampleError(f"an image of {len(payload)} bytes is not a whole {', '.join(FORMATS)} ({error})") from error
    raise SampleError(f"an image has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all")
