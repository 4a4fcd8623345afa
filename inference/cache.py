"""Keys and values of rows that later rows read, and the pattern that says who may read them."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from omniform.modeling.attention_pattern import PADDING, AttentionPattern

_SMALLEST_CAPACITY = 64


class KVCache:
    """Keys and values of the committed rows of a batch of sequences.

    A forward pass writes its rows behind the committed ones; unless they are then committed, the next pass overwrites
    them. Sequences of unequal length stay aligned by padding rows, which the pattern hides.
    """

    def __init__(self) -> None:
        self.n_committed = 0
        self.pattern: AttentionPattern | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def extend(
        self, layer: int, k: Float[Tensor, "B G N K"], v: Float[Tensor, "B G N K"]
    ) -> tuple[Float[Tensor, "B G L K"], Float[Tensor, "B G L K"]]:
        """Return the layer's committed keys and values followed by the new rows'."""
        return self._write(self._keys, layer, k), self._write(self._values, layer, v)

    def covering(self, new: AttentionPattern) -> AttentionPattern:
        """Return the pattern of the committed rows followed by `new` ones."""
        return new if self.pattern is None else self.pattern.append(new)

    def commit(self, new: AttentionPattern) -> None:
        """Keep the rows of the last forward pass, whose pattern was `new`."""
        self.pattern = self.covering(new)
        self.n_committed += new.document_ids.shape[1]

    def forget(self, sequence: int) -> None:
        """Hide all committed rows of one sequence of the batch, as if they were padding."""
        if self.pattern is not None:
            document_ids = self.pattern.document_ids.clone()
            document_ids[sequence] = PADDING
            self.pattern = replace(self.pattern, document_ids=document_ids)

    def _write(self, store: dict[int, Any], layer: int, rows: Tensor) -> Tensor:
        stop = self.n_committed + rows.shape[2]
        held = store.get(layer)
        if held is None or held.shape[2] < stop:
            batch, heads, _, width = rows.shape
            grown = rows.new_empty(batch, heads, max(_SMALLEST_CAPACITY, 2 * stop), width)
            if held is not None:
                grown[:, :, : self.n_committed] = held[:, :, : self.n_committed]
            store[layer] = held = grown
        held[:, :, self.n_committed : stop] = rows
        return held[:, :, :stop]
