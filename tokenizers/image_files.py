"""Image files as people have them -> upright, bounded, plain 8-bit pictures.

The formats are those whose decoders Pillow carries for the web (PNG, JPEG, WebP, GIF), BMP, which needs none, and TIFF
with the compressions that editors write by default. Others (AVIF, HEIF, JPEG 2000, PSD, JPEG or fax inside TIFF, ...)
bring large decoders with a history of faults, or hold no single picture: convert such files first. The format is
recognised by content; a file's name says nothing.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from omniform.tokenizers.base import TokenizerError

Mode = Literal["L", "RGB"]
Fit = Literal["crop", "pad", "stretch"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 2**27
MAX_PIXELS = 2**26  # decoding takes up to 24 bytes per pixel (WebP)
MAX_JPEG_SCANS = 100  # each scan costs a pass over all pixels, and a few bytes can ask for one
# Within a scan, FF is never followed by DA. The length, of 1 to 4 components, tells a header from the bytes of a film
# that phones append. Thumbnails count too.
_SCAN_HEADER = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFileError(TokenizerError):
    """An image that cannot be read, with the reason by which such images are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself before a pixel is decoded.

    Attributes:
        file_format: one of FORMATS.
        width: pixels, of the upright picture; so is `height`.
        grey: whether it has no colours; transparency does not count.
        animated: whether it holds more than one picture; the first is the one that is read.
    """

    file_format: str
    width: int
    height: int
    grey: bool
    animated: bool


def read_header(payload: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return what an image file says of itself; no pixel is decoded.

    Raises:
        ImageFileError: not an image of FORMATS, damaged as far as it is read, above MAX_BYTES or `max_pixels`.
    """
    with _opened(payload, max_pixels) as image:
        width, height = image.size
        if image.format != "TIFF" and _orientation(image) >= 5:  # Pillow gives a TIFF the size of its upright picture
            width, height = height, width
        file_format = {"MPO": "JPEG"}.get(image.format or "", image.format or "")
        grey = image.mode[0] in "1LIF" and image.mode != "LAB"
        return ImageHeader(file_format, width, height, grey, bool(getattr(image, "is_animated", False)))


def read_picture(payload: bytes, mode: Mode, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first picture of an image file and make it plain, as `plain_picture` does.

    Raises:
        ImageFileError: not a whole image of FORMATS, or above MAX_BYTES or `max_pixels`, which is known before any
            pixel is decoded.
    """
    with _opened(payload, max_pixels) as image:
        return plain_picture(image, mode)


def open_picture(payload: bytes) -> Image.Image:
    """Decode the first picture of an image file in the mode that it is stored in, transparency and all.

    Raises:
        ImageFileError: as `read_picture`.
    """
    with _opened(payload, MAX_PIXELS) as image:
        image.load()
        return image


def plain_picture(image: Image.Image, mode: Mode) -> Image.Image:
    """Return an 8-bit picture, grey or RGB: turned upright as its EXIF says, and laid on white where transparent.

    16-bit levels are scaled, not clipped. Where the depth is not stated (32-bit integers, floats) it is the smallest
    of the usual ranges that holds every level: [0, 1] for floats, [0, 255], [0, 65535]. Colour profiles are left out.

    Raises:
        ImageFileError: pixels that cannot be decoded, more than MAX_PIXELS of them, or levels outside of these ranges.
    """
    with _decoding(f"{image.width} x {image.height} pixels of mode {image.mode}"):
        _check_pixels(image.size, MAX_PIXELS)
        image.load()  # turns a TIFF upright, after which its orientation says so
        turn = _UPRIGHT.get(_orientation(image))
        upright = _with_8_bits(_with_known_polarity(image))
        if upright.has_transparency_data:
            shown = upright.convert("RGBA")
            upright = Image.new("RGB", shown.size, "white")
            upright.paste(shown, mask=shown.getchannel("A"))
        plain = upright.convert(mode)
        return plain if turn is None else plain.transpose(turn)


def fit_picture(picture: Image.Image, size: tuple[int, int], fit: Fit, background: int = 255) -> Image.Image:
    """Bring a plain picture to `size` (width, height) in pixels by bicubic interpolation.

    Args:
        fit: "crop" keeps the largest central part of the right shape, "pad" keeps the whole picture and fills the rest
            with the grey level `background`, "stretch" changes its proportions.
    """
    if picture.size == size:
        return picture
    if fit == "stretch":
        return picture.resize(size, Image.Resampling.BICUBIC)
    if fit == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new(picture.mode, size, (background,) * len(picture.getbands()))
    whole = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(whole, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def fitted_frame(picture_size: tuple[int, int], size: tuple[int, int], fit: Fit) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom), in pixels of the picture, of what `fit_picture` shows; "pad" shows more than
    there is."""
    width, height = picture_size
    if fit == "stretch" or picture_size == size:
        return (0.0, 0.0, float(width), float(height))
    if fit == "crop":
        scale = min(width / size[0], height / size[1])
        shown = (scale * size[0], scale * size[1])
    else:
        scale = min(size[0] / width, size[1] / height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        margins = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
        left, top = -margins[0] * width / inner[0], -margins[1] * height / inner[1]
        return (left, top, left + size[0] * width / inner[0], top + size[1] * height / inner[1])
    left, top = (width - shown[0]) / 2, (height - shown[1]) / 2
    return (left, top, left + shown[0], top + shown[1])


@contextmanager
def _opened(payload: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Yield an image whose header is read and within bounds; errors of Pillow inside the block become ours."""
    if not payload:
        raise ImageFileError("empty file", f"0 bytes are not a whole {', '.join(FORMATS)} image: the file is empty")
    if len(payload) > MAX_BYTES:
        raise ImageFileError("file too large", f"an image file of {len(payload)} bytes, expected at most {MAX_BYTES}")
    with _decoding(f"{len(payload)} bytes"):
        if payload.startswith(b"RIFF"):
            _check_pixels(_webp_size(payload), max_pixels)
        try:
            image = Image.open(io.BytesIO(payload), formats=FORMATS)
        except UnidentifiedImageError as error:
            if payload.startswith(_SIGNATURES):
                raise ValueError("its header is damaged or cut short") from error
            raise ImageFileError(
                "not an image of a known format",
                f"{len(payload)} bytes are not a whole {', '.join(FORMATS)} image: they begin with {payload[:12]!r}; "
                "convert other formats first",
            ) from error
        with image:
            _check_pixels(image.size, max_pixels)
            if image.format == "TIFF" and image.info.get("compression") not in TIFF_COMPRESSIONS:
                raise ImageFileError(
                    "TIFF of a compression that is not read",
                    f"a TIFF image is compressed as {image.info.get('compression')!r}, expected one of "
                    f"{', '.join(TIFF_COMPRESSIONS)}: convert it first",
                )
            if image.format in ("JPEG", "MPO") and len(_SCAN_HEADER.findall(payload)) > MAX_JPEG_SCANS:
                raise ImageFileError("too many scans", f"a JPEG image has more than {MAX_JPEG_SCANS} scans")
            yield image


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageFileError about `what`, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow can read is good enough, and its bomb bound is not ours
            yield
    except ImageFileError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFileError("too many pixels", f"an image has far more pixels than {MAX_PIXELS}: {error}") from error
    except Exception as error:  # Pillow raises almost any type on hostile bytes, EXIF among them
        raise ImageFileError(
            "damaged image", f"{what} are not a whole {', '.join(FORMATS)} image: {error or type(error).__name__}"
        ) from error


def _webp_size(payload: bytes) -> tuple[int, int]:
    """Return the canvas that a WebP file states: Pillow's decoder takes memory for it before Pillow tells the size."""
    width, height = (int.from_bytes(payload[place : place + 2], "little") & 0x3FFF for place in (26, 28))
    if payload[12:16] == b"VP8L":
        bits = int.from_bytes(payload[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif payload[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(payload[place : place + 3], "little") for place in (24, 27))
    return width, height


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageFileError(
            "too many pixels", f"an image has {size[0]} x {size[1]} pixels, expected at most {max_pixels} in all"
        )


def _orientation(image: Image.Image) -> int:
    stored = image.info.get("exif")
    if isinstance(stored, bytes):
        Image.Exif().load(stored)  # Pillow passes over damage in some JPEG files, but not in all
    value = image.getexif().get(_EXIF_ORIENTATION)
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _with_known_polarity(image: Image.Image) -> Image.Image:
    """Pillow takes every CMYK JPEG for one of Adobe's, which store inks inverted; only their marker says so."""
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        return ImageChops.invert(image)
    return image


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of an 8-bit mode that Pillow can turn into L, RGB and RGBA, with any transparency."""
    if image.mode in ("La", "LAB"):
        return image.convert({"La": "LA", "LAB": "RGB"}[image.mode])
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    tops = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    low, high = levels.min(), levels.max()
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        raise ImageFileError(
            "levels out of range", f"an image of mode {image.mode} spans [{low}, {high}], expected [0, {tops[-1]}]"
        )
    plain = Image.fromarray((levels / (top / 255)).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one level that stands for "nothing here"
        plain.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return plain
