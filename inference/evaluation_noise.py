"""Noise: what a model would generate that draws every token at random, which shows what a judge makes of garbage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from omniform.kernels.keyed_noise import keyed_normal, keyed_uniform, stream
from omniform.tokenizers.base import Discrete, Latents, Modality, Tokens


def noise_like(items: Sequence[Any], tokenizer: Modality[Any], seed: int) -> list[Any]:
    """Return, for each item, another one of as many random tokens, as its tokenizer decodes them: codes uniform, the
    numbers of vectors standard normal."""
    representation, drawn = tokenizer.representation, list[Any]()
    with torch.inference_mode():
        for place, tokens in enumerate(tokenizer.encode_batch(items)):
            keys, positions = (seed, stream("evaluation/noise"), place), np.arange(len(tokens))
            if isinstance(representation, Discrete):
                chosen = keyed_uniform(*keys, positions) * representation.vocab_size
                drawn.append(Tokens(torch.from_numpy(chosen.astype("int64")), tokens.grid))
            else:
                values = keyed_normal(*keys, positions[:, None], np.arange(representation.channels))
                drawn.append(Latents(torch.from_numpy(values).float(), tokens.grid))
        return list(tokenizer.decode_batch(drawn))
