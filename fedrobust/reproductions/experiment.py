"""What every reproduction is: trials that are kept as they end, then a page with tables and a figure."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fedrobust import __version__
from fedrobust.trials import Setting, Trial, begun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            InputError: the data is not there, or `trials.jsonl` holds something else or trials that
                another version of fedrobust ran.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "trials.jsonl"
        kept = begun(path, __version__)
        done: list[Trial] = []
        with path.open("a") as file:
            for planned in plan:
                watch(", ".join(map(str, planned.setting.values())))
                trial = kept.get(planned.key)
                if trial is None:
                    began = time.perf_counter()
                    figures = self.trial(planned.setting, planned.seed, data_dir)
                    seconds = time.perf_counter() - began
                    trial = replace(planned, figures=figures, seconds=seconds, version=__version__)
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
        end = f"{len(trials)} trials by fedrobust {__version__}, {seconds:.0f} s in all.\n"
        return "\n\n".join([*parts, end])


def published(name: str) -> list[dict[str, str]]:
    """The rows of a table of published numbers."""
    text = (files("fedrobust.reproductions") / "published" / f"{name}.csv").read_text()
    return list(csv.DictReader(text.splitlines()))
