"""What an operator sees of a run: a line a round and a bar, or JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from fedrobust.text import printable
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import RoundReport

ROUND_COLUMNS: Sequence[str] = (
    "round",
    "outcome",
    "asked",
    "accepted",
    "refused",
    "verdict",
    "certificate",
    "accuracy",
    "reason",
)
EVENT_COLUMNS: Sequence[str] = ("at", "round", "what")
CLIENT_COLUMNS: Sequence[str] = (
    "client",
    "state",
    "until",
    "suspicion",
    "strikes",
    "accepted",
    "refused",
)


@dataclass(frozen=True)
class Terminal:
    """Prints what happens."""

    progress: Progress
    bar: TaskID
    rounds: int
    as_json: bool

    def show(self, report: RoundReport) -> None:
        """A round is over."""
        verdict = None if report.aggregated is None else report.aggregated.verdict.value
        if self.as_json:
            figures = {
                "round": report.round,
                "outcome": report.outcome,
                "reason": report.reason,
                "accuracy": report.evaluation.accuracy,
                "loss": report.evaluation.loss,
                "accepted": report.accepted,
                "refused": report.refused,
                "verdict": verdict,
            }
            print(json.dumps(figures), flush=True)  # noqa: T201
            return
        words = verdict if report.outcome == "aggregated" else f"skipped: {report.reason}"
        self.progress.start()
        self._line(
            f"round {report.round:>3}/{self.rounds}  accuracy {report.evaluation.accuracy:.3f}  "
            f"accepted {report.accepted:>3}  refused {report.refused:>2}  {words}"
        )
        self.progress.advance(self.bar)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """The run is over."""
        self.progress.stop()
        if self.as_json:
            print(json.dumps(dict(figures)), flush=True)  # noqa: T201
            return
        for name, value in figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else value
            self._line(f"{name.replace('_', ' '):<30} {shown}")

    def _line(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def terminal(config: RunConfig, *, as_json: bool) -> Iterator[Terminal]:
    """Show this run's progress until the context ends."""
    columns = ("rounds", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, transient=True, disable=as_json)
    bar = progress.add_task("rounds", total=config.rounds)
    try:
        yield Terminal(progress, bar, config.rounds, as_json)  # the bar appears with the first round
    finally:
        if progress.live.is_started:
            progress.stop()


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text under a header; what clients wrote cannot move the cursor.

    Args:
        rows: columns by name; `at` is in seconds since 1970.
        columns: which ones to show, in this order.
    """
    header = [name.replace("_", " ") for name in columns]
    cells = (
        [_moment(row[name]) if name == "at" else shown(row[name]) for name in columns] for row in rows
    )
    lines = [header, *cells]
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
    answers = ("round", "verdict", "status", "weight", "equal_share", "score", "norm", "evidence")
    for title, columns in (
        ("answers", (*answers, "suspicion", "state", "reason")),
        ("changes", ("round", "evidence", "suspicion", "state", "until")),
        ("decisions", ("at", "action", "who", "applied", "reason")),
    ):
        if dossier[title]:
            parts.append(f"{title}\n{table(dossier[title], columns)}")
    return "\n\n".join(parts)


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
