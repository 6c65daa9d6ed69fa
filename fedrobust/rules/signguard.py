"""SignGuard: rows of ordinary length whose signs are distributed as most rows' are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.mean import Mean
from fedrobust.rules.mixings import length_of, median_by_mass, shortened
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule

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
    paper has none): the median length is by mass, and so are the clustering, which cluster is the
    largest, and the mean. Scores: distance from the largest cluster's centre, in fractions.
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
        """Clip, taking the share of what does not pass; average the rest."""
        return OrdinaryRows(self.low, self.high), Mean()


@dataclass(frozen=True, repr=False)
class OrdinaryRows(Mixing):
    """No row longer than the median one, and no share for rows that do not pass. Attributes as above."""

    name = "ordinary_rows"
    low: float = 0.1
    high: float = 3.0

    def __call__(self, gram: Gram) -> Mixed:
        """Shorten the longer half; take the share of what does not pass."""
        lengths = gram.lengths
        median = length_of(gram, lengths, 0.5)
        mixed = shortened(gram, lengths, median)
        signs = gram.through(mixed.matrix, gram.shares, gram.eps).signs
        within = (lengths >= self.low * median) & (lengths <= self.high * median)
        masses = np.round(gram.shares / gram.shares.max(), 9)  # equal shares are, in spite of rounding
        largest = _largest_cluster(signs, masses)
        centre = (masses[:, None] * signs)[largest].sum(axis=0) / masses[largest].sum()
        shares = gram.shares
        for passed in (within, largest):
            left = np.where(passed, shares, 0.0)
            shares = left / left.sum() if left.any() else shares
        return Mixed(mixed.matrix, shares, gram.eps, np.linalg.norm(signs - centre, axis=1))


def _largest_cluster(points: Matrix, masses: Vector) -> npt.NDArray[np.bool_]:
    """(n,) who is in the mean-shift cluster of most mass; of several, the one nearest to the median.

    With equal masses as scikit-learn's `MeanShift(bin_seeding=True)` with
    `estimate_bandwidth(quantile=0.5)`, up to ties that rounding decides; here means do not move one
    after the other.

    Args:
        points: (n, m).
        masses: (n,) of the points; the largest is 1.
    """
    median = np.array([median_by_mass(column, masses / masses.sum()) for column in points.T])
    off = np.linalg.norm(points - median, axis=1)
    middle, width = points[np.argmin(np.where(masses > 0, off, np.inf))], _bandwidth(points, masses)
    if width < 1e-9:  # half of the mass is alike, and nothing tells how wide to look
        return np.asarray(np.linalg.norm(points - middle, axis=1) < 1e-6)
    centres = _mean_shift(points, masses, width)
    labels = _distances(points, centres).argmin(axis=1)
    near = -np.linalg.norm(centres - middle, axis=1)
    largest = np.lexsort([near, np.bincount(labels, masses, minlength=len(near))])[-1]
    return np.asarray(labels == largest)


def _bandwidth(points: Matrix, masses: Vector) -> float:
    """The mean distance within which a point finds half of the mass, its own included."""
    half = masses.sum() / 2 * (1 + 1e-9)
    found = []
    for part in np.array_split(points, -(-len(points) // _TOGETHER)):
        distances = _distances(part, points)
        order = np.argsort(distances, axis=1)
        upto = np.cumsum(masses[order], axis=1)
        last = np.maximum((upto <= half).sum(axis=1, keepdims=True) - 1, 0)
        found.append(np.take_along_axis(distances, np.take_along_axis(order, last, 1), 1)[:, 0])
    return float((np.concatenate(found) * masses).sum() / masses.sum())


def _mean_shift(points: Matrix, masses: Vector, width: float) -> Matrix:
    """(k, m) where means of all (n, m) points within a width end up, those of most mass first.

    They begin at the corners of a grid of that width, or at the points where each has a corner of its
    own, and move until they hardly do. Of two that end within a width of each other, the one of less
    mass is dropped.
    """
    starts = np.unique(np.round(points / width), axis=0) * width
    starts = points if len(starts) == len(points) else starts
    parts = np.array_split(starts, -(-len(starts) // _TOGETHER))
    means, held = map(
        np.concatenate, zip(*(_moved(part, points, masses, width) for part in parts), strict=True)
    )
    kept: list[int] = []
    for i in np.lexsort([*means.T[::-1], held])[::-1]:
        if not kept or (np.linalg.norm(means[kept] - means[i], axis=1) > width).all():
            kept.append(int(i))
    return np.asarray(means[kept])


def _moved(means: Matrix, points: Matrix, masses: Vector, width: float) -> tuple[Matrix, Vector]:
    """(k, m) where means end up, and (k,) how much mass is within a width of each."""
    means, held, moving = means.copy(), np.zeros(len(means)), np.arange(len(means))
    for _ in range(_MOVES):
        within = (_distances(means[moving], points) <= width) * masses
        held[moving] = within.sum(axis=1)
        some = held[moving] > 0  # none only by rounding, or where no point near has a mass
        within, moving = within[some], moving[some]
        moved = within @ points / held[moving, None]
        far = np.linalg.norm(moved - means[moving], axis=1) > 1e-3 * width
        means[moving], moving = moved, moving[far]
        if not len(moving):
            break
    return means, held


def _distances(some: Matrix, points: Matrix) -> Matrix:
    """(k, n) of k points from n others."""
    squares = ((a[:, None] - b) ** 2 for a, b in zip(some.T, points.T, strict=True))
    return np.asarray(np.sqrt(sum(squares)))
