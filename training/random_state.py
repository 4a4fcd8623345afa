"""The global random generators of one process, as JSON."""

import base64
import random
from typing import Any

import numpy as np
import torch

from omniform.kernels.keyed_noise import keyed_bits, stream


def seed_everything(seed: int, rank: int) -> None:
    """Start torch, numpy and python from a number that is a pure function of `seed` and `rank`."""
    number = int(keyed_bits(seed, stream("global random state"), rank)) >> 32
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def capture() -> dict[str, Any]:
    """Return the state of the generators of torch (CPU and current CUDA device), numpy and python."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    state = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [kind, base64.b64encode(np.asarray(keys, "<u4").tobytes()).decode(), *rest],
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def restore(state: dict[str, Any]) -> None:
    """Set what `capture` returned."""
    torch.set_rng_state(_tensor(state["torch"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), "<u4"), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
