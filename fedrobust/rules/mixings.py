"""Mixings: what is done to the rows before a rule sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import Mixed, Mixing


@dataclass(frozen=True, repr=False)
class NNM(Mixing):
    """Nearest-neighbour mixing: every row becomes the mean of its n - f nearest rows, itself among them.

        x_i <- (1 / (n - f)) sum of the n - f rows that are nearest to x_i

    Guarantee: brings any standard rule to the optimal order under heterogeneous data: a rule whose
    squared error is at most kappa times the honest rows' mean squared distance has 8 f / (n - f)
    (kappa + 1) times it behind this. Needs n > 2 f; breakdown point 1/2, or the rule's. Shares stay with
    their rows and do not weigh the neighbours (the paper has no such form). No scores. Deviations: none;
    ties go to the first clients. Cost: n^2 log n after the Gram; the mixed rows are never formed.
    Source: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan 2023, "Fixing by Mixing: A Recipe for
    Optimal Byzantine ML under Heterogeneity" (arXiv 2302.01772).
    """

    name = "nnm"

    def __call__(self, gram: Gram) -> Mixed:
        """Mix each row with its neighbours."""
        require_majority(self, gram.n, gram.f)
        count = gram.n - gram.f
        nearest = np.argsort(gram.squared_distances, axis=1, kind="stable")[:, :count]
        matrix = np.zeros((gram.n, gram.n))
        np.put_along_axis(matrix, nearest, 1 / count, axis=1)
        return Mixed(matrix, gram.shares, gram.eps)


@dataclass(frozen=True, repr=False)
class Bucketing(Mixing):
    """Averages of s rows each, by a random permutation that changes with the round.

        y_k <- mean of x_p(s (k - 1) + 1), .., x_p(s k), p a random permutation of the clients

    Guarantee: honest rows that differ come out 1 / s as much, in variance, at the price of a malicious
    fraction up to s times as large: up to f buckets hold a malicious row. Breakdown point: the next
    rule's over s; refused where the f heaviest buckets hold half of the mass. Weighted by shares inside
    a bucket, which has the mass of its rows; buckets without any go. No scores. Deviations: none.
    Cost: n; the next rule needs the Gram.
    Source: Karimireddy, He, Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing" (arXiv 2006.09365).

    Attributes:
        s: rows in a bucket; the last one may hold fewer.
    """

    name = "bucketing"
    s: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.s >= 1, "s must be at least 1")

    def __call__(self, gram: Gram) -> Mixed:
        """Average the buckets."""
        order = np.random.default_rng(gram.seed).permutation(gram.n)
        buckets = math.ceil(gram.n / self.s)
        members = np.zeros((buckets, gram.n))
        members[np.arange(gram.n) // self.s, order] = gram.shares[order]
        shares = members.sum(axis=1)
        f = gram.f_with_share
        eps = float(np.sort(shares)[::-1][:f].sum())
        self.require(
            eps < 0.5,
            f"{f} malicious of {gram.n} clients could spoil {eps:.0%} of the {buckets} buckets; "
            "take fewer rows a bucket",
        )
        held = shares > 0  # a bucket of clients without share says nothing
        return Mixed(members[held] / shares[held, None], shares[held], eps)


@dataclass(frozen=True, repr=False)
class Clip(Mixing):
    """Rows longer than the radius are shortened to it: x_i min(1, c / ||x_i||).

    Lengths are measured from the reference (the broadcast model, when rows are deltas), so an
    attacker gains nothing by being long.

    Guarantee: no row moves the mean by more than its share times the radius; none on the distance by
    itself. Breakdown point: the next rule's. Weighted by shares: the default radius is by mass. No
    scores. Deviation: the default radius, where the literature has a fixed one. Cost: n log n after the
    Gram's diagonal.
    Source: static clipping, as in Karimireddy, He, Jaggi 2021 (arXiv 2012.10333) and ByzFL.

    Attributes:
        radius: c, in the updates' units; None takes the largest length that malicious rows cannot have
            raised: the smallest that rows of 1 - eps of the mass do not exceed, with equal shares the
            (n - f)-th smallest.
    """

    name = "clip"
    radius: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.radius is None or self.radius > 0, "radius must be positive")

    def __call__(self, gram: Gram) -> Mixed:
        """Shorten the long rows."""
        lengths = gram.lengths
        radius = length_of(gram, lengths, 1 - gram.eps) if self.radius is None else self.radius
        return shortened(gram, lengths, radius)


@dataclass(frozen=True, repr=False)
class ARC(Mixing):
    """Adaptive robust clipping: the longest rows are shortened to the length of the next.

        k <- floor(2 (f / n) (n - f));  x_i min(1, c / ||x_i||), c the (k + 1)-th largest length

    Guarantee: before any (f, kappa)-robust rule it keeps robustness, where a fixed radius does not, and
    no row is left longer than the honest rows are, since k >= f. Breakdown point: the next rule's.
    Lengths are measured from the reference. Weighted by shares: the radius is the smallest length that
    rows of 1 - 2 eps (1 - eps) of the mass do not exceed, which is the above where shares are equal. No
    scores. Deviations: the weighted form. Cost: n log n after the Gram's diagonal.
    Source: Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan 2024, "Adaptive Gradient Clipping for
    Robust Federated Learning" (arXiv 2405.14432).
    """

    name = "arc"

    def __call__(self, gram: Gram) -> Mixed:
        """Shorten the longest rows."""
        lengths = gram.lengths
        eps = gram.eps if np.ptp(gram.shares) > 1e-12 else gram.f / gram.n
        return shortened(gram, lengths, length_of(gram, lengths, 1 - 2 * eps * (1 - eps)))


def length_of(gram: Gram, lengths: Vector, mass: float) -> float:
    """The smallest of these (n,) lengths that rows of at least this mass do not exceed.

    With equal shares and mass 1 - f / n it is the (n - f)-th smallest. Clients without a share of the
    mass have no say in it, however many they are.
    """
    order = np.argsort(lengths, kind="stable")
    upto = np.cumsum(gram.shares[order])
    first = int(np.searchsorted(upto, mass - 1e-9))
    return float(lengths[order[min(first, gram.n - 1)]])


def median_by_mass(values: Vector, shares: Vector) -> float:
    """The median of (n,) values of rows of these (n,) shares, sum 1.

    Where two rows share the middle it is the mean of their values: with equal shares numpy's median.
    """
    order = np.argsort(values, kind="stable")
    middle = np.searchsorted(np.cumsum(shares[order]), [0.5 - 1e-9, 0.5 + 1e-9])
    return float(values[order[middle]].mean())


def shortened(gram: Gram, lengths: Vector, radius: float) -> Mixed:
    """The rows of these (n,) lengths, none longer than the radius."""
    factors = np.divide(radius, lengths, out=np.ones_like(lengths), where=lengths > radius)
    return Mixed(np.diag(factors), gram.shares, gram.eps)
