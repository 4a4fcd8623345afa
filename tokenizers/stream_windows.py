"""A stream in chunks of any sizes -> windows of one size, which are the same for any chunks."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Shaped
from torch import Tensor


def stream_windows(
    chunks: Iterable[Shaped[Tensor, "n *S"]], size: int, margin: int, around: Shaped[Tensor, "*S"]
) -> Iterator[tuple[Shaped[Tensor, "window *S"], int]]:
    """Cut a stream into windows that begin every `size` entries, from the first, and show `margin` more on each side.

    No more than a window and a chunk are held at a time.

    Args:
        chunks: parts of the stream in order, each with any number of entries along its first axis.
        around: the entry that there is before the first of the stream, and after the last, again and again.

    Yields:
        the size + 2 * margin entries of a window, and how many of those in the middle are of the stream: `size`, or
        fewer in the last. An empty stream has no windows.
    """
    held = [around.expand(margin, *around.shape)]
    n_held, n_left = margin, 0  # entries in `held`; those of the stream that no window has had in its middle
    for chunk in chunks:
        held.append(chunk)
        n_held, n_left = n_held + len(chunk), n_left + len(chunk)
        if n_held < size + 2 * margin:
            continue
        entries = torch.cat(held)
        while len(entries) >= size + 2 * margin:
            yield entries[: size + 2 * margin], size
            entries, n_left = entries[size:], n_left - size
        held, n_held = [entries], len(entries)
    while n_left > 0:
        entries = torch.cat([*held, around.expand(max(size + 2 * margin - n_held, 0), *around.shape)])
        yield entries[: size + 2 * margin], min(size, n_left)
        held, n_held, n_left = [entries[size:]], len(entries) - size, n_left - size
