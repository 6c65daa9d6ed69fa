"""Figure 2 of "Being Robust (in High Dimensions) Can Be Practical": covariance under planted rows.

Diakonikolas, Kamath, Kane, Li, Moitra, Stewart, ICML 2017 (arXiv 1703.00893), section 4.1. The paper
prints a figure only; the numbers in `published/robust_cov.csv` are recomputed: the authors'
programs (github.com/hoonose/robust-filter, commit 69d020b), written anew apart from ours, with 3 seeds
for d of 10, 30 and 50.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.covariance import MinCovDet

from fedrobust.kernels import Matrix, Vector
from fedrobust.reproductions import covariance_rivals as rivals
from fedrobust.reproductions.experiment import Experiment, published
from fedrobust.statistics import RobustCovariance
from fedrobust.trials import Setting, Summary, Trial, grouped, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPS = 0.05
CASES = ("isotropic", "skewed")
ESTIMATORS = {
    "filter": "filter",
    "plain": "plain",
    "pruned": "pruning",
    "ransac_released": "RANSAC as released",
    "ransac": "RANSAC as intended",
    "mcd": "MinCovDet",
    "lrv": "Lai-Rao-Vempala",
}
"""What is compared, with the names that tables show."""
PUBLISHED = {
    "filter": "filter_excess",
    "plain": "noisy_excess",
    "pruned": "prune_excess",
    "ransac_released": "ransac_asreleased_excess",
    "ransac": "ransac_fixed_excess",
}
"""Columns of the published table."""
SLOW = {"mcd", "lrv"}
"""What takes minutes for large d: Lai-Rao-Vempala by the spectrum of d (d + 1) / 2 columns."""


@dataclass(frozen=True, eq=False)
class Spoiled:
    """Rows of which the last are planted.

    Attributes:
        rows: (n, d) float64.
        planted: how many.
        spread: (d,) float64, the standard deviations of the others.
    """

    rows: Matrix
    planted: int
    spread: Vector

    @property
    def good(self) -> Matrix:
        """The others."""
        return self.rows[: -self.planted]

    def error(self, covariance: Matrix) -> float:
        """Mahalanobis error |S^-1/2 C S^-1/2 - I|_F of a (d, d) covariance."""
        white = covariance / np.outer(self.spread, self.spread)
        return float(np.linalg.norm(white - np.eye(len(white))))


def spoiled(case: str, d: int, rng: np.random.Generator) -> Spoiled:
    """The rows of figure 2: n = d / (2 eps^2), a part eps of them planted.

    Args:
        case: "isotropic": N(0, I), planted rows at 0. "skewed": N(0, diag(100, 1, ..., 1)), planted
            rows on a rotated grid that is long in one direction.
        d: how many columns, even.
        rng: draws everything.
    """
    n = 0.5 * d / EPS**2
    good, planted = round((1 - EPS) * n), round(EPS * n)
    spread = np.ones(d)
    noise = np.zeros((planted, d))
    if case == "skewed":
        spread[0] = 10
        grids = [(0.5, 1, d // 2), (0.8, 2, d // 2 - 1), (1.0, 100, 1)]
        parts = [size * rng.integers(-top, top + 1, (planted, wide)) for size, top, wide in grids]
        noise = np.hstack(parts) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    return Spoiled(np.vstack([rng.standard_normal((good, d)) * spread, noise]), planted, spread)


def settings(quick: bool) -> list[Setting]:
    """Both cases, over dimensions; slow rivals only up to d = 50, in the quick form up to 10."""
    dimensions, limit = ((10, 30, 50), 10) if quick else (range(10, 101, 10), 50)
    return [{"case": case, "d": d, "slow": d <= limit} for case in CASES for d in dimensions]


def trial(setting: Setting, seed: int, _data_dir: Path | None) -> dict[str, float]:
    """Excess errors over the good rows' own, and what the filter dropped."""
    d = int(setting["d"])
    sample = spoiled(setting["case"], d, np.random.default_rng(seed))
    rows, rng = sample.rows, np.random.default_rng(seed + 1)
    robust = RobustCovariance(eps=EPS, assume_centered=True)
    mcd = MinCovDet(assume_centered=True, random_state=seed)
    estimators: dict[str, Callable[[], Matrix]] = {
        "filter": lambda: robust.fit(rows).covariance_,
        "plain": lambda: np.cov(rows.T),
        "pruned": lambda: rivals.pruned(rows),
        "ransac_released": lambda: rivals.ransac(rows, EPS, rng, as_released=True),
        "ransac": lambda: rivals.ransac(rows, EPS, rng),
        "mcd": lambda: mcd.fit(rows).covariance_,
        "lrv": lambda: rivals.lai_rao_vempala(rows, EPS),
    }
    sampling = sample.error(np.cov(sample.good.T))
    figures = {"sampling": sampling}
    for name, estimate in estimators.items():
        if name in SLOW and not setting["slow"]:
            continue
        began = time.perf_counter()
        figures[name] = sample.error(estimate()) - sampling
        figures[f"{name}_seconds"] = time.perf_counter() - began
    lost = ~robust.support_
    bad = int(lost[-sample.planted :].sum())
    return figures | {"lost_bad": bad / sample.planted, "lost_good": int(lost.sum()) - bad}


def tables(trials: Sequence[Trial]) -> str:
    """Excess errors by case and dimension, the published ones in brackets."""
    theirs = {(row["setting"], int(row["d"])): row for row in published("robust_cov")}
    pages = []
    for case in CASES:
        chosen = [trial for trial in trials if trial.setting["case"] == case]
        found = {name: _by_dimension(chosen, name) for name in [*ESTIMATORS, "lost_bad", "lost_good"]}
        rows = [
            [d, 200 * d]
            + [_beside(found[name].get(d), theirs.get((case, d), {}), name) for name in ESTIMATORS]
            + [found["lost_bad"][d], found["lost_good"][d]]
            for d in found["filter"]
        ]
        header = ["d", "n", *ESTIMATORS.values(), "planted rows dropped", "good rows dropped"]
        pages.append(f"**{case.capitalize()}**\n\n{table(header, rows)}")
    note = (
        "Mahalanobis error above that of the good rows' own covariance; mean ± standard deviation "
        "over seeds (in brackets: the authors' programs, recomputed)."
    )
    return "\n\n".join([*pages, note])


def draw(trials: Sequence[Trial], _data: Path | None = None) -> Figure:
    """As figure 2: both cases, and below them what is near zero."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, case in zip(axes.T, CASES, strict=True):
        chosen = [trial for trial in trials if trial.setting["case"] == case]
        for name, label in ESTIMATORS.items():
            means = {d: summary.mean for d, summary in _by_dimension(chosen, name).items()}
            style = {"lw": 3, "marker": "o"} if name == "filter" else {"lw": 1.5, "marker": "x"}
            for axis in column:
                axis.plot([*means], [*means.values()], label=label, **style)
        column[0].set_title(case)
        column[1].set(ylim=(-0.05, 1.3), xlabel="dimension")
    for axis, note in zip(axes[:, 0], ("", ", near zero"), strict=True):
        axis.set_ylabel(f"excess Mahalanobis error{note}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=len(labels), loc="outside lower center", frameon=False, fontsize=8
    )
    return figure


def _by_dimension(trials: Sequence[Trial], figure: str) -> Mapping[int, Summary]:
    return grouped(trials, lambda s: int(s["d"]), figure)


def _beside(ours: Summary | None, theirs: Mapping[str, str], name: str) -> str:
    number = theirs.get(PUBLISHED.get(name, ""))
    return ("" if ours is None else f"{ours}") + (f" ({float(number):.3g})" if number else "")


EXPERIMENT = Experiment(
    "Robust covariance: figure 2 of Diakonikolas et al., ICML 2017",
    settings,
    trial,
    tables,
    draw,
    seeds=(3, 1),
)
