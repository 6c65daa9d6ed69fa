"""Figure 1 of "Being Robust (in High Dimensions) Can Be Practical": error of the mean against dimension.

Diakonikolas, Kamath, Kane, Li, Moitra, Stewart 2017 (ICML, arXiv 1703.00893). The published numbers are
those of the authors' released code, written anew apart from ours, with three seeds for every dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedrobust.kernels import Vector
from fedrobust.reproductions import rivals
from fedrobust.reproductions.experiment import Experiment, published
from fedrobust.statistics import RobustMean
from fedrobust.trials import Setting, Trial, grouped, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = npt.NDArray[np.float32]

EPS = 0.1
LARGEST_LRV = 1000
"""Coordinates beyond which complete eigenproblems, one for every halving, take too long."""


def two_parts(rng: np.random.Generator, count: int, d: int) -> Rows:
    """The paper's: half the rows 0 or 1 at random, half (12, -2, 0, ..., 0)."""
    rows = rng.integers(0, 2, (count, d)).astype(np.float32)
    rows[count // 2 :] = 0
    rows[count // 2 :, :2] = (12, -2)
    return rows


def far_cluster(_rng: np.random.Generator, count: int, d: int) -> Rows:
    """One point, as far from the mean as honest rows are: sqrt(d)."""
    return np.full((count, d), 2, dtype=np.float32)


def subtle_cluster(rng: np.random.Generator, count: int, d: int) -> Rows:
    """Honest rows, moved by three standard deviations in one direction."""
    direction = rng.standard_normal(d)
    shift = 1 + 3 * direction / np.linalg.norm(direction)
    return rng.standard_normal((count, d), dtype=np.float32) + shift.astype(np.float32)


def many_clusters(rng: np.random.Generator, count: int, d: int) -> Rows:
    """Honest rows, moved by ten standard deviations along one of twenty axes each."""
    rows = rng.standard_normal((count, d), dtype=np.float32) + 1
    rows[np.arange(count), rng.integers(0, min(20, d), count)] += 10
    return rows


def large_norms(rng: np.random.Generator, count: int, d: int) -> Rows:
    """A hundred times as far out as honest rows, half of it in a common direction."""
    return 100 * (rng.standard_normal((count, d), dtype=np.float32) + 1)


NOISES: dict[str, Callable[[np.random.Generator, int, int], Rows]] = {
    "two parts": two_parts,
    "far cluster": far_cluster,
    "subtle cluster": subtle_cluster,
    "many clusters": many_clusters,
    "large norms": large_norms,
}
"""What the bad rows are; the good ones are Gaussian about (1, ..., 1) with unit variance."""


def _robust(X: Rows, method: str) -> Vector:
    return RobustMean(EPS, covariance="identity", method=method).fit(X).location_


ESTIMATORS: dict[str, Callable[[Rows], Vector]] = {
    "filter": partial(_robust, method="filter"),
    "entropy filter": partial(_robust, method="entropy"),
    "Lai-Rao-Vempala": partial(rivals.lai_rao_vempala, eps=EPS),
    "pruning": partial(rivals.pruned_mean, eps=EPS),
    "RANSAC": partial(rivals.ransac, eps=EPS),
    "geometric median": rivals.geometric_median,
    "coordinate median": rivals.coordinate_median,
    "mean": rivals.empirical_mean,
}
PUBLISHED = {
    "filter": "filter_excess",
    "Lai-Rao-Vempala": "lrv_excess",
    "pruning": "prune_excess",
    "RANSAC": "ransac_asreleased_excess",
    "geometric median": "geomedian_excess",
    "mean": "noisy_mean_excess",
}


def published_size(d: int) -> int:
    """The paper's number of rows, 10 d / eps^2."""
    return 10 * math.floor(d / EPS**2)


def settings(quick: bool) -> list[Setting]:
    """The figure as it was published, the other noises in it, and on to more dimensions.

    There 10 d / eps^2 rows are too many for a small machine, so they are 10 d, and 4 d at the last.
    """
    figure = (100, 200) if quick else range(100, 401, 50)
    others = (100,) if quick else (100, 200, 400)
    further = (500, 1000) if quick else (500, 1000, 2000, 4000, 10_000)
    noises = [noise for noise in NOISES if noise != "two parts"]
    return [
        *({"noise": "two parts", "d": d, "n": published_size(d)} for d in figure),
        *({"noise": noise, "d": d, "n": published_size(d)} for noise in noises for d in others),
        *({"noise": "two parts", "d": d, "n": min(10 * d, 40_000)} for d in further),
        *({"noise": noise, "d": 1000, "n": 10_000} for noise in noises if not quick),
    ]


def draw_sample(setting: Setting, seed: int) -> tuple[Rows, int]:
    """(n, d) rows, and how many of them, the first, are bad."""
    noise, d, n = setting["noise"], setting["d"], setting["n"]
    rng = np.random.default_rng([seed, d, n, list(NOISES).index(noise)])
    rows, bad = np.empty((n, d), dtype=np.float32), round(EPS * n)
    rng.standard_normal(dtype=np.float32, out=rows)
    rows += 1
    rows[:bad] = NOISES[noise](rng, bad, d)
    return rows, bad


def trial(setting: Setting, seed: int, _data: Path | None = None) -> Mapping[str, float]:
    """How much farther from the true mean every estimator is than the mean of the good rows."""
    X, bad = draw_sample(setting, seed)
    sampling = _error(rivals.empirical_mean(X[bad:]))
    figures = {
        name: _error(estimate(X)) - sampling
        for name, estimate in ESTIMATORS.items()
        if name != "Lai-Rao-Vempala" or X.shape[1] <= LARGEST_LRV
    }
    return {"sampling": sampling, **figures}


def _error(mean: Vector) -> float:
    return float(np.linalg.norm(mean - 1))


def tables(trials: Sequence[Trial]) -> str:
    """A row for every setting, and that of the authors' code under it where there is one."""
    by = {name: grouped(trials, _point, name) for name in ("sampling", *ESTIMATORS)}
    theirs = {int(row["d"]): row for row in published("robust_mean")}
    rows: list[list[object]] = []
    for point, sampling in by["sampling"].items():
        noise, d, n = point
        rows.append([noise, d, n, sampling, *(by[name].get(point, "") for name in ESTIMATORS)])
        if noise == "two parts" and d in theirs and n == published_size(d):
            cells = [theirs[d].get(PUBLISHED.get(name, ""), "") for name in ESTIMATORS]
            rows.append(["authors' code", d, theirs[d]["N"], theirs[d]["sampling"], *cells])
    header = ["noise", "d", "n", "mean of the good rows", *ESTIMATORS]
    return "Distance from the true mean beyond that of the good rows' mean:\n\n" + table(header, rows)


def _point(setting: Setting) -> tuple[str, int, int]:
    return setting["noise"], setting["d"], setting["n"]


def draw(trials: Sequence[Trial], _data: Path | None = None) -> Figure:
    """Excess error against dimension: the published figure, then more dimensions, then other noises."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    first = [t for t in trials if t.setting["noise"] == "two parts"]
    long = [t for t in first if t.setting["n"] == published_size(t.setting["d"])]
    short = [t for t in first if t not in long]
    for axes, shown in ((left, long), (middle, short)):
        for number, name in enumerate(ESTIMATORS):
            found = grouped(shown, lambda setting: setting["d"], name)
            means, spreads = [s.mean for s in found.values()], [s.spread for s in found.values()]
            axes.errorbar(list(found), means, spreads, color=f"C{number}", marker=".", label=name)
        axes.set_xlabel("d")
        axes.set_ylabel("excess error")
    _draw_published(left)
    left.set_title("two parts, n = 10 d / eps² (open: the authors' code)")
    middle.set_title("two parts, n = 10 d, at most 40 000")
    middle.set_xscale("log")
    middle.set_yscale("symlog", linthresh=0.1)
    _draw_noises(right, trials)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(ESTIMATORS))
    return figure


def _draw_published(axes: Axes) -> None:
    rows = published("robust_mean")
    for number, name in enumerate(ESTIMATORS):
        if name in PUBLISHED:
            values = [float(row[PUBLISHED[name]]) for row in rows]
            dims = [int(row["d"]) for row in rows]
            axes.plot(dims, values, "o", color=f"C{number}", markerfacecolor="none", markersize=9)


def _draw_noises(axes: Axes, trials: Sequence[Trial]) -> None:
    """Every noise at the largest dimension that all were tried in with the paper's n."""
    shared = [
        t
        for t in trials
        if t.setting["n"] == published_size(t.setting["d"])
        if t.setting["noise"] != "two parts"
    ]
    largest = max((t.setting["d"] for t in shared), default=0)
    chosen = [t for t in trials if _point(t.setting)[1:] == (largest, published_size(largest))]
    for number, name in enumerate(ESTIMATORS):
        found = grouped(chosen, lambda setting: setting["noise"], name)
        places = [list(NOISES).index(noise) + 0.08 * (number - 3.5) for noise in found]
        axes.plot(places, [s.mean for s in found.values()], "o", color=f"C{number}")
    axes.set_xticks(range(len(NOISES)), [name.replace(" ", "\n") for name in NOISES])
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_title(f"every noise, d = {largest}, n = {published_size(largest)}")


EXPERIMENT = Experiment(
    "Mean of a corrupted Gaussian (Diakonikolas et al. 2017, figure 1)",
    settings,
    trial,
    tables,
    draw,
    seeds=(3, 1),
)
