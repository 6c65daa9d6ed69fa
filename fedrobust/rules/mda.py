"""Minimum-diameter averaging: the n - f rows that are closest together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.exact import refusal
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import Mixed, Weighting, weigh

_RATE = 5e3
"""Nodes of search a second, bookkeeping of the bisections included."""


@dataclass(frozen=True, repr=False)
class MDA(Weighting):
    """The mean of the n - f rows of smallest diameter, exactly.

    Of several such sets, the one whose second largest distance is smallest, and so on: so the order of
    the clients does not matter. Exact ties go to the first clients.

    Method: a set fits a diameter if f rows meet every pair that is farther apart: a vertex cover of
    size f, found by branching in at most 1.4656^f nodes where there are n! / (f! (n - f)!) sets.
    Diameters are found by bisection, the farthest pair is fixed, and so on for the next distance.

    Guarantee: within 2 f / (n - f) of the honest rows' diameter of their mean; breakdown point 1/2.
    Shares only tell how many rows can be malicious (the paper has no weighted form). No scores.
    Deviation: which of several sets of smallest diameter is taken, where the paper takes any.
    Cost: at most 1.4656^f nodes for each of 2 log2(n + 1) steps of n - f bisections, some 5e3 nodes a
    second; n = 40, f = 8 takes hundreds of nodes of the 7e3 possible. Beyond `budget` nodes the rule
    refuses, by n and f alone, rather than let a round hang.
    Source: Rousseeuw 1985; El Mhamdi, Farhadkhani, Guerraoui, Guirguis, Hoang, Rouault 2021,
    "Collaborative Learning in the Jungle" (arXiv 2008.00742).

    Attributes:
        budget: the most nodes that may have to be searched.
    """

    name = "mda"
    budget: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget >= 1, "budget must be at least 1")

    def __call__(self, gram: Gram) -> Mixed:
        """Choose n - f rows."""
        n, f = gram.n, gram.f
        require_majority(self, n, f)
        nodes = 1.4656 ** min(f, 1800) * (n - f) * 2 * math.log2(n + 1)
        within = f == 0 or nodes <= self.budget
        self.require(within, refusal(n, f, nodes, "nodes of search", _RATE, self.budget))
        kept = _closest(gram.squared_distances, f)
        weights = np.zeros(n)
        weights[kept] = 1 / len(kept)
        return weigh(weights)


def _closest(distances: Matrix, f: int) -> list[int]:
    """The n - f rows that are closest together."""
    n = len(distances)
    fixed, levels = 0, np.unique(distances)
    while True:
        place, removed = _bisect(distances, levels, fixed, f)
        alive = [row for row in range(n) if not removed >> row & 1]
        if fixed.bit_count() >= n - f or levels[place] == 0:
            break
        # The set cannot do without its farthest pair: fix that, and look at the next distance.
        far = (distances[np.ix_(alive, alive)] == levels[place]).any(axis=1)
        fixed |= sum(1 << row for row, is_far in zip(alive, far, strict=True) if is_far)
        levels = levels[:place]
    return sorted(alive, key=lambda row: not fixed >> row & 1)[: n - f]


def _bisect(distances: Matrix, levels: Vector, fixed: int, f: int) -> tuple[int, int]:
    """The first of the ascending levels at which f rows meet all farther pairs, and those rows."""
    low, high, removed = 0, len(levels), 0
    while low < high:
        middle = (low + high) // 2
        found = _removal(distances > levels[middle], fixed, f)
        if found is None:
            low = middle + 1
        else:
            high, removed = middle, found
    return low, removed


def _removal(far: npt.NDArray[np.bool_], fixed: int, f: int) -> int | None:
    """At most f rows, none of them fixed, that meet every pair that is far but for pairs of fixed ones.

    Sets of rows are integers, one bit a row.
    """
    packed = np.packbits(far, axis=1, bitorder="little")
    pairs = [int.from_bytes(row.tobytes(), "little") for row in packed]
    forced = 0
    for row, others in enumerate(pairs):
        if fixed >> row & 1:
            forced |= others & ~fixed
    free = ((1 << len(pairs)) - 1) & ~fixed & ~forced
    if forced.bit_count() > f:
        return None
    cover = _cover(pairs, free, f - forced.bit_count())
    return None if cover is None else cover | forced


def _cover(pairs: Sequence[int], free: int, size: int) -> int | None:
    """At most `size` of the free rows that meet every pair of free rows; None if there are none."""
    degrees = [(others & free).bit_count() if free >> row & 1 else 0 for row, others in enumerate(pairs)]
    most = max(degrees)
    if most == 0:
        return 0
    if sum(degrees) > 2 * size * most:  # each row meets `most` pairs at best
        return None
    row = degrees.index(most)
    without = free & ~(1 << row)
    if (cover := _cover(pairs, without, size - 1)) is not None:
        return cover | 1 << row
    near = pairs[row] & free
    if most == 1 or most > size:  # of a lone pair either row will do
        return None
    cover = _cover(pairs, without & ~near, size - most)
    return None if cover is None else cover | near
