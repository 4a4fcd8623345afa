"""Noise: what a model would generate that draws every token at random, which shows what a judge makes of garbage."""

from collections.abc import Sequence
from typing import Any

import torch

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.tokenizers.base import Discrete, Modality, Tokens


def noise_like(items: Sequence[Any], tokenizer: Modality[Any], seed: int) -> list[Any]:
    """Return, for each item, another one of as many tokens, each uniformly random, as its tokenizer decodes them."""
    assert isinstance(tokenizer.representation, Discrete)
    n_codes, drawn = tokenizer.representation.vocab_size, []
    with torch.inference_mode():
        for place, tokens in enumerate(tokenizer.encode_batch(items)):
            chosen = keyed_uniform(seed, stream("evaluation/noise"), place, torch.arange(len(tokens.codes)).numpy())
            drawn.append(Tokens(torch.from_numpy((chosen * n_codes).astype("int64")), tokens.grid))
        return list(tokenizer.decode_batch(drawn))
