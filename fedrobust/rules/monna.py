"""MoNNA: the mean of the rows nearest to one that is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class MoNNA(Weighting):
    """The mean of the n - f rows that are nearest to a trusted row.

    The paper's workers have no server: each trusts its own vector. Here the trusted row is the
    server's own, the anchor "root" of `aggregate`, which is looked at and not averaged; or the row of
    one client, by its place among the usable updates, which is averaged as in the paper. Whoever holds
    that place decides everything, and a refused update moves the places behind it: name a client only
    where places are fixed and it is yours.

        value <- (1 / (n - f)) sum of the n - f rows that are nearest to the trusted row

    Guarantee: the value lies within 2 f / (n - f) diameters of the honest mean, the diameter that of the
    honest rows and the trusted row together: a malicious row is averaged only if it is no farther from
    the trusted row than an honest one that it displaces. Breakdown point 1/2. Shares only tell how many
    rows can be malicious (the paper has no weighted form). Scores: squared distances from the trusted
    row. Deviation: the server's row; ties go to the first clients. Cost: n log n after the Gram.
    Source: Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan 2023, "Robust Collaborative Learning
    with Linear Gradient Overhead" (arXiv 2209.10931), nearest-neighbour averaging.

    Attributes:
        index: the trusted client's place; None is the anchor "root".
    """

    name = "monna"
    index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.index is None or self.index >= 0, "index must not be negative")

    @property
    def anchors(self) -> tuple[str, ...]:
        """The server's own update, unless a client is trusted."""
        return ("root",) if self.index is None else ()

    def __call__(self, gram: Gram) -> Mixed:
        """Average the neighbours of the trusted row."""
        require_majority(self, gram.n, gram.f)
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
