"""The auto-weighted geometric median: rows weigh less the further they are from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.geometric_median import GeometricMedian
from fedrobust.rules.mixings import length_of
from fedrobust.rules.rule import Mixed, Weighting, weigh

_TURNS, _STEPS = 100, 20
_SETTLED = 1e-9
"""Turns end where less of the mass than this goes from row to row."""


@dataclass(frozen=True, repr=False)
class AutoGM(Weighting):
    """The geometric median of rows whose weights are chosen along with it.

        argmin over z and a of sum_i a_i ||x_i - z|| + lambda / 2 sum_i a_i^2, a >= 0, sum a = 1; in turn
        a_i <- max(eta - ||x_i - z||, 0) / lambda, eta such that they sum to 1
        z   <- argmin_z sum_i a_i ||x_i - z||

    It begins at the geometric median z_0 of all rows, and ends when no a_i changes any more. A large
    lambda leaves that median as it is; a small one goes to the nearest row. Here lambda = c n D, D the
    median distance from z_0: with c = 1, and most rows at about that distance, those at twice of it
    count for nothing. eps is not used.

    Guarantee: rows further than 2 (1 + c) D from the last z but one have no weight; for
    c > 2 eps / (1 - 2 eps) an honest row has some, and is within 4 (1 + c) D of the value; D is at most
    the honest rows' largest distance from z_0. (The first a comes to a sum of at most (1 + c) D, nothing
    afterwards raises it, and with all weight on eps of the mass it is c D / (2 eps) or more.) Breakdown
    point 1/2: at any c and eps, rows out of reach of all others have no weight. All for at most 1000
    clients, as for the geometric median. Below that distance a few rows that are alike can take most of
    the weight, where the others differ in many directions: this rule can be further off than the median.
    Weighted by shares b: a_i <- b_i max(eta - ||x_i - z||, 0) / (c D), so a share of two is two clients.
    Scores: distances from the value.
    Deviations: lambda is in the rows' own units, so that the rule is scale-equivariant, where the paper
    has a number; z is found as `GeometricMedian` finds it; D is the lower median of an even number.
    Cost: n^2 a step after the Gram.
    Source: Li, Ngai, Voigt 2023, "Byzantine-Robust Aggregation in Federated Learning Empowered
    Industrial IoT" (IEEE Transactions on Industrial Informatics 19).

    Attributes:
        regulariser: c, lambda over the number of clients, in median distances from z_0.
    """

    name = "auto_gm"
    regulariser: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.regulariser > 0, "regulariser must be positive")

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        weights, distances = GeometricMedian().of_all(gram)
        median = GeometricMedian(steps=_STEPS)  # each turn goes on where the last one ended
        room, mass = self.regulariser * length_of(gram, distances, 0.5), gram.shares
        for _ in range(_TURNS if room > 0 else 0):  # else most rows are the median itself
            previous, mass = mass, _nearest(gram.shares, distances, room)
            weights, distances = median.of(gram, mass, weights)
            if np.abs(mass - previous).sum() <= _SETTLED:
                break
        return weigh(weights, distances)


def _nearest(shares: Vector, distances: Vector, room: float) -> Vector:
    """(n,) b_i max(eta - d_i, 0), normalised, eta such that they sum to the room.

    For the p nearest rows alone eta would be (room + sum b_i d_i) / sum b_i; it is the least of these.
    All is measured from the nearest row, whose weight is not to be lost in rounding.
    """
    beyond = distances - distances[shares > 0].min()
    order = np.argsort(beyond, kind="stable")
    mass, moment = np.cumsum(shares[order]), np.cumsum((shares * beyond)[order])
    held = mass > 0
    eta = ((room + moment[held]) / mass[held]).min()
    weights = shares * np.maximum(eta - beyond, 0.0)
    return np.asarray(weights / weights.sum())
