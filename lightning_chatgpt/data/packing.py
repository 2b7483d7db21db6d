"""Several examples in one row: which go together, so that few places are padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], *, capacity: int) -> list[list[int]]:
    """Pack examples into rows by best-fit decreasing: the longest first, each into the fullest row that has room.

    Never uses more than 11/9 of the fewest rows possible, plus one. The sort takes O(n log n); a row is found in the time it takes to
    look through ``capacity`` bits of one integer, whatever the number of rows.

    Source: Johnson 1973, Near-optimal bin packing algorithms.

    Args:
        lengths: Tokens of each example.
        capacity: Tokens a row has room for.

    Returns: for each row the indices of its examples.

    Raises:
        ValueError: An example is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.max()) > capacity:
        raise ValueError(f"an example of {int(sizes.max())} tokens does not fit into a row of {capacity}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by how many tokens they have room for
    rooms = 0  # bit n is set where some row has room for n tokens
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if size and fitting:
            room = size + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least room that is enough
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - size
        with_room[left].append(row)
        if left:
            rooms |= 1 << left
    return rows


def shuffle_equal(lengths: npt.NDArray[np.int64], rows: Sequence[Sequence[int]], *, generator: np.random.Generator) -> list[list[int]]:
    """Shuffle packed rows without losing the fit: rows change places, and examples of one length change theirs.

    Args:
        lengths: Tokens of each example.
        rows: For each row the indices of its examples, as :func:`pack` gives them.
        generator: Where chance comes from.

    Returns: rows of the same lengths, in another order and with other neighbours.
    """
    shuffled = generator.permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    in_order = np.argsort(lengths, kind="stable")
    stand_in = np.empty(len(lengths), dtype=np.int64)
    stand_in[in_order] = by_length  # of one length each, so that they may change places
    return [stand_in[list(rows[row])].tolist() for row in generator.permutation(len(rows)).tolist()]


def padding_share(lengths: Sequence[int] | npt.NDArray[np.int64], rows: Sequence[Sequence[int]], *, capacity: int) -> float:
    """The fraction of places in packed rows that no token fills."""
    return 1 - float(np.sum(lengths)) / (len(rows) * capacity) if rows else 0.0
