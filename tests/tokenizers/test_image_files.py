"""Odd image files: each is read as it was meant or refused with a reason, and none takes more memory than its bound."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from omniform.tokenizers.image_files import (
    FORMATS,
    MAX_JPEG_SCANS,
    ImageFileError,
    fit_picture,
    plain_picture,
    read_header,
    read_picture,
)

NOISE = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, file_format: str, **settings: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, file_format, **settings)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand: forms that Pillow does not write, and headers that lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    listed = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in listed)
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(payload: bytes, mode: str = "RGB") -> list:
    """Levels of what is read, as lists."""
    return np.asarray(read_picture(payload, mode)).tolist()  # type: ignore[arg-type]


def refusal(payload: bytes) -> str:
    """Why a file is refused."""
    with pytest.raises(ImageFileError) as caught:
        read_picture(payload, "RGB")
    return caught.value.reason


WHOLE = {name: encode(Image.fromarray(NOISE), name) for name in FORMATS}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright_as_pillow_turns_them(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    image = Image.fromarray(NOISE[:, :11])
    payload = encode(image, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB")
    assert pixels(payload) == np.asarray(expected).tolist()
    header = read_header(payload)
    assert (header.width, header.height, header.file_format) == (*expected.size, file_format)


@given(colour=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255))
def test_alpha_is_laid_on_white(colour: tuple[int, int, int], alpha: int) -> None:
    [[found]] = pixels(encode(Image.new("RGBA", (1, 1), (*colour, alpha)), "PNG"))
    expected = [(level * alpha + 255 * (255 - alpha)) / 255 for level in colour]
    assert np.abs(np.subtract(found, expected)).max() <= 0.5
    [[grey]] = pixels(encode(Image.new("LA", (1, 1), (colour[0], alpha)), "PNG"), "L")
    assert abs(grey - expected[0]) <= 0.5


def palette_image() -> Image.Image:
    """Two pixels of a palette: red and blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


RED, BLUE, WHITE, BLACK = [255, 0, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (encode(palette_image(), "PNG"), [RED, BLUE]),
        (encode(palette_image(), "GIF"), [RED, BLUE]),
        (encode(palette_image(), "PNG", transparency=0), [WHITE, BLUE]),
        (encode(palette_image(), "PNG", transparency=b"\xff\x00"), [RED, WHITE]),
        (encode(palette_image(), "GIF", transparency=1), [RED, WHITE]),
        (encode(palette_image(), "BMP"), [RED, BLUE]),
        (encode(palette_image(), "TIFF"), [RED, BLUE]),
        (png(2, 1, 1, 0, b"\0\x40"), [BLACK, WHITE]),  # 1 bit
        (png(2, 1, 1, 0, b"\0\x40", (b"tRNS", b"\0\0")), [WHITE, WHITE]),
        (png(2, 1, 2, 0, b"\0\x70"), [[85] * 3, WHITE]),  # 2 bits
        (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 100 * 257, 65535)), [[100] * 3, WHITE]),
        (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 7, 9 * 257), (b"tRNS", b"\0\7")), [WHITE, [9] * 3]),
        (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)), [RED, BLUE]),
        (png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 0, 0, 3 * 257, 65535)), [WHITE, [3] * 3]),
        (png(2, 1, 16, 6, b"\0" + struct.pack(">8H", 0, 0, 0, 0, 65535, 0, 0, 65535)), [WHITE, RED]),
        (encode(Image.fromarray(np.array([[0, 257]], np.uint16)), "TIFF"), [BLACK, [1] * 3]),
        (encode(Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF"), [BLACK, WHITE]),
        (encode(Image.fromarray(np.array([[0, 200]], np.int32)), "TIFF"), [BLACK, [200] * 3]),
        (encode(Image.fromarray(np.array([[0.2, 1]], np.float32)), "TIFF"), [[51] * 3, WHITE]),
        (encode(Image.fromarray(np.array([[3, 255]], np.float32)), "TIFF"), [[3] * 3, WHITE]),
        (encode(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
    ],
)
def test_every_depth_and_palette_is_shown_as_it_was_meant(payload: bytes, expected: list) -> None:
    assert pixels(payload) == [expected]


@pytest.mark.parametrize("levels", [np.array([[-1, 5]], np.int32), np.array([[np.nan, 1]], np.float32)])
def test_levels_of_no_usual_range_are_refused(levels: np.ndarray) -> None:
    assert refusal(encode(Image.fromarray(levels), "TIFF")) == "levels out of range"


def test_the_adobe_marker_decides_whether_inks_are_inverted() -> None:
    payload = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")  # as Adobe stores it, inverted
    assert pixels(payload)[0][0] == RED
    start = payload.index(b"\xff\xee")
    plain = payload[:start] + payload[start + 2 + int.from_bytes(payload[start + 2 : start + 4]) :]
    assert pixels(plain)[0][0] == BLACK  # the same bytes, now inks as they are: all of cyan and all of black
    assert Image.open(io.BytesIO(plain)).mode == "CMYK"


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_pictures_is_read(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    payload = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert read_header(payload).animated
    assert np.abs(np.subtract(pixels(payload), RED)).max() <= 2
    assert not read_header(encode(frames[0], file_format)).animated


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_cut_anywhere_is_refused_or_whole(file_format: str) -> None:
    whole, expected = WHOLE[file_format], pixels(WHOLE[file_format])
    refused = []
    for size in range(len(whole)):
        try:
            assert pixels(whole[:size]) == expected  # only what follows the last pixel is missing
        except ImageFileError as error:
            refused.append((size, error.reason))
    assert refused[0] == (0, "empty file")
    assert [size for size, _ in refused[:-20]] == list(range(len(refused) - 20))
    assert {reason for size, reason in refused if size > 4} == {"damaged image"}
    assert len(whole) - len(refused) <= 24


@settings(max_examples=200)
@given(
    payload=st.one_of(
        st.binary(max_size=300),
        st.builds(bytes.__add__, st.sampled_from([p[:40] for p in WHOLE.values()]), st.binary(max_size=200)),
    )
)
def test_random_bytes_are_a_bounded_picture_or_are_refused(payload: bytes) -> None:
    try:
        header = read_header(payload, 2**20)
    except ImageFileError:
        with pytest.raises(ImageFileError):
            read_picture(payload, "L", 2**20)
        return
    assert header.width * header.height <= 2**20
    try:
        picture = read_picture(payload, "L", 2**20)
    except ImageFileError:
        return
    assert picture.size == (header.width, header.height)


@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bits_give_a_picture_or_a_refusal(data: st.DataObject) -> None:
    payload = bytearray(WHOLE[data.draw(st.sampled_from(FORMATS))])
    for place in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), min_size=1, max_size=6)):
        payload[place // 8] ^= 1 << place % 8
    try:
        picture = read_picture(bytes(payload), "RGB", 2**20)
    except ImageFileError:
        return
    assert picture.mode == "RGB"
    assert picture.width * picture.height <= 2**20


BOMBS = """
import io, json, resource, struct, sys, zlib
sys.path.insert(0, sys.argv[1])
import numpy as np
from PIL import Image
from test_image_files import encode, png
from omniform.tokenizers.image_files import ImageFileError, plain_picture, read_header, read_picture

def patched(payload, offset, content):
    return payload[:offset] + content + payload[offset + len(content):]

tiny = Image.new("RGB", (4, 4))
gif, bmp, jpeg, tiff = (encode(tiny, name) for name in ("GIF", "BMP", "JPEG", "TIFF"))
wide = tiff.index(struct.pack("<HHI", 256, 4, 1))
lossless, exif = encode(tiny, "WEBP", lossless=True), encode(tiny, "WEBP", exif=b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\0\\0")
zeros = zlib.compress(bytes(2**27), 1)
bombs = {
    "png": png(60000, 60000, 8, 0, b""),
    "png below Pillow's bound": png(9000, 9000, 8, 0, bytes(9000)),
    "png text": png(4, 4, 8, 0, bytes(20), (b"zTXt", b"key\\0\\0" + zeros)),
    "png international text": png(4, 4, 8, 0, bytes(20), (b"iTXt", b"key\\0\\1\\0\\0\\0" + zeros)),
    "png profile": png(4, 4, 8, 0, bytes(20), (b"iCCP", b"key\\0\\0" + zeros)),
    "gif": patched(gif, 6, struct.pack("<HH", 65535, 65535)),
    "gif below Pillow's bound": patched(gif, 6, struct.pack("<HH", 12000, 12000)),
    "bmp": patched(bmp, 18, struct.pack("<ii", 2**30, 2**30)),
    "jpeg": patched(jpeg, jpeg.index(b"\\xff\\xc0") + 5, struct.pack(">HH", 65500, 65500)),
    "tiff": patched(patched(tiff, wide + 8, struct.pack("<I", 60000)), wide + 20, struct.pack("<I", 60000)),
    "webp": patched(exif, exif.index(b"VP8X") + 12, b"\\xff\\xff\\0\\xff\\xff\\0"),
    "webp below Pillow's bound": patched(lossless, 21, struct.pack("<I", 11999 | 11999 << 14)),
    "large file": bytes(2**27 + 1),
}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {}
for name, payload in bombs.items():
    for read in (read_header, lambda payload: read_picture(payload, "RGB")):
        try:
            found[name] = str(read(payload))
        except ImageFileError as error:
            found[name] = error.reason
try:
    plain_picture(Image.open(io.BytesIO(bombs["png below Pillow's bound"])), "L")
except ImageFileError as error:
    found["image of a user"] = error.reason
print(json.dumps({"kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "found": found}))
"""


def test_bombs_are_refused_from_their_headers_in_little_memory() -> None:
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-W", "ignore", "-c", BOMBS, folder]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = result["found"]
    assert found.pop("large file") == "file too large"
    assert {found.pop(f"png {chunk}") for chunk in ("text", "international text", "profile")} == {"damaged image"}
    assert set(found.values()) == {"too many pixels"}
    assert len(found) == 10
    assert result["kilobytes"] < 2**16


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_is_refused_for_nobody_knows_which_side_is_up(file_format: str) -> None:
    exif = b"Exif\0\0junkjunkjunkjunk"
    assert refusal(encode(Image.new("RGB", (16, 16)), file_format, exif=exif)) == "damaged image"


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    payload = encode(Image.fromarray(NOISE), "JPEG", progressive=True)
    start = payload.rindex(b"\xff\xda")
    assert refusal(payload[:-2] + payload[start:-2] * MAX_JPEG_SCANS + payload[-2:]) == "too many scans"


def test_the_film_that_a_phone_appends_to_a_photo_counts_no_scans() -> None:
    payload = encode(Image.fromarray(NOISE), "JPEG", progressive=True)
    film = np.random.default_rng(0).bytes(12_000_000)
    assert film.count(b"\xff\xda") > MAX_JPEG_SCANS
    assert read_picture(payload + film, "RGB").tobytes() == read_picture(payload, "RGB").tobytes()


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"])
def test_usual_tiff_compressions_are_read(compression: str) -> None:
    assert pixels(encode(Image.fromarray(NOISE), "TIFF", compression=compression)) == NOISE.tolist()


def test_other_files_are_refused_by_what_they_begin_with() -> None:
    assert refusal(encode(Image.new("L", (4, 4)), "TIFF", compression="jpeg")).startswith("TIFF of a compression")
    for payload in (encode(Image.new("RGB", (16, 16)), "AVIF"), encode(Image.new("L", (4, 4)), "ICO"), b"<html>404"):
        assert refusal(payload) == "not an image of a known format"
        with pytest.raises(ImageFileError, match="convert other formats first"):
            read_header(payload)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"],
)
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_a_picture_of_any_mode_becomes_plain(mode: str, target: str) -> None:
    plain = plain_picture(Image.new(mode, (3, 2)), target)  # type: ignore[arg-type]
    assert (plain.mode, plain.size) == (target, (3, 2))


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.tuples(st.integers(1, 24), st.integers(1, 24)))
def test_every_fit_gives_the_size_asked_for(width: int, height: int, size: tuple[int, int]) -> None:
    grey = Image.new("L", (width, height), 90)
    for fit in ("crop", "stretch"):
        assert np.all(np.asarray(fit_picture(grey, size, fit)) == 90)  # type: ignore[arg-type]
    padded = np.asarray(fit_picture(grey, size, "pad", background=7))
    assert padded.shape == size[::-1]
    rows, columns = np.nonzero(padded == 90)
    found = (int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
    scale = min(size[0] / width, size[1] / height)
    assert len(rows) == found[0] * found[1]
    assert (
        found == size if (width, height) == size else found == tuple(max(1, round(n * scale)) for n in (width, height))
    )
    assert set(np.unique(padded)) <= {7, 90}


@pytest.mark.parametrize(("fit", "seen"), [("crop", "g"), ("pad", "wrgbw"), ("stretch", "rgb")])
def test_what_each_fit_shows_of_a_wide_picture(fit: str, seen: str) -> None:
    wide = np.zeros((12, 36, 3), np.uint8)
    for third in range(3):
        wide[:, 12 * third : 12 * (third + 1), third] = 255
    fitted = np.asarray(fit_picture(Image.fromarray(wide), (12, 12), fit))  # type: ignore[arg-type]
    line = fitted[6] if fit != "pad" else np.concatenate([fitted[:1, 6], fitted[6], fitted[-1:, 6]])
    names = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b", (255, 255, 255): "w"}
    found = "".join(names.get(tuple(pixel.tolist()), "") for pixel in line)
    assert "".join(c for i, c in enumerate(found) if i == 0 or found[i - 1] != c) == seen
