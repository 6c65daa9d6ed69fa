"""A ledger's rows as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fedrobust.text import printable

_COUNTS = ("accepted", "refused")
ROUND_COLUMNS: Sequence[str] = (
    *("round", "outcome", "asked", *_COUNTS),
    *("verdict", "certificate", "accuracy", "reason"),
)
CLIENT_COLUMNS: Sequence[str] = ("client", "state", "until", "suspicion", "strikes", *_COUNTS)
EVENT_COLUMNS: Sequence[str] = ("at", "round", "what")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text under a header; what clients wrote cannot move the cursor.

    Args:
        rows: columns by name; `at` is in seconds since 1970.
        columns: which ones to show, in this order.
    """
    header = [name.replace("_", " ") for name in columns]
    lines = [header, *(_cells(row, columns) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def shown(value: object) -> str:
    """One value for people: a dash for none, four digits for a float."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def described(dossier: Mapping[str, Any]) -> str:
    """What the ledger holds about one client, as text; `fedrobust_server.dossier` makes it."""
    until = f" until round {dossier['until']}" if dossier["until"] else ""
    facts = {
        "client": dossier["client"],
        "asked": f"in {dossier['asked']} rounds",
        "standing": f"{dossier['state']}{until}; excluded {dossier['strikes']} times",
        "suspicion": dossier["suspicion"],
        "excluded": dossier["why"] or None,
    }
    parts = [
        "\n".join(f"{name:<10} {shown(value)}" for name, value in facts.items() if value is not None)
    ]
    answers = (
        "round",
        "verdict",
        "status",
        "times",
        "weight",
        "equal_share",
        "score",
        "norm",
        "evidence",
    )
    for title, columns in (
        ("answers", (*answers, "suspicion", "state", "reason")),
        ("changes", ("round", "evidence", "suspicion", "state", "until")),
        ("decisions", ("at", "action", "who", "applied", "reason")),
    ):
        if dossier[title]:
            parts.append(f"{title}\n{table(dossier[title], columns)}")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    return [_moment(row[name]) if name == "at" else shown(row[name]) for name in columns]


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
