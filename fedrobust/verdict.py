"""Does anything stand out? The round judged against its own bulk, whatever the rule.

f malicious rows change the honest covariance by at most rank f + 1, so by interlacing lambda_{f+2} of
the raw round lies between the honest rows' (f + 2)-th eigenvalue and their first: an attacker can
neither raise it above the honest spread nor lower it below the honest bulk. Honest federations show a
factor of 2 to 4 between this eigenvalue and the first, seldom more (docs/rules.md); hence two levels:
from `VISIBLE` times on it pays to remove something, from `ALARMING` times on somebody should look.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector

VISIBLE = 3.0
ALARMING = 6.0


class Verdict(StrEnum):
    """What is said of the round as a whole."""

    NOT_JUDGED = "not judged"
    """The rule gives no weights, or there are too few clients to tell."""
    CLEAR = "no visible attack"
    """Nothing stands out against the bulk of the updates as they came."""
    REMOVED = "outliers removed"
    """Something stood out, and with the rule's weights nothing does any more to an alarming degree."""
    EXCEEDED = "bound exceeded"
    """Something stands out even so: more than eps may be malicious, or the rule is too weak."""


@dataclass(frozen=True)
class Levels:
    """From where on an eigenvalue stands out.

    Attributes:
        visible: until eps of the mass is gone.
        alarming: from then on: what is left should be honest, and honest clients differ.
    """

    visible: float
    alarming: float


def bulk_edge(values: Vector, f: int) -> float | None:
    """The largest eigenvalue that the honest bulk vouches for, lambda_{f+2}.

    Args:
        values: the eigenvalues of the weighted covariance, largest first.
        f: how many of the rows that carry weight may be malicious.

    Returns:
        None if it cannot be read off: beside a row of norm 1e30 the bulk is nothing but rounding, and
        fewer than f + 2 directions leave no bulk.
    """
    rank = max(f, 0) + 1
    edge = float(values[rank]) if rank < len(values) else 0.0
    return edge if edge > 1e-9 * values[0] else None


def judge(gram: Gram, weights: Vector, kept: Vector) -> Verdict:
    """The verdict on a round, beside what a rule made of it.

    Args:
        gram: the n rows as the clients sent them.
        weights: (n,) that the rule gave them.
        kept: eigenvalues of the covariance of what the value is a mean of, largest first.
    """
    raw, rows, f = gram.raw_eigenvalues, int(np.count_nonzero(gram.shares)), gram.f_with_share
    if raw[0] <= gram.rounding(gram.shares):  # all alike
        return Verdict.CLEAR
    if rows < f + 3 or not has_bulk(gram, gram.shares):
        return Verdict.NOT_JUDGED
    edge = _edge(gram, gram.shares, raw)
    if edge is not None and raw[0] <= ALARMING * edge:
        return Verdict.CLEAR
    if edge is None:
        edge = _edge(gram, weights, kept)
    return Verdict.REMOVED if kept[0] <= ALARMING * (edge or 0.0) else Verdict.EXCEEDED


def read_levels(gram: Gram, weights: Vector, values: Vector, factor: float = VISIBLE) -> Levels | None:
    """The levels that the bulk gives; None if there is none, or none that can be read.

    Args:
        gram: of all rows.
        weights: (n,) sum 1.
        values: the largest of the eigenvalues that belong to them.
        factor: how far above the bulk's edge something is visible.
    """
    if not has_bulk(gram, weights) or _hides(gram, weights, float(values[0])):
        return None
    if len(values) < gram.size(weights):
        raw = np.array_equal(weights, gram.shares)
        values = gram.raw_eigenvalues if raw else gram.eigenvalues(weights)
    edge = _edge(gram, weights, values)
    if edge is None or edge <= gram.rounding(weights, _left(gram, weights) + 1):
        return None
    return Levels(factor * edge, factor * edge * ALARMING / VISIBLE)


def has_bulk(gram: Gram, weights: Vector) -> bool:
    """Whether there are more directions than those that malicious rows can stretch."""
    return _left(gram, weights) + 2 <= gram.size(weights)


def _edge(gram: Gram, weights: Vector, values: Vector) -> float | None:
    """The largest eigenvalue that the honest bulk vouches for under these weights.

    With more coordinates than rows, an honest row stretches the covariance by what it weighs: of unequal
    shares the spectrum tells the shares. So the bulk is read off the rows as if their shares were equal,
    and counts as much as the row that has the largest.

    Args:
        gram: of all rows.
        weights: (n,) of them; a negative one counts for none.
        values: the eigenvalues that belong to them.
    """
    shares, f = gram.shares[gram.shares > 0], _left(gram, weights)
    if np.ptp(shares) <= 1e-9 * shares.max():
        return bulk_edge(values, f)
    kept = np.divide(weights, gram.shares, out=np.zeros_like(weights), where=gram.shares > 0)
    kept = np.maximum(kept, 0.0)
    if not kept.any():
        return None
    edge = bulk_edge(gram.eigenvalues(kept / kept.sum()), f)
    return None if edge is None else edge * float(kept.sum() * gram.shares[kept > 0].max())


def _left(gram: Gram, weights: Vector) -> int:
    """How many of the rows that carry weight may still be malicious."""
    gone = int(np.count_nonzero(gram.shares) - np.count_nonzero(weights))
    return max(gram.f_with_share - gone, 0)


def _hides(gram: Gram, weights: Vector, top: float) -> bool:
    """Whether the bulk certainly cannot be read beside the largest rows, which spares looking for it.

    Without its f largest terms, sum_i w_i |x_i|^2 is no less than the (f + 2)-th eigenvalue.
    """
    terms = np.sort(weights * gram.squared_norms)
    return bool(terms[: gram.n - gram.f_with_share].sum() < 1e-9 * top)
