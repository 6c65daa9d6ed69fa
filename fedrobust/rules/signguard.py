"""SignGuard: rows of ordinary length whose signs are distributed as most rows' are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.mixings import length_of, shortened
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule, Weighting, weigh

_MOVES = 300
_TOGETHER = 500
"""So many points' distances from all others are in memory at a time."""


@dataclass(frozen=True, repr=False)
class SignGuard(Composite):
    """The mean of the rows that pass a band of lengths and a clustering of signs, clipped to the median.

        by length <- rows with low <= ||x_i|| / M <= high, M the median length
        by signs  <- the largest mean-shift cluster of the fractions of coordinates > 0, = 0, < 0
        value     <- mean over both of x_i min(1, M / ||x_i||)

    It catches flipped and noisy rows, whose signs differ, and not those with the honest statistics.
    eps is not used: it takes a majority to be honest. Rows are measured from the reference; behind a
    mixing the mixed rows' signs are counted. Where no row passes both, those by length are taken.

    Guarantee: none on the distance; the value is no longer than the median row. Breakdown point 1/2 for
    its length. Of two or three rows one decides: half of them is the row itself. Weighted by shares (the
    paper has none): the median length is by mass, and so is the mean; a cluster is as large as the
    number of its rows. Scores: distance from the largest cluster's centre, in fractions.
    Deviations: signs of all coordinates instead of a random tenth; no similarity to the previous
    aggregate (the plain variant); a bandwidth from all pairs of rows; the lower median of an even
    number of lengths, and both ends belong to the band; of two largest clusters, the one nearer to the
    coordinate-wise median. Cost: a pass over the coordinates for the signs, then mean shift on n points
    in three dimensions, n^2 a step.
    Source: Xu, Huang, Song, Lan 2022, "Byzantine-robust Federated Learning through Collaborative
    Malicious Gradient Filtering" (arXiv 2109.05872).

    Attributes:
        low: the shortest row that passes, in median lengths.
        high: the longest one.
    """

    name = "signguard"
    low: float = 0.1
    high: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.low <= 1 <= self.high, "low must be in [0, 1] and high at least 1")

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Clip, taking the share of what is out of the band; average the largest cluster."""
        return LengthBand(self.low, self.high), SignCluster()


@dataclass(frozen=True, repr=False)
class LengthBand(Mixing):
    """No row longer than the median one, and no share for rows out of the band. Attributes as above."""

    name = "length_band"
    low: float = 0.1
    high: float = 3.0

    def __call__(self, gram: Gram) -> Mixed:
        """Shorten the longer half; the (lower) median row itself is always within the band."""
        lengths = gram.lengths
        median = length_of(gram, lengths, 0.5)
        within = (lengths >= self.low * median) & (lengths <= self.high * median)
        shares = np.where(within, gram.shares, 0.0)
        mixed = shortened(gram, lengths, median)
        return Mixed(mixed.matrix, shares / shares.sum() if shares.any() else gram.shares, gram.eps)


@dataclass(frozen=True, repr=False)
class SignCluster(Weighting):
    """The mean of the largest cluster of sign statistics, as far as it has a share."""

    name = "sign_cluster"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        largest = _largest_cluster(gram.signs)
        centre = gram.signs[largest].mean(axis=0)
        shares = np.where(largest, gram.shares, 0.0)
        weights = shares / shares.sum() if shares.any() else gram.shares
        return weigh(weights, np.linalg.norm(gram.signs - centre, axis=1))


def _largest_cluster(points: Matrix) -> npt.NDArray[np.bool_]:
    """(n,) who is in the largest mean-shift cluster; of several, the one nearest to the median.

    As scikit-learn's `MeanShift(bin_seeding=True)` with `estimate_bandwidth(quantile=0.5)`, up to ties
    that rounding decides; here means do not move one after the other.
    """
    off = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    middle, width = points[np.argmin(off)], _bandwidth(points)
    if width < 1e-9:  # half of the rows are alike, and nothing tells how wide to look
        return np.asarray(np.linalg.norm(points - middle, axis=1) < 1e-6)
    centres = _mean_shift(points, width)
    labels = _distances(points, centres).argmin(axis=1)
    near = -np.linalg.norm(centres - middle, axis=1)
    largest = np.lexsort([near, np.bincount(labels, minlength=len(near))])[-1]
    return np.asarray(labels == largest)


def _bandwidth(points: Matrix) -> float:
    """The mean distance within which a point finds half of all, itself included."""
    n, half = len(points), max(1, len(points) // 2)
    parts = np.array_split(points, -(-n // _TOGETHER))
    found = [np.partition(_distances(part, points), half - 1, axis=1)[:, half - 1] for part in parts]
    return float(np.concatenate(found).mean())


def _mean_shift(points: Matrix, width: float) -> Matrix:
    """(k, m) where means of all (n, m) points within a width end up, those with most points first.

    They begin at the corners of a grid of that width, or at the points where each has a corner of its
    own, and move until they hardly do. Of two that end within a width of each other, the one with fewer
    points is dropped.
    """
    starts = np.unique(np.round(points / width), axis=0) * width
    starts = points if len(starts) == len(points) else starts
    parts = np.array_split(starts, -(-len(starts) // _TOGETHER))
    means, counts = map(
        np.concatenate, zip(*(_moved(part, points, width) for part in parts), strict=True)
    )
    kept: list[int] = []
    for i in np.lexsort([*means.T[::-1], counts])[::-1]:
        if not kept or (np.linalg.norm(means[kept] - means[i], axis=1) > width).all():
            kept.append(int(i))
    return np.asarray(means[kept])


def _moved(means: Matrix, points: Matrix, width: float) -> tuple[Matrix, Vector]:
    """(k, m) where means end up, and (k,) how many points are within a width of each."""
    means, counts, moving = means.copy(), np.zeros(len(means)), np.arange(len(means))
    for _ in range(_MOVES):
        within = (_distances(means[moving], points) <= width).astype(float)
        counts[moving] = within.sum(axis=1)
        some = counts[moving] > 0  # none only by rounding
        within, moving = within[some], moving[some]
        moved = within @ points / counts[moving, None]
        far = np.linalg.norm(moved - means[moving], axis=1) > 1e-3 * width
        means[moving], moving = moved, moving[far]
        if not len(moving):
            break
    return means, counts


def _distances(some: Matrix, points: Matrix) -> Matrix:
    """(k, n) of k points from n others."""
    squares = ((a[:, None] - b) ** 2 for a, b in zip(some.T, points.T, strict=True))
    return np.asarray(np.sqrt(sum(squares)))
