"""What an operator sees of a run: a line a round and a bar, or JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from fedrobust.text import finite
from fedrobust_server.aftermath import RoundReport
from fedrobust_server.config import RunConfig


@dataclass(frozen=True)
class Terminal:
    """Prints what happens."""

    progress: Progress
    bar: TaskID
    rounds: int
    as_json: bool

    def show(self, report: RoundReport) -> None:
        """A round is over."""
        over, evaluation = report.round, report.evaluation
        verdict = None if over.verdict is None else over.verdict.value
        if self.as_json:
            figures = {
                "round": over.number,
                "outcome": over.outcome,
                "reason": over.reason,
                "accuracy": evaluation.accuracy,
                "loss": evaluation.loss,
                "accepted": over.accepted,
                "refused": over.refused,
                "verdict": verdict,
            }
            print(json.dumps(finite(figures)), flush=True)  # noqa: T201
            return
        words = verdict if over.outcome == "aggregated" else f"skipped: {over.reason}"
        self.progress.start()
        self._line(
            f"round {over.number:>3}/{self.rounds}  accuracy {evaluation.accuracy:.3f}  "
            f"accepted {over.accepted:>3}  refused {over.refused:>2}  {words}"
        )
        self.progress.advance(self.bar)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """The run is over."""
        self.progress.stop()
        if self.as_json:
            print(json.dumps(finite(figures)), flush=True)  # noqa: T201
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
