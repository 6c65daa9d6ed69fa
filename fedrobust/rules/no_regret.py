"""The no-regret filter: multiplicative weights that are never far from the clients' shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.filter import without_loud
from fedrobust.rules.rule import Mixed, Weighting, weigh
from fedrobust.verdict import read_levels


@dataclass(frozen=True, repr=False)
class NoRegret(Weighting):
    """Robust mean for bounded covariance, by regret minimisation over the capped simplex.

        w <- b
        repeat: for each eigenvector v of the covariance under w that stands out:
                    tau_i <- <v, x_i - mu_w>^2
                    w_i   <- w_i (1 - lambda_v / lambda_1 tau_i / (2 max tau))
                w <- its projection, in relative entropy, onto {w_i <= b_i / (1 - eps), sum w = 1}
        return the iterate with the smallest top eigenvalue

    The weights stay a distribution near the shares all the time, so nothing is lost for good: what was
    marked down by mistake comes back. It stops where nothing stands out against the round's own bulk,
    at `filter`'s threshold. Rows that stretch the covariance 30 times beyond the bulk go first, and
    outright (the paper prunes rows that are far out first): multiplicative weights would take a hundred
    steps to forget a norm of 1e30.

    Guarantee: error O(sigma sqrt eps) whatever d is, proved for eps below a constant less than 1/2.
    Breakdown point: eps < 1/2 is accepted. Weighted by shares. Scores: the largest tau_i over its step's
    eigenvalue; zero where nothing stands out. Deviations: exact eigenvectors, all that stand out in a
    step instead of the first; the stopping rule; pruning by the spectrum. Cost: an eigenproblem of size
    min(n, d) a step; f steps or so beside few coordinates, where each removes a row.
    Source: Hopkins, Li, Zhang 2020, "Robust and Heavy-Tailed Mean Estimation Made Simple, via Regret
    Minimization" (arXiv 2007.15839).

    Attributes:
        steps: the most steps taken, beside those that remove a row outright, f of these at most.
    """

    name = "no_regret"
    steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps >= 1, "steps must be at least 1")

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        cap, quiet = gram.shares / (1 - gram.eps), without_loud(gram, 30.0)
        weights = quiet / quiet.sum()
        best, smallest, levels, near = weights, np.inf, None, None
        scores = np.zeros(gram.n)
        left, outright = self.steps, gram.f_with_share
        while True:
            values, projections = gram.leading(weights, near)
            if values[0] < smallest:
                best, smallest = weights, float(values[0])
            levels = levels or read_levels(gram, weights, values)
            level = levels.visible if levels else 0.0
            settled = values[0] <= max(level, gram.rounding(weights))
            if gram.f_with_share == 0 or settled or left == 0:
                break
            near = np.zeros(gram.n)
            near[weights > 0] = projections[:, 0]
            marked = weights.copy()
            for along, value in zip(projections.T, values, strict=True):
                if value < max(level, values[0] * (1 if levels is None else 1e-9)):
                    break
                tau = np.zeros(gram.n)
                tau[weights > 0] = along**2
                scores = np.maximum(scores, tau / value)
                # By as much as it matters: rows of one point have no variance in other directions, and
                # would gain what honest rows lose in each of theirs.
                marked *= 1 - (0.5 if levels else 1.0) * value / values[0] * tau / tau.max()
            if cap[marked > 0].sum() < 1 - 1e-9:
                break
            if outright and (marked[weights > 0] == 0).any():
                outright -= 1
            else:
                left -= 1
            weights = _project(marked, cap)
        return weigh(best, scores, notes={"kept_eigenvalue": smallest})


def _project(weights: Vector, cap: Vector) -> Vector:
    """The distribution below `cap` that is nearest to the weights in relative entropy.

    It is min(cap, c w): caps are met in the order of w / cap, and c is what is left over what is free.
    """
    support = np.flatnonzero(weights)
    # Short of 1 by a rounding error, the caps would leave no such distribution.
    cap = cap / min(1.0, cap[support].sum())
    order = support[np.argsort(-weights[support] / cap[support], kind="stable")]
    left = 1 - np.append(0.0, np.cumsum(cap[order])[:-1])
    free = np.cumsum(weights[order][::-1])[::-1]
    scales = left / np.maximum(free, 1e-290)
    fits = scales * weights[order] <= cap[order] * (1 + 1e-12)
    first = int(np.argmax(fits))
    met = np.arange(len(order)) < first
    projected = np.zeros_like(weights)
    projected[order] = np.where(met, cap[order], scales[first] * weights[order])
    return np.asarray(projected / projected.sum())
