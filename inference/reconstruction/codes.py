"""What tokens cost, and how much of a codebook is in use."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from omniform.tokenizers.base import Continuous, Discrete, Latents, Tokens


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
