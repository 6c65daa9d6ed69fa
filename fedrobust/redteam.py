"""The red team: the worst error that is found for a rule, beside what is known to bound it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrobust.attacks.search import HONEST, Found, rounds
from fedrobust.errors import InputError
from fedrobust.rules import CATALOG, Mixing, parse_rule
from fedrobust.text import brief, finite

COMPOSITIONS = (
    "nnm | trimmed_mean",
    "nnm | median",
    "nnm | krum",
    "nnm | filter",
    "bucketing | median",
    "bucketing | filter",
    "clip | mean",
    "clip | trimmed_mean",
    "clip | filter",
    "arc | geometric_median",
    "arc | filter",
)
"""Every mixing before rules that it fits."""

RULES = (*sorted(name for name, cls in CATALOG.items() if not issubclass(cls, Mixing)), *COMPOSITIONS)
"""What the table of all rules has, as text."""


@dataclass(frozen=True)
class Setting:
    """The rounds that are searched.

    Attributes:
        n: how many clients.
        eps: the fraction that is malicious: f = floor(eps n) of them; rules are told f / n.
        d: how many parameters.
        budget: how often a rule is tried for each seed, over all kinds of honest updates.
        seed: the first seed.
        seeds: how many seeds, one after another; the worst counts.
    """

    n: int = 20
    eps: float = 0.2
    d: int = 100
    budget: int = 3000
    seed: int = 0
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("n", "d", "budget", "seed", "seeds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InputError(f"{name} must be a whole number, got {brief(value)}")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float | np.floating):
            raise InputError(f"eps must be a number in (0, 0.5), got {brief(self.eps)}")
        if not 0 < self.eps < 0.5:
            raise InputError(f"eps must be in (0, 0.5), the malicious fraction; got {self.eps}")
        if self.n < 1 or not 1 <= self.malicious < self.n / 2 or self.d < 1:
            raise InputError(
                f"{self.malicious} malicious of {self.n} clients with {self.d} parameters; the search "
                "needs at least one malicious client, fewer than half, and at least one parameter"
            )
        if self.budget < 50 * len(HONEST):
            raise InputError(
                f"budget must be at least {50 * len(HONEST)}, 50 for each of {len(HONEST)} kinds of "
                f"honest updates; got {self.budget}"
            )
        if self.seeds < 1 or self.seed < 0:
            raise InputError(f"seeds must be at least 1 and seed 0, got {self.seeds} and {self.seed}")

    @property
    def malicious(self) -> int:
        """How many clients are malicious."""
        return math.floor(self.eps * self.n * (1 + 1e-9))

    def __str__(self) -> str:
        seeds = f"seed {self.seed}" if self.seeds == 1 else f"seeds {self.seed} to {self._last}"
        return (
            f"{self.n} clients, {self.malicious} malicious (eps {self.eps:g}), {self.d} parameters, "
            f"budget {self.budget}, {seeds}"
        )

    @property
    def _last(self) -> int:
        return self.seed + self.seeds - 1


@dataclass(frozen=True)
class Assessment:
    """What is found for a rule.

    Attributes:
        rule: its text.
        found: the worst round of each kind of honest updates; none if the rule refuses.
        refused: why the rule has no answer to this many clients, or None.
    """

    rule: str
    found: tuple[Found, ...]
    refused: str | None = None

    @property
    def worst(self) -> Found:
        """The round with the largest error in units of sqrt(lambda_S)."""
        return max(self.found, key=lambda found: found.error_over_spread)

    @property
    def exceeding(self) -> tuple[Found, ...]:
        """Rounds above a bound: a mistake, here or in the literature."""
        return tuple(found for found in self.found if found.exceeds)


Watch = Callable[[str], None]
"""Told what is searched next."""


def _nobody(_: str) -> None:
    pass


def assess(rule: str, setting: Setting, watch: Watch = _nobody) -> Assessment:
    """Search for the worst rounds of a rule.

    Args:
        rule: its text.
        setting: the rounds.
        watch: told each kind of honest updates, for every seed, before it is searched.

    Raises:
        InputError: the text is no rule, or the rule has no answer to this many clients.
    """
    aggregator, n, eps = parse_rule(rule), setting.n, setting.malicious / setting.n
    seeds = range(setting.seed, setting.seed + setting.seeds)
    each = [rounds(aggregator, n, eps, setting.d, setting.budget, seed, watch) for seed in seeds]
    worst = (max(kind, key=lambda found: found.error_over_spread) for kind in zip(*each, strict=True))
    return Assessment(repr(aggregator), tuple(worst))


def assess_all(
    setting: Setting, rules: Sequence[str] = RULES, watch: Watch = _nobody
) -> list[Assessment]:
    """`assess` for each rule; those without an answer to this many clients say why.

    Args:
        setting: the rounds.
        rules: texts.
        watch: told each rule before it is searched.
    """
    assessments = []
    for rule in rules:
        watch(rule)
        try:
            assessments.append(assess(rule, setting))
        except InputError as error:
            assessments.append(Assessment(rule, (), str(error)))
    return assessments


# Tables ---------------------------------------------------------------------------------------------

HEADER = ("rule", "worst error found", "published", "proved", "certificate", "honest updates", "attack")


def cells(rule: str, found: Found) -> tuple[str, ...]:
    """A line of a table: lengths in units of sqrt(lambda_S) of the round, `-` for no bound."""
    lengths = (found.error, found.published, found.proved, found.bound)
    return (rule, *(_length(length / found.spread) for length in lengths), found.honest, found.attack)


def table(assessments: Iterable[Assessment]) -> list[tuple[str, ...]]:
    """A line for each rule that has an answer: its worst round."""
    return [cells(a.rule, a.worst) for a in assessments if a.found]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as plain text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(assessments: Sequence[Assessment]) -> str:
    """The table of rules as Markdown, and after it those that refuse."""
    lines = [HEADER, ("---",) * len(HEADER), *table(assessments)]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    refusals = [f"- {a.refused}" for a in assessments if a.refused]
    return "\n".join(
        [*rows, *(["", "No answer to this many clients:", "", *refusals] if refusals else [])]
    )


def figures(assessment: Assessment) -> dict[str, Any]:
    """For programs; lengths in the updates' own units, None for no bound."""
    rows = [
        {
            **finite(dataclasses.asdict(found)),
            "error_over_spread": found.error_over_spread,
            "kappa": found.kappa,
            "exceeds": found.exceeds,
        }
        for found in assessment.found
    ]
    return {"rule": assessment.rule, "refused": assessment.refused, "found": rows}


def _length(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.2g}"
