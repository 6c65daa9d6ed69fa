"""What a grid's runs show, as tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fedrobust_server.drawing import Vector
from fedrobust_server.schedule import NONE

from fedrobust.trials import Summary, Trial, summary
from fedrobust_laboratory.grid import AXES, BEST, NO_ATTACK

REFUSED = "refused"
"""In the place of figures: why a run cannot be."""

Figures = Mapping[str, Any]
"""Of a run, by name."""
Cells = Mapping[str, Mapping[str, Summary]]
"""By rule, then by attack."""


@dataclass(frozen=True)
class Arena:
    """Runs that differ in nothing but rule, attack and seed.

    Attributes:
        label: in what this arena differs from the others.
        trials: its runs.
        rules: in the grid's order.
        attacks: likewise.
    """

    label: str
    trials: Sequence[Trial]
    rules: tuple[str, ...]
    attacks: tuple[str, ...]

    def percent(self, figure: str = "accuracy_last") -> Cells:
        """A figure in percent, over the seeds; a summary of nothing where no run has it."""
        runs: dict[tuple[str, str], list[Figures]] = defaultdict(list)
        for trial in self.trials:
            runs[trial.setting["rule"], trial.setting["attack"]].append(trial.figures)
        return {
            r: {a: summary(100 * value for value in _values(runs[r, a], figure)) for a in self.attacks}
            for r in self.rules
        }

    def worst(self, figure: str = "accuracy_last") -> dict[str, tuple[str, Summary]]:
        """For each rule the attack that leaves the lowest mean of a figure of accuracy, and that."""
        found = {}
        for rule, row in self.percent(figure).items():
            known = {attack: cell for attack, cell in row.items() if cell.count}
            if known:
                found[rule] = min(known.items(), key=lambda item: item[1].mean)
        return found

    def attacked(self, figure: str) -> dict[str, list[float]]:
        """For each rule a figure of all attacked runs that have it."""
        rows: dict[str, list[float]] = {rule: [] for rule in self.rules}
        for trial in self.trials:
            if figure in trial.figures and trial.setting["malicious"]:
                rows[trial.setting["rule"]].append(trial.figures[figure])
        return rows

    def certified(self) -> dict[tuple[str, str], Certified]:
        """For each rule and attack how robust the models are, where that was asked."""
        found: dict[tuple[str, str], list[Trial]] = {}
        for trial in self.trials:
            if "certified" in trial.figures:
                key = trial.setting["rule"], trial.setting["attack"]
                found.setdefault(key, []).append(trial)
        return {key: Certified.of(trials) for key, trials in found.items()}


def _values(runs: Sequence[Figures], figure: str) -> list[float]:
    """A figure of each run that has it; the best is of the evaluation at which their mean is highest."""
    if figure != BEST:
        return [run[figure] for run in runs if figure in run]
    curves: Any = [run["curve"] for run in runs if "curve" in run]
    if not curves:
        return []
    accuracy = np.array(curves, float)[:, :, 1]
    found: list[float] = accuracy[:, accuracy.mean(axis=0).argmax()].tolist()
    return found


@dataclass(frozen=True, eq=False)
class Certified:
    """Several seeds' certified accuracy.

    Attributes:
        radii: (k,) of the curve.
        accuracy: (k,) the mean over the seeds.
        average_radius: the average certified radius.
    """

    radii: Vector
    accuracy: Vector
    average_radius: Summary

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> Certified:
        """Of runs that differ in the seed alone."""
        curves: Any = [trial.figures["certified"] for trial in trials]
        radii, accuracy = np.mean(np.array(curves, float), axis=0).T
        return cls(radii, accuracy, summary(trial.figures["average_radius"] for trial in trials))


def arenas(trials: Sequence[Trial]) -> list[Arena]:
    """Sort runs into arenas, in the order in which they first come.

    Where the number of attackers varies by itself, runs without any count for every number.
    """
    varied = [key for key in _keys(trials) if len({t.setting.get(key) for t in trials}) > 1]
    telling = [key for key in varied if key not in ("rule", "attack", "seed", "malicious", "outsiders")]
    found: dict[tuple[Hashable, ...], list[Trial]] = {}
    for trial in trials:
        found.setdefault(tuple(trial.setting.get(key) for key in telling), []).append(trial)
    return [
        Arena(
            ", ".join([*map(_named, telling, values), *more]),
            members,
            _distinct(members, "rule"),
            _distinct(members, "attack"),
        )
        for values, alike in found.items()
        for more, members in _by_attackers(alike)
    ]


def _by_attackers(trials: list[Trial]) -> Iterator[tuple[list[str], list[Trial]]]:
    """What is to be said of the number of attackers, and the runs with it and those without any."""
    numbers = dict.fromkeys(t.setting["malicious"] for t in trials if t.setting["attack"] != NO_ATTACK)
    if len(numbers) < 2:
        yield [], trials
        return
    for number in numbers:
        of = [t for t in trials if t.setting["attack"] == NO_ATTACK or t.setting["malicious"] == number]
        yield [_named("malicious", number)], of


def ranked(arenas: Sequence[Arena]) -> list[str]:
    """All rules, the one with the best worst case first, on the average over the arenas that try it.

    One that some arena's runs refused comes last.
    """
    worst = [(arena, arena.worst()) for arena in arenas]
    rules = dict.fromkeys(rule for arena in arenas for rule in arena.rules)

    def merit(rule: str) -> float:
        tried = [cases for arena, cases in worst if rule in arena.rules]
        found = [cases[rule][1].mean for cases in tried if rule in cases]
        return sum(found) / len(found) if len(found) == len(tried) else -math.inf

    return sorted(rules, key=merit, reverse=True)


def _keys(trials: Sequence[Trial]) -> list[str]:
    known = dict.fromkeys(key for trial in trials for key in trial.setting)
    return sorted(known, key=lambda key: AXES.index(key) if key in AXES else len(AXES))


def _named(key: str, value: object) -> str:
    """A value that says by itself what it is goes without its key's name."""
    return value if isinstance(value, str) and value != NONE else f"{key} {value}"


def _distinct(trials: Sequence[Trial], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trial.setting[key] for trial in trials))
