"""What robust covariance is held against: numpy functions, rows in, covariance out; the mean is 0."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import chi2

from fedrobust.kernels import Matrix, Vector
from fedrobust.reproductions import rivals as means


def second_moment(rows: Matrix) -> Matrix:
    """(d, d) float64, x x^T on average over (n, d) rows."""
    return np.asarray(rows.T @ rows / len(rows))


def distances(rows: Matrix, covariance: Matrix) -> Vector:
    """(n,) float64, x^T C^-1 x of (n, d) rows by a (d, d) covariance of full rank."""
    return np.asarray(np.einsum("ij,ij->i", rows, np.linalg.solve(covariance, rows.T).T))


def pruned(rows: Matrix, tau: float = 0.1) -> Matrix:
    """(d, d) float64: second moment without the rows that are far by it, until none is.

    Far is beyond 0.2 d log(n / tau). Source: the rival "Prune" of Diakonikolas et al. 2017 (arXiv
    1703.00893), constants as in the authors' program.

    Args:
        rows: (n, d) float64, of full rank.
        tau: the probability of failure that the threshold allows.
    """
    while True:
        n, d = rows.shape
        moment = second_moment(rows)
        near = distances(rows, moment) <= 0.2 * d * math.log(n / tau)
        if near.all() or near.sum() <= d:
            return moment
        rows = rows[near]


def ransac(
    rows: Matrix, eps: float, rng: np.random.Generator, *, draws: int = 1000, as_released: bool = False
) -> Matrix:
    """(d, d) float64: the ellipsoid of the smallest volume about 1 - eps of a random sample.

    Samples are ceil(d / eps) rows, drawn with replacement; a sample's second moment is scaled to hold
    1 - eps of the sample. Source: the rival "RANSAC" of Diakonikolas et al. 2017 (arXiv 1703.00893),
    after the minimum-volume ellipsoid of Rousseeuw 1985. In their program the smallest volume is never
    stored, so that the last sample wins, whatever its volume: `as_released` does that.

    Args:
        rows: (n, d) float64.
        eps: the part that may be arbitrary.
        rng: draws the samples.
        draws: how many samples.
        as_released: take the last sample.
    """
    d = rows.shape[1]
    size = math.ceil(d / eps)
    best, smallest = np.eye(d), math.inf
    for _ in range(1 if as_released else draws):
        sample = rows[rng.integers(len(rows), size=size)]
        moment = second_moment(sample)
        factor = np.sort(distances(sample, moment))[size - math.floor(eps * size) - 1]
        volume = float(np.linalg.slogdet(moment)[1]) + d * math.log(factor)
        if volume < smallest:
            best, smallest = factor * moment, volume
    return np.asarray(best / chi2.ppf(1 - eps, d))


def lai_rao_vempala(rows: Matrix, eta: float) -> Matrix:
    """(d, d) float64: `rivals.lai_rao_vempala`, the agnostic mean, of x x^T.

    Source: Lai, Rao, Vempala, "Agnostic Estimation of Mean and Covariance", FOCS 2016 (arXiv
    1604.06968), for bounded fourth moments; fractions as in the authors' program. Deviation: it works on
    the d (d + 1) / 2 coordinates of symmetric matrices, not on d^2 of which half are repeated, so its
    first halving is of these. Takes n d^2 / 2 numbers and O(d^6): for d up to about 60.

    Args:
        rows: (n, d) float64.
        eta: the part that may be arbitrary.
    """
    d = rows.shape[1]
    i, j = np.triu_indices(d)
    scale = np.where(i == j, 1.0, math.sqrt(2))  # so that distances are those of whole matrices
    found = means.lai_rao_vempala(rows[:, i] * rows[:, j] * scale, eta) / scale
    covariance = np.zeros((d, d))
    covariance[i, j] = covariance[j, i] = found
    return covariance
