"""How far could they have moved it: a bound that holds for whatever the malicious clients sent.

For two weightings p, q of the same points at total-variation distance t < 1,

    ||mu_p - mu_q|| <= sqrt(t / (1 - t)) (sqrt(lambda_p) + sqrt(lambda_q)),

lambda the largest eigenvalue of the weighted covariance: apply Cauchy-Schwarz to the common part
min(p, q) / (1 - t), once from each side. With p the shares restricted to the honest clients S and q
the weights that a rule returned, t is at most

    t* = 1 - sum_i min(b_i, q_i) + max over T with b(T) <= eps of sum_{i in T} min(b_i, q_i),

for every S of mass at least 1 - eps. (Diakonikolas & Kane, Algorithmic High-Dimensional Robust
Statistics, 2023, section 2: stability; here deterministic and weighted.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector


@dataclass(frozen=True)
class Certificate:
    """A deterministic bound on the distance between an aggregate and the honest clients' mean.

    Attributes:
        variation: t*, the largest total-variation distance from the honest clients' shares.
        spread: square root of the largest eigenvalue of the covariance under the returned weights.
        honest_spread: the most that the honest clients' own spread can be, judged from the raw round
            alone; loose under a loud attack.
        eps: the malicious mass that the bound is for.
        rounding: how far the value is from what was worked out, at most: updates of less than float32
            are aggregated in float32, and the value is rounded to their form.
    """

    variation: float
    spread: float
    honest_spread: float
    eps: float
    rounding: float = 0.0

    def bound(self, sigma: float | None = None) -> float:
        """The largest possible distance, in the updates' own units; infinite where t* reaches 1.

        Args:
            sigma: a bound on the honest spread, if one is known: sigma^2 at least the largest
                eigenvalue of the honest clients' covariance about their mean. None assumes nothing.
        """
        if self.variation >= 1.0:
            return math.inf
        factor = math.sqrt(self.variation / (1.0 - self.variation))
        return factor * (self.spread + (self.honest_spread if sigma is None else sigma)) + self.rounding


def certify(gram: Gram, mixings: Sequence[Matrix]) -> tuple[Certificate, Vector]:
    """The certificate of a weighting of the rows that was reached by way of mixings.

    The value is a weighted mean of the rows and the reference; it is also one of the rows as any of
    the mixings left them: of clipped rows, say, among which those that were not clipped still count
    as the clients' own. The bound holds for every such view. Returned is the one with the smallest
    bound where honest rows are spread no more than what the value is a mean of. (A loudly clipped row
    is far away with a tiny weight in the first view, and near by in the second.)

    Args:
        gram: the n rows as the clients sent them, with their base shares and eps.
        mixings: (k, n), then (k', k) and so on, at last (1, k); at least one. Applied in this order
            they give the value; what a row lacks of the sum 1 is weight on the reference.

    Returns:
        The certificate, and the eigenvalues of its view's covariance, largest first; zero if they are
        nothing but rounding.
    """
    raw = float(gram.raw_eigenvalues[0]) + gram.rounding(gram.shares)
    honest = math.sqrt(raw / (1.0 - gram.eps))
    views: list[tuple[Certificate, Vector]] = []
    for points, weights in _views(mixings):
        held = weights if points is None else weights @ np.where(_untouched(points), points, 0.0)
        variation = _variation(gram.shares, held, gram.eps)
        if variation < 1.0 or not views:
            values, rounding = _spectrum(gram, points, weights)
            spread = math.sqrt(values[0] + rounding)
            seen = values if values[0] > rounding else np.zeros_like(values)
            views.append((Certificate(variation, spread, honest, gram.eps), seen))
    # Not for the honest spread as judged from the raw round: one huge row would hide all difference.
    least = min(certificate.spread for certificate, _ in views)
    return min(views, key=lambda view: view[0].bound(least))


def _views(mixings: Sequence[Matrix]) -> Iterator[tuple[Matrix | None, Vector]]:
    """The value as a mean of points: their mixture of the rows, None for the rows, and their weights.

    Only those that are means, with no negative weight on a point or the reference; the last one is.
    """
    for step in range(len(mixings)):
        weights = reduce(np.matmul, reversed(mixings[step:]))[0]
        if weights.min() >= 0 and weights.sum() <= 1 + 1e-9:
            yield reduce(np.matmul, reversed(mixings[:step])) if step else None, weights


def _untouched(points: Matrix) -> npt.NDArray[np.bool_]:
    """(k, 1) which points are one of the rows as it came."""
    alone = np.count_nonzero(points, axis=1, keepdims=True) == 1
    return np.asarray(alone & (points == 1.0).any(axis=1, keepdims=True))


def _spectrum(gram: Gram, points: Matrix | None, weights: Vector) -> tuple[Vector, float]:
    """Eigenvalues of the covariance of the weighted points and, with what is left, of the reference.

    And below what they are as good as zero.
    """
    if points is not None:
        gram = gram.through(points, weights, gram.eps)
    return gram.eigenvalues(weights), gram.rounding(weights)


def _variation(shares: Vector, weights: Vector, eps: float) -> float:
    """t* by the fractional knapsack: the densest common mass first, until eps of shares is spent."""
    common = np.minimum(shares, weights)
    density = np.divide(common, shares, out=np.zeros_like(common), where=shares > 0)
    order = np.argsort(-density)
    before = np.cumsum(shares[order]) - shares[order]
    taken = np.clip(eps - before, 0.0, shares[order])
    worst = float((density[order] * taken).sum())
    variation = max(1.0 - float(common.sum()) + worst, 0.0)
    return variation if variation < 1.0 - 1e-9 else 1.0  # the difference from 1 is rounding, and divides
