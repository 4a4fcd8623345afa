"""Random numbers that are a pure function of integer keys.

Every random decision of Omniform that a result depends on (data order, corruption in training, sampling in generation)
is drawn here from keys such as (seed, sample, span, step, position), so it never depends on batch, rank, worker or
on how many numbers were drawn before. Computed on the CPU in 64-bit integers: the same bits on every machine.
"""

import zlib

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words that avalanches."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream(name: str) -> int:
    """Return the integer that separates one use of random numbers from another, from a readable name."""
    return zlib.crc32(name.encode())


def keyed_bits(*keys: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return 64 random bits per element of the broadcast of `keys`.

    Args:
        keys: integers or integer arrays that broadcast together; their order matters. Negative values are taken
            modulo 2**64.

    Raises:
        TypeError: a key is not integral.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            array = np.asarray(key)
            if array.dtype.kind not in "iu":
                raise TypeError(f"a noise key must be integral, but one has dtype {array.dtype}")
            state = np.asarray(_mix((state ^ array.astype(np.uint64)) + _GOLDEN))
        return np.asarray(_mix(state + _GOLDEN))


def keyed_uniform(*keys: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return uniform numbers in the open interval (0, 1), one per element of the broadcast of `keys`."""
    return ((keyed_bits(*keys) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def keyed_gumbel(*keys: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits) (arXiv:1611.01144)."""
    return -np.log(-np.log(keyed_uniform(*keys)))


def keyed_normal(*keys: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return standard normal numbers: the quantile function at uniform ones, within [-8.3, 8.3]."""
    return torch.special.ndtri(torch.from_numpy(keyed_uniform(*keys))).numpy()


def keyed_permutation(size: int, *keys: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(size) that is a pure function of `keys`."""
    return np.argsort(keyed_bits(*keys, np.arange(size)), kind="stable")
