"""Krum and multi-Krum: trust the rows with the closest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.rule import Mixed, Rule, Weighting, weigh


def krum_scores(rule: Rule, gram: Gram) -> Vector:
    """(n,) sums of squared distances to the n - f - 2 nearest other rows (Blanchard et al. 2017).

    Raises:
        InputError: fewer than 2 f + 3 rows, below which the paper's guarantee is void.
    """
    n, f = gram.n, gram.f
    rule.require(
        n >= 2 * f + 3,
        f"needs at least 2 f + 3 = {2 * f + 3} clients for f = {f} malicious ones, got {n}",
    )
    nearest = np.sort(gram.squared_distances, axis=1)  # column 0 is the row itself
    scores: Vector = nearest[:, 1 : n - f - 1].sum(axis=1)
    return scores


@dataclass(frozen=True, repr=False)
class Krum(Weighting):
    """The row with the smallest sum of squared distances to its n - f - 2 nearest others.

        s_i   <- sum of ||x_i - x_j||^2 over the n - f - 2 rows j /= i that are nearest to x_i
        value <- the x_i of smallest s_i

    Its answer is one client's update, so its certificate is empty: an attacker who is chosen decides
    alone.

    Guarantee: for n >= 2 f + 3, which is required, ||value - mu_S||^2 <= 6 (1 + f / (n - 2 f)) times the
    honest rows' mean squared distance from mu_S (Allouah et al. 2023, arXiv 2302.01772): an error of
    O(sigma sqrt(min(n, d))). Breakdown point 1/2. Shares only tell how many rows can be malicious (the
    paper has no weighted form). Scores: s_i. Deviations: none; ties go to the first client.
    Cost: n^2 log n after the Gram.
    Source: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent" (arXiv 1703.02757).
    """

    name = "krum"

    def __call__(self, gram: Gram) -> Mixed:
        """Choose one row."""
        scores = krum_scores(self, gram)
        weights = np.zeros(gram.n)
        weights[np.argmin(scores)] = 1.0
        return weigh(weights, scores)


@dataclass(frozen=True, repr=False)
class MultiKrum(Weighting):
    """The mean of the m rows with the smallest Krum scores (see `Krum` for these).

    Guarantee: up to f of the m rows may be malicious ones with many honest neighbours; the original has
    no bound for m > 1, the first is in Bareilles, Bouaziz, Fageot, El Mhamdi 2026 (arXiv 2602.03899).
    Needs n >= 2 f + 3; breakdown point 1/2. Shares only tell how many rows can be malicious (the paper
    has no weighted form). Scores: Krum's. Deviation: m = n - f unless given, as ByzFL and later papers
    take it, where the original leaves m free; ties go to the first clients.
    Cost: n^2 log n after the Gram.
    Source: Blanchard, El Mhamdi, Guerraoui, Stainer 2017 (arXiv 1703.02757).

    Attributes:
        m: how many rows are averaged, at most n - f; None takes n - f.
    """

    name = "multi_krum"
    m: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.m is None or self.m >= 1, "m must be at least 1")

    def __call__(self, gram: Gram) -> Mixed:
        """Choose m rows."""
        scores = krum_scores(self, gram)
        most = gram.n - gram.f
        m = most if self.m is None else self.m
        self.require(m <= most, f"m must be at most n - f = {most} of {gram.n} clients")
        weights = np.zeros(gram.n)
        weights[np.argsort(scores, kind="stable")[:m]] = 1 / m
        return weigh(weights, scores)
