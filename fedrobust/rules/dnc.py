"""Divide and conquer: drop the rows that stand out most along the top direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class DnC(Weighting):
    """The mean of the rows without the c f whose projection on the top eigenvector is longest.

        s_i <- <v, x_i - mean>^2, v the top eigenvector of the rows' covariance
        the mean of the rows without the floor(c f) of largest s_i

    It always drops c f rows, honest ones where nobody is malicious, and it looks once: f rows that
    are far out in different directions need not all be seen, and a large row hides a smaller one of the
    same side (`filter` looks again).

    Guarantee: the paper bounds what is left along v for c >= 1; none on the distance here, since one
    look is not enough. Needs n > 2 f. Breakdown point: two rows, of however many. One that is far out
    turns v its way; another, out in some other direction, gets through if it is a little on the first
    one's side, where the mean is as well, so that its projection is the shortest of all. Shares only
    tell how many rows can be malicious (the paper has no weighted form).
    Scores: s_i over the top eigenvalue. Ties keep the first clients.
    Deviation: the paper draws coordinates at random, several times, so that a singular value
    decomposition becomes affordable, and keeps whoever is kept every time; the Gram matrix gives the
    exact eigenvector of all coordinates, once. Cost: one eigenproblem of size n after the Gram.
    Source: Shejwalkar & Houmansadr 2021, "Manipulating the Byzantine: Optimizing Model Poisoning
    Attacks and Defenses for Federated Learning" (NDSS).

    Attributes:
        c: rows dropped for each that may be malicious; one row is always kept.
    """

    name = "dnc"
    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.c > 0, "c must be positive")

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        require_majority(self, gram.n, gram.f)
        values, projections = gram.leading(np.full(gram.n, 1 / gram.n))
        scores = projections[:, 0] ** 2
        kept = gram.n - min(math.floor(self.c * gram.f * (1 + 1e-9)), gram.n - 1)
        weights = np.zeros(gram.n)
        weights[np.argsort(scores, kind="stable")[:kept]] = 1 / kept
        return weigh(weights, scores / (values[0] or 1.0))
