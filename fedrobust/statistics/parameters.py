"""Parameters of estimators, kept as they are given, as scikit-learn wants it, until there are data."""

from __future__ import annotations

import math
from numbers import Integral


def number(value: object) -> float:
    """NaN, which no range holds, for what is none; text is none.

    >>> number(1), number("1"), number(None)
    (1.0, nan, nan)
    """
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]  # that is what is tried
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_integer(value: object) -> bool:
    """Whether this is an integer, of Python or numpy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)
