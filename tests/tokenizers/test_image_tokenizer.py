"""The image tokenizer: ranges, grids, determinism, and what it refuses."""

import io
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from omniform.tokenizers.base import Discrete, TokenizerError, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.lfq import LFQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.codecs.vq import VQEMAConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig

QUANTIZERS = {
    "fsq": FSQConfig(levels=(5, 4)),
    "lfq": LFQConfig(bits=4),
    "vq_ema": VQEMAConfig(codebook_size=20, dim=4),
    "residual fsq": ResidualConfig(depth=3, base=FSQConfig(levels=(5, 4))),
    "residual vq_ema": ResidualConfig(depth=2, base=VQEMAConfig(codebook_size=20, dim=4)),
}


def build(kind: str = "fsq", channels: int = 1, **settings: object) -> ImageTokenizer:
    """A tokenizer with random weights whose codes vary over random images."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "widths": (16, 24), **settings}
    config = ImageTokenizerConfig(channels=channels, quantizer=QUANTIZERS[kind], **sizes)
    codec = config.build()
    if "vq_ema" in kind:
        codec(torch.rand(8, channels, 16, 16) * 2 - 1)  # the first batch initialises the codebook
    return ImageTokenizer(config, codec)


def images(n: int, channels: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.rand(n, channels, 16, 16, generator=generator) * 2 - 1)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_codes_and_images_are_in_range_and_on_the_grid(kind: str, channels: int) -> None:
    tokenizer = build(kind, channels)
    quantizer = tokenizer.codec.quantizer
    assert tokenizer.representation == Discrete(16 if kind == "lfq" else 20)
    tokens = tokenizer.encode_batch(images(5, channels))
    grid = (4, 4) if quantizer.depth == 1 else (quantizer.depth, 4, 4)
    assert all(entry.grid == tokenizer.fixed_grid == grid for entry in tokens)
    assert all(entry.codes.shape == (math.prod(grid),) for entry in tokens)
    codes = torch.cat([entry.codes for entry in tokens])
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < tokenizer.representation.vocab_size
    assert codes.unique().numel() > 1
    with torch.no_grad():
        tokenizer.codec.decoder[-2].weight.mul_(100)  # so that the clamp has something to do
    decoded = torch.stack(tokenizer.decode_batch(tokens))
    assert decoded.shape == (5, channels, 16, 16)
    assert decoded.abs().max() == 1


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_encoding_again_or_alone_gives_the_same_codes(kind: str) -> None:
    tokenizer = build(kind)
    items = images(7)
    batch = tokenizer.encode_batch(items)
    assert all(a.codes.equal(b.codes) for a, b in zip(batch, tokenizer.encode_batch(items), strict=True))
    # Random images keep clear of ties, so rounding that depends on the batch's size changes no code.
    assert all(a.codes.equal(tokenizer.encode(item).codes) for a, item in zip(batch, items, strict=True))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_saved_and_loaded_it_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind)
    tokenizer.save(tmp_path / "one")
    loaded = ImageTokenizer.load(tmp_path / "one")
    assert loaded.config == tokenizer.config
    state = tokenizer.codec.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in loaded.codec.state_dict().items())
    tokens = tokenizer.encode_batch(images(3))
    for a, b in zip(tokenizer.decode_batch(tokens), loaded.decode_batch(tokens), strict=True):
        assert a.equal(b)
    loaded.save(tmp_path / "two")
    for file in ("config.json", "codec.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@given(seed=st.integers(0, 2**16), channels=st.sampled_from([1, 3]))
def test_an_8_bit_image_of_the_right_size_survives_reading(seed: int, channels: int) -> None:
    shape = (16, 16) if channels == 1 else (16, 16, 3)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    tokenizer = build(channels=channels)
    item = tokenizer.read(png(Image.fromarray(levels)))
    assert item.min() >= -1
    assert item.max() <= 1
    assert np.array_equal(np.asarray(tokenizer.to_pil(item)), levels)


def test_other_images_are_fitted() -> None:
    tokenizer = build(channels=3)
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste((255, 0, 0), (10, 0, 30, 20))  # the central square is red
    red = tokenizer.read(png(wide))
    assert red[0].min() > 0.9
    assert red[1:].max() < -0.9
    transparent = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (tokenizer.from_pil(transparent) == 1).all()
    sideways = Image.new("L", (16, 16), 0)
    sideways.paste(255, (0, 0, 16, 8))
    sideways.getexif()[0x0112] = 3  # stored upside down
    file = io.BytesIO()
    sideways.save(file, "JPEG", exif=sideways.getexif(), quality=95)
    upright = tokenizer.read(file.getvalue())
    assert upright[:, :7].max() < -0.9
    assert upright[:, 9:].min() > 0.9


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    deep, shallow = Image.fromarray(levels * 257), Image.fromarray(levels.astype(np.uint8))
    assert deep.mode == "I;16"
    for channels in (1, 3):
        assert torch.equal(build(channels=channels).read(png(deep)), build(channels=channels).read(png(shallow)))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_damaged_exif_is_an_error_of_that_image(file_format: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, file_format, exif=b"Exif\0\0junkjunkjunkjunk")
    with pytest.raises(TokenizerError, match=r"not a whole PNG, .* image: not a TIFF file"):
        build().read(file.getvalue())


def test_files_that_are_no_images_are_refused() -> None:
    tokenizer = build()
    whole = png(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    for payload in (b"", b"GIF89a", whole[:50], b"BM" + whole):
        with pytest.raises(TokenizerError, match=r"not a whole PNG, .* image"):
            tokenizer.read(payload)
    for width, height in ((9000, 9000), (20_000, 20_000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        bomb = whole[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
        with pytest.raises(TokenizerError, match="pixels"):
            tokenizer.read(bomb)


def test_items_and_tokens_that_do_not_fit_are_refused() -> None:
    tokenizer = build()
    good = images(1)[0]
    for item in (good[:, :8], good.double(), "a path", good.repeat(3, 1, 1)):
        with pytest.raises(TokenizerError, match="expected float32"):
            tokenizer.encode(item)
    for value in (1.5, float("nan")):
        with pytest.raises(TokenizerError, match=r"expected finite values in \[-1, 1\]"):
            tokenizer.encode(torch.full_like(good, value))
    with pytest.raises(TokenizerError, match="expected the grid"):
        tokenizer.decode(Tokens(torch.zeros(16, dtype=torch.int64), (16,)))
    for code in (-1, 20):
        with pytest.raises(TokenizerError, match=r"expected \[0, 19\]"):
            tokenizer.decode(Tokens(torch.full((16,), code), (4, 4)))


def test_a_grid_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        ImageTokenizerConfig(image_size=18)


def test_the_comparison_shows_items_above_what_their_codes_decode_to() -> None:
    tokenizer = build()
    items = images(5)
    sheet = np.asarray(tokenizer.comparison(items, scale=2, columns=3))
    assert sheet.shape == (2 * 64 + 4, 3 * 32 + 2 * 4)
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(items))
    for place, (item, back) in enumerate(zip(items, decoded, strict=True)):
        top, left = place // 3 * 68, place % 3 * 36
        assert np.array_equal(sheet[top : top + 32 : 2, left : left + 32 : 2], np.asarray(tokenizer.to_pil(item)))
        below = sheet[top + 33 : top + 64 : 2, left + 1 : left + 32 : 2]
        assert np.array_equal(below, np.asarray(tokenizer.to_pil(back)))
    assert (sheet[64:68] == 255).all()
    assert (sheet[68:, 72:] == 255).all()
    assert tokenizer.comparison(items).size == (5 * 64 + 4 * 8, 2 * 64)


def test_diffusers_is_imported_only_for_a_codec() -> None:
    code = "import sys, omniform.tokenizers.registry; print(sorted({'diffusers', 'sentencepiece'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
