"""FLAME: the majority that points the same way, at no more than the median length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.rules.mixings import shortened
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule, Weighting, weigh

_DIGITS = 6
"""Decimals of a cosine distance: beyond them those of float32 rows are rounding, and make no order."""


@dataclass(frozen=True, repr=False)
class FLAME(Composite):
    """The mean of the largest cluster of directions, its rows clipped to the median length of all rows.

        admitted <- HDBSCAN of the cosine distances, min_cluster_size = n // 2 + 1, min_samples = 1
        value    <- mean over admitted of x_i min(1, median ||x|| / ||x_i||)

    With these settings HDBSCAN (scikit-learn's) has one cluster: the first one of more than half of
    the rows that single linkage forms. Distances are rounded to six decimals, so that rows at equal
    angles are all in or all out, whatever the last digit of a float32 product is. A row of zeros has
    no direction and is at distance 1 from all.

    The paper's third step, Gaussian noise on the new model (its scale lambda = median length times
    sqrt(2 log(1.25 / delta)) / epsilon, where backdoors are to be drowned), is left to the server: a
    rule returns the mean. eps is not used: it takes a majority to be honest.

    Guarantee: none on the distance; the value is no longer than the median row. Breakdown point 1/2 by
    count: HDBSCAN knows no shares. Weighted by shares among the admitted (the paper has none); all
    rows by their shares where no cluster is found or none of the admitted has a share. Scores: the
    cosine distance to the closest admitted row, 0 for those admitted.
    Source: Nguyen, Rieger, Chen et al. 2022 (arXiv 2101.02281), algorithm 1. Deviation: the
    paper takes cosines between local models, here between the rows as they are given, measured from
    the reference: updates. Cost: n^2 after the Gram.
    """

    name = "flame"

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Clip to the median length, which leaves directions as they are; average the majority."""
        return MedianLength(), CosineMajority()


@dataclass(frozen=True, repr=False)
class MedianLength(Mixing):
    """No row longer than the median one."""

    name = "median_length"

    def __call__(self, gram: Gram) -> Mixed:
        """Shorten the longer half."""
        return shortened(gram, gram.lengths, float(np.median(gram.lengths)))


@dataclass(frozen=True, repr=False)
class CosineMajority(Weighting):
    """The mean of the tightest cluster of directions that holds more than half of the rows."""

    name = "cosine_majority"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        if gram.n < 2:  # HDBSCAN takes no fewer
            return weigh(gram.shares)
        from sklearn.cluster import HDBSCAN  # noqa: PLC0415 (takes a second)

        distances = gram.cosines
        np.maximum(np.subtract(1, distances, out=distances), 0.0, out=distances)
        np.round(distances, _DIGITS, out=distances)
        clusters = HDBSCAN(
            min_cluster_size=gram.n // 2 + 1,
            min_samples=1,
            metric="precomputed",
            allow_single_cluster=True,
            copy=True,
        )
        admitted = clusters.fit(distances).labels_ >= 0
        if not admitted.any():
            return weigh(gram.shares)
        scores = np.where(admitted, 0.0, distances[:, admitted].min(axis=1))
        weights = np.where(admitted, gram.shares, 0.0)
        return weigh(weights / weights.sum() if weights.any() else gram.shares, scores)
