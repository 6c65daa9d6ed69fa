"""An aggregate that is nearly ready when the last update arrives.

What a rule needs, inner products of the rows, is worked out as they come in, while other clients still
train; what is left at the deadline is the n x n rule and one weighted sum.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.aggregate import (
    Aggregated,
    LocalRows,
    check_anchors,
    check_seed,
    combine,
    gram_of,
    lower_median,
    masses,
    of_rounded,
    unsound,
)
from fedrobust.errors import InputError
from fedrobust.kernels import Block, Vector
from fedrobust.rules import Aggregator, Rule
from fedrobust.text import brief
from fedrobust.trees import Tree, as_tensor, fit, rebuild

Values = npt.NDArray[np.floating] | Tensor


class RunningAggregate:
    """Updates that arrive one after another, or in pieces, and the robust mean of those that are whole.

    Updates are vectors of `size` coordinates, or trees of the form of `like`: state dicts, gradients.
    All lie as rows in one arena of capacity x d. An arriving piece is multiplied with the rows that are
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

    >>> model = torch.nn.Linear(3, 1)
    >>> running = RunningAggregate(capacity=5, like=model.state_dict())
    >>> for client in "abcde":
    ...     row = running.add(torch.nn.Linear(3, 1).state_dict(), client=client)
    >>> model.load_state_dict(running.result("median").value)
    <All keys matched successfully>
    """

    def __init__(
        self,
        capacity: int,
        size: int | None = None,
        *,
        like: Tree = None,
        reference: Tree = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make room.

        Args:
            capacity: the most rows.
            size: d, where updates are vectors; give this or `like`.
            like: a tree of the form that updates must have, the model's state dict for instance; its
                values do not matter, and where a reference is given that stands for it.
            reference: a point that the server knows, of the form of one update; rows are measured from
                it. Give the broadcast model when updates are models rather than differences.
            dtype: of the arena, and of the value where updates are vectors: float32 or float64. None is
                float64 where `like` has float64 leaves, otherwise float32.

        Raises:
            InputError: no room, neither or both of size and like, a reference of another form or that is
                not finite, another dtype.
        """
        capacity = _whole(capacity, "capacity")
        size = None if size is None else _whole(size, "size")
        if capacity < 1 or (size is not None and size < 1):
            raise InputError(f"need capacity and size of at least 1, got {capacity} and {size}")
        if dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"dtype must be float32 or float64, got {dtype}")
        if size is not None and like is not None:
            raise InputError("give size, for vectors, or like, for trees, not both")
        if size is not None:
            like = torch.zeros(size, dtype=dtype or torch.float32)
        elif like is None and reference is None:
            raise InputError("give size, the number of coordinates, or like, a tree such as updates are")
        self._like, name = (reference, "reference") if like is None else (like, "like")
        leaves, counts = _fitted(self._like, self._like, name)
        self._counts = [count.clone() for count in counts]
        if not leaves:
            raise InputError("updates would hold no floating-point values, so nothing to aggregate")
        wide = any(leaf.dtype == torch.float64 for leaf in leaves)
        self._widths = [len(leaf) for leaf in leaves]
        dtype = dtype or (torch.float64 if wide else torch.float32)
        self._rows = torch.zeros(capacity, sum(self._widths), dtype=dtype)
        self._inner = np.zeros((capacity, capacity))
        self._arrived = np.zeros(capacity, dtype=np.int64)
        self._shares: list[float] = []
        self._clients: list[Hashable | None] = []
        self._counters: list[list[Tensor]] = []
        self._reference = None
        if reference is not None:
            parts, _ = _fitted(reference, self._like, "reference")
            self._reference = torch.cat([part.to(self._rows) for part in parts])
            if not self._reference.isfinite().all():
                raise InputError("the reference holds values that are not finite")

    def __len__(self) -> int:
        """How many rows have begun."""
        return len(self._shares)

    @property
    def clients(self) -> tuple[Hashable | None, ...]:
        """Who sent each row; None where nobody was named."""
        return tuple(self._clients)

    def begin(self, share: float = 1.0, *, client: Hashable | None = None) -> int:
        """Make room for one more row; returns its number, from 0.

        Args:
            share: its mass beside the others', not negative.
            client: whose it is, any name; each may have one row.

        Raises:
            InputError: there is no room left, the client has a row already or no hashable name, or the
                share is no number, negative or not finite.
        """
        try:
            hash(client)
        except TypeError:
            raise InputError(f"a client's name must be hashable, got {brief(client)}") from None
        if client is not None and client in self._clients:
            row = self._clients.index(client)
            raise InputError(f"client {client!r} has sent an update already, which is row {row}")
        if len(self._shares) == len(self._rows):
            raise InputError(f"there is room for {len(self._rows)} rows, and all is taken")
        share = _mass(share)
        self._shares.append(share)
        self._clients.append(client)
        self._counters.append(self._counts)
        return len(self._shares) - 1

    def write(self, row: int, start: int, values: Values) -> None:
        """Take the next coordinates of a row; `start` 0 again starts it anew.

        Args:
            row: as `begin` numbered it.
            start: the number of its coordinates that have arrived.
            values: (c,), in the arena's dtype or one that converts to it. A tree's coordinates are those
                of its floating leaves one after the other; its integer leaves count as those of `like`.

        Raises:
            InputError: no such row, a gap or an overlap, or too many coordinates; the row is as before.
        """
        row, start = _whole(row, "row"), _whole(start, "start")
        if not 0 <= row < len(self):
            raise InputError(f"there is no row {row}; {len(self)} have begun")
        fresh = self._piece(values)
        stop, size = start + len(fresh), self._rows.shape[1]
        if start not in (0, self._arrived[row]) or not start < stop <= size:
            raise InputError(
                f"row {row} has {self._arrived[row]} of {size} coordinates, and cannot take "
                f"{len(fresh)} from {start} on"
            )
        if start == 0:
            self._inner[row] = self._inner[:, row] = 0.0
            self._arrived[row] = 0
            self._counters[row] = self._counts
        if self._reference is not None:
            fresh = fresh - self._reference[start:stop]
        self._rows[row, start:stop] = fresh
        self._arrived[row] = stop
        self._fold(row, row + 1, start, stop)

    def add(self, update: Tree, share: float = 1.0, *, client: Hashable | None = None) -> int:
        """Take a whole update; returns its row's number.

        Args:
            update: (d,) floating-point values, or a tree of the form of `like`.
            share: as for `begin`.
            client: as for `begin`.

        Raises:
            InputError: as `begin`, or the update has another form; nothing is taken then. Values that
                are not finite are no error here: `result` refuses their row.
        """
        leaves, counters = _fitted(update, self._like, "update")
        row = self.begin(share, client=client)
        self._counters[row] = [counter.clone() for counter in counters]
        self._lay(row, leaves)
        self._fold(row, row + 1, 0, self._rows.shape[1])
        return row

    def extend(
        self, updates: Iterable[Tree] | Values, shares: Iterable[float] | None = None
    ) -> list[int]:
        """Take several whole updates in one pass; returns their rows' numbers.

        Args:
            updates: (m, d) floating-point values, or m trees of the form of `like`.
            shares: (m,), 1 where not given.

        Raises:
            InputError: no room, another form, or a bad share; nothing is taken then.
        """
        updates = _several(updates, "updates")
        shares = [1.0] * len(updates) if shares is None else _several(shares, "shares")
        first, last = len(self), len(self) + len(updates)
        if len(shares) != len(updates):
            raise InputError(f"need a share for each of {len(updates)} updates, got {len(shares)}")
        if last > len(self._rows):
            raise InputError(
                f"there is no room for {len(updates)} rows more than {first} of {len(self._rows)}"
            )
        shares = [_mass(share) for share in shares]
        fitted = [_fitted(update, self._like, "update") for update in updates]
        for share, (leaves, counters) in zip(shares, fitted, strict=True):
            row = self.begin(share)
            self._counters[row] = [counter.clone() for counter in counters]
            self._lay(row, leaves)
        if fitted:
            self._fold(first, last, 0, self._rows.shape[1])
        return list(range(first, last))

    def result(
        self,
        rule: str | Rule | Aggregator,
        eps: float | str | None = None,
        seed: int = 0,
        *,
        shares: Sequence[float] | Vector | None = None,
        anchors: Mapping[str, Tree] | None = None,
        certified: bool = True,
    ) -> Aggregated:
        """The robust mean of the rows that are whole; more may arrive afterwards.

        Arguments, answer and errors as `fedrobust.aggregate`: the value has the form of `like`. Rows
        that are not whole or not finite are `refused`. `shares` are in place of those with which the
        rows began.
        """
        check_seed(seed)
        n, size = len(self), self._rows.shape[1]
        check_anchors(anchors)
        mass = masses(self._shares if shares is None else shares, n)
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
        own = tuple(self._own(name, tree) for name, tree in (anchors or {}).items())
        block = Block(self._rows[:n], anchors=own)
        rows = LocalRows((block if len(kept) == n else block.select(kept),))
        inner = self._inner[np.ix_(kept, kept)]
        gram = gram_of(
            rows,
            mass[kept],
            squares[kept],
            seed,
            tuple(anchors or ()),
            certified=certified,
            matrix=(inner + inner.T) / 2,
            precision=kernels.FLOAT64 if self._rows.dtype == torch.float64 else kernels.ARRIVING,
        )
        result = combine(rows, rule, replace(gram, width=size), eps, certified=certified)
        (value,) = result.value
        value = value if self._reference is None else value + self._reference
        leaves, counts = fit(self._like, self._like)
        exact = torch.split(value, self._widths)
        parts = [part.to(leaf) for part, leaf in zip(exact, leaves, strict=True)]
        counters = [lower_median([self._counters[row][i] for row in kept]) for i in range(len(counts))]
        whole = rebuild(self._like, parts, counters)
        result = replace(result, certificate=of_rounded(result.certificate, exact, parts))
        return result.over(n, kept, whole, dict(sorted(refused.items())))

    def _own(self, name: str, tree: Tree) -> Tensor:
        """(d,) a row of the server's own, measured from the reference."""
        leaves, _ = _fitted(tree, self._like, f"anchor {name!r}")
        row = torch.cat([leaf.to(self._rows.dtype) for leaf in leaves])
        return row if self._reference is None else row - self._reference

    def _piece(self, values: Values) -> Tensor:
        try:
            vector = as_tensor(values)
        except InputError as error:
            raise InputError(f"the piece {error}") from None
        if vector.ndim != 1 or not vector.is_floating_point():
            raise InputError(
                f"need floating-point values of shape (c,), got {vector.dtype} of shape "
                f"{tuple(vector.shape)}"
            )
        return vector.detach().to(self._rows.dtype)

    def _lay(self, row: int, leaves: list[Tensor]) -> None:
        """Write a whole row, measured from the reference."""
        for part, leaf in zip(torch.split(self._rows[row], self._widths), leaves, strict=True):
            part.copy_(leaf)
        if self._reference is not None:
            self._rows[row] -= self._reference
        self._arrived[row] = self._rows.shape[1]

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


def _whole(value: object, what: str) -> int:
    """A whole number, of numpy's or Python's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{what} must be a whole number, got {brief(value)}")
    return int(value)


def _mass(share: Any) -> float:  # noqa: ANN401 (whatever is given)
    """A row's mass beside the others'."""
    try:
        mass = None if np.iscomplexobj(share) else float(share)  # or numpy would drop a part
    except (TypeError, ValueError, OverflowError):
        mass = None
    if mass is None:
        raise InputError(f"a share must be a number, got {brief(share)}")
    if not 0 <= mass < np.inf:
        raise InputError(f"a share must be finite and not negative, got {mass}")
    return mass


def _several(items: object, what: str) -> list[Any]:
    """Several of what may come in any sequence, an array among them, or from a generator."""
    if isinstance(items, Mapping | str | bytes) or not isinstance(items, Iterable):
        raise InputError(f"{what} must be an array or a sequence, got {brief(items)}")
    try:
        return list(items)
    except TypeError:  # an array of no dimension
        raise InputError(f"{what} must be an array or a sequence, got {brief(items)}") from None


def _fitted(update: Tree, like: Tree, what: str) -> tuple[list[Tensor], list[Tensor]]:
    try:
        return fit(update, like)
    except InputError as error:
        raise InputError(f"the {what} {error}") from None
