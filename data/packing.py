"""Which documents share a row."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put each document, in order, into the first row that has room; return the places of each row's documents.

    Args:
        lengths: tokens per document, at most `row_length`; a document of 0 gets no place.
    """
    rows: list[list[int]] = []
    shortest = min((length for length in lengths if length), default=0)
    open_rows: list[tuple[int, list[int]]] = []  # (room, row) of rows that the shortest document still fits
    for place, length in enumerate(lengths):
        if length == 0:
            continue
        for slot, (room, row) in enumerate(open_rows):
            if length <= room:
                row.append(place)
                if room - length < shortest:
                    del open_rows[slot]
                else:
                    open_rows[slot] = (room - length, row)
                break
        else:
            rows.append([place])
            if row_length - length >= shortest:
                open_rows.append((row_length - length, rows[-1]))
    return rows
