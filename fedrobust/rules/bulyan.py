"""Bulyan: rows that Krum chooses one after another, then the values nearest to their median."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Reducer, Vector
from fedrobust.reducers import window_mean
from fedrobust.rules.rule import Composite, CoordinateWise, Mixed, Mixing, Rule


@dataclass(frozen=True, repr=False)
class Bulyan(Composite):
    """Krum's choice n - 2f times over, then of every coordinate the n - 4f values nearest the median.

        S <- {}
        n - 2f times: move the row that Krum chooses among the rest from the rest to S
        every coordinate: the mean of the |S| - 2f values of S that are nearest to their median

    The point of the second step: a row may be near in distance and far in one coordinate.

    Guarantee: for n >= 4 f + 3, which is required, the paper bounds what an attacker can gain in one
    coordinate by O(sigma / sqrt d). Breakdown point 1/4. Shares only tell how many rows can be
    malicious (the paper has no weighted form). Scores: Krum's, among all the rows.
    Deviations: near the end fewer rows are left than Krum asks for; it then sums over one neighbour at
    least, and a pair of nearest neighbours ties. Ties go to the row whose distances to all the others
    sum to less, then to the first client. f = 0 is answered for any n.
    Cost: n^2 (n - 2 f) after the Gram, then a sort of every coordinate.
    Source: El Mhamdi, Guerraoui, Rouault 2018, "The Hidden Vulnerability of Distributed Learning in
    Byzantium" (arXiv 1802.07927).
    """

    name = "bulyan"

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The selection, and what becomes of a coordinate."""
        return BulyanSelection(), BulyanMean()


@dataclass(frozen=True, repr=False)
class BulyanSelection(Mixing):
    """The n - 2f rows that Krum chooses one after another."""

    name = "bulyan_selection"

    def __call__(self, gram: Gram) -> Mixed:
        """Choose rows."""
        n, f = gram.n, gram.f
        if n < 4 * f + 3:
            Bulyan(eps=self.eps).require(
                f == 0,
                f"needs at least 4 f + 3 = {4 * f + 3} clients for f = {f} malicious ones, got {n}",
            )
        left, chosen, first = np.arange(n), [], np.zeros(n)
        nearest = np.sort(gram.squared_distances, axis=1)  # column 0 is the row itself
        for step in range(n - 2 * f):
            scores = nearest[:, 1 : max(len(left) - f - 1, 2)].sum(axis=1)
            first = first if step else scores
            best = int(np.lexsort([nearest.sum(axis=1), scores])[0])
            chosen.append(left[best])
            nearest = _without(best, nearest, gram.squared_distances[left, left[best]])
            left = np.delete(left, best)
        count = len(chosen)
        return Mixed(np.eye(n)[chosen], np.full(count, 1 / count), f / count, scores=first)


def _without(row: int, nearest: Matrix, distances: Vector) -> Matrix:
    """(k - 1, k - 1) of (k, k) sorted distances: without a row, and all others' (k,) distances to it."""
    kept = np.ones(nearest.shape, dtype=bool)
    kept[np.arange(len(nearest)), (nearest < distances[:, None]).sum(axis=1)] = False
    kept[row] = False
    return nearest[kept].reshape(len(nearest) - 1, len(nearest) - 1)


@dataclass(frozen=True, repr=False)
class BulyanMean(CoordinateWise):
    """The mean of all but 2f values, those nearest to the median."""

    name = "bulyan_mean"

    def reducer(self, shares: Vector, eps: float) -> Reducer:
        """Leave out 2f of the values."""
        k = len(shares)
        return partial(window_mean, keep=k - 2 * round(eps * k))
