"""What counts of noisy predictions prove about a probability, and that about a radius."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, betaincc, betaincinv, betaln, ndtr, ndtri

Floats = npt.NDArray[np.float64]


def lower_bound(successes: npt.ArrayLike, trials: npt.ArrayLike, alpha: float) -> Floats:
    """A bound that is above the true probability with probability alpha at most.

    Exact, one-sided: Clopper, Pearson 1934; LowerConfBound of Cohen, Rosenfeld, Kolter 2019.

    Args:
        successes: k, integers 0 .. trials.
        trials: how many independent ones there were, at least 1.
        alpha: in (0, 1).

    Returns:
        float64, of the broadcast shape of both.
    """
    k, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(trials, float))
    found = betaincinv(np.maximum(k, 1), n - k + 1, alpha)
    return np.asarray(np.where(k > 0, found, 0.0), np.float64)


def radius(p: npt.ArrayLike, sigma: float) -> Floats:
    """How far no perturbation changes a class that noise leaves with probability p or more.

    sigma Phi^-1(p), in the l2 norm; 0 where p is 1/2 or less. Cohen et al. 2019, theorem 1 and section
    3.2.2, with 1 - p for the runner-up.
    """
    return np.asarray(sigma * ndtri(np.maximum(np.asarray(p, float), 0.5)), np.float64)


def needed(distance: float, sigma: float) -> float:
    """The probability whose `radius` is this distance."""
    return float(ndtr(distance / sigma))


def undecided(first: npt.ArrayLike, second: npt.ArrayLike, alpha: float) -> npt.NDArray[np.bool_]:
    """Whether counts of the two top classes may well be those of a tie.

    The two-sided binomial test of PREDICT (Cohen et al. 2019, section 3.2.1): True where its p-value is
    above alpha. The first count is the larger one.
    """
    first, total = np.asarray(first), np.asarray(first) + np.asarray(second)
    tail = bdtrc(first - 1, total, 0.5)  # of a count as large as the larger one
    return np.asarray(np.minimum(2 * tail, 1.0) > alpha)


def evidence_above(successes: npt.ArrayLike, trials: npt.ArrayLike, p: float) -> Floats:
    """The natural logarithm of the evidence that a probability is above p, at any moment of counting.

    Under every probability of p or less, exp of it is a supermartingale that starts at 1, so that it
    ever reaches 1 / alpha with probability alpha at most (Ville 1939), however often and whenever one
    looks: the likelihood ratio against p, averaged over the uniform distribution on (p, 1], the mixture
    of Robbins 1970.

    Args:
        successes: k so far.
        trials: n so far.
        p: in (0, 1).

    Returns:
        float64, of the broadcast shape; -inf where the counts speak clearly against it.
    """
    k, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(trials, float))
    mass = betaincc(k + 1, n - k + 1, p)
    with np.errstate(divide="ignore"):
        # Near the end of float64's range digits are lost; no evidence is always safe.
        mass = np.log(np.where(mass > 1e-290, mass, 0.0))
    mixed = betaln(k + 1, n - k + 1) + mass - np.log1p(-p)
    return np.asarray(mixed - k * np.log(p) - (n - k) * np.log1p(-p), np.float64)


def evidence_below(successes: npt.ArrayLike, trials: npt.ArrayLike, p: float) -> Floats:
    """As `evidence_above`, that the probability is below p."""
    k, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(trials, float))
    return evidence_above(n - k, n, 1 - p)


__all__ = ["evidence_above", "evidence_below", "lower_bound", "needed", "radius", "undecided"]
