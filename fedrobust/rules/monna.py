"""MoNNA: the mean of the rows nearest to one that is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class MoNNA(Weighting):
    """The mean of the n - f rows that are nearest to a trusted row.

    The paper's workers have no server: each trusts its own vector. Here the trusted row is the
    server's own, the anchor "root" of `aggregate`, which is looked at and not averaged; or the row of
    one client, by its place among the clients that answered, which is averaged as in the paper. Whoever
    holds that place decides everything: name a client only where places are fixed and it is yours.

    Guarantee: if the trusted row is honest, the value lies within 4 f / (n - f) honest diameters of
    the honest mean. Breakdown point 1/2. Ties go to the first clients; shares are not used (the paper
    has no such form). Scores: squared distances from the trusted row.
    Source: Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan 2023, "Robust Collaborative Learning
    with Linear Gradient Overhead" (arXiv 2209.10931), nearest-neighbour averaging. Cost: n log n after
    the Gram.

    Attributes:
        index: the trusted client's place; None is the anchor "root".
    """

    name = "monna"
    index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.index is None or self.index >= 0, "index must not be negative")

    def __call__(self, gram: Gram) -> Mixed:
        """Average the neighbours of the trusted row."""
        distances = self._distances(gram)
        count = gram.n - gram.f
        weights = np.zeros(gram.n)
        weights[np.argsort(distances, kind="stable")[:count]] = 1 / count
        return weigh(weights, distances)

    def _distances(self, gram: Gram) -> Vector:
        if self.index is None:
            toward, norm = gram.anchor("root")
        else:
            self.require(self.index < gram.n, f"there are only {gram.n} clients")
            trusted = np.eye(gram.n)[self.index]
            toward, norm = gram.product(1)(trusted), float(gram.squared_norms[self.index])
        return np.asarray(np.maximum(gram.squared_norms - 2 * toward + norm, 0.0))
