"""What every reproduction is: trials that are kept as they end, then a page with tables and a figure."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedrobust.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Group = TypeVar("Group", bound=Hashable)
Setting = Mapping[str, Any]
"""One point of an experiment's grid: what JSON can hold."""


@dataclass(frozen=True)
class Trial:
    """One setting, run once.

    Attributes:
        setting: what was tried.
        seed: of everything random in it.
        figures: what was measured, by name.
        seconds: how long it took.
    """

    setting: Setting
    seed: int
    figures: Mapping[str, float]
    seconds: float

    @property
    def key(self) -> str:
        """The same for the same setting and seed."""
        return json.dumps([dict(self.setting), self.seed], sort_keys=True)


@dataclass(frozen=True)
class Experiment:
    """A published experiment.

    Attributes:
        title: what it is, and where it was published.
        settings: of the full form, or of the quick one, which takes two minutes at most.
        trial: measures one setting with one seed; the last argument is the data directory. Raises
            `InputError` if the data is not there.
        tables: Markdown of what the trials show, beside what was published.
        draw: the figure of the same; the last argument is the data directory.
        seeds: how many of the full form, and of the quick one.
    """

    title: str
    settings: Callable[[bool], Sequence[Setting]]
    trial: Callable[[Setting, int, Path | None], Mapping[str, float]]
    tables: Callable[[Sequence[Trial]], str]
    draw: Callable[[Sequence[Trial], Path | None], Figure]
    seeds: tuple[int, int] = (5, 1)

    def plan(self, *, quick: bool = False, seeds: int | None = None) -> list[Trial]:
        """The trials to be run, nothing measured yet.

        Args:
            quick: the quick form.
            seeds: 0 to seeds - 1 for every setting; None is the form's own number.
        """
        repeats = range(self.seeds[quick] if seeds is None else seeds)
        return [Trial(setting, seed, {}, 0.0) for setting in self.settings(quick) for seed in repeats]

    def run(
        self,
        plan: Sequence[Trial],
        folder: Path,
        data_dir: Path | None = None,
        watch: Callable[[str], None] = lambda _next: None,
    ) -> list[Trial]:
        """Run all trials but those that the folder has already; one that was cut short goes on.

        Args:
            plan: of `plan`.
            folder: keeps `trials.jsonl`, a line a trial, and then `README.md` and `figure.png`.
            data_dir: where datasets are; None reads FEDROBUST_DATA.
            watch: is told what comes next.

        Raises:
            InputError: the data is not there, or `trials.jsonl` holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "trials.jsonl"
        kept = {trial.key: trial for trial in read(path)}
        done: list[Trial] = []
        with path.open("a") as file:
            for planned in plan:
                watch(", ".join(map(str, planned.setting.values())))
                trial = kept.get(planned.key)
                if trial is None:
                    began = time.perf_counter()
                    figures = self.trial(planned.setting, planned.seed, data_dir)
                    seconds = time.perf_counter() - began
                    trial = Trial(planned.setting, planned.seed, figures, seconds)
                    file.write(json.dumps(trial.__dict__) + "\n")
                    file.flush()
                done.append(trial)
        self.draw(done, data_dir).savefig(folder / "figure.png", dpi=150)
        (folder / "README.md").write_text(self.page(done))
        return done

    def page(self, trials: Sequence[Trial]) -> str:
        """Markdown, beside `figure.png`."""
        seconds = sum(trial.seconds for trial in trials)
        parts = [f"# {self.title}", self.tables(trials), f"![{self.title}](figure.png)"]
        return "\n\n".join([*parts, f"{len(trials)} trials, {seconds:.0f} s in all.\n"])


def read(path: Path) -> list[Trial]:
    """The trials that a file holds; a last line that was cut off by a crash is left out.

    Raises:
        InputError: it holds something else.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    try:
        return [Trial(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold trials ({error}); move it away") from None


def published(name: str) -> list[dict[str, str]]:
    """The rows of a table of published numbers."""
    text = (files("fedrobust.reproductions") / "published" / f"{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


@dataclass(frozen=True)
class Summary:
    """Several seeds' figures: mean, standard deviation, and how many."""

    mean: float
    spread: float
    count: int

    def __str__(self) -> str:
        """As a table shows it; one value has no spread."""
        if not self.count:
            return ""
        return f"{self.mean:.3g}" + (f" ± {self.spread:.2g}" if self.count > 1 else "")


def summary(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation; those that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.nan, math.nan, 0)
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0
    return Summary(float(np.mean(finite)), spread, len(finite))


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
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])
