"""Videos <-> a grid of codes of a causal convolutional autoencoder."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.base import TokenizerError, Tokens
from omniform.tokenizers.codec_tokenizer import CodecTokenizer, from_bytes, to_bytes
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.quantizers import QuantizerConfig
from omniform.tokenizers.image_files import Fit, Mode, fit_picture, plain_picture

if TYPE_CHECKING:
    from omniform.tokenizers.codecs.causal_video import CausalVideoCodec, Past
    from omniform.tokenizers.video_files import Video

_CHUNK = 64  # videos in one pass of the codec, which bounds memory


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class VideoTokenizerConfig:
    """Sizes of a video tokenizer.

    Attributes:
        channels: 1 for grey, 3 for colour.
        frame_size: height and width in pixels.
        fps: frames per second at which files are sampled, 0.0001 to 1000.
        n_frames: of a video that is read from a file or generated: 1 + a multiple of the temporal rate.
        fit: how frames of another shape are brought to that size: their largest central part of the right shape
            ("crop"), all of them with margins ("pad"), or all of them with other proportions ("stretch").
        background: grey level of the margins that "pad" leaves.
        patch_frames: frames of the patches that the first layer reads.
        patch_size: pixels per side of these patches.
        widths: channels at each resolution, each half as fine in space as the one before.
        time_strides: for each width after the first, 2 where it is half as fine in time too, else 1.
        n_blocks: residual blocks at each resolution, in encoder and decoder each.
        local: each code sees the square of pixels that it stands for and nothing around it.
    """

    channels: Literal[1, 3] = 1
    frame_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (32, 32)
    fps: float = Field(default=8.0, ge=1e-4, le=1000)
    n_frames: int = Field(default=9, ge=1)
    fit: Fit = "crop"
    background: int = Field(default=0, ge=0, le=255)
    patch_frames: int = Field(default=8, ge=1)
    patch_size: int = Field(default=4, ge=1)
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (64, 96)
    time_strides: tuple[Literal[1, 2], ...] = (1,)
    n_blocks: int = Field(default=1, ge=1)
    local: bool = False
    quantizer: QuantizerConfig = FSQConfig()

    @property
    def temporal_rate(self) -> int:
        """Frames that the codes of one step stand for; those of the first stand for one."""
        return int(self.patch_frames * math.prod(self.time_strides))

    @property
    def spatial_rate(self) -> int:
        """Pixels per side of the area that one code stands for."""
        return int(self.patch_size * 2 ** (len(self.widths) - 1))

    @property
    def places(self) -> tuple[int, int]:
        """Rows and columns of the codes of one step."""
        return self.frame_size[0] // self.spatial_rate, self.frame_size[1] // self.spatial_rate

    @model_validator(mode="after")
    def _check_rates(self) -> "VideoTokenizerConfig":
        if len(self.time_strides) != len(self.widths) - 1:
            raise ValueError(
                f"time_strides has {len(self.time_strides)} entries for {len(self.widths)} widths, expected one for "
                "each width after the first"
            )
        if any(side % self.spatial_rate for side in self.frame_size):
            raise ValueError(
                f"frame_size is {self.frame_size}, expected multiples of {self.spatial_rate} = patch_size x 2 for each "
                "width after the first"
            )
        if (self.n_frames - 1) % self.temporal_rate:
            raise ValueError(
                f"n_frames is {self.n_frames}, expected 1 + a multiple of {self.temporal_rate} = patch_frames x the "
                "time_strides"
            )
        return self

    def build(self) -> "CausalVideoCodec":
        """Return the codec with random weights from torch's generator."""
        from omniform.tokenizers.codecs.causal_video import CausalVideoCodec

        return CausalVideoCodec(
            self.channels,
            (self.patch_frames, self.patch_size),
            self.widths,
            self.time_strides,
            self.n_blocks,
            self.quantizer.build(),
            local=self.local,
        )


class VideoTokenizer(CodecTokenizer[Tokens]):
    """Codes of the first frame, then of every `temporal_rate` frames that follow it.

    An item is a float32 tensor (C, T, H, W) in [-1, 1] of the config's frame size, with 1 + a multiple of the temporal
    rate as T. An image is a video of one frame. Tokens are on the grid (steps, rows, columns); where each place has
    several codes, each step is as many grids of rows and columns, coarse first, and the first axis has as many
    entries per step. The tokens of a video begin with those of each part that it begins with.
    """

    kind = "causal_video_vq"
    name = "video"
    config_type = VideoTokenizerConfig
    config: VideoTokenizerConfig
    codec: "CausalVideoCodec"

    @property
    def fixed_grid(self) -> tuple[int, int, int]:
        """The grid of a video of `n_frames`."""
        return self._grid(self.config.n_frames)

    def grid(self, item: Float[Tensor, "C T H W"]) -> tuple[int, int, int]:
        """Return the grid of an item's tokens."""
        return self._grid(item.shape[1])

    @torch.no_grad()
    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn videos into codes.

        Raises:
            TokenizerError: an item has another shape or type, or values outside [-1, 1].
        """
        for item in items:
            self._check_item(item)
        tokens: dict[int, Tokens] = {}
        for places in _chunks_of_one_length([item.shape[1] for item in items]):
            codes = self.codec.encode(torch.stack([items[place] for place in places]))
            for place, steps in zip(places, codes, strict=True):
                tokens[place] = Tokens(self._by_depth(steps).flatten(), self._grid(items[place].shape[1]))
        return [tokens[place] for place in range(len(items))]

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Float[Tensor, "C T H W"]]) -> Iterator[Int[Tensor, "N"]]:
        """Turn a video of any length, which comes in chunks of any number of frames, into the codes of its steps, each
        as soon as its frames are there. Together they are those of the whole video, to the bit.

        Raises:
            TokenizerError: a chunk is of another shape or type, or the frames do not end with a step.
        """
        past: Past = {}
        waiting: list[Float[Tensor, "C T H W"]] = []
        n_waiting, n_frames, wanted = 0, 0, 1
        for chunk in chunks:
            self._check_frames(chunk)
            waiting.append(chunk)
            n_waiting += chunk.shape[1]
            n_frames += chunk.shape[1]
            if n_waiting < wanted:
                continue
            frames = torch.cat(waiting, 1)
            while frames.shape[1] >= wanted:
                step, frames = frames.split([wanted, frames.shape[1] - wanted], 1)
                yield self._by_depth(self.codec.encode_step(step[None], past)[0]).flatten()
                wanted = self.config.temporal_rate
            waiting, n_waiting = [frames], frames.shape[1]
        if n_waiting or not past:
            raise TokenizerError(self._wrong_length(n_frames))

    @torch.no_grad()
    def decode_batch(self, tokens: Sequence[Tokens]) -> list[Float[Tensor, "C T H W"]]:
        """Turn codes into videos, of as many steps as the grid of each has.

        Raises:
            TokenizerError: another grid, or a code outside the codebook.
        """
        for entry in tokens:
            self._check_tokens(entry)
        depth = self.codec.quantizer.depth
        items: dict[int, Tensor] = {}
        for places in _chunks_of_one_length([entry.grid[0] for entry in tokens]):
            codes = torch.stack([tokens[place].codes.view(tokens[place].grid) for place in places])
            if depth > 1:
                codes = codes.unflatten(1, (-1, depth)).movedim(2, -1)
            items.update(zip(places, self.codec.decode(codes), strict=True))
        return [items[place] for place in range(len(tokens))]

    def read(self, payload: bytes) -> Float[Tensor, "C T H W"]:
        """Decode the first `n_frames` of a video file (`video_files` says which), sampled at the config's rate and
        fitted to its frame size. A shorter video ends standing still: its last frame is repeated.

        Raises:
            TokenizerError: it is not a video, or above the bounds of `video_files`.
        """
        from omniform.tokenizers.video_files import read_video

        config = self.config
        video = read_video(payload, fps=config.fps, max_frames=config.n_frames, mode=self._mode, fit=self._fit)
        return self._lengthened(video.frames)

    def from_video(self, video: "Video") -> Float[Tensor, "C T H W"]:
        """Turn any frames into an item, as `read` does.

        Raises:
            TokenizerError: no frames, frames that are not 8-bit grey or RGB levels, or a rate that is no finite number
                above 0.
        """
        frames = video.frames
        pictured = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] in (1, 3) and frames.size > 0
        if not pictured or not (math.isfinite(video.fps) and video.fps > 0):
            raise TokenizerError(
                f"a video of {frames.dtype} frames {frames.shape} at {video.fps} per second, expected uint8 "
                "(T, H, W, 1 or 3) with T >= 1 and a finite rate above 0"
            )
        # A frame that begins within a millionth of its length of the moment asked for is the one shown. The last frame
        # is over before the moment of a rate as high as the number of frames.
        step = min(video.fps / self.config.fps, len(frames))
        moments = np.floor(np.arange(self.config.n_frames) * step + 1e-6).astype(np.int64)
        shown = frames[moments[moments < len(frames)]]
        pictures = [Image.fromarray(frame if frame.shape[-1] == 3 else frame[..., 0]) for frame in shown]
        fitted = [np.asarray(self._fit(plain_picture(picture, self._mode))) for picture in pictures]
        return self._lengthened(np.stack(fitted))

    def to_video(self, item: Float[Tensor, "C T H W"]) -> "Video":
        """Turn an item into 8-bit frames; `from_video` gives it back to within half a level."""
        from omniform.tokenizers.video_files import Video

        return Video(to_bytes(item).permute(1, 2, 3, 0).contiguous().numpy(), self.config.fps)

    def compact(self, item: Float[Tensor, "C T H W"]) -> UInt8[Tensor, "C T H W"]:
        """Return the item's 256 levels."""
        return to_bytes(item)

    def expand(self, compact: UInt8[Tensor, "*N C T H W"]) -> Float[Tensor, "*N C T H W"]:
        """Turn levels back into an item."""
        return from_bytes(compact)

    def comparison(
        self, items: Sequence[Float[Tensor, "C T H W"]], *, scale: int = 2, columns: int = 4
    ) -> list[Image.Image]:
        """Return the frames of one film, on grey: rows of `columns` pairs, each an item and to its right what its codes
        decode to, `scale` times enlarged. Items that end before others stand still."""
        height, width = (side * scale for side in self.config.frame_size)
        gap = 4 * scale
        pair = 2 * width + gap
        n_rows, n_columns = -(-len(items) // columns), min(columns, len(items))
        sheet_size = (n_columns * (pair + gap) - gap, n_rows * (height + gap) - gap)
        decoded = self.decode_batch(self.encode_batch(items))
        films = [[self.to_video(item).frames for item in side] for side in (items, decoded)]
        sheets = []
        for moment in range(max(item.shape[1] for item in items)):
            sheet = Image.new(self._mode, sheet_size, "grey")
            for side, videos in enumerate(films):
                for place, frames in enumerate(videos):
                    row, column = divmod(place, columns)
                    frame = frames[min(moment, len(frames) - 1)]
                    picture = Image.fromarray(frame if frame.shape[-1] == 3 else frame[..., 0])
                    corner = (column * (pair + gap) + side * (width + gap), row * (height + gap))
                    sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), corner)
            sheets.append(sheet)
        return sheets

    def write_comparison(self, items: Sequence[Float[Tensor, "C T H W"]], stem: Path) -> list[Path]:
        """Write `comparison` of the items as one GIF that plays for ever."""
        path = stem.with_name(f"{stem.name}.gif")
        path.parent.mkdir(parents=True, exist_ok=True)
        first, *others = self.comparison(items)
        first.save(path, save_all=True, append_images=others, duration=1000 / self.config.fps, loop=0)
        return [path]

    @property
    def _mode(self) -> Mode:
        return "L" if self.config.channels == 1 else "RGB"

    def _fit(self, picture: Image.Image) -> Image.Image:
        height, width = self.config.frame_size
        return fit_picture(picture, (width, height), self.config.fit, self.config.background)

    def _lengthened(self, frames: UInt8[np.ndarray, "T H W *C"]) -> Float[Tensor, "C T H W"]:
        levels = torch.from_numpy(frames).view(len(frames), *self.config.frame_size, self.config.channels)
        missing = levels[-1:].expand(self.config.n_frames - len(levels), -1, -1, -1)
        return from_bytes(torch.cat([levels, missing]).permute(3, 0, 1, 2).contiguous())

    def _grid(self, n_frames: int) -> tuple[int, int, int]:
        n_steps = 1 + (n_frames - 1) // self.config.temporal_rate
        return n_steps * self.codec.quantizer.depth, *self.config.places

    def _by_depth(self, codes: Int[Tensor, "t h w *Q"]) -> Int[Tensor, "t h w"]:
        return codes.movedim(-1, 1).flatten(0, 1) if self.codec.quantizer.depth > 1 else codes

    def _wrong_length(self, n_frames: int) -> str:
        return (
            f"a video has {n_frames} frames, expected 1 + a multiple of {self.config.temporal_rate}, the temporal "
            "rate: leave the last ones out, or repeat the last one"
        )

    def _check_item(self, item: object) -> None:
        self._check_frames(item)
        if isinstance(item, Tensor) and (item.shape[1] == 0 or (item.shape[1] - 1) % self.config.temporal_rate):
            raise TokenizerError(self._wrong_length(item.shape[1]))

    def _check_frames(self, frames: object) -> None:
        channels, (height, width) = self.config.channels, self.config.frame_size
        if (
            not isinstance(frames, Tensor)
            or frames.dtype != torch.float32
            or frames.ndim != 4
            or (frames.shape[0], *frames.shape[2:]) != (channels, height, width)
        ):
            given = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
            raise TokenizerError(
                f"a video is {given}, expected float32 ({channels}, frames, {height}, {width}): `read` and "
                "`from_video` make such tensors"
            )
        if not (frames.abs() <= 1).all():
            raise TokenizerError(f"a video spans [{frames.min()}, {frames.max()}], expected finite values in [-1, 1]")

    def _check_tokens(self, tokens: Tokens) -> None:
        grid, depth = tuple(tokens.grid), self.codec.quantizer.depth
        whole = len(grid) == 3 and grid[1:] == self.config.places and grid[0] > 0 and grid[0] % depth == 0
        if not whole or len(tokens.codes) != math.prod(grid):
            raise TokenizerError(
                f"{len(tokens.codes)} codes of grid {grid}, expected a grid (a multiple of {depth}, "
                f"{', '.join(map(str, self.config.places))})"
            )
        self.check_codes(tokens.codes)


def _chunks_of_one_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of items of equal length, at most _CHUNK at a time."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        places[length].append(place)
    for alike in places.values():
        for first in range(0, len(alike), _CHUNK):
            yield alike[first : first + _CHUNK]
