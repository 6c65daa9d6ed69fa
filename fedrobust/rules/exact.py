"""What an exact search may cost, said before it starts."""

from __future__ import annotations

_LARGEST = 1e300


def refusal(n: int, f: int, cost: float, unit: str, rate: float, budget: float) -> str:
    """Why a rule does not start a search whose worst case is beyond its budget.

    Args:
        n: clients.
        f: malicious among them.
        cost: the most of `unit` that n and f can ask for, whatever the rows are.
        unit: what is counted.
        rate: how many of them a second take, roughly.
        budget: the most that the rule would look at.
    """
    if cost > _LARGEST:  # whole numbers have no largest one, and are compared before they are rounded
        most = f"more than {_LARGEST:.0e} {unit}"
        return f"{n} clients with f = {f} may take {most}; the budget is {budget:.2g}"
    return (
        f"{n} clients with f = {f} may take {cost:.2g} {unit}, some {_duration(cost / rate)} at "
        f"{rate:.0e} a second; the budget is {budget:.2g}"
    )


def _duration(seconds: float) -> str:
    """In the largest unit of which there is more than one: 3 hours."""
    units = [("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)]
    for unit, length in units:
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} seconds"
