"""The malicious fraction: named by somebody, or estimated from the round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedrobust.errors import InputError
from fedrobust.gram import Gram
from fedrobust.rules.filter import Filter
from fedrobust.verdict import VISIBLE

DEFAULT_EPS = 0.2
"""The malicious fraction assumed where neither the rule nor the caller names one."""
AUTO = "auto"
"""The malicious fraction is to be estimated."""
_MOST = 0.499
_STANDS_OUT = 40.0
"""Honest rounds show up to 35 between their first eigenvalue and the middle one (docs/rules.md)."""


def assume(gram: Gram, *named: Any) -> Gram:  # noqa: ANN401 (what it is is looked at here)
    """The same rows, with the malicious mass that is named.

    Args:
        gram: the n rows.
        named: who comes first decides; None leaves it to the next, and all of them to 0.2.

    Raises:
        InputError: it is neither in [0, 0.5) nor "auto".
    """
    eps = next((name for name in named if name is not None), DEFAULT_EPS)
    check_eps(eps)
    return gram.assuming(estimate_eps(gram) if eps == AUTO else float(eps))


def check_eps(eps: Any) -> None:  # noqa: ANN401 (as above)
    """Raises InputError: it is neither in [0, 0.5) nor "auto"."""
    number = isinstance(eps, int | float | np.floating | np.integer) and not isinstance(eps, bool)
    if not (0 <= float(eps) < 0.5 if number else isinstance(eps, str) and eps == AUTO):
        raise InputError(f"eps must be in [0, 0.5), the malicious fraction, or 'auto'; got {eps!r}")


def at_least(fraction: float, number: int) -> int:
    """So many make a fraction of a number: 7 make 0.07 of 100, though that product is a bit more."""
    return math.ceil(fraction * number * (1 - 1e-12))


def estimate_eps(gram: Gram) -> float:
    """The mass that has to go until nothing stands out against the middle of the spectrum.

    Fewer than half of the rows are malicious, so they cannot move the eigenvalue of rank n / 2 beyond
    the honest spread; what stands out forty times above it is filtered. The mass that this takes is the
    estimate, rows that lose more than half of their weight counted as wholes: soft removal leaves each a
    little, and a rule that counts rows would take one malicious row for honest. An attack that does not
    stand out is not counted: the filter would let it pass with eps known, but a certificate for the
    estimate does not cover it.

    Where copies of rows leave no spectrum to read, which an attacker can bring about, half are assumed.

    Source: ours; the third regime of the filter, with neither sigma nor eps known.

    Raises:
        InputError: rows differ, but there are too few of them or of coordinates to read a spectrum off.
    """
    half = gram.assuming(_MOST)
    notes = Filter()(half).notes
    threshold = notes["threshold"]
    if threshold == 0:
        if notes["top_eigenvalue"] <= gram.rounding(gram.shares):  # rows that are all alike
            return 0.0
        if gram.n >= 4 and (gram.width is None or gram.width >= half.f + 2):
            return _MOST
        raise InputError(
            f"eps cannot be estimated: {gram.n} rows have {gram.size(gram.shares)} eigenvalues, too few "
            "to find what is usual among them; name the malicious fraction"
        )
    kept = Filter().down_to(half, threshold * _STANDS_OUT / VISIBLE)
    gone = float(gram.shares[kept.matrix[0] < 0.5 * gram.shares].sum())
    return min(max(kept.notes["removed"], gone) * (1 + 1e-6), _MOST)
