"""CAF: the filter that needs to know f and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.rules.filter import without_loud
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class CAF(Weighting):
    """Covariance-bound agnostic filter: filter to the budget, return the best iterate.

        w <- b
        while the mass of w is more than 1 - 2 eps:
            lambda, v <- top eigenpair of the covariance under w/|w|;  tau_i <- <v, x_i - mu_w>^2
            keep w if lambda is the smallest yet
            w_i <- w_i (1 - tau_i / max tau)

    Unlike `filter` it has no threshold: it removes honest clients where there is nothing to remove.

    Guarantee: error O(sigma sqrt eps) whatever d is, with sigma unknown; breakdown point 1/2. Weighted
    by shares (the paper has unit weights). Scores: the largest tau_i over the lambda of its step.
    Deviation: the budget is 2 eps of the mass, where the paper has 2 f clients: with eps n not whole it
    is larger; no row goes where f = 0. Rows that stretch the covariance 1e4 times beyond the bulk go
    first, all at once: they would cost a step each. Cost: at most n + 1 eigenproblems after the Gram.
    Source: Allouah, Guerraoui, Stephan 2025, "Towards Trustworthy Federated Learning with Untrusted
    Participants" (arXiv 2505.01874).

    ByzFL's code differs from this: one step of the power method from a random start stands for the
    eigenpair, so that two runs differ; max tau is taken over removed rows as well, so that the number
    of steps is the attacker's choice; f = 0 or identical rows give no answer at all.
    """

    name = "caf"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        weights, best, smallest = without_loud(gram, 1e4), gram.shares, np.inf
        scores, near, steps = np.zeros(gram.n), None, 0
        while gram.f_with_share > 0 and weights.sum() > 1 - 2 * gram.eps + 1e-9:
            normalised = weights / weights.sum()
            values, projections = gram.leading(normalised, near)
            near = np.zeros(gram.n)
            near[normalised > 0] = projections[:, 0]
            tau = near**2
            if values[0] < smallest:
                best, smallest = normalised, float(values[0])
            if not tau.any() or np.count_nonzero(normalised) == 1:
                break
            scores = np.maximum(scores, tau / values[0])
            weights = weights * (1 - tau / tau.max())
            # What is as good as removed may be huge: a rounding error is too much weight for it.
            weights, steps = np.where(weights < 1e-12 * gram.shares, 0.0, weights), steps + 1
        return weigh(best, scores, notes={"steps": steps})
