"""What SEVER's authors compare it with, each the same loop with scores of its own.

Source: Diakonikolas, Kamath, Kane, Li, Steinhardt, Stewart 2019 (arXiv 1803.02815), section 4, and the
thresholds of the code they published (github.com/hoonose/sever).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fedrobust.data.files import need_files
from fedrobust.errors import InputError
from fedrobust.kernels import Vector
from fedrobust.statistics.severing import Gradients, sever

Model = TypeVar("Model")

FILTERS = ("l2", "loss", "gradient", "gradientCentered")
DEFENCES = ("none", *FILTERS, "ransac", "sever")
COLORS = {
    "uncorrupted": "black",
    "none": "tab:gray",
    "l2": "tab:blue",
    "loss": "tab:green",
    "gradient": "tab:orange",
    "gradientCentered": "tab:purple",
    "ransac": "tab:brown",
    "sever": "tab:red",
}
_SUBSETS = 10
"""How many random halves RANSAC tries."""


@dataclass(frozen=True, eq=False)
class Problem(Generic[Model]):
    """A learner and the data that it is to learn from, bad examples and all.

    Attributes:
        fit: (n,) float64 weights, 0 or 1 -> the model.
        losses: (n,) of each example at a model, not negative.
        gradients: (n, p) of each example at a model, dense or sparse.
        inputs: (n, d) the examples, dense or sparse.
        groups: (n,) integers; each group is filtered by itself.
    """

    fit: Callable[[Vector], Model]
    losses: Callable[[Model], Vector]
    gradients: Callable[[Model], Gradients]
    inputs: Gradients
    groups: npt.NDArray[np.int64]


def defended(
    name: str, problem: Problem[Model], *, share: float, rounds: int, eps: float, seed: int
) -> Model:
    """The model that a defence ends with.

    Args:
        name: one of the `DEFENCES`.
        problem: learner and data.
        share: of each group, removed each round by all but RANSAC.
        rounds: how many removals there are; the model is fitted once more often.
        eps: the share of all examples that is bad, for RANSAC.
        seed: of RANSAC's subsets.
    """
    n = len(problem.groups)
    if name == "none":
        return problem.fit(np.ones(n))
    if name == "ransac":
        return _ransac(problem, eps, np.random.default_rng(seed))
    if name == "sever":
        options: dict[str, Any] = {"eps": 2 * share, "rounds": rounds, "groups": problem.groups}
        return sever(problem.fit, problem.gradients, n, **options).model
    weights = np.ones(n)
    for _ in range(rounds):
        model = problem.fit(weights)
        rows = _rows(name, problem, model)
        for group in np.unique(problem.groups):
            active = np.flatnonzero((problem.groups == group) & (weights > 0))
            scores = distances(rows[active], centred=name in ("l2", "gradientCentered"))
            weights[active[~below(scores, share)]] = 0.0
    return problem.fit(weights)


def _rows(name: str, problem: Problem[Model], model: Model) -> Gradients:
    if name == "l2":
        return problem.inputs
    return problem.losses(model)[:, None] if name == "loss" else problem.gradients(model)


def distances(rows: Gradients, *, centred: bool) -> Vector:
    """(m,) of (m, p) rows from their mean, or from 0."""
    # Through inner products, so that sparse rows stay sparse.
    squares = np.asarray((rows.multiply(rows) if hasattr(rows, "multiply") else rows**2).sum(axis=1))
    squares = squares.ravel()
    if centred:
        mean = np.asarray(rows.mean(axis=0)).ravel()
        squares = squares - 2 * np.asarray(rows @ mean).ravel() + mean @ mean
    found: Vector = np.sqrt(np.maximum(squares, 0.0))
    return found


def below(scores: Vector, share: float) -> npt.NDArray[np.bool_]:
    """(m,) what the authors' thresholds keep: strictly less than the ceil((1 - share) m)-th smallest.

    Whatever ties with the threshold goes, so at least one does; where the threshold is 0, only what ties
    with the largest.
    """
    # A product that is a hair above a whole number is that number.
    rank = int(np.ceil((1 - share) * len(scores) - 1e-9))
    threshold = np.sort(scores)[max(rank, 1) - 1]
    kept: npt.NDArray[np.bool_] = scores < (threshold or scores.max())
    return kept


def _ransac(problem: Problem[Model], eps: float, rng: np.random.Generator) -> Model:
    """Fit to random halves, take the model of least median loss, fit to the 1 - eps that it fits best.

    The paper names RANSAC and gives no details. Minimal subsets are hopeless here: of d + 1 examples all
    are good with probability (1 - eps)^(d + 1).
    """
    n = len(problem.groups)
    best: tuple[float, Vector] = (np.inf, np.zeros(n))
    for _ in range(_SUBSETS):
        weights = np.zeros(n)
        weights[rng.permutation(n)[: n // 2]] = 1.0
        losses = problem.losses(problem.fit(weights))
        if (middle := float(np.median(losses))) < best[0]:
            best = middle, losses
    weights = np.zeros(n)
    weights[np.argsort(best[1], kind="stable")[: n - int(eps * n)]] = 1.0
    return problem.fit(weights)


def read(name: str, data_dir: Path | None) -> dict[str, Any]:
    """The arrays of one file of the authors' data.

    Args:
        name: of the file, in the folder "sever" of the data directory or there itself.
        data_dir: None is the directory that FEDROBUST_DATA names.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    (path,) = need_files(
        [name],
        "sever",
        "SEVER's data (github.com/hoonose/sever, converted by examples/sever_data.py)",
        data_dir,
    )
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
