"""What the pages say in words and figures: headline, tables of rounds, refusals and runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from fedrobust_server.config import RunConfig
from fedrobust_server.plots import Grid, unbounded

Rows = Sequence[Mapping[str, Any]]

_FIRST, _LAST, _REFUSALS = 15, 25, 100
"""How many rounds a table shows from either end, and how many kinds of refusal."""
_NONE = "none"


@dataclass(frozen=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    note: str


def cards(config: RunConfig, summary: Mapping[str, Any], finished: Rows) -> list[Card]:
    """The headline figures.

    Args:
        config: of the run.
        summary: as `summarise` gives it.
        finished: the ledger's rounds that are over.
    """
    done = f"{len(finished)} of {config.rounds} rounds are over"
    skipped, refused = summary["rounds_skipped"], summary["updates_refused"]
    kept, free = _bounds(summary, finished)
    spread = f"if the honest clients spread as those kept; {free} without assumptions"
    found = [
        Card("Final accuracy", _share(summary["accuracy"]), "on the test examples"),
        Card("Rounds aggregated", str(summary["rounds_aggregated"]), f"{skipped} skipped; {done}"),
        Card("Updates accepted", str(summary["updates_accepted"]), f"{refused} refused"),
        Card("Last verdict", summary["verdict"] or _NONE, "on the last aggregated round"),
        Card("Last certificate", kept, "there is none without weights" if kept == _NONE else spread),
    ]
    if config.malicious:
        count, clients = config.malicious, config.task.clients
        share = f"{count} of {clients} clients; an equal share would be {_share(count / clients)}"
        weight = _share(summary["malicious_weight"])
        found.insert(1, Card("Malicious clients' final weight", weight, share))
    return found


def span(finished: Rows) -> str:
    """When the rounds took place, in words; empty if there are none."""
    if not finished:
        return ""
    first, last = finished[0]["opened"], finished[-1]["closed"]
    begun = datetime.fromtimestamp(first, UTC)
    took = timedelta(seconds=max(round(last - first), 0))
    return f"Begun {begun:%Y-%m-%d %H:%M} UTC; took {took}."


def round_table(rounds: Rows, answers: Rows, grid: Grid) -> tuple[list[dict[str, Any] | None], int]:
    """Rows of the table of rounds, with a None where rounds are left out; and how many are."""
    accepted, refused = Counter[int](), Counter[int]()
    for answer in answers:
        counts = accepted if answer["status"] == "ACCEPTED" else refused
        counts[answer["round"]] += answer["times"]
    malicious = _malicious_weights(grid)
    table: list[dict[str, Any] | None] = [
        {
            "round": row["round"],
            "outcome": row["outcome"] or "open",
            "reason": row["reason"] or "",
            "verdict": row["verdict"] or _NONE,
            "accepted": accepted[row["round"]],
            "refused": refused[row["round"]],
            "accuracy": _share(row["accuracy"]),
            "malicious": _share(malicious.get(row["round"])),
        }
        for row in rounds
    ]
    hidden = max(len(table) - _FIRST - _LAST, 0)
    if hidden:
        table[_FIRST:-_LAST] = [None]
    return table, hidden


def refusal_table(answers: Rows, malicious: AbstractSet[str]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the table of refusals, by client and status; and how many kinds are left out."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for answer in answers:
        if answer["status"] != "ACCEPTED":
            groups[answer["client"], answer["status"]].append(answer)
    ranked = sorted(groups.items(), key=lambda item: (-_times(item[1]), item[0]))
    table = [
        {
            "client": _short(client, 80),
            "malicious": client in malicious,
            "status": status.replace("_", " ").lower(),
            "times": _times(group),
            "rounds": _range([answer["round"] for answer in group]),
            "reason": _short(group[-1]["reason"], 300),
        }
        for (client, status), group in ranked[:_REFUSALS]
    ]
    return table, max(len(ranked) - _REFUSALS, 0)


def _times(answers: Rows) -> int:
    return sum(answer["times"] for answer in answers)


def compared(config: RunConfig, summary: Mapping[str, Any], finished: Rows) -> dict[str, Any]:
    """A run's row in a comparison; arguments as for `cards`."""
    kept, free = _bounds(summary, finished)
    return {
        "rule": config.rule,
        "attack": summary["attack"],
        "malicious": f"{config.malicious} of {config.task.clients}",
        "accuracy": _share(summary["accuracy"]),
        "weight": _share(summary["malicious_weight"]),
        "certificate": kept if kept == free else f"{kept} ({free})",
    }


def _bounds(summary: Mapping[str, Any], finished: Rows) -> tuple[str, str]:
    """The last aggregated round's certificate: under the assumption on the spread, and without."""
    last = next((row for row in reversed(finished) if row["outcome"] == "aggregated"), None)
    if last is not None and unbounded(last):
        return "unbounded", "unbounded"
    return _figure(summary["certificate"]), _figure(summary["certificate_without_assumption"])


def _malicious_weights(grid: Grid) -> dict[int, float]:
    """What the malicious clients together had, in each round that has weights."""
    return {
        number: float(np.nansum(weights[: grid.malicious]))
        for number, weights in zip(grid.rounds, grid.weight.T, strict=True)
        if np.isfinite(weights).any()
    }


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _figure(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"


def _range(rounds: Sequence[int]) -> str:
    first, last = min(rounds), max(rounds)
    return str(first) if first == last else f"{first} to {last}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
