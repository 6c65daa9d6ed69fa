"""What becomes of one coordinate of k rows: functions of a (k, c) tile, measured from the reference.

numpy sorts along contiguous memory several times faster than torch does, so tiles are transposed and
sorted in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from fedrobust.kernels import Matrix, Vector


def rank_mean(tile: Tensor, low: int, high: int) -> Tensor:
    """(c,) means of the values of ranks low .. high - 1 in each column, the smallest of rank 0."""
    return _means(_sorted(tile)[:, low:high], tile)


def window_mean(tile: Tensor, keep: int) -> Tensor:
    """(c,) means of the `keep` values of each column that are nearest to its median.

    They are neighbours in sorted order: from the lowest `keep` on, the lowest value is given up for the
    next higher one as long as that is nearer.
    """
    columns = _sorted(tile)
    c, k = columns.shape
    median = columns[:, (k - 1) // 2 : k // 2 + 1].mean(axis=1, dtype=np.float64, keepdims=True)
    start = (median - columns[:, : k - keep] > columns[:, keep:] - median).sum(axis=1)
    kept = sliding_window_view(columns, keep, axis=1)[np.arange(c), start]
    return _means(kept, tile)


def sign_vote(tile: Tensor, shares: Vector) -> Tensor:
    """(c,) sign of the sum of the signs of each column, by mass; 0 where the two sides tie."""
    vote = torch.from_numpy(shares).to(tile) @ torch.sign(tile)
    return torch.where(vote.abs() > 1e-6, torch.sign(vote), torch.zeros_like(vote))


def weighted_rank_mean(
    tile: Tensor, shares: Vector, weigh: Callable[[Matrix, Matrix], Matrix]
) -> Tensor:
    """(c,) sums of the sorted values of each column by weights that depend on the mass below each.

    Args:
        tile: (k, c).
        shares: (k,) mass of each row, sum 1.
        weigh: maps mass strictly below and mass up to each value, (c, k) each, to weights (c, k).
    """
    columns = tile.T.cpu().numpy()
    order = np.argsort(columns, axis=1, kind="stable")
    mass = shares[order]
    upto = np.cumsum(mass, axis=1)
    weights = weigh(upto - mass, upto)
    values = np.take_along_axis(columns, order, axis=1)
    # A weight of zero must not meet a huge value: 0 * 1e38 is harmless, 1e-17 * 1e38 is not.
    weights = np.where(weights > 1e-9, weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy((values * weights).sum(axis=1)).to(tile.device)


def _sorted(tile: Tensor) -> npt.NDArray[Any]:
    """(c, k) the columns of a tile, each in ascending order."""
    columns = np.array(tile.cpu().numpy().T, order="C")  # a copy: the tile may be the caller's rows
    columns.sort(axis=1)
    return columns


def _means(values: npt.NDArray[Any], tile: Tensor) -> Tensor:
    """(c,) means of the rows of (c, m) values."""
    # Divided before they are added: the sum of huge values may be no float32. einsum is several times
    # faster than mean along short rows, and starts no threads, as a matrix product would.
    parts = np.full(values.shape[1], 1 / values.shape[1], dtype=values.dtype)
    return torch.from_numpy(np.einsum("ij,j->i", values, parts)).to(tile.device)
