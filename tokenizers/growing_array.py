"""Collect rows whose number is not known beforehand without holding them twice."""

from typing import Any

import numpy as np
import numpy.typing as npt


class GrowingArray:
    """Rows of one type and shape, which those added first decide; memory is at most a quarter more than theirs."""

    def __init__(self) -> None:
        self._stored: npt.NDArray[Any] | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, rows: npt.NDArray[Any]) -> None:
        """Copy rows (N, ...) to the end.

        Raises:
            ValueError: they have another type or shape than those before.
        """
        if self._stored is None:
            self._stored = np.empty((0, *rows.shape[1:]), rows.dtype)
        stored = self._stored
        if (rows.dtype, rows.shape[1:]) != (stored.dtype, stored.shape[1:]):
            raise ValueError(f"rows of {rows.dtype} {rows.shape[1:]} follow some of {stored.dtype} {stored.shape[1:]}")
        needed = self._length + len(rows)
        if needed > len(stored):
            # The memory is moved or extended in place; nobody else refers to it before `finish`.
            stored.resize((needed + self._length // 4, *rows.shape[1:]), refcheck=False)
        stored[self._length : needed] = rows
        self._length = needed

    def finish(self, length: int | None = None) -> npt.NDArray[Any]:
        """Return the first `length` rows, all by default, and hold them no more.

        Raises:
            ValueError: there are none.
        """
        if self._stored is None:
            raise ValueError("no rows were added")
        stored, self._stored = self._stored, None
        stored.resize((self._length if length is None else length, *stored.shape[1:]), refcheck=False)
        self._length = 0
        return stored
