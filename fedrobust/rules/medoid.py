"""The medoid: the row that is nearest to all the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class Medoid(Weighting):
    """argmin over the rows x_i of sum_j b_j ||x_i - x_j||: the geometric median, kept to the rows.

    Its answer is one client's update, so its certificate is empty, as Krum's is.

    Guarantee: within 2 (1 - eps) / (1 - 2 eps) honest diameters of every honest row, since the mean
    distance of the row that is returned is no larger than an honest one's; at most twice the geometric
    median's. Breakdown point 1/2; eps is not used. Weighted by shares, and never a row without one.
    Scores: the mean distances. Deviations: none; ties go to the first client. Cost: n^2 after the Gram.
    Source: Kaufman & Rousseeuw 1987; as an aggregator, the geometric median kept to the rows, Xie,
    Koyejo, Gupta 2018, "Generalized Byzantine-tolerant SGD" (arXiv 1802.10116).
    """

    name = "medoid"

    def __call__(self, gram: Gram) -> Mixed:
        """Choose one row."""
        distances = np.sqrt(gram.squared_distances)
        weights = np.zeros(gram.n)
        excess = np.where(gram.shares > 0, _excess(gram, distances), np.inf)
        weights[np.argmin(excess)] = 1.0
        return weigh(weights, distances @ gram.shares)


def _excess(gram: Gram, distances: Vector) -> Vector:
    """(n,) mean distances less that of the shortest row, without taking differences of huge ones.

    d_ij - d_kj = (d_ij^2 - d_kj^2) / (d_ij + d_kj) and ||x_j||^2 drops out of the numerator, so a row
    of norm 1e30 does not drown what tells the others apart.
    """
    norms = gram.squared_norms
    k = int(np.argmin(norms))
    difference = (norms - norms[k])[:, None] - 2 * (gram.matrix - gram.matrix[k])
    total = distances + distances[k]
    ratio = np.divide(difference, total, out=np.zeros_like(total), where=total > 0)
    excess: Vector = ratio @ gram.shares
    return excess
