"""What rules that count rows need of shares."""

from __future__ import annotations

from fedrobust.rules.rule import Rule


def require_majority(rule: Rule, n: int, f: int) -> None:
    """Refuse a round in which as many rows may be malicious as not.

    With equal shares it cannot be. With others it can: any number of clients may together have next to
    no share, and a rule that counts rows would let them decide.

    Raises:
        InputError: n <= 2 f.
    """
    rule.require(
        n > 2 * f,
        f"needs at least 2 f + 1 = {2 * f + 1} clients for f = {f} malicious ones, got {n}: it counts "
        "clients, whatever their shares",
    )
