"""What rules that cluster the rows' directions have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix
from fedrobust.rules.rule import Mixed, weigh

DIGITS = 6
"""Decimals of a cosine distance: beyond them those of float32 rows are rounding, and make no order."""


def cosine_distances(gram: Gram) -> Matrix:
    """(n, n) 1 - cosine, from 0 to 2, rounded; rows of zeros are alike, and 1 from all others."""
    distances = gram.cosines
    np.maximum(np.subtract(1, distances, out=distances), 0.0, out=distances)
    np.round(distances, DIGITS, out=distances)
    zero = gram.lengths == 0
    distances[np.ix_(zero, zero)] = 0.0
    return distances


def mean_of(gram: Gram, distances: Matrix, admitted: npt.NDArray[np.bool_]) -> Mixed:
    """The mean of the (n,) admitted rows by their shares, of all by theirs if those have none.

    Scores are the (n, n) distances to the closest admitted row, 0 for those admitted.
    """
    scores = np.where(admitted, 0.0, distances.min(axis=1, where=admitted, initial=np.inf))
    weights = np.where(admitted, gram.shares, 0.0)
    return weigh(weights / weights.sum() if weights.any() else gram.shares, scores)
