"""SEVER: whatever learns by gradients, learning from data of which a share may be hostile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.linalg import svd
from scipy.sparse import csr_matrix, issparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.statistics.parameters import is_integer, number
from fedrobust.text import choose

Model = TypeVar("Model")
Gradients: TypeAlias = Matrix | csr_matrix
"""(n, p) float64, a row an example; sparse where most of it is zero."""
Groups: TypeAlias = npt.NDArray[np.integer]
Removal: TypeAlias = Callable[[Vector, Vector, float, np.random.Generator], Vector]
"""(m,) scores and (m,) weights of a group, eps, a generator -> (m,) weights that remain."""

_DENSE = 64
"""Up to here a dense decomposition is faster than an iterative one."""


@dataclass(frozen=True, eq=False)
class Severed(Generic[Model]):
    """What came of `sever`.

    Attributes:
        model: the last one that was fitted.
        weights: (n,) float64 in 0 .. 1, under which it was; zero is removed.
        scores: (n,) float64, how far out each example's gradient at the model is: |<v, g_i - mean>|,
            v the direction in which the gradients that carry weight spread most.
        rounds: how many times something was removed.
    """

    model: Model
    weights: Vector
    scores: Vector
    rounds: int


def sever(  # noqa: PLR0913 (what an optimiser and a filter need together)
    fit: Callable[[Vector], Model],
    gradients: Callable[[Model], Gradients],
    n: int,
    *,
    eps: float,
    removal: str = "quantile",
    rounds: int | None = None,
    sigma: float | None = None,
    groups: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Severed[Model]:
    """Fit, remove the examples whose gradients stand out in the direction of most spread, fit again.

    Near an optimum the mean gradient is zero, so bad examples can hold the model away from where the
    good ones want it only by a mean gradient of their own; a small share of them must then have large
    gradients in one direction, which shows in the spectrum of all gradients.

    Three ways to remove:
    "quantile": the share eps/2 of what is left that stands out most, `rounds` times (as the authors'
    experiments; here 3 times, as their regressions). Examples with a score of 0 stay.
    "random": each example with probability tau_i / max tau, tau the squared score.
    "soft": weights are multiplied by 1 - tau_i / max tau.
    The last two go on until `rounds`, until the spread is at most `sigma`, or until 2 eps of the
    weight would be gone: removal beyond that is not made.

    Source: Diakonikolas, Kamath, Kane, Li, Steinhardt, Stewart 2019 (arXiv 1803.02815), algorithms 1
    and 2. Deviations: "random" draws for each example by itself instead of one threshold for all, which
    removes the same number in the mean with less chance; "soft" is the deterministic form of it; the
    budget ends the loop where sigma is not known.

    Args:
        fit: (n,) float64 weights of the examples -> the model, at or near an optimum. They are 0 or 1
            but for soft removal.
        gradients: of each example's own loss at a model, (n, p), float64 or a sparse matrix. A part
            that is the same for all, such as that of a regulariser, may be left out.
        n: how many examples there are.
        eps: the share of the examples, of each group if there are groups, that may be bad; below 1/2.
        removal: "quantile", "random" or "soft".
        rounds: at most so many removals; None is 3 for quantiles, else 20.
        sigma: a spread (standard deviation in any one direction) of good gradients, if it is known;
            a group within it is left alone.
        groups: (n,) integers; each group has its own mean and direction, as the classes in the
            authors' classification.
        seed: of random removal.

    Raises:
        InputError: an argument is out of range, or gradients are not finite or not of n rows.

    >>> x = np.append(np.zeros(98), [50.0, 50.0])
    >>> robust = sever(lambda w: w @ x / w.sum(), lambda mean: (mean - x)[:, None], 100, eps=0.04)
    >>> float(robust.model), int((robust.weights == 0).sum())
    (0.0, 2)
    """
    remove = REMOVALS[choose(removal, REMOVALS, "removal")]
    labels = _checked(n, eps, rounds, sigma, groups)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    eps, sigma = number(eps), None if sigma is None else number(sigma)
    if rounds is None:
        rounds = 3 if removal == "quantile" else 20
    rng = np.random.default_rng(seed)
    weights, done = np.ones(n), 0
    while True:
        model = fit(weights.copy())
        rows = gradients(model)
        if rows.ndim != 2 or rows.shape[0] != n:
            raise InputError(
                f"gradients must have a row for each of {n} examples, got shape {rows.shape}"
            )
        scores, left = np.zeros(n), weights.copy()
        for group in members:
            scores[group] = spectral_scores(rows[group], weights[group])
            if sigma is None or _spread(scores[group], weights[group]) > sigma:
                left[group] = remove(scores[group], weights[group], eps, rng)
        if done >= rounds or np.array_equal(left, weights):
            return Severed(model, weights, scores, done)
        weights, done = left, done + 1


def spectral_scores(gradients: Gradients, weights: Vector) -> Vector:
    """|<v, g_i - mu>|, v the top right singular vector of the centred rows.

    Args:
        gradients: (m, p) float64, or a sparse matrix.
        weights: (m,) float64, not negative; rows without weight are scored but have no part in v or mu.

    Returns:
        (m,) float64.

    Raises:
        InputError: a gradient is not finite.
    """
    values = gradients.data if issparse(gradients) else gradients
    if not np.isfinite(values).all():
        raise InputError(
            "gradients must be finite; scale the examples, or regularise the model to keep it bounded"
        )
    largest = float(np.abs(values).max(initial=0.0))
    total = weights.sum()
    if largest == 0 or total == 0:
        return np.zeros(len(weights))
    scaled = gradients / largest  # squares of whatever is finite must stay so
    mean = np.asarray(scaled.T @ (weights / total)).ravel()
    direction = _top_direction(scaled, mean, weights / total)
    projections: Vector = np.asarray(scaled @ direction).ravel() - mean @ direction
    return np.abs(projections) * largest


def _top_direction(rows: Gradients, mean: Vector, shares: Vector) -> Vector:
    """(p,) unit vector of most spread under shares that sum to 1."""
    roots = np.sqrt(shares)
    m, p = rows.shape

    def forth(v: Vector) -> Vector:
        v = v.ravel()
        return roots * (rows @ v - mean @ v)

    def back(u: Vector) -> Vector:
        u = roots * u.ravel()
        v: Vector = rows.T @ u - mean * u.sum()
        return v

    if min(m, p) > _DENSE:
        # On the smaller side; a start that is drawn and not constant is orthogonal to nothing of note.
        wide = p > m
        product = (lambda u: forth(back(u))) if wide else (lambda v: back(forth(v)))
        size = min(m, p)
        start = np.random.default_rng(0).standard_normal(size)
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        try:
            top = eigsh(operator, k=1, v0=start, tol=1e-9)[1][:, 0]
        except ArpackError:
            return _dense_direction(rows, mean, roots)
        return _unit(back(top) if wide else top)
    return _dense_direction(rows, mean, roots)


def _dense_direction(rows: Gradients, mean: Vector, roots: Vector) -> Vector:
    dense = csr_matrix(rows).toarray() if issparse(rows) else rows
    direction: Vector = svd(roots[:, None] * (dense - mean), full_matrices=False)[2][0]
    return direction


def _unit(v: Vector) -> Vector:
    length = float(np.linalg.norm(v))
    return v / length if length else v


def _spread(scores: Vector, weights: Vector) -> float:
    """The standard deviation in the direction of the scores."""
    largest = float(scores.max(initial=0.0))
    if largest == 0 or weights.sum() == 0:
        return 0.0
    return largest * math.sqrt(float(weights @ (scores / largest) ** 2) / float(weights.sum()))


def _quantile(scores: Vector, weights: Vector, eps: float, _rng: np.random.Generator) -> Vector:
    active = np.flatnonzero(weights)
    count = int(eps / 2 * len(active) + 0.5)
    out = active[np.argsort(-scores[active], kind="stable")[:count]]
    left = weights.copy()
    left[out[scores[out] > 0]] = 0.0
    return left


def _lost(scores: Vector, weights: Vector) -> Vector:
    """tau_i / max tau, over the examples that carry weight."""
    carried = np.where(weights > 0, scores, 0.0)
    largest = float(carried.max(initial=0.0))
    return (carried / largest) ** 2 if largest else carried


def _random(scores: Vector, weights: Vector, eps: float, rng: np.random.Generator) -> Vector:
    kept = np.where(rng.random(len(scores)) < _lost(scores, weights), 0.0, weights)
    return _within_budget(kept, weights, eps)


def _soft(scores: Vector, weights: Vector, eps: float, _rng: np.random.Generator) -> Vector:
    kept = weights * (1 - _lost(scores, weights))
    return _within_budget(np.where(kept < 1e-12, 0.0, kept), weights, eps)


def _within_budget(kept: Vector, weights: Vector, eps: float) -> Vector:
    return kept if len(kept) - kept.sum() <= 2 * eps * len(kept) * (1 + 1e-9) else weights


REMOVALS: dict[str, Removal] = {"quantile": _quantile, "random": _random, "soft": _soft}
"""The ways to remove, by name."""


def _checked(
    n: int, eps: float, rounds: int | None, sigma: float | None, groups: npt.ArrayLike | None
) -> Groups:
    """(n,) the groups, once all else is in range."""
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    if not 0 <= number(eps) < 0.5:
        raise InputError(
            f"eps must be at least 0 and below 1/2, got {eps!r}: most examples must be good"
        )
    if rounds is not None and not is_integer(rounds):
        raise InputError(f"rounds must be an integer, or None for the usual number, got {rounds!r}")
    if rounds is not None and rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    if sigma is not None and not number(sigma) > 0:
        raise InputError(f"sigma must be positive, got {sigma!r}; None means not known")
    labels = np.zeros(n, np.int64) if groups is None else np.asarray(groups)
    if labels.shape != (n,):
        raise InputError(f"groups must be one label for each of {n} examples, got shape {labels.shape}")
    return labels
