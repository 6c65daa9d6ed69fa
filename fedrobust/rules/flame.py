"""FLAME: the majority that points the same way, at no more than the median length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.rules.directions import cosine_distances, mean_of
from fedrobust.rules.mixings import median_by_mass, shortened
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule, Weighting, weigh

_HALF = 1e-9
"""A mass is more than a half if it is by this much: less is rounding."""


@dataclass(frozen=True, repr=False)
class FLAME(Composite):
    """The mean of the largest cluster of directions, its rows clipped to the median length of all rows.

        admitted <- the first cluster of more than half of the mass that single linkage of the cosine
                    distances forms
        value    <- mean over admitted of x_i min(1, median ||x|| / ||x_i||)

    With equal shares these are the rows of the one cluster that HDBSCAN has with the paper's settings,
    min_cluster_size = n // 2 + 1 and min_samples = 1. Distances are rounded to six decimals, so that
    rows at equal angles are all in or all out, whatever the last digit of a float32 product is. Rows
    of zeros have no direction: they are alike, and at distance 1 from all others.

    The paper's third step, Gaussian noise on the new model (its scale lambda = median length times
    sqrt(2 log(1.25 / delta)) / epsilon, where backdoors are to be drowned), is left to the server: a
    rule returns the mean. eps is not used: it takes a majority to be honest.

    Guarantee: none on the distance; the value is no longer than the median row, and malicious rows have
    less than 2 eps of its weight. Breakdown point 1/2. Weighted by shares (the paper has none): the
    majority and the median length are by mass; rows with next to no share can link others, but neither
    are a majority nor set the length. Scores: the cosine distance to the closest admitted row, 0 for
    those admitted.
    Source: Nguyen, Rieger, Chen et al. 2022 (arXiv 2101.02281), algorithm 1. Deviations: the
    paper takes cosines between local models, here between the rows as they are given, measured from
    the reference: updates; the weighted form. Cost: n^2 after the Gram.
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
        return shortened(gram, gram.lengths, median_by_mass(gram.lengths, gram.shares))


@dataclass(frozen=True, repr=False)
class CosineMajority(Weighting):
    """The mean of the tightest cluster of directions that holds more than half of the mass."""

    name = "cosine_majority"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        if gram.n < 2:  # there are no distances
            return weigh(gram.shares)
        from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415 (rarely needed)
        from scipy.spatial.distance import squareform  # noqa: PLC0415

        distances = cosine_distances(gram)
        links = linkage(squareform(distances, checks=False), "single")
        masses = list(gram.shares)
        for one, other in links[:, :2].astype(int):
            masses.append(masses[one] + masses[other])
            if masses[-1] > 0.5 + _HALF:
                break
        # All links of one length are made.
        clusters = fcluster(links, links[len(masses) - gram.n - 1, 2], "distance")
        admitted = clusters == np.bincount(clusters, gram.shares).argmax()
        return mean_of(gram, distances, admitted)
