"""What the reconstructions of all modalities share: items beside what their tokens give back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from omniform.inference.reconstruction.codes import token_figures
from omniform.inference.reconstruction.judged import Answers
from omniform.tokenizers.base import Latents, Modality, Tokens

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


def mean_or_none(values: Sequence[float] | npt.NDArray[np.float64]) -> float | None:
    """Return the mean, None where it is infinite, which JSON cannot hold: such is the PSNR of an exact round trip."""
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else None
