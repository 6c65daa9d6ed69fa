"""An aggregate that is nearly ready when the last update arrives.

What a rule needs, inner products of the rows, is worked out as they come in, while other clients still
train; what is left at the deadline is the n x n rule and one weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.aggregate import Aggregated, LocalRows, combine, gram_of, precision, unsound
from fedrobust.errors import InputError
from fedrobust.kernels import Block, Vector
from fedrobust.rules import Aggregator, Rule

Values = npt.NDArray[np.floating] | Tensor


class RunningAggregate:
    """Updates that arrive one after another, or in pieces, and the robust mean of those that are whole.

    All rows lie in one arena of capacity x size. An arriving piece is multiplied with the rows that are
    there already, which are read once: for all n rows together n / 2 passes, where `aggregate` takes the
    time of about 3 + n / 20, but while waiting. Several rows at once (`extend`) share a pass.
    Not safe to be used by several threads at a time.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> running = RunningAggregate(capacity=10, size=50)
    >>> for update in rng.normal(size=(8, 50)).astype(np.float32):
    ...     row = running.add(update)
    >>> late = running.begin()
    >>> running.write(late, 0, np.ones(20, np.float32))   # and the rest does not come in time
    >>> result = running.result("filter")
    >>> result.refused
    {8: 'has 20 of 50 coordinates'}
    """

    def __init__(
        self,
        capacity: int,
        size: int,
        *,
        reference: Values | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make room.

        Args:
            capacity: the most rows.
            size: d, coordinates of a row.
            reference: (d,) a point that the server knows; rows are measured from it.
            dtype: of the arena and the value, float32 or float64.

        Raises:
            InputError: no room, a reference of another length, or another dtype.
        """
        if capacity < 1 or size < 1 or dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"need capacity and size of at least 1 and float32 or float64, got {capacity}, {size} "
                f"and {dtype}"
            )
        self._rows = torch.zeros(capacity, size, dtype=dtype)
        self._inner = np.zeros((capacity, capacity))
        self._arrived = np.zeros(capacity, dtype=np.int64)
        self._shares: list[float] = []
        self._reference = None if reference is None else self._vector(reference, size)

    def __len__(self) -> int:
        """How many rows have begun."""
        return len(self._shares)

    def begin(self, share: float = 1.0) -> int:
        """Make room for one more row; returns its number, from 0.

        Args:
            share: its mass beside the others', not negative.

        Raises:
            InputError: there is no room left, or the share is negative or not finite.
        """
        if len(self._shares) == len(self._rows):
            raise InputError(f"there is room for {len(self._rows)} rows, and all is taken")
        if not 0 <= share < np.inf:
            raise InputError(f"a share must be finite and not negative, got {share}")
        self._shares.append(float(share))
        return len(self._shares) - 1

    def write(self, row: int, start: int, values: Values) -> None:
        """Take the next coordinates of a row; `start` 0 again starts it anew.

        Args:
            row: as `begin` numbered it.
            start: the number of its coordinates that have arrived.
            values: (c,), in the arena's dtype or one that converts to it.

        Raises:
            InputError: no such row, a gap or an overlap, or too many coordinates; the row is as before.
        """
        if not 0 <= row < len(self):
            raise InputError(f"there is no row {row}; {len(self)} have begun")
        fresh = self._vector(values, None)
        stop, size = start + len(fresh), self._rows.shape[1]
        if start not in (0, self._arrived[row]) or not start < stop <= size:
            raise InputError(
                f"row {row} has {self._arrived[row]} of {size} coordinates, and cannot take "
                f"{len(fresh)} from {start} on"
            )
        if start == 0:
            self._inner[row] = self._inner[:, row] = 0.0
            self._arrived[row] = 0
        if self._reference is not None:
            fresh = fresh - self._reference[start:stop]
        self._rows[row, start:stop] = fresh
        self._arrived[row] = stop
        self._fold(row, row + 1, start, stop)

    def add(self, update: Values, share: float = 1.0) -> int:
        """Take a whole row; returns its number. Arguments and errors as `begin` and `write`."""
        return self.extend(self._vector(update, self._rows.shape[1])[None], [share])[0]

    def extend(self, updates: Values, shares: Sequence[float] | None = None) -> list[int]:
        """Take several whole rows in one pass; returns their numbers.

        Args:
            updates: (m, d).
            shares: (m,), 1 where not given.

        Raises:
            InputError: no room, wrong shapes, or a bad share; nothing is taken then.
        """
        fresh = torch.as_tensor(updates)
        shares = [1.0] * len(fresh) if shares is None else list(shares)
        first, size = len(self), self._rows.shape[1]
        if fresh.ndim != 2 or fresh.shape[1] != size or len(shares) != len(fresh):
            raise InputError(
                f"need (m, {size}) updates and m shares, got {tuple(fresh.shape)} and {len(shares)}"
            )
        if first + len(fresh) > len(self._rows) or not all(0 <= share < np.inf for share in shares):
            raise InputError(
                f"{len(fresh)} rows more than {first} of {len(self._rows)}, or a share of {shares} that "
                "is negative or not finite"
            )
        numbers = [self.begin(share) for share in shares]
        rows = self._rows[first : len(self)]
        rows.copy_(fresh)
        if self._reference is not None:
            rows -= self._reference
        self._arrived[first : len(self)] = size
        if numbers:
            self._fold(first, len(self), 0, size)
        return numbers

    def result(
        self,
        rule: str | Rule | Aggregator,
        eps: float | str | None = None,
        seed: int = 0,
        *,
        shares: Sequence[float] | Vector | None = None,
        certified: bool = True,
    ) -> Aggregated:
        """The robust mean of the rows that are whole; more may arrive afterwards.

        Arguments, answer and errors as `fedrobust.aggregate`. Rows that are not whole or not finite are
        `refused`. `shares` are in place of those with which the rows began.
        """
        n, size = len(self), self._rows.shape[1]
        masses = np.asarray(self._shares if shares is None else shares, dtype=np.float64)
        if masses.shape != (n,) or not ((masses >= 0) & (masses < np.inf)).all():
            raise InputError(f"need {n} shares, finite and not negative, got {shares!r:.60}")
        squares = np.diag(self._inner)[:n].copy()
        refused = unsound(np.sqrt(squares))
        refused |= {
            i: f"has {self._arrived[i]} of {size} coordinates"
            for i in range(n)
            if self._arrived[i] < size
        }
        kept = [i for i in range(n) if i not in refused]
        if not kept:
            raise InputError(f"none of the {n} rows is whole and finite")
        block = Block(self._rows[:n])
        rows = LocalRows((block if len(kept) == n else block.select(kept),))
        inner = self._inner[np.ix_(kept, kept)]
        gram = gram_of(
            rows,
            masses[kept],
            squares[kept],
            seed,
            certified=certified,
            matrix=(inner + inner.T) / 2,
            precision=precision([self._rows.dtype]),
        )
        result = combine(rows, rule, replace(gram, width=size), eps, certified=certified)
        (value,) = result.value
        value = value if self._reference is None else value + self._reference
        return result.over(n, kept, value, dict(sorted(refused.items())))

    def _vector(self, values: Values, size: int | None) -> Tensor:
        vector = torch.as_tensor(values)
        if vector.ndim != 1 or not vector.is_floating_point() or (size and len(vector) != size):
            raise InputError(
                f"need floating-point values of shape ({size or 'c'},), got {vector.dtype} of shape "
                f"{tuple(vector.shape)}"
            )
        return vector.detach().to(self._rows.dtype)

    def _fold(self, first: int, last: int, start: int, stop: int) -> None:
        """Add to the inner products what coordinates start .. stop of rows first .. last give."""
        there, new = self._arrived[: len(self)], np.arange(first, last)
        for end in np.unique(np.minimum(there[there > start], stop)):
            # Rows that got to the same point share a product; as a rule all others are whole.
            part = Block(self._rows[: len(self), start:end])
            found = kernels.cross(part, Block(self._rows[first:last, start:end]))
            reached = np.flatnonzero(np.minimum(there, stop) == end)
            self._inner[np.ix_(reached, new)] += found[reached]
            others = np.setdiff1d(reached, new)
            self._inner[np.ix_(new, others)] += found[others].T
