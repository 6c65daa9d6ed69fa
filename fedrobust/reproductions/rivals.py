"""Estimators of the mean that robust ones are compared with: (n, d) rows in, (d,) mean out.

All accept float32 or float64 rows of any number, copy no more than a part of them at a time where their
definition allows it, and answer in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from fedrobust.kernels import Vector

Rows = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

_CHUNK = 1 << 22  # elements


def empirical_mean(X: Rows) -> Vector:
    """(d,) the mean of all (n, d) rows."""
    return _mean(X, np.ones(len(X), dtype=X.dtype))


def coordinate_median(X: Rows) -> Vector:
    """(d,) the median of every coordinate of (n, d) rows; its error grows like eps sqrt(d)."""
    width = max(_CHUNK // len(X), 1)
    # Copies of a few columns: a partition along rows that lie apart would miss the cache every time.
    parts = [
        np.median(np.ascontiguousarray(X[:, start : start + width].T), axis=1)
        for start in range(0, X.shape[1], width)
    ]
    return np.concatenate(parts).astype(np.float64)


def geometric_median(X: Rows, steps: int = 100) -> Vector:
    """(d,) the point with the smallest sum of distances from the (n, d) rows.

    By Weiszfeld's steps from the mean, at most so many, and no more once the point stands still.
    """
    point = empirical_mean(X)
    for _ in range(steps):
        distances = np.sqrt(squared_distances(X, point))
        nearest = max(float(distances.max()) * 1e-9, 1e-300)  # the point may be a row
        weights = 1 / np.maximum(distances, nearest)
        before, point = point, _mean(X, (weights / weights.mean()).astype(X.dtype))
        if np.linalg.norm(point - before) <= 1e-5 * np.linalg.norm(point):
            break
    return point


def pruned_mean(X: Rows, eps: float) -> Vector:
    """(d,) the mean of the (n, d) rows within 0.33 sqrt(d ln(n / eps)) of the coordinate-wise median.

    Naive pruning as in the code of Diakonikolas et al. 2017 (arXiv 1703.00893); unit variance. In many
    dimensions that is more than every distance of their noise; where it is less than all, it keeps all.
    """
    n, d = X.shape
    near = squared_distances(X, coordinate_median(X)) <= 0.33**2 * d * math.log(n / eps)
    return _mean(X, near.astype(X.dtype)) if near.any() else empirical_mean(X)


def ransac(X: Rows, eps: float, tau: float = 0.1, draws: int = 100, seed: int = 0) -> Vector:
    """(d,) of the means of random parts of (n, d) rows, the one with the most rows near it.

    Parts of 2 (d ln 4 + ln(2 / tau)) / eps^2 rows; near is |x - m|^2 <= d + 2 (sqrt(d ln(n / tau)) +
    ln(n / tau)) + eps^2 ln(1 / eps)^2. As in the code of Diakonikolas et al. 2017 (arXiv 1703.00893) was
    meant: what was released counts a number in the place of a row, so that any part may win.
    Unit variance. Rows that are too few for such a part are all taken, but one half.
    """
    n, d = X.shape
    size = min(math.ceil(2 * (d * math.log(4) + math.log(2 / tau)) / eps**2), n // 2)
    rng = np.random.default_rng(seed)
    # One product for the means of all parts, and one for the distances from them.
    members = np.zeros((draws, n), dtype=X.dtype)
    for row in members:
        row[rng.choice(n, size, replace=False, shuffle=False)] = 1
    means = sum(members[:, span] @ X[span] for span in _spans(X)) / size
    several = math.log(n / tau)
    reach = d + 2 * (math.sqrt(d * several) + several) + eps**2 * math.log(1 / eps) ** 2
    lengths, near = np.einsum("ij,ij->i", means, means), np.zeros(draws)
    for span in _spans(X):
        part = X[span]
        squares = np.einsum("ij,ij->i", part, part)[:, None] - 2 * part @ means.T + lengths
        near += (squares <= reach).sum(axis=0)
    best: Vector = means[int(np.argmax(near))].astype(np.float64)
    return best


def lai_rao_vempala(X: Rows, eps: float) -> Vector:
    """(d,) the mean by recursion on the half of the space in which the rows have most variance.

        drop rows outside the ball round the coordinate-wise median that holds (1 - eps)^2 of them
        the mean of what is left counts in the lower half of its covariance's eigenvectors
        the upper half of them is seen to in the same way, with all rows
        of one coordinate: the mean of the shortest interval that holds (1 - eps)^2 of the rows

    Source: Lai, Rao, Vempala 2016, "Agnostic Estimation of Mean and Covariance" (FOCS, arXiv
    1604.06968), with the constants of their code.
    """
    n, d = X.shape
    held = min(math.ceil((1 - eps) ** 2 * n), n)
    if d == 1:
        ordered = np.sort(X[:, 0])
        start = int(np.argmin(ordered[held - 1 :] - ordered[: n - held + 1]))
        return np.array([ordered[start : start + held].mean(dtype=np.float64)])
    squares = squared_distances(X, coordinate_median(X))
    near = squares <= np.partition(squares, held - 1)[held - 1]
    mean = _mean(X, near.astype(X.dtype))
    _, vectors = eigh(_covariance(X, near, mean))
    lower, upper = np.split(vectors, [d // 2], axis=1)
    above = lai_rao_vempala(X @ upper.astype(X.dtype), eps)
    return np.asarray(lower @ (lower.T @ mean) + upper @ above)


def squared_distances(X: Rows, point: Vector) -> Vector:
    """(n,) of (n, d) rows from a (d,) point."""
    found = np.empty(len(X))
    for span in _spans(X):
        seen = X[span] - point.astype(X.dtype)
        found[span] = np.einsum("ij,ij->i", seen, seen)
    return found


def _mean(X: Rows, weights: Rows) -> Vector:
    total = np.zeros(X.shape[1])
    for span in _spans(X):
        total += weights[span] @ X[span]
    return np.asarray(total / weights.sum(dtype=np.float64))


def _covariance(X: Rows, chosen: Mask, mean: Vector) -> Vector:
    total = np.zeros((X.shape[1], X.shape[1]))
    for span in _spans(X):
        seen = X[span][chosen[span]] - mean.astype(X.dtype)
        total += seen.T @ seen
    return np.asarray(total / np.count_nonzero(chosen))


def _spans(X: Rows) -> Iterator[slice]:
    """Stretches of rows that a processor's cache holds: sums of them add up in float64."""
    size = max(_CHUNK // X.shape[1], 1)
    return (slice(start, start + size) for start in range(0, len(X), size))
