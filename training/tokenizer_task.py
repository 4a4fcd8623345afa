"""Training of tokenizers: the image tokenizer as a Task of the training loop, and the text tokenizer in one go."""

import copy
import difflib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import yaml
from jaxtyping import UInt8
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from omniform.data.schema import RawSpan, SampleError
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.errors import OmniformError
from omniform.kernels.keyed_noise import keyed_permutation, stream
from omniform.modeling.config import STRICT, ConfigError, dump_config, parse_config
from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.codecs.adversarial import GENERATOR_TERMS, AdversarialCodec, PatchDiscriminator
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.training.config import NAME, FitConfig
from omniform.training.loop import fit
from omniform.training.run_folder import CONFIG_FILE, lock_folder, open_run_folder
from omniform.training.task import MicroBatch

RESULT = "tokenizer"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdversarialConfig:
    """A discriminator beside the codec. It shares the codec's learning rate, betas and bound on the gradient's norm.

    No pretrained network is used: the one perceptual term compares features of this discriminator.

    Attributes:
        widths: channels of the discriminator's layers, each of which halves the resolution.
        weight: of the codec's hinge loss, beside a mean squared error of pixels in [-1, 1].
        feature_weight: of the squared distance between discriminator features (arXiv:1512.09300).
        start_step: the first step in which the codec heeds both; the discriminator learns from step 0.
    """

    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (32, 64)
    weight: float = Field(default=0.01, ge=0)
    feature_weight: float = Field(default=0.01, ge=0)
    start_step: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageTokenizerTrainConfig(FitConfig):
    """How to train an image tokenizer; a row is an image.

    Attributes:
        data: folder of indexed shards, such as WORLD/train; every image span of it is learnt from.
        index_dir: where its indexes are, if not beside the shards.
        max_images: the first so many are held in memory, as bytes; a larger folder is learnt from in part.
        commitment_weight: beta of VQ-VAE (arXiv:1711.00937, equation 3); FSQ has no such term.
        entropy_weight: of the entropy penalty of LFQ (arXiv:2310.05737, section 3.1); the others have no such term.
        adversarial: train against a discriminator, which is not stored with the tokenizer; null: on pixels alone.
    """

    kind: Literal["conv_vq"]
    data: Path
    index_dir: Path | None = None
    tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    max_images: int = Field(default=200_000, ge=1)
    commitment_weight: float = Field(default=0.25, gt=0)
    entropy_weight: float = Field(default=0.1, gt=0)
    adversarial: AdversarialConfig | None = None

    @model_validator(mode="after")
    def _check_precision(self) -> "ImageTokenizerTrainConfig":
        quantizer = self.tokenizer.quantizer
        base = quantizer.base if quantizer.kind == "residual" else quantizer
        if self.engine.precision == "bf16" and base.kind == "vq_ema":
            raise ValueError(
                "engine.precision is bf16, in which the moving averages of a vq_ema codebook stand still: choose "
                "bf16_autocast"
            )
        return self

    @model_validator(mode="after")
    def _check_adversarial(self) -> "ImageTokenizerTrainConfig":
        if self.adversarial is None:
            return self
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage is 3, which scatters the weights that an adversarial loss needs detached: choose "
                "0, 1 or 2"
            )
        halvings = len(self.adversarial.widths)
        if self.tokenizer.image_size < 2**halvings:
            raise ValueError(
                f"adversarial.widths halve the resolution {halvings} times, expected at most "
                f"{self.tokenizer.image_size.bit_length() - 1} for images of {self.tokenizer.image_size} pixels"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextTokenizerTrainConfig:
    """How to learn a text tokenizer.

    Attributes:
        data: folders of indexed shards; every text span of them is learnt from.
        index_dirs: where the indexes of each of `data` are, in its order; null: beside the shards. None: all are there.
        corpora: texts that packages ship: "python-topics" is the Python language reference in pydoc_data.
        vocab_size: ids in all, among them 256 bytes and "unknown".
    """

    kind: Literal["sentencepiece"]
    name: str = Field(pattern=NAME)
    data: tuple[Path, ...] = ()
    index_dirs: tuple[Path | None, ...] | None = None
    corpora: tuple[Literal["python-topics"], ...] = ()
    vocab_size: int = Field(default=1024, ge=258)
    algorithm: Literal["bpe", "unigram"] = "bpe"

    @model_validator(mode="after")
    def _check_index_dirs(self) -> "TextTokenizerTrainConfig":
        if self.index_dirs is not None and len(self.index_dirs) != len(self.data):
            raise ValueError(
                f"index_dirs has {len(self.index_dirs)} entries for {len(self.data)} folders in data: give one for "
                "each, null where the indexes are beside the shards"
            )
        return self


_CONFIGS: dict[str, type[ImageTokenizerTrainConfig] | type[TextTokenizerTrainConfig]] = {
    "conv_vq": ImageTokenizerTrainConfig,
    "sentencepiece": TextTokenizerTrainConfig,
}


class ImageTokenizerTask:
    """Shows every image once per epoch, in an order that is a keyed permutation.

    Raises:
        OmniformError: the data cannot be read, or holds no image.
    """

    def __init__(self, config: ImageTokenizerTrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        codec = config.tokenizer.build()
        # The tokenizer reads images and stores the result; the module that learns stays apart from it.
        self.tokenizer = ImageTokenizer(config.tokenizer, copy.deepcopy(codec))
        self.module: nn.Module = codec
        weights = {"commitment": config.commitment_weight, "entropy": config.entropy_weight}
        self.term_weights: Mapping[str, float] = {
            "reconstruction": 1.0,
            **{term: weights[term] for term in codec.quantizer.loss_terms},
        }
        if config.adversarial is not None:
            discriminator = PatchDiscriminator(config.tokenizer.channels, config.adversarial.widths)
            self.module = AdversarialCodec(codec, discriminator)
            self.term_weights = {
                **self.term_weights,
                "adversarial": config.adversarial.weight,
                "features": config.adversarial.feature_weight,
                "discriminator": 1.0,
            }
        reader = ShardReader(config.data, config.index_dir)
        self._images, self.unreadable = _read_images(reader, self.tokenizer, config.max_images)
        self._identity = {"data": reader.digest, "n_images": len(self._images)}
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Return this rank's images of the step, every world_size-th of it."""
        size = self.config.engine.micro_batch_rows
        first = step * self.config.rows_per_step
        places = [self._place(n) for n in range(first + rank, first + self.config.rows_per_step, world_size)]
        return [self._micro_batch(step, places[i : i + size]) for i in range(0, len(places), size)]

    def position(self, step: int) -> dict[str, Any]:
        """Return which images are drawn from; which of them come next follows from the step alone."""
        return dict(self._identity)

    def restore(self, position: dict[str, Any]) -> None:
        """Check that the images are those of the stored run."""
        if position != self._identity:
            raise OmniformError(
                f"{self.config.data} holds other images than when this run began (then {position}, now "
                f"{self._identity}): bring the data back, or start again with --fresh"
            )

    def save(self, folder: Path, module: nn.Module) -> None:
        """Write the tokenizer folder."""
        self._trained(module).save(folder)

    def draw(self, path: Path, module: nn.Module, n: int = 16) -> None:
        """Write a picture of the first `n` images and of what their codes decode to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._trained(module).comparison([_to_item(image) for image in self._images[:n]]).save(path)

    def _trained(self, module: nn.Module) -> ImageTokenizer:
        codec = module.codec if isinstance(module, AdversarialCodec) else module
        self.tokenizer.codec.load_state_dict(codec.state_dict())
        return self.tokenizer

    def _micro_batch(self, step: int, places: list[int]) -> MicroBatch:
        pixels = _to_item(self._images[torch.tensor(places)])
        counts = dict.fromkeys(self.term_weights, float(len(places)))
        if self.config.adversarial is not None and step < self.config.adversarial.start_step:
            counts |= dict.fromkeys(GENERATOR_TERMS, 0.0)  # absent
        return MicroBatch(pixels, counts, len(places) * math.prod(self.tokenizer.fixed_grid))

    def _place(self, n: int) -> int:
        epoch, place = divmod(n, len(self._images))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return keyed_permutation(len(self._images), self.config.seed, stream("tokenizer/order"), epoch)


def train_tokenizer(
    config_path: Path, overrides: Sequence[str] = (), out: Path | None = None, *, fresh: bool = False
) -> Path:
    """Train the tokenizer that a YAML file describes, or go on with it, and return its folder, `out`/tokenizer.

    Args:
        overrides: dotted key=value.
        out: run folder; runs/NAME unless given.
        fresh: delete what an earlier run left in `out` first.

    Raises:
        OmniformError: the configuration, the data or the run folder cannot be used.
    """
    config = load_config(config_path, overrides)
    out = out or Path("runs") / config.name
    if isinstance(config, TextTokenizerTrainConfig):
        return _train_text(config, out, fresh=fresh)
    task = ImageTokenizerTask(config)
    config.accumulation(int(os.environ.get("WORLD_SIZE", "1")))  # both fail here rather than with the folder made
    config.check_loss_terms(task.term_weights)
    open_run_folder(out, config, fresh=fresh, result=RESULT)
    if task.unreadable:
        print(f"images of {config.data} that cannot be read are left out: {task.unreadable}", flush=True)

    def preview(module: nn.Module, step: int) -> None:
        task.draw(out / "samples" / f"step-{step}.png", module)

    return fit(task, config, out, result=RESULT, preview=preview)


def load_config(path: Path, overrides: Sequence[str] = ()) -> ImageTokenizerTrainConfig | TextTokenizerTrainConfig:
    """Read a YAML file of either kind, with dotted key=value overrides.

    Raises:
        ConfigError: it cannot be read, or is not such a configuration.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind not in _CONFIGS:
        raise ConfigError(f"{path}: kind is {kind!r}, expected a mapping whose kind is one of {', '.join(_CONFIGS)}")
    return parse_config(_CONFIGS[kind], text, overrides, source=str(path))


def _train_text(config: TextTokenizerTrainConfig, out: Path, *, fresh: bool) -> Path:
    """Learn the text tokenizer; it takes seconds and gives the same bits, so a run that was stopped starts again."""
    lock_folder(out)
    record, text = out / CONFIG_FILE, dump_config(config)
    if record.exists() and not fresh:
        stored = record.read_text(encoding="utf-8")
        if stored != text:
            changes = difflib.unified_diff(stored.splitlines(), text.splitlines(), str(record), "given", "", "", 0, "")
            raise OmniformError(
                f"{out} holds a tokenizer of another configuration:\n" + "\n".join(changes) + "\n"
                "Choose another --out, or replace that tokenizer with --fresh"
            )
    texts, unreadable = _read_texts(config)
    if unreadable:
        print(f"samples that cannot be read are left out: {unreadable}", flush=True)
    tokenizer = SentencePieceTokenizer.train(texts, vocab_size=config.vocab_size, algorithm=config.algorithm)
    record.write_text(text, encoding="utf-8")
    tokenizer.save(out / RESULT)
    return out / RESULT


def _read_texts(config: TextTokenizerTrainConfig) -> tuple[list[str], Tally]:
    """Return the texts, and which samples could not be read."""
    texts: list[str] = []
    unreadable = Tally()
    for folder, index_dir in zip(config.data, config.index_dirs or [None] * len(config.data), strict=True):
        reader = ShardReader(folder, index_dir)
        for place in range(len(reader)):
            try:
                texts += [span.text for span in reader[place].spans if span.text is not None]
            except SampleError as error:
                unreadable.add(error.reason, reader.describe(place))
    if "python-topics" in config.corpora:
        from pydoc_data.topics import topics

        texts += topics.values()
    return texts, unreadable


def _read_images(
    reader: ShardReader, tokenizer: ImageTokenizer, max_images: int
) -> tuple[UInt8[Tensor, "N C H W"], Tally]:
    """Return the images as bytes, and which could not be read."""
    images: list[Tensor] = []
    unreadable = Tally()
    for place in range(len(reader)):
        try:
            spans: Sequence[RawSpan] = reader[place].spans
        except SampleError as error:
            unreadable.add(error.reason, reader.describe(place))
            continue
        for span in spans:
            if span.modality != "image" or span.payload is None or len(images) >= max_images:
                continue
            try:
                images.append(((tokenizer.read(span.payload) + 1) * 127.5).round().to(torch.uint8))
            except TokenizerError as error:
                unreadable.add(error.reason, reader.describe(place))
        if len(images) >= max_images:
            break
    if not images:
        raise OmniformError(f"{reader.folder} holds no image that can be read: {unreadable or 'none at all'}")
    return torch.stack(images), unreadable


def _to_item(image: UInt8[Tensor, "*N C H W"]) -> Tensor:
    return image.float() / 127.5 - 1
