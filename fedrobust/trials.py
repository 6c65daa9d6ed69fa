"""Trials: settings tried with several seeds, kept line by line as they end, and summed up over seeds."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedrobust.errors import InputError

Group = TypeVar("Group", bound=Hashable)
Setting = Mapping[str, Any]
"""One point of a grid: what JSON can hold."""
_BEGIN = b'{"setting": '
"""How a trial's line begins."""


@dataclass(frozen=True)
class Trial:
    """One setting, run once.

    Attributes:
        setting: what was tried.
        seed: of everything random in it.
        figures: what was measured, by name.
        seconds: how long it took.
        version: of fedrobust that ran it; "" if that was not kept.
    """

    setting: Setting
    seed: int
    figures: Mapping[str, float]
    seconds: float
    version: str = ""

    @property
    def key(self) -> str:
        """The same for the same setting and seed."""
        return json.dumps([dict(self.setting), self.seed], sort_keys=True)


def begun(path: Path, version: str) -> dict[str, Trial]:
    """The trials that a file holds, by their keys, to go on with; cuts off a line that a crash left.

    Args:
        path: of the file; there may be none.
        version: of fedrobust that goes on.

    Raises:
        InputError: it holds something else, or trials that another version ran.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    *whole, cut = data.split(b"\n")
    try:
        trials = [Trial(**json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold trials ({error}); move it away") from None
    if not (cut.startswith(_BEGIN) or _BEGIN.startswith(cut)):
        raise InputError(f"{path} does not hold trials: it ends in {cut[:40]!r}; move it away")
    if others := {trial.version for trial in trials} - {version}:
        versions = ", ".join(other or "of an unknown version" for other in sorted(others))
        raise InputError(
            f"{path} holds trials of fedrobust {versions}, and this is {version}: "
            "move the folder away, or give another one with --to"
        )
    if cut:
        os.truncate(path, len(data) - len(cut))  # what is whole is not written again
    return {trial.key: trial for trial in trials}


@dataclass(frozen=True)
class Summary:
    """Several seeds' figures.

    Attributes:
        mean: of those that are finite.
        spread: their standard deviation.
        count: how many they are.
        lost: how many are not finite.
    """

    mean: float
    spread: float
    count: int
    lost: int = 0

    def __str__(self) -> str:
        """As a table shows it; one value has no spread."""
        if not self.count:
            return self.share.lstrip()
        return f"{self.mean:.3g}" + (f" ± {self.spread:.2g}" if self.count > 1 else "") + self.share

    @property
    def share(self) -> str:
        """What stands behind the mean where it is not of all: " (2 of 3 finite)"."""
        return f" ({self.count} of {self.count + self.lost} finite)" if self.lost else ""


def summary(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation of what is finite, and how much is not."""
    every = list(values)
    finite = [value for value in every if math.isfinite(value)]
    lost = len(every) - len(finite)
    if not finite:
        return Summary(math.nan, math.nan, 0, lost)
    spread = float(np.std(finite, ddof=1)) if len(set(finite)) > 1 else 0.0
    return Summary(float(np.mean(finite)), spread, len(finite), lost)


def grouped(
    trials: Iterable[Trial], by: Callable[[Setting], Group], figure: str
) -> dict[Group, Summary]:
    """One figure over the seeds of each group of settings, in the order of the trials."""
    groups: dict[Group, list[float]] = defaultdict(list)
    for trial in trials:
        if figure in trial.figures:
            groups[by(trial.setting)].append(trial.figures[figure])
    return {group: summary(values) for group, values in groups.items()}


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; everything but the first column is right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    cells = ([str(cell).replace("|", "\\|") for cell in row] for row in [header, rule, *rows])
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
