"""The geometric median by smoothed Weiszfeld steps in client space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.rule import Mixed, Weighting, weigh

_FAR = 1e3
"""So many times the usual distance rows must be away before steps begin elsewhere than at the mean."""
_MANY = 1000
"""For more rows all distances are not worked out; and with fewer steps the rule may stop far short."""
_SHARP = 1e-3
"""With more smoothing than this the rule is no median any more."""


@dataclass(frozen=True, repr=False)
class GeometricMedian(Weighting):
    """argmin_z sum_i b_i ||x_i - z||, as RFA.

        a_i <- b_i / max(nu, ||x_i - sum_j a_j x_j||), normalised; repeated

    All steps take place on the weights a, by ||x_i - X a||^2 = G_ii - 2 (G a)_i + a^T G a, so many
    steps cost no more than few; they stop when no distance changes any more. (The same from squared
    distances would lose the honest rows' digits beside a row of norm 1e30.) Few steps begin at the mean,
    as in the paper. Where n or more may be taken, of at most 1000 rows, and rows are a thousand times
    further out than most, each counts at first by the inverse of its median distance from the others:
    from the mean, near eps = 1/2, it would take thousands of steps to forget a norm of 1e30.

    Guarantee: ||z - mu_S|| <= 2 (1 - eps) / (1 - 2 eps) max_S ||x_i - mu_S|| (a factor sqrt d worse
    than the filter's for spread-out rows), up to the smoothing; with `steps` of 1000 or more, nu of at
    most 1e-3 and no more than 1000 clients. Otherwise the steps may end far from the median, and there
    is none. Breakdown point 1/2, on the same terms; eps is not used.
    Weighted by shares: a share of two is two clients. Scores: distances from the median. Deviations: nu
    is relative to the median distance of the rows from the current median, so that the rule is
    scale-equivariant; steps until nothing changes, where RFA takes a few. Cost: n^2 a step after the
    Gram, or a pass over the rows a step without it.
    Source: Pillutla, Kakade, Harchaoui 2022, "Robust Aggregation for Federated Learning" (arXiv
    1912.13445), by the smoothed Weiszfeld algorithm.

    Attributes:
        steps: the most Weiszfeld steps taken.
        nu: smoothing, in units of the median distance from the current median.
    """

    name = "geometric_median"
    steps: int = 1000
    nu: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps >= 1, "steps must be at least 1")
        self.require(self.nu > 0, "nu must be positive")

    def arrives(self, n: int) -> bool:
        """Whether the steps come to the median of n rows, whatever some of them hold."""
        return self.steps >= _MANY >= n and self.nu <= _SHARP

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        return weigh(*self.of_all(gram))

    def of_all(self, gram: Gram) -> tuple[Vector, Vector]:
        """The median of all rows by their shares, in the form that `of` gives it."""
        near = gram.n <= min(self.steps, _MANY)
        return self.of(gram, gram.shares, _near_most(gram) if near else gram.shares)

    def of(self, gram: Gram, mass: Vector, weights: Vector) -> tuple[Vector, Vector]:
        """The median of rows of this (n,) mass: (n,) weights, and (n,) distances of all rows from it.

        Args:
            gram: the rows.
            mass: sum 1.
            weights: (n,) of the point at which the steps begin; sum 1.
        """
        product, norms = gram.product(self.steps), gram.squared_norms
        distances = np.zeros(gram.n)
        blur = 1e-8 * np.sqrt(norms)  # distances below this are rounding
        for _ in range(self.steps):
            toward = product(weights)
            previous = distances
            distances = np.sqrt(np.maximum(norms - 2 * toward + weights @ toward, 0.0))
            if (np.abs(distances - previous) <= 1e-12 * distances + blur).all():
                break
            floor = self.nu * float(np.median(distances)) or np.finfo(float).tiny
            closeness = mass / np.maximum(distances, floor)
            weights = closeness / closeness.sum()
        return weights, distances


def _near_most(gram: Gram) -> Vector:
    """(n,) shares; if rows are far out, over each row's median distance from all of them, by mass."""
    norms = gram.squared_norms
    apart = np.sqrt(np.maximum(norms[:, None] + norms - 2 * gram.matrix, 0.0))
    order = np.argsort(apart, axis=1)
    below = (np.cumsum(gram.shares[order], axis=1) < 0.5).sum(axis=1)
    middle = np.take_along_axis(apart, order, axis=1)[np.arange(gram.n), below]
    if middle.max() <= _FAR * np.median(middle):
        return gram.shares
    closeness = gram.shares / np.maximum(middle, 1e-8 * np.sqrt(norms) + np.finfo(float).tiny)
    return np.asarray(closeness / closeness.sum())
