"""Rules that look at one coordinate at a time: simple, and a factor sqrt(d) from optimal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fedrobust.gram import most_malicious
from fedrobust.kernels import Matrix, Reducer, Vector
from fedrobust.reducers import rank_mean, sign_vote, weighted_rank_mean, window_mean
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import CoordinateWise


@dataclass(frozen=True, repr=False)
class Median(CoordinateWise):
    """The weighted median of every coordinate; the mean of the two middle values where they tie.

        value_j <- the middle of argmin_z sum_i b_i |x_ij - z|

    Guarantee: ||value - mu_S||^2 <= 4 (1 + f / (n - 2 f))^2 times the honest rows' mean squared distance
    from mu_S (Allouah et al. 2023, arXiv 2302.01772); error O(sigma sqrt(d) eps) against a coordinated
    shift of bell-shaped rows. Breakdown point 1/2; eps is not used. Weighted by shares: a share of two
    is two clients. No scores, no weights. Deviations: none. Cost: a sort of every coordinate; no Gram.
    Source: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates" (arXiv 1803.01498).
    """

    name = "median"

    def reducer(self, shares: Vector, eps: float) -> Reducer:  # noqa: ARG002 (needs no eps)
        """The middle of the shares."""
        return _by_rank(shares, _middle)


@dataclass(frozen=True, repr=False)
class TrimmedMean(CoordinateWise):
    """The mean of every coordinate after eps of the mass is cut off at each end.

        value_j <- mean of the n - 2 f values of x_1j .. x_nj without the f smallest and the f largest

    Guarantee: ||value - mu_S||^2 <= 6 f / (n - 2 f) (1 + f / (n - 2 f)) times the honest rows' mean
    squared distance from mu_S (Allouah et al. 2023, arXiv 2302.01772): O(sigma sqrt(d eps)). Breakdown
    point 1/2. Weighted by shares: exactly eps of the mass is cut at each end, through the midst of a
    client's share if need be, so that a share of two is two clients where eps n is whole; equal shares
    cut f = floor(eps n) values, as published. No scores, no weights. Deviations: the weighted form.
    Cost: a sort of every coordinate; no Gram.
    Source: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-Robust Distributed Learning: Towards
    Optimal Statistical Rates" (arXiv 1803.01498).
    """

    name = "trimmed_mean"

    def reducer(self, shares: Vector, eps: float) -> Reducer:
        """What lies between the trimmed ends."""
        return _by_rank(shares, partial(_between, trim=_trim(shares, eps)))


@dataclass(frozen=True, repr=False)
class Meamed(CoordinateWise):
    """Mean around median: of every coordinate the mean of the n - f values nearest to its median.

        value_j <- mean of the n - f values of x_1j .. x_nj that are nearest to their median

    They are neighbours in sorted order, the best window of n - f.

    Guarantee: no value that is averaged is farther outside the honest values' range than that range is
    wide; error O(sigma sqrt(d) eps) against a coordinated shift of bell-shaped rows. Needs n > 2 f;
    breakdown point 1/2. Shares only tell how many rows can be malicious (the paper has no weighted
    form). No scores, no weights. Deviations: none; of two windows that reach equally far, the lower one.
    Cost: a sort of every coordinate; no Gram.
    Source: Xie, Koyejo, Gupta 2018, "Generalized Byzantine-tolerant SGD" (arXiv 1802.10116).
    """

    name = "meamed"

    def reducer(self, shares: Vector, eps: float) -> Reducer:
        """The best window."""
        n, f = len(shares), most_malicious(shares, eps)
        require_majority(self, n, f)
        return partial(window_mean, keep=n - f)


@dataclass(frozen=True, repr=False)
class SignMajority(CoordinateWise):
    """The sign that most clients give every coordinate: +scale, -scale, or 0 where the sides tie.

        value_j = scale * sign(sum_i b_i sign(x_ij))

    What it returns is a direction of fixed length, scale * sqrt(d), not a mean of the updates: the
    server's step size must be chosen for it. Signs are those of the rows measured from the reference,
    so it is equivariant under neither shifts nor positive factors of the rows.

    Guarantee: convergence at the rate of signSGD with fewer than half of the clients malicious, under
    unimodal symmetric noise; every client moves a coordinate by 2 scale at most. Breakdown point 1/2;
    eps is not used. Weighted by shares: a share of two is two votes. No scores, no weights. Deviations:
    clients send updates rather than signs, a zero is no vote, and a majority of less than 1e-6 of the
    mass is a tie. Cost: a pass over the coordinates; no Gram.
    Source: Bernstein, Zhao, Azizzadenesheli, Anandkumar 2018, "signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant" (arXiv 1810.05291).

    Attributes:
        scale: the magnitude of every coordinate of the value, in the updates' units.
    """

    name = "sign_majority"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.scale > 0, "scale must be positive")

    def reducer(self, shares: Vector, eps: float) -> Reducer:  # noqa: ARG002 (needs no eps)
        """The vote."""
        return partial(_scaled_vote, shares=shares, scale=self.scale)


def _scaled_vote(tile: Tensor, shares: Vector, scale: float) -> Tensor:
    return scale * sign_vote(tile, shares)


def _trim(shares: Vector, eps: float) -> float:
    if _uneven(shares):
        return min(eps, 0.5 - 1e-6)
    n = len(shares)
    return float(min(np.floor(eps * n * (1 + 1e-9)), (n - 1) // 2)) / n


def _uneven(shares: Vector) -> bool:
    """Whether the shares differ by more than rounding."""
    return bool(np.ptp(shares) > 1e-12)


def _by_rank(shares: Vector, weigh: Callable[[Vector, Vector], Vector]) -> Reducer:
    """With uniform shares a run of ranks counts equally, the same one in every coordinate."""
    if _uneven(shares):
        return partial(weighted_rank_mean, shares=shares, weigh=weigh)
    upto = np.arange(1, len(shares) + 1) / len(shares)
    ranks = np.flatnonzero(weigh(upto - 1 / len(shares), upto))
    return partial(rank_mean, low=int(ranks[0]), high=int(ranks[-1]) + 1)


def _middle(below: Matrix, upto: Matrix) -> Matrix:
    """All weight on the values whose span of mass holds 1/2."""
    return ((below <= 0.5 + 1e-9) & (upto >= 0.5 - 1e-9) & (upto > below)).astype(np.float64)


def _between(below: Matrix, upto: Matrix, trim: float) -> Matrix:
    """The mass of each value that lies between the trimmed ends, of all that does."""
    mass = (np.clip(upto, trim, 1 - trim) - np.clip(below, trim, 1 - trim)) / (1 - 2 * trim)
    # Rounding must not leave a trimmed value 1e-17 of weight: its value may be 1e30.
    return np.where(mass > 1e-9, mass, 0.0)
