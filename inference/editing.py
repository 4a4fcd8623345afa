"""Pictures of which a part is drawn anew: which tokens that takes, and how the result becomes one picture again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from omniform.errors import OmniformError
from omniform.kernels.keyed_noise import keyed_permutation, stream
from omniform.tokenizers.base import Latents, Modality, Tokens
from omniform.tokenizers.image_files import MAX_PIXELS, plain_picture


@runtime_checkable
class FramedTokenizer(Protocol):
    """What editing needs of an image tokenizer beside what every modality has."""

    def from_pil(self, image: Image.Image) -> Tensor:
        """Turn a picture into an item."""
        ...

    def frame(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom), in pixels of a picture of `size`, of what an item shows of it."""
        ...


@dataclass(frozen=True)
class Edit:
    """One picture to be drawn anew in part.

    Attributes:
        picture: upright, 8 bits, grey or RGB.
        mask: pixels to be drawn anew; None where `wanted` was not derived from pixels.
        frame: the part of the picture that the tokens show, in its pixels.
        tokens: of the whole frame. A codec may see further than a token's own cell, so those that are kept can know
            something of what the mask hides: erase that part of the picture first if nothing may be known of it.
        wanted: which tokens are to be new.
    """

    picture: Image.Image
    mask: Bool[np.ndarray, "H W"] | None
    frame: tuple[float, float, float, float]
    tokens: Tokens | Latents
    wanted: Bool[Tensor, "N"]

    @classmethod
    def masked(cls, image: Image.Image, mask: Image.Image | None, tokenizer: Modality[Any]) -> Self:
        """Draw anew what a mask covers, and every token that touches it.

        Args:
            image: any picture that can be read.
            mask: of the size of the upright picture; what is not black, as 8-bit colours, is drawn anew. None: what is
                transparent.

        Raises:
            OmniformError: no mask where nothing is transparent, a mask of another size, one that covers nothing, or
                something that the tokenizer cannot see.
        """
        picture = _plain(image)
        covered = _transparent(image) if mask is None else np.asarray(plain_picture(mask, "RGB")).any(2)
        if covered.shape != (picture.height, picture.width):
            raise OmniformError(
                f"the mask has {covered.shape[1]} x {covered.shape[0]} pixels, expected the picture's "
                f"{picture.width} x {picture.height}"
            )
        if not covered.any():
            raise OmniformError("the mask covers nothing: paint what is to be drawn anew white, the rest black")
        frame, tokens = _encode(picture, tokenizer)
        beyond = covered & ~_inside(frame, picture.size)
        if beyond.any():
            raise OmniformError(
                f"the mask covers {int(beyond.sum())} pixels outside of the part that the model sees, which is "
                f"{tuple(round(side, 1) for side in frame)} (left, top, right, bottom) of {picture.width} x "
                f"{picture.height}: mask less, or give the picture that shape (by margins, where it is to be continued)"
            )
        rows = _overlap(tokens.grid[-2], frame[1], frame[3], picture.height)
        columns = _overlap(tokens.grid[-1], frame[0], frame[2], picture.width)
        touched = torch.from_numpy((rows @ covered.astype(np.float32) @ columns.T) > 0)
        return cls(picture, covered, frame, tokens, _over_depth(touched, tokens.grid))

    @classmethod
    def varied(cls, image: Image.Image, strength: float, seed: int, sample: int, tokenizer: Modality[Any]) -> Self:
        """Draw anew a fraction `strength` of the tokens, chosen by seed and sample; the whole picture is new then.

        Raises:
            OmniformError: a strength that is not in (0, 1].
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise OmniformError(f"strength is {strength!r}, expected a fraction of the picture in (0, 1]")
        picture = _plain(image)
        frame, tokens = _encode(picture, tokenizer)
        height, width = tokens.grid[-2:]
        places = keyed_permutation(height * width, seed, stream("edit/variation"), sample)
        chosen = torch.zeros(height * width, dtype=torch.bool)
        chosen[torch.from_numpy(places[: math.ceil(strength * height * width)])] = True
        return cls(picture, None, frame, tokens, _over_depth(chosen.view(height, width), tokens.grid))

    def compose(self, drawn: Image.Image) -> Image.Image:
        """Return the picture with what was drawn in its frame; with a mask, all pixels outside of it as they were."""
        left, top, right, bottom = self.frame
        # Whole pixels that the frame touches: some of it may lie beyond the picture, or end inside of a pixel.
        x, y = max(0, math.floor(left)), max(0, math.floor(top))
        width = min(self.picture.width, math.ceil(right)) - x
        height = min(self.picture.height, math.ceil(bottom)) - y
        across, down = drawn.width / (right - left), drawn.height / (bottom - top)
        box = (
            max(0.0, (x - left) * across),
            max(0.0, (y - top) * down),
            min(drawn.width, (x + width - left) * across),
            min(drawn.height, (y + height - top) * down),
        )
        result = self.picture.copy()
        patch = drawn.convert(self.picture.mode).resize((width, height), Image.Resampling.BICUBIC, box)
        result.paste(patch, (x, y))
        return result if self.mask is None else Image.composite(result, self.picture, Image.fromarray(self.mask))


def parse_edits(
    image: Any,
    mask: Any,
    strength: Any,
    *,
    names: tuple[str, ...] | None,
    seeds: Sequence[tuple[int, int]],
    tokenizer: Modality[Any] | None,
) -> Sequence[Edit | None]:
    """Turn what a user gives as `image`, `mask` and `strength` into the edit of each prompt, None where all is new.

    Args:
        image, mask: one for all, or a list of one per prompt.
        names: modalities of the reply.
        seeds: (seed, sample) of each prompt.
        tokenizer: of images, if the model has it.

    Raises:
        OmniformError: a mask or strength without a picture, both, another reply than one picture, or what `Edit`
            refuses.
    """
    if image is None:
        if mask is not None or strength is not None:
            raise OmniformError("mask and strength say what of a picture to draw anew: give the picture as image")
        return [None] * len(seeds)
    if names != ("image",) or tokenizer is None:
        raise OmniformError(f'an image to edit was given, and to is {names}: expected to="image"')
    if mask is not None and strength is not None:
        raise OmniformError("both mask and strength were given: a mask says already what is drawn anew")
    images, masks = _one_per_prompt("image", image, len(seeds)), _one_per_prompt("mask", mask, len(seeds))
    if strength is None:
        single = not isinstance(image, list | tuple) and not isinstance(mask, list | tuple)
        pairs = list(zip(images, masks, strict=True))[: 1 if single else None]
        edits = [Edit.masked(own, cover, tokenizer) for own, cover in pairs]
        return edits * len(seeds) if single else edits
    return [Edit.varied(own, strength, *seed, tokenizer=tokenizer) for own, seed in zip(images, seeds, strict=True)]


def _one_per_prompt(name: str, given: Any, n_prompts: int) -> Sequence[Any]:
    found = given if isinstance(given, list | tuple) else [given] * n_prompts
    if len(found) != n_prompts:
        raise OmniformError(f"{len(found)} values of {name} for {n_prompts} prompts, expected one, or one per prompt")
    for entry in found:
        if not (isinstance(entry, Image.Image) or (name == "mask" and entry is None)):
            raise OmniformError(f"{name} is a {type(entry).__name__}, expected a PIL image")
    return found


def outpaint(
    image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Return a larger canvas with the picture in it, and the mask of the margins: an `image` and `mask` to generate.

    The margins repeat the picture's edges until they are drawn.

    Args:
        left, top, right, bottom: pixels to add at each side.

    Raises:
        OmniformError: a negative margin, none, or a canvas of more than MAX_PIXELS pixels.
    """
    margins = (left, top, right, bottom)
    if not all(isinstance(margin, int) and margin >= 0 for margin in margins) or not any(margins):
        raise OmniformError(f"margins are {margins}, expected whole pixels to add, at least one in all")
    picture = _plain(image)
    width, height = picture.width + left + right, picture.height + top + bottom
    if width * height > MAX_PIXELS:
        raise OmniformError(f"the canvas would have {width} x {height} pixels, expected at most {MAX_PIXELS} in all")
    sides = ((top, bottom), (left, right))
    levels = np.asarray(picture)
    canvas = Image.fromarray(np.pad(levels, (*sides, (0, 0))[: levels.ndim], mode="edge"))
    mask = np.pad(np.zeros((picture.height, picture.width), dtype=np.uint8), sides, constant_values=255)
    return canvas, Image.fromarray(mask)


def _plain(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    return plain_picture(image, "L" if grey else "RGB")


def _transparent(image: Image.Image) -> npt.NDArray[np.bool_]:
    if not image.has_transparency_data:
        raise OmniformError(
            "the picture has nothing transparent to draw anew: give a mask, a strength, or margins to add"
        )
    # Pillow turns premultiplied grey into nothing but plain grey.
    alpha = (image.convert("LA") if image.mode == "La" else image).convert("RGBA").getchannel("A")
    if "exif" in image.info:
        alpha.info["exif"] = image.info["exif"]  # turned as the picture is
    return np.asarray(plain_picture(alpha, "L")) == 0


def _encode(
    picture: Image.Image, tokenizer: Modality[Any]
) -> tuple[tuple[float, float, float, float], Tokens | Latents]:
    if not isinstance(tokenizer, FramedTokenizer):
        raise OmniformError(f"tokenizer {tokenizer.kind!r} cannot say which part of a picture it sees: edits need that")
    with torch.inference_mode():
        return tokenizer.frame(picture.size), tokenizer.encode(tokenizer.from_pil(picture))


def _inside(frame: tuple[float, float, float, float], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return which pixels touch the frame."""
    (x, y), (left, top, right, bottom) = (np.arange(side) for side in size), frame
    return ((y < bottom) & (y + 1 > top))[:, None] & ((x < right) & (x + 1 > left))[None, :]


def _overlap(n_cells: int, first: float, last: float, n_pixels: int) -> npt.NDArray[np.float32]:
    """Return (n_cells, n_pixels): 1 where a pixel lies at least in part in a cell of [first, last) in equal cells."""
    edges = first + (last - first) * np.arange(n_cells + 1) / n_cells
    pixels = np.arange(n_pixels)
    return ((pixels[None, :] < edges[1:, None]) & (pixels[None, :] + 1 > edges[:-1, None])).astype(np.float32)


def _over_depth(cells: Bool[Tensor, "h w"], grid: tuple[int, ...]) -> Bool[Tensor, "N"]:
    """Return the cells' flags per token: a cell of several codes is drawn anew as a whole."""
    return cells.expand(grid).flatten()
