"""Estimators of `fedrobust.statistics` beside the plain ones: `python -m benchmarks.statistics`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.covariance import EmpiricalCovariance
from threadpoolctl import threadpool_limits

from benchmarks.measure import sample
from fedrobust.statistics import RobustMean

Rows = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Case:
    """An estimator beside a plain one, on the same data.

    Attributes:
        name: `group/what`.
        prepare: makes the data; not timed.
        ours: what is timed.
        plain: what it is held against.
        limit: the ratio of their times that is aimed at.
        quick: makes data that take no time, for a try of the machinery.
    """

    name: str
    prepare: Callable[[], Any]
    ours: Callable[[Any], Any]
    plain: Callable[[Any], Any]
    limit: float
    quick: Callable[[], Any]


def corrupted(n: int, d: int, eps: float = 0.1) -> Rows:
    """(n, d) float32 standard Gaussian rows, the first eps of them one far point."""
    X = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    X[: int(eps * n)] = 1
    return X


def _mean_cases() -> list[Case]:
    forms = {
        "clean": (RobustMean(covariance="identity"), 0.0, 3.0),
        "filter": (RobustMean(covariance="identity"), 0.1, 3.0),
        "entropy": (RobustMean(covariance="identity", method="entropy"), 0.1, 3.0),
        "bounded, sigma known": (RobustMean(sigma=1.1), 0.1, 10.0),
        "bounded": (RobustMean(), 0.1, 10.0),
    }
    return [
        Case(
            f"mean/{name}",
            lambda eps=eps: corrupted(100_000, 1000, eps),  # type: ignore[misc]
            estimator.fit,
            EmpiricalCovariance(store_precision=False).fit,
            limit,
            lambda eps=eps: corrupted(500, 20, eps),  # type: ignore[misc]
        )
        for name, (estimator, eps, limit) in forms.items()
    ]


CASES = [*_mean_cases()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every case and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="data that take no time")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    print("| case | ours, s | plain, s | ratio | ratio of processor times | aim |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with threadpool_limits(options.threads):
        for case in CASES:
            if options.only in case.name:
                print(_line(case, options.repetitions, quick=options.quick), flush=True)


def _line(case: Case, repetitions: int, *, quick: bool) -> str:
    """Both in turn, so that what else the machine does meets both; ratios of medians."""
    data = case.quick() if quick else case.prepare()
    taken = [
        (sample(lambda: case.ours(data), trim=False), sample(lambda: case.plain(data), trim=False))
        for _ in range(repetitions)
    ]
    ours, plain = (median(pair[side].wall for pair in taken) for side in (0, 1))
    work = [median(pair[side].cpu for pair in taken) for side in (0, 1)]
    figures = f"{ours:.2f} | {plain:.2f} | {ours / plain:.2f} | {work[0] / work[1]:.2f}"
    return f"| {case.name} | {figures} | {case.limit:g} |"


if __name__ == "__main__":
    main()
