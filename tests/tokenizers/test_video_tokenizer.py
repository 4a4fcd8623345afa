"""The video tokenizer: nothing looks ahead, an image is a video of one frame, and chunks change nothing."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from omniform.tokenizers.base import Discrete, TokenizerError, Tokens
from omniform.tokenizers.codecs.causal_video import CausalConv3d
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.lfq import LFQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.codecs.vq import VQEMAConfig
from omniform.tokenizers.registry import load_modality
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omniform.tokenizers.video_files import Video, VideoFileError
from omniform.tokenizers.video_writing import video_bytes

QUANTIZERS = {
    "fsq": FSQConfig(levels=(5, 4)),
    "lfq": LFQConfig(bits=4),
    "vq_ema": VQEMAConfig(codebook_size=20, dim=4),
    "residual vq_ema": ResidualConfig(depth=2, base=VQEMAConfig(codebook_size=20, dim=4)),
}
# Frames per step and pixels per code: all by patches, all by strides, both, and a codec of images that lasts.
RATES = {
    "patches": {"patch_frames": 4, "patch_size": 4, "widths": (16, 24), "time_strides": (1,)},
    "strides": {"patch_frames": 1, "patch_size": 2, "widths": (8, 12, 16), "time_strides": (2, 2)},
    "both": {"patch_frames": 2, "patch_size": 2, "widths": (8, 12, 16), "time_strides": (1, 2)},
    "space alone": {"patch_frames": 1, "patch_size": 8, "widths": (16,), "time_strides": ()},
}


def build(kind: str = "fsq", rates: str = "both", channels: int = 1, **sizes: object) -> VideoTokenizer:
    """A tokenizer with random weights whose codes vary over random videos."""
    torch.manual_seed(0)
    chosen = {"frame_size": (16, 24), "n_frames": 9, **RATES[rates], **sizes}
    config = VideoTokenizerConfig(channels=channels, quantizer=QUANTIZERS[kind], **chosen)
    codec = config.build()
    if "vq_ema" in kind:
        codec(torch.rand(8, channels, config.n_frames, *config.frame_size) * 2 - 1)  # initialises the codebook
    return VideoTokenizer(config, codec)


def video(n_frames: int, channels: int = 1, seed: int = 1, size: tuple[int, int] = (16, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, n_frames, *size, generator=generator) * 2 - 1


def in_chunks(item: Tensor, cuts: list[int]) -> list[Tensor]:
    edges = [0, *sorted(cuts), item.shape[1]]
    return [item[:, first:last] for first, last in itertools.pairwise(edges)]


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_codes_and_videos_are_in_range_and_on_the_grid(kind: str, channels: int) -> None:
    tokenizer = build(kind, channels=channels)
    depth = tokenizer.codec.quantizer.depth
    assert tokenizer.representation == Discrete(16 if kind == "lfq" else 20)
    assert tokenizer.fixed_grid == (3 * depth, 2, 3)
    items = [video(n_frames, channels, seed) for seed, n_frames in enumerate((9, 1, 9, 13))]
    tokens = tokenizer.encode_batch(items)
    assert [entry.grid for entry in tokens] == [(n * depth, 2, 3) for n in (3, 1, 3, 4)]
    assert [tokenizer.grid(item) for item in items] == [entry.grid for entry in tokens]
    assert all(entry.codes.shape == (math.prod(entry.grid),) for entry in tokens)
    codes = torch.cat([entry.codes for entry in tokens])
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() < codes.max() < tokenizer.representation.vocab_size
    with torch.no_grad():
        tokenizer.codec.decoder[-1].conv.conv.weight.mul_(100)  # so that the clamp has something to do
    decoded = tokenizer.decode_batch(tokens)
    assert [back.shape for back in decoded] == [item.shape for item in items]
    assert all(back.abs().max() == 1 for back in decoded)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("rates", RATES)
def test_no_code_and_no_frame_depends_on_a_later_frame(kind: str, rates: str) -> None:
    tokenizer = build(kind, rates, n_frames=9)
    rate, depth = tokenizer.config.temporal_rate, tokenizer.codec.quantizer.depth
    n_frames = 1 + 4 * rate
    one, other = video(n_frames, seed=1), video(n_frames, seed=2)
    tokens = tokenizer.encode(one)
    whole = tokenizer.decode(tokens)
    steps = tokens.codes.view(-1, depth, *tokens.grid[1:])
    for n_kept in range(1, 5):
        kept = 1 + (n_kept - 1) * rate
        changed = tokenizer.encode(torch.cat([one[:, :kept], other[:, kept:]], 1))
        changed_steps = changed.codes.view_as(steps)
        assert changed_steps[:n_kept].equal(steps[:n_kept])
        assert not changed_steps[n_kept].equal(steps[n_kept])
        assert tokenizer.decode(changed)[:, :kept].equal(whole[:, :kept])
        alone = tokenizer.encode(one[:, :kept])
        assert alone.codes.equal(steps[:n_kept].flatten())
        assert tokenizer.decode(alone).equal(whole[:, :kept])


@pytest.mark.parametrize("rates", RATES)
def test_gradients_say_which_frames_are_seen(rates: str) -> None:
    """In the pass over the whole video that training makes, and in the codec apart from its rounding."""
    codec = build(rates=rates).codec.requires_grad_(True)
    rate = codec.temporal_rate
    frames = video(1 + 3 * rate)[None].requires_grad_()
    latents = codec.encoder(frames)
    for step in range(4):
        [gradient] = torch.autograd.grad(latents[:, :, step].square().sum(), frames, retain_graph=True)
        seen = gradient.abs().amax((0, 1, 3, 4)) > 0
        assert seen[max(0, 1 + (step - 1) * rate) : 1 + step * rate].all()
        assert not seen[1 + step * rate :].any()
    steps = latents.detach().requires_grad_()
    decoded = codec.decoder(steps)
    for frame in range(1 + 3 * rate):
        [gradient] = torch.autograd.grad(decoded[:, :, frame].square().sum(), steps, retain_graph=True)
        seen = gradient.abs().amax((0, 1, 3, 4)) > 0
        assert seen[-(-frame // rate)]
        assert not seen[-(-frame // rate) + 1 :].any()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("rates", RATES)
def test_a_local_encoder_sees_the_square_of_its_code_and_a_wide_one_around_it(rates: str, local: bool) -> None:
    tokenizer = build(rates=rates, local=local)
    codec, side = tokenizer.codec, tokenizer.config.spatial_rate
    frames = video(1 + 2 * codec.temporal_rate)[None].requires_grad_()
    latents = codec.encoder(frames)
    n_rows, n_columns = latents.shape[3:]
    for row, column in itertools.product(range(n_rows), range(n_columns)):
        [gradient] = torch.autograd.grad(latents[..., row, column].square().sum(), frames, retain_graph=True)
        seen = gradient.abs().amax((0, 1, 2)) > 0
        assert seen[row * side : (row + 1) * side, column * side : (column + 1) * side].all()
        if local:
            assert int(seen.sum()) == side**2
        else:
            assert int(seen.sum()) > side**2


@pytest.mark.parametrize("rates", RATES)
def test_an_image_is_a_video_of_one_frame_and_stillness_has_the_codes_of_an_image(rates: str) -> None:
    tokenizer = build(rates=rates)
    image = video(1)
    codes = tokenizer.encode(image).codes
    longer = torch.cat([image, video(2 * tokenizer.config.temporal_rate, seed=2)], 1)
    assert tokenizer.encode(longer).codes[: len(codes)].equal(codes)
    still = tokenizer.encode(image.expand(-1, 1 + 3 * tokenizer.config.temporal_rate, -1, -1).contiguous())
    assert still.codes.equal(codes.repeat(4))


@pytest.mark.parametrize("rates", RATES)
def test_training_sees_the_whole_video_as_the_tokenizer_does_step_by_step(rates: str) -> None:
    codec = build(rates=rates).codec.double()
    frames = video(1 + 3 * codec.temporal_rate).double()[None]
    past: dict = {}
    steps = [frames[:, :, :1], *frames[:, :, 1:].split(codec.temporal_rate, 2)]
    latents = codec.encoder(frames)
    assert torch.allclose(torch.cat([codec.encoder(step, past) for step in steps], 2), latents, atol=1e-12)
    past = {}
    shown = torch.cat([codec.decoder(step, past) for step in latents.split(1, 2)], 2)
    assert torch.allclose(shown, codec.decoder(latents), atol=1e-12)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (2, 3), (3, 3)])
def test_a_causal_convolution_is_one_whose_past_is_the_first_step(kernel: tuple[int, int]) -> None:
    layer = CausalConv3d(3, 5, kernel)
    steps = torch.randn(2, 3, 4, 6, 6)
    before = steps[:, :, :1].repeat(1, 1, kernel[0] - 1, 1, 1)
    margin = kernel[1] // 2
    expected = torch.nn.functional.conv3d(
        torch.cat([before, steps], 2), layer.conv.weight, layer.conv.bias, padding=(0, margin, margin)
    )
    assert torch.allclose(layer(steps, {}), expected, atol=1e-6)


TOKENIZERS = {rates: build("residual vq_ema" if rates == "both" else "fsq", rates) for rates in RATES}


@settings(max_examples=20)
@given(rates=st.sampled_from(sorted(RATES)), data=st.data())
def test_a_video_in_any_chunks_has_the_codes_of_the_whole(rates: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[rates]
    item = video(1 + data.draw(st.integers(0, 5)) * tokenizer.config.temporal_rate)
    cuts = data.draw(st.lists(st.integers(0, item.shape[1]), max_size=6))
    streamed = list(tokenizer.encode_stream(iter(in_chunks(item, cuts))))
    assert torch.cat(streamed).equal(tokenizer.encode(item).codes)


def test_ten_thousand_frames_are_held_a_step_at_a_time() -> None:
    tokenizer = build(rates="patches", frame_size=(8, 8), patch_frames=16, n_frames=17)
    drawn = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal drawn
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            drawn += 10
            yield torch.rand(1, 10, 8, 8, generator=generator) * 2 - 1
        yield torch.zeros(1, 1, 8, 8)

    for n_steps, codes in enumerate(tokenizer.encode_stream(chunks())):
        assert codes.shape == (1,)
        assert drawn - 10 <= 1 + 16 * n_steps  # no chunk is asked for before it is needed
    assert n_steps == 625


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_saved_and_loaded_it_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind)
    tokenizer.save(tmp_path)
    loaded = load_modality(tmp_path)
    assert isinstance(loaded, VideoTokenizer)
    assert loaded.config == tokenizer.config
    tokens = tokenizer.encode(video(9))
    assert loaded.encode(video(9)).codes.equal(tokens.codes)
    assert loaded.decode(tokens).equal(tokenizer.decode(tokens))


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_sampled_fitted_and_read_back(channels: int) -> None:
    tokenizer = build(channels=channels, fps=10.0)
    frames = np.random.default_rng(0).integers(0, 256, (18, 16, 24, channels), dtype=np.uint8)
    payload = video_bytes(frames, 20.0, "mp4", lossless=True)
    item = tokenizer.read(payload)
    assert item.shape == (channels, 9, 16, 24)
    tokenizer.encode(item)
    shown = tokenizer.to_video(item)
    assert shown.fps == 10.0
    assert np.abs(shown.frames.astype(int) - frames[::2]).max() <= (0 if channels == 1 else 6)
    assert tokenizer.from_video(Video(frames, 20.0)).equal(
        tokenizer.expand(torch.from_numpy(frames[::2]).permute(3, 0, 1, 2))
    )
    assert tokenizer.expand(tokenizer.compact(item)).equal(item)


def test_a_short_video_ends_standing_still() -> None:
    tokenizer = build(fps=8.0)
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 1), dtype=np.uint8)
    for item in (
        tokenizer.read(video_bytes(frames, 8.0, "mp4", lossless=True)),
        tokenizer.from_video(Video(frames, 8.0)),
    ):
        assert np.array_equal(tokenizer.to_video(item).frames, frames[[0, 1, 2, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize(("fit", "seen"), [("crop", "g"), ("pad", "wrgbw"), ("stretch", "rgb")])
def test_odd_sizes_are_fitted_as_images_are(fit: str, seen: str) -> None:
    wide = np.zeros((1, 10, 30, 3), np.uint8)
    for third in range(3):
        wide[:, :, 10 * third : 10 * (third + 1), third] = 255
    tokenizer = build(channels=3, fit=fit, frame_size=(24, 24), background=255, patch_size=1, widths=(8, 8, 8))
    frame = tokenizer.to_video(tokenizer.from_video(Video(wide, 8.0))).frames[0]
    line = frame[12] if fit != "pad" else np.concatenate([frame[:1, 12], frame[12], frame[-1:, 12]])
    names = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b", (255, 255, 255): "w"}
    found = "".join(names.get(tuple(pixel.tolist()), "") for pixel in line)
    assert "".join(name for name, _ in itertools.groupby(found)) == seen


def test_what_is_no_video_of_the_right_kind_is_refused() -> None:
    tokenizer = build()
    good = video(9)
    for item in (good[:, :, :8], good.double(), good[0], "a path", good.repeat(3, 1, 1, 1)):
        with pytest.raises(TokenizerError, match=r"expected float32 \(1, frames, 16, 24\)"):
            tokenizer.encode(item)
    for value in (1.5, float("nan")):
        with pytest.raises(TokenizerError, match=r"expected finite values in \[-1, 1\]"):
            tokenizer.encode(torch.full_like(good, value))
    for n_frames in (0, 2, 4, 8):
        for refused in (tokenizer.encode, lambda item: list(tokenizer.encode_stream([item]))):
            with pytest.raises(TokenizerError, match=f"has {n_frames} frames, expected 1 [+] a multiple of 4"):
                refused(good[:, :n_frames])
    for shape, grid in ((6, (6,)), (7, (1, 2, 3)), (6, (1, 3, 2)), (0, (0, 2, 3))):
        with pytest.raises(TokenizerError, match=r"expected a grid \(a multiple of 1, 2, 3\)"):
            tokenizer.decode(Tokens(torch.zeros(shape, dtype=torch.int64), grid))
    for code in (-1, 20):
        with pytest.raises(TokenizerError, match=r"expected \[0, 19\]"):
            tokenizer.decode(Tokens(torch.full((6,), code), (1, 2, 3)))
    with pytest.raises(VideoFileError):
        tokenizer.read(b"no video")
    for frames, fps in [
        *((np.zeros(shape, np.uint8), 8.0) for shape in ((0, 16, 24, 1), (2, 0, 24, 1), (2, 16, 24), (2, 16, 24, 4))),
        (np.zeros((2, 16, 24, 1), np.float32), 8.0),
        *((np.zeros((2, 16, 24, 1), np.uint8), fps) for fps in (0.0, -1.0, np.inf, np.nan)),
    ]:
        with pytest.raises(TokenizerError, match=r"expected uint8 \(T, H, W, 1 or 3\)"):
            tokenizer.from_video(Video(frames, fps))
    still = tokenizer.from_video(Video(np.arange(2, dtype=np.uint8).repeat(16 * 24).reshape(2, 16, 24, 1), 1e300))
    assert torch.equal(still, -torch.ones_like(still))  # all but the first frame are over at once


@pytest.mark.parametrize("fps", [0.0, -1.0, 1e-300, 1001.0, float("inf"), float("nan")])
def test_rates_at_which_no_file_can_be_sampled_are_refused(fps: float) -> None:
    with pytest.raises(ValidationError, match="fps"):
        VideoTokenizerConfig(fps=fps)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"frame_size": (16, 20)}, "expected multiples of 8"),
        ({"n_frames": 8}, "expected 1 [+] a multiple of 4"),
        ({"time_strides": (2,)}, "1 entries for 3 widths"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoTokenizerConfig(**{"frame_size": (16, 24), **RATES["both"], **sizes})


@pytest.mark.parametrize("channels", [1, 3])
def test_the_comparison_shows_items_beside_what_their_codes_decode_to(channels: int, tmp_path: Path) -> None:
    tokenizer = build(channels=channels)
    items = [video(9, channels), video(5, channels, seed=2)]
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(items))
    sheets = tokenizer.comparison(items, scale=2, columns=1)
    assert len(sheets) == 9
    for moment, sheet in enumerate(sheets):
        pixels = np.asarray(sheet).reshape(2 * 32 + 8, 2 * 48 + 8, channels)[::2, ::2]
        for row, pair in enumerate(zip(items, decoded, strict=True)):
            for side, item in enumerate(pair):
                frame = tokenizer.to_video(item).frames[min(moment, item.shape[1] - 1)]
                assert np.array_equal(pixels[row * 20 : row * 20 + 16, side * 28 : side * 28 + 24], frame)
    [path] = tokenizer.write_comparison(items, tmp_path / "samples" / "step-5")
    assert path == tmp_path / "samples" / "step-5.gif"
    with Image.open(path) as film:
        assert (film.n_frames, film.info["loop"]) == (9, 0)
