"""Edits: the touched tokens are new, the others and every pixel outside of the mask are as they were."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.editing import Edit, outpaint
from omniform.inference.generate import Model
from omniform.modeling.config import ModelConfig
from omniform.modeling.folder import LoadedModel
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.image_files import Fit, fit_picture, fitted_frame

FITS: list[Fit] = ["crop", "pad", "stretch"]
SIDES = st.integers(3, 40)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def random_tokenizer(fit: Fit, depth: int = 1) -> ImageTokenizer:
    torch.manual_seed(0)
    quantizer = FSQConfig(levels=(4, 4))
    config = ImageTokenizerConfig(channels=3, image_size=16, fit=fit, patch_size=2, widths=(8, 8), quantizer=quantizer)
    return ImageTokenizer(config, config.build())


@given(st.sampled_from(FITS), SIDES, SIDES, st.integers(2, 24), st.booleans())
def test_the_frame_is_what_fitting_shows(fit: Fit, width: int, height: int, side: int, across: bool) -> None:
    """The centre of each fitted pixel shows what lies there in the frame: read off ramps along either axis."""
    ramp = np.arange(width, dtype=np.float64)[None, :] if across else np.arange(height, dtype=np.float64)[:, None]
    levels = np.broadcast_to(ramp, (height, width)).astype(np.float32)
    fitted = np.asarray(fit_picture(Image.fromarray(levels), (side, side), fit, background=0))
    frame = fitted_frame((width, height), (side, side), fit)
    first, last = (frame[0], frame[2]) if across else (frame[1], frame[3])
    n_pixels = width if across else height
    step = (last - first) / side
    expected = first + step * (np.arange(side) + 0.5) - 0.5
    other = fitted_frame((width, height), (side, side), fit)[1 if across else 0]
    inside = (expected > 2 * max(step, 1)) & (expected < n_pixels - 1 - 2 * max(step, 1))  # away from edges
    assert other <= (0 if fit == "pad" else max(width, height) / 2)
    found = fitted[side // 2, :] if across else fitted[:, side // 2]
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.05 * max(step, 1) + 1e-3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FITS), SIDES, SIDES, st.data())
def test_tokens_whose_cells_touch_the_mask_are_wanted_and_no_others(
    fit: Fit, width: int, height: int, data: st.DataObject
) -> None:
    tokenizer = random_tokenizer(fit)
    left, top, right, bottom = frame = tokenizer.frame((width, height))
    xs = [x for x in range(width) if x < right and x + 1 > left]
    ys = [y for y in range(height) if y < bottom and y + 1 > top]
    painted = data.draw(st.sets(st.tuples(st.sampled_from(xs), st.sampled_from(ys)), min_size=1, max_size=6))
    mask = Image.new("L", (width, height))
    for place in painted:
        mask.putpixel(place, data.draw(st.integers(1, 255)))
    edit = Edit.masked(picture(width, height), mask, tokenizer)
    assert edit.frame == frame
    cell_width, cell_height = (right - left) / 4, (bottom - top) / 4
    for row, column in itertools.product(range(4), range(4)):
        x0, y0 = left + column * cell_width, top + row * cell_height
        touched = any(x < x0 + cell_width and x + 1 > x0 and y < y0 + cell_height and y + 1 > y0 for x, y in painted)
        # Cells and pixels that share nothing but an edge may fall on either side of it by rounding.
        by_rounding = any(
            min(abs(a - b) for a, b in ((x, x0 + cell_width), (x + 1, x0), (y, y0 + cell_height), (y + 1, y0))) < 1e-9
            for x, y in painted
        )
        assert bool(edit.wanted.view(4, 4)[row, column]) == touched or by_rounding


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FITS), SIDES, SIDES)
def test_all_that_is_masked_is_drawn_and_memory_is_that_of_the_picture(fit: Fit, width: int, height: int) -> None:
    tokenizer = random_tokenizer(fit)
    black = Image.new("RGB", (width, height))
    left, top, right, bottom = tokenizer.frame(black.size)
    x, y = np.arange(width), np.arange(height)
    seen = ((y < bottom) & (y + 1 > top))[:, None] & ((x < right) & (x + 1 > left))[None, :]
    edit = Edit.masked(black, Image.fromarray(seen), tokenizer)
    composed = np.asarray(edit.compose(Image.new("L", (16, 16), 255)))
    assert (composed[seen] == 255).all()
    assert (composed[~seen] == 0).all()


def test_a_drawing_lands_where_its_frame_is() -> None:
    """A picture of the tokenizer's own size comes back as drawn; a padded one fills the middle of what was drawn."""
    drawn = picture(16, 16, "L")
    whole = Edit.masked(picture(16, 16), Image.new("1", (16, 16), 1), random_tokenizer("crop")).compose(drawn)
    assert np.array_equal(np.asarray(whole)[..., 0], np.asarray(drawn))
    bands = Image.new("L", (16, 16), 0)
    bands.paste(200, (0, 4, 16, 12))
    wide = Edit.masked(picture(32, 16), Image.new("1", (32, 16), 1), random_tokenizer("pad")).compose(bands)
    assert np.asarray(wide).min() > 150


@pytest.fixture(params=["masked", "next_token", "masked, remasking"])
def painter(request: pytest.FixtureRequest, omni: Model) -> Model:
    """The tiny model with pictures of each discrete objective."""
    kinds = {"masked": Masked(steps=3), "next_token": NextToken(), "masked, remasking": Masked(steps=3, remask=True)}
    config = ModelConfig(
        decoder=omni.network.config.decoder, objectives={"text": NextToken(), "image": kinds[request.param]}
    )
    network = UnifiedModel(config, omni.network.vocabulary)
    network.load_state_dict(omni.network.state_dict())
    return Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["L", "RGB"]), SIDES, SIDES, st.integers(0, 2**31), st.data())
def test_pixels_outside_of_the_mask_come_back_as_they_were(
    painter: Model, mode: str, width: int, height: int, seed: int, data: st.DataObject
) -> None:
    original = picture(width, height, mode, seed)
    box = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width)).filter(lambda b: b[0] != b[1])))
    mask = Image.new("L", (width, height))
    mask.paste(255, (box[0], 0, box[1], height))
    [edited] = painter.generate("a", to="image", image=original, mask=mask, seed=seed, temperature=2.0).images
    assert (edited.size, edited.mode) == (original.size, original.mode)
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(edited)[outside], np.asarray(original)[outside])


def test_kept_tokens_stay_and_wanted_ones_are_new(painter: Model) -> None:
    """Drawn often enough, each wanted token takes other values; the kept ones never do."""
    original = Image.fromarray(np.array([[0, 255], [73, 146]], dtype=np.uint8))
    mask = Image.fromarray(np.array([[0, 255], [0, 0]], dtype=np.uint8))
    replies = painter.generate_batch(["a"] * 40, to="image", image=original, mask=mask, seed=0, temperature=3.0)
    drawn = np.stack([np.asarray(reply.images[0]) for reply in replies])
    assert len(np.unique(drawn[:, 0, 1])) > 3
    assert (drawn[:, [0, 1, 1], [0, 0, 1]] == [0, 73, 146]).all()


def test_a_variation_keeps_the_rest_of_the_tokens(painter: Model) -> None:
    original = Image.fromarray(np.array([[0, 255], [73, 146]], dtype=np.uint8))
    replies = painter.generate_batch(["a"] * 60, to="image", image=original, strength=0.5, seed=0, temperature=3.0)
    changed = np.stack([np.asarray(reply.images[0]) for reply in replies]) != np.asarray(original)
    assert (changed.sum((1, 2)) <= 2).all()
    assert changed.any(0).all()
    whole = painter.generate("a", to="image", image=original, strength=1.0, seed=5).images[0]
    assert whole.tobytes() == painter.generate("a", to="image", seed=5).images[0].tobytes()


def test_one_picture_per_prompt_gives_what_each_gives_alone(painter: Model) -> None:
    pictures = [picture(2, 2, "L", seed) for seed in range(3)]
    masks = [Image.fromarray(np.eye(2, dtype=np.uint8) * 255), None, Image.new("L", (2, 2), 1)]
    pictures[1].putalpha(Image.fromarray(np.array([[0, 9], [255, 0]], dtype=np.uint8)))
    together = painter.generate_batch(["a", "b", []], to="image", image=pictures, mask=masks, seed=[1, 2, 3])
    for prompt, one, mask, seed, reply in zip(["a", "b", []], pictures, masks, [1, 2, 3], together, strict=True):
        alone = painter.generate(prompt, to="image", image=one, mask=mask, seed=seed)
        assert alone.images[0].tobytes() == reply.images[0].tobytes()
    assert together[1].images[0].getpixel((1, 0)) != 255 or together[1].images[0].mode == "L"


def test_what_is_wholly_transparent_is_the_mask(omni: Model) -> None:
    original = picture(6, 4)
    original.putalpha(Image.fromarray(np.array([[0] * 3 + [255] * 3] * 4, dtype=np.uint8)))
    edit = Edit.masked(original, None, omni.tokenizers["image"])
    assert edit.wanted.tolist() == [True, False, True, False]
    assert edit.mask is not None
    assert edit.mask.sum() == 12


def test_outpainting_keeps_the_picture_and_masks_the_margins(omni: Model) -> None:
    original = picture(5, 4)
    canvas, mask = outpaint(original, left=2, bottom=3)
    assert canvas.size == mask.size == (7, 7)
    assert np.array_equal(np.asarray(canvas)[:4, 2:], np.asarray(original))
    assert (np.asarray(mask) == 0).sum() == 20
    edited = omni.generate([], to="image", image=canvas, mask=mask, seed=0).images[0]
    assert np.array_equal(np.asarray(edited)[:4, 2:], np.asarray(original))
    for margins in ({}, {"left": -1}, {"left": 1.5}):
        with pytest.raises(OmniformError, match="margins are"):
            outpaint(original, **margins)
    with pytest.raises(OmniformError, match="the canvas would have 100000005 x 4 pixels"):
        outpaint(original, left=10**8)


def test_masks_of_any_colour_and_premultiplied_transparency_count(omni: Model) -> None:
    mask = Image.new("RGB", (4, 4))
    mask.putpixel((3, 0), (0, 0, 4))
    assert Edit.masked(ORIGINAL, mask, omni.tokenizers["image"]).wanted.tolist() == [False, True, False, False]
    clear = Image.merge("LA", [Image.new("L", (4, 4), 9), Image.new("L", (4, 4))]).convert("La")
    assert Edit.masked(clear, None, omni.tokenizers["image"]).wanted.all()


ORIGINAL, MASK = picture(4, 4), Image.new("L", (4, 4), 255)


@pytest.mark.parametrize(
    ("to", "keywords", "message"),
    [
        ("image", {"mask": MASK}, "give the picture as image"),
        ("image", {"strength": 0.5}, "give the picture as image"),
        ("text", {"image": ORIGINAL, "mask": MASK}, 'expected to="image"'),
        (["image", "image"], {"image": ORIGINAL, "mask": MASK}, 'expected to="image"'),
        ("image", {"image": ORIGINAL}, "nothing transparent"),
        ("image", {"image": ORIGINAL, "mask": Image.new("L", (4, 4))}, "covers nothing"),
        ("image", {"image": ORIGINAL, "mask": Image.new("L", (4, 5), 255)}, "the mask has 4 x 5 pixels"),
        ("image", {"image": ORIGINAL, "mask": MASK, "strength": 0.5}, "both mask and strength"),
        ("image", {"image": ORIGINAL, "strength": 0.0}, r"strength is 0.0, expected a fraction of the picture in \(0"),
        ("image", {"image": ORIGINAL, "strength": "x"}, "strength is 'x', expected a fraction"),
        ("image", {"image": [ORIGINAL] * 2, "mask": MASK}, "2 values of image for 1 prompts"),
        ("image", {"image": "seven.png", "mask": MASK}, "image is a str, expected a PIL image"),
    ],
)
def test_edits_that_cannot_be_are_refused(omni: Model, to: str, keywords: dict, message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        omni.generate("a", to=to, **keywords)


def test_a_mask_beyond_what_the_tokenizer_sees_is_refused() -> None:
    wide, mask = picture(40, 16), Image.new("L", (40, 16))
    mask.putpixel((2, 3), 255)
    with pytest.raises(OmniformError, match=r"1 pixels outside of the part .* \(12.0, 0.0, 28.0, 16.0\)"):
        Edit.masked(wide, mask, random_tokenizer("crop"))
