"""What the reconstructions of all modalities share: items beside what their tokens give back, and what these cost."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from omniform.inference.reconstruction.judged import Answers
from omniform.tokenizers.base import Continuous, Discrete, Latents, Modality, Tokens

# Given how to read a picture's bytes, and whether altered copies count, returns the pictures of the train split and the
# digits that they show.
TrainPictures = Callable[[Callable[[bytes], Any], bool], tuple[list[Any], npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class Reconstruction(ABC):
    """Items of one modality, their tokens, and what these decode to.

    A new modality is one file beside this one and an entry in `tokenizer_evaluation.py`.

    Attributes:
        before, after: as the tokenizer takes and gives them.
        about: what the sample of each item says of it, such as its digit and voice.
    """

    tokenizer: Modality[Any]
    before: Sequence[Any]
    tokens: Sequence[Tokens | Latents]
    after: Sequence[Any]
    about: Sequence[Mapping[str, Any]]

    groups: ClassVar[tuple[str, ...]] = ()
    """What of `about` tells items of one class apart, each to be judged by itself."""
    distortion_name: ClassVar[str]
    """The figure that `distortions` gives, in tokenizer.json and in examples."""

    @classmethod
    def of(cls, tokenizer: Modality[Any], items: Sequence[Any], about: Sequence[Mapping[str, Any]]) -> Self:
        """Encode and decode items."""
        tokens = tokenizer.encode_batch(items)
        return cls(tokenizer, items, tokens, tokenizer.decode_batch(tokens), about)

    @cached_property
    def rates(self) -> dict[str, Any]:
        """What tokens cost and how the codebook is used, in terms that all modalities have."""
        return token_figures(self.tokens, self.tokenizer.representation)

    @property
    def digits(self) -> npt.NDArray[np.int64]:
        """The digit of each item."""
        return np.array([entry["digit"] for entry in self.about], dtype=np.int64)

    @staticmethod
    def source(about: Mapping[str, Any]) -> Any:
        """Return where an item comes from, such as a voice, None where its sample does not say: items of one source are
        no independent trials of a judge."""
        return None

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """Return rates that mean something for the modality, and distortions."""

    @abstractmethod
    def distortions(self) -> npt.NDArray[np.float64]:
        """Return one figure per item, the greater the worse, by which examples are chosen."""

    def answers(self, train_pictures: TrainPictures) -> dict[str, Answers]:
        """Return what each judge of the modality says, by the judge's name; called where all items have a digit."""
        return {}

    @abstractmethod
    def write_example(self, place: int, stem: Path) -> dict[str, str]:
        """Write one item and what came back of it into files whose names begin with `stem`.

        Returns:
            What is where: "picture", "before" and "after" name files; "before_text" and "after_text" are texts.
        """

    def write_comparison(self, places: Sequence[int], stem: Path) -> list[Path]:
        """Write the items of some places beside what came back, as the tokenizer shows them; return the files."""
        tokenizer: Any = self.tokenizer
        return list(tokenizer.write_comparison([self.before[place] for place in places], stem))


def token_figures(tokens: Sequence[Tokens | Latents], representation: Discrete | Continuous) -> dict[str, Any]:
    """Return how many tokens an item takes; of codes also the bits and how the codebook is used, of vectors how many
    numbers they are."""
    codes = [entry.codes for entry in tokens if isinstance(entry, Tokens)]
    if isinstance(representation, Discrete):
        per_item = sum(map(len, codes)) / len(tokens)
        return {
            "codebook_size": representation.vocab_size,
            "tokens_per_item": per_item,
            "bits_per_item": per_item * math.log2(representation.vocab_size),
            **code_use(torch.cat(codes), representation.vocab_size),
        }
    per_item = sum(math.prod(entry.grid) for entry in tokens) / len(tokens)
    return {
        "channels": representation.channels,
        "tokens_per_item": per_item,
        "numbers_per_item": per_item * representation.channels,
    }


def code_use(codes: Int[Tensor, "N"], size: int) -> dict[str, float]:
    """Return the fraction of codes that occur, and the perplexity exp(H) of how often each occurs: the number of
    equally used codes that would be as varied."""
    counts = torch.bincount(codes, minlength=size).double()
    frequencies = counts[counts > 0] / counts.sum()
    return {
        "code_use": len(frequencies) / size,
        "perplexity": float(torch.exp(-(frequencies * frequencies.log()).sum())),
    }


def mean_figure(name: str, values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Return the mean of the finite values under `name`, None where there are none.

    Others, such as the infinite PSNR of an exact round trip, are counted under `name`_left_out where there are any.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    figure: dict[str, float | None] = {name: float(finite.mean()) if len(finite) else None}
    return figure if len(finite) == len(array) else {**figure, f"{name}_left_out": len(array) - len(finite)}
