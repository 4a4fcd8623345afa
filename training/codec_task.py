"""Training of a codec as a Task of the training loop: images, speech and video alike."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from omniform.data.schema import SampleError
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.errors import OmniformError
from omniform.kernels.keyed_noise import keyed_permutation, stream
from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.codec_tokenizer import CodecTokenizer
from omniform.tokenizers.codecs.adversarial import GENERATOR_TERMS, AdversarialCodec
from omniform.training.task import MicroBatch
from omniform.training.tokenizer_config import CodecTrainConfig


class CodecTask:
    """Shows every item once per epoch, in an order that is a keyed permutation.

    Raises:
        OmniformError: the data cannot be read, or holds no item of the modality.
    """

    def __init__(self, config: CodecTrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        codec = config.tokenizer.build()
        # The tokenizer reads items and stores the result; the module that learns stays apart from it.
        self.tokenizer: CodecTokenizer[Any] = config.tokenizer_type(config.tokenizer, copy.deepcopy(codec))
        self.module: nn.Module = codec
        self.term_weights: Mapping[str, float] = {term: config.loss_weights[term] for term in codec.loss_terms}
        if config.adversarial is not None:
            self.module = AdversarialCodec(codec, config.adversarial.build(config.tokenizer.channels))
            self.term_weights = {
                **self.term_weights,
                "adversarial": config.adversarial.weight,
                "features": config.adversarial.feature_weight,
                "discriminator": 1.0,
            }
        readers = [ShardReader(config.data, config.index_dir), *map(ShardReader, config.more_data)]
        self._items, self.unreadable = list[Tensor](), list[tuple[Path, Tally]]()
        for reader in readers:
            items, unreadable = _read_items(reader, self.tokenizer, config.max_items)
            self._items += items
            if unreadable:
                self.unreadable.append((reader.folder, unreadable))
        first, *others = [reader.digest for reader in readers]
        self._identity = {"data": [first, *others] if others else first, "n_items": len(self._items)}
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def example(self, item: Shaped[Tensor, "*S"], n: int) -> Float[Tensor, "C *S"]:
        """Return what is learnt from of a compact item, channels first, in the n-th draw of the run."""
        example: Tensor = self.tokenizer.expand(item)
        return example

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """Return this rank's items of the step, every world_size-th of it."""
        size = self.config.engine.micro_batch_rows
        first = step * self.config.rows_per_step
        draws = list(range(first + rank, first + self.config.rows_per_step, world_size))
        return [self._micro_batch(step, draws[i : i + size]) for i in range(0, len(draws), size)]

    def after_step(self, sum_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool) -> dict[str, float]:
        """Change nothing: codebooks move in the forward pass."""
        return {}

    def position(self, step: int) -> dict[str, Any]:
        """Return which items are drawn from; which of them come next follows from the step alone."""
        return dict(self._identity)

    def restore(self, position: dict[str, Any]) -> None:
        """Check that the items are those of the stored run."""
        if position != self._identity:
            folders = ", ".join(map(str, (self.config.data, *self.config.more_data)))
            raise OmniformError(
                f"{folders} holds other {self.tokenizer.name} items than when this run began (then {position}, now "
                f"{self._identity}): bring the data back, or start again with --fresh"
            )

    def save(self, folder: Path, module: nn.Module) -> None:
        """Write the tokenizer folder."""
        self._trained(module).save(folder)

    def write_samples(self, stem: Path, module: nn.Module, n: int = 16) -> None:
        """Write the first `n` items and what their tokens decode to, into files whose names begin with `stem`."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._trained(module).write_comparison([self.tokenizer.expand(item) for item in self._items[:n]], stem)

    def _trained(self, module: nn.Module) -> CodecTokenizer[Any]:
        codec = module.codec if isinstance(module, AdversarialCodec) else module
        self.tokenizer.codec.load_state_dict(codec.state_dict())
        return self.tokenizer

    def _micro_batch(self, step: int, draws: list[int]) -> MicroBatch:
        examples = torch.stack([self.example(self._items[self._place(n)], n) for n in draws])
        counts = dict.fromkeys(self.term_weights, float(len(draws)))
        if self.config.adversarial is not None and step < self.config.adversarial.start_step:
            counts |= dict.fromkeys(GENERATOR_TERMS, 0.0)  # absent
        return MicroBatch(examples, counts, len(draws) * math.prod(self.tokenizer.grid(examples[0])))

    def _place(self, n: int) -> int:
        epoch, place = divmod(n, len(self._items))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return keyed_permutation(len(self._items), self.config.seed, stream("tokenizer/order"), epoch)


def _read_items(reader: ShardReader, tokenizer: CodecTokenizer[Any], max_items: int) -> tuple[list[Tensor], Tally]:
    """Return compact items, and which could not be read."""
    items: list[Tensor] = []
    unreadable = Tally()
    for place in range(len(reader)):
        try:
            spans = reader[place].spans
        except SampleError as error:
            unreadable.add(error.reason, reader.describe(place))
            continue
        for span in spans:
            if span.modality != tokenizer.name or span.payload is None or len(items) >= max_items:
                continue
            try:
                items.append(tokenizer.compact(tokenizer.read(span.payload)))
            except TokenizerError as error:
                unreadable.add(error.reason, reader.describe(place))
        if len(items) >= max_items:
            break
    if not items:
        raise OmniformError(
            f"{reader.folder} holds no {tokenizer.name} that can be read: {unreadable or 'none at all'}"
        )
    return items, unreadable
