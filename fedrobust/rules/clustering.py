"""Two clusters of directions, the heavier one averaged: whole, or clipped to the median length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix
from fedrobust.rules.directions import DIGITS, cosine_distances, mean_of
from fedrobust.rules.flame import MedianLength
from fedrobust.rules.rule import Composite, Mixed, Rule, Weighting

_ALIKE = 10.0**-DIGITS
"""Distances that differ by no more are equal, and so are masses."""
_LINKAGES = ("complete", "average", "single")


@dataclass(frozen=True, repr=False)
class Clustering(Weighting):
    """The mean of the heavier one of two clusters of directions.

        A, B  <- agglomerative clustering of the cosine distances 1 - <x_i, x_j> / (||x_i|| ||x_j||)
        value <- mean of the x_i in the one of larger mass

    The two closest clusters become one until two are left. How far apart two are, `linkage` says:
    "complete", as in Blades, takes their furthest pair; "single" the closest, which finds the paper's
    argmin over A, B of the largest cosine across; "average" the mean over all pairs. Rows of zeros have
    no direction: they are alike, and at distance 1 from all others. Rows are measured from the
    reference. eps is not used: it takes a majority to be honest.

    Guarantee: none. Breakdown point 0: lengths are not looked at, and one long row in the heavier
    cluster is enough (see `ClippedClustering`). Nor are there more than two: a row opposed to all others
    is one of them, and whoever sends it has the rest of his rows in the other. Weighted by shares:
    clusters are as heavy as their rows' mass, so that many clients with next to no share make no heavy
    one; those without any have no influence. Linkage counts rows (the paper has no shares). Scores: the
    cosine distance to the closest row of the mean, 0 for its own.
    Deviations: every round is split anew, as in Blades; all rows are averaged where two clusters are
    equally heavy, or the last two links equally long (rows all alike, or at right angles), since nothing
    tells one from the other; of other ties, rows closest to all others go first, and only then the first
    clients. Cost: n^2 after the Gram.
    Source: Sattler, Müller, Wiegand, Samek 2020, "On the Byzantine Robustness of Clustered Federated
    Learning" (ICASSP 2020).

    Attributes:
        linkage: "complete", "average" or "single".
    """

    name = "clustering"
    linkage: str = "complete"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_linkage(self, self.linkage)

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        distances = cosine_distances(gram)
        held = np.flatnonzero(gram.shares)
        labels = _two_clusters(distances, held, self.linkage)
        masses = np.bincount(labels, gram.shares[held])
        admitted = np.zeros(gram.n, dtype=bool)
        admitted[held] = (masses.max() - masses <= _ALIKE)[labels]
        return mean_of(gram, distances, admitted)


@dataclass(frozen=True, repr=False)
class ClippedClustering(Composite):
    """The mean of the heavier one of two clusters of directions, no row longer than the median one.

        x_i   <- x_i min(1, M / ||x_i||), M the median length of all rows
        A, B  <- agglomerative clustering of the cosine distances
        value <- mean of the x_i in the one of larger mass

    `Clustering` says how; clipping leaves directions as they are. eps is not used: it takes a majority
    to be honest.

    Guarantee: none on the distance; the value is no longer than the median row. Breakdown point 1/2 for
    its length; none for its direction, as for `Clustering`: a row opposed to all others is a cluster.
    Weighted by shares: the median length is by mass, and so is the heavier cluster; linkage counts rows
    (the paper has no shares). Scores: the cosine distance to the closest row of the mean, 0 for its own.
    Deviations: M is of this round alone, where the paper takes the median of all lengths since the first
    round: rules keep no state. Otherwise as for `Clustering`. Cost: n^2 after the Gram.
    Source: Li, Ngai, Voigt 2023, "An Experimental Study of Byzantine-Robust Aggregation Schemes in
    Federated Learning" (IEEE Transactions on Big Data).

    Attributes:
        linkage: "average", as the paper has it, "complete" or "single".
    """

    name = "clipped_clustering"
    linkage: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_linkage(self, self.linkage)

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Clip to the median length; average the heavier cluster."""
        return MedianLength(), Clustering(self.linkage)


def _require_linkage(rule: Rule, linkage: str) -> None:
    rule.require(linkage in _LINKAGES, f"linkage must be one of {', '.join(_LINKAGES)}")


def _two_clusters(distances: Matrix, held: npt.NDArray[np.intp], linkage: str) -> npt.NDArray[np.intp]:
    """(k,) 0 or 1: who of these k rows is in which cluster; 0 where the last two links are as long.

    Args:
        distances: (n, n) of all rows.
        held: (k,) which rows there are, ascending.
        linkage: how far apart two clusters are.
    """
    if len(held) < 2:
        return np.zeros(len(held), dtype=np.intp)
    from scipy.cluster import hierarchy  # noqa: PLC0415 (takes a while)
    from scipy.spatial.distance import squareform  # noqa: PLC0415

    order = np.argsort(np.round(distances[:, held].sum(axis=1)[held], DIGITS), kind="stable")
    rows = held[order]
    tree = hierarchy.linkage(squareform(distances[np.ix_(rows, rows)], checks=False), linkage)
    last_but_one = tree[-2, 2] if len(tree) > 1 else 0.0
    labels = np.empty(len(order), dtype=np.intp)
    labels[order] = hierarchy.fcluster(tree, last_but_one + _ALIKE, "distance") - 1
    return labels
