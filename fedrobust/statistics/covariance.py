"""Robust covariance and robust PCA: plain estimates of the rows that the covariance filter keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.base import BaseEstimator
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.statistics.parameters import number

Mask = npt.NDArray[np.bool_]
Fitted = TypeVar("Fitted", bound=BaseEstimator)

_TRIALS = 10
"""Of tail constants; each halves the interval that is left."""
_TOLERANCE = 1e-3
"""Of the top eigenvector; its eigenvalue is then known to about the square of that."""


class RobustCovariance(EmpiricalCovariance):  # type: ignore[misc] # scikit-learn has no types
    """Mean and covariance of Gaussian rows of which a part is arbitrary, by the covariance filter.

    What rows that are not Gaussian do to y y^T (y the row whitened by the estimate) is looked at in the
    d^2-dimensional space of symmetric matrices:

        repeat
            y_i <- the kept rows, whitened by their own covariance
            drop rows with |y_i|^2 beyond every Gaussian's, and begin again
            V   <- the unit V with the largest variance of y^T V y; stop if the variance is below 2
            T_i <- |y_i^T V y_i - mean| / sqrt 2
            t   <- the smallest T_i that too many rows pass:
                   more than N (12 exp(-k T_i) + 3 eps / (d log(N/tau))^2)
            drop rows with T_i > t; stop if there are none

    k is tuned until 0.5 to 1.5 eps n rows are dropped; so some are dropped from clean rows as well. V is
    found by Lanczos iterations on V -> mean of (y^T V y - tr V) y y^T, so the d^2 x d^2 matrix is never
    formed: O(n d^2) a step.

    Guarantee: Mahalanobis error O(eps log 1/eps) whatever d is, for n of order d^2 / eps^2. With fewer
    rows the sampling noise of the fourth moments hides what an attacker does, and so do honest rows
    with tails far heavier than a Gaussian's: where they are, it helps much to know the mean. The kept
    rows' mean is good where their covariance is. Equivariant under affine maps (linear ones if
    `assume_centered`), up to the tolerance of the iterations.

    Breakdown point: not 1/2, but (1 - 1/sqrt 3) / 2 = 0.21, and 1/3 if `assume_centered`, at most. Of a
    far cluster with a larger part of the rows nothing shows: y is then, towards it, one of two numbers,
    and the variance of its square below 2.

    Sources: Diakonikolas, Kamath, Kane, Li, Moitra, Stewart, "Being Robust (in High Dimensions) Can Be
    Practical", ICML 2017 (arXiv 1703.00893), section 3 and appendix; constants and tuning as in the
    authors' program. Deviations: rows go for their norm only beyond the Laurent-Massart bound, too,
    which is larger than the program's 0.4 d log(N/tau) for d below about 15; the kept rows' own mean is
    subtracted where it is not known; a trial ends once it has dropped too many, and if no trial hits the
    range, the nearest counts.

    Attributes:
        eps: the part that may be arbitrary, in [0, 1/2), but see above for large ones.
        tau: the probability of failure that the thresholds allow, in (0, 1).
        decay: k, how fast the tails are taken to fall off; None tunes it.
        assume_centered: the mean is known to be 0.
        store_precision: keep `precision_`.
        location_: (d,) float64, the kept rows' mean; 0 if `assume_centered`.
        covariance_: (d, d) float64, the kept rows' covariance, over their number.
        precision_: (d, d) float64, its pseudo-inverse.
        support_: (n,) bool, the rows that were kept.
        weights_: (n,) float64, the same as weights that sum to 1.
    """

    def __init__(
        self,
        *,
        eps: float = 0.1,
        tau: float = 0.1,
        decay: float | None = None,
        assume_centered: bool = False,
        store_precision: bool = True,
    ) -> None:
        super().__init__(store_precision=store_precision, assume_centered=assume_centered)
        self.eps = eps
        self.tau = tau
        self.decay = decay

    def fit(self, X: Any, y: object = None) -> RobustCovariance:  # noqa: ANN401, ARG002 (their contract)
        """Filter the rows and estimate from those that are kept.

        Args:
            X: (n, d) numbers, finite, n > d.
            y: not used.

        Raises:
            InputError: a parameter is out of its range, or there are too few rows.
            ValueError: `X` is no matrix of finite numbers.
        """
        rows = _rows(self, X)
        self.support_ = _support(self, rows)
        self.weights_ = self.support_ / self.support_.sum()
        super().fit(rows[self.support_])
        return _named(self, X)


class FilteredPCA(PCA):  # type: ignore[misc] # scikit-learn has no types
    """Principal components of Gaussian rows of which a part is arbitrary: PCA of what the filter keeps.

    Everything that `sklearn.decomposition.PCA` has is of the kept rows; `transform` takes all rows.

    Source, guarantee and breakdown point: as `RobustCovariance`.

    Attributes:
        n_components: how many, or the part of the variance to be explained; None is min(n, d).
        eps: the part that may be arbitrary, in [0, 1/2).
        tau: the probability of failure that the thresholds allow, in (0, 1).
        decay: how fast the tails are taken to fall off; None tunes it.
        assume_centered: the filter takes the mean to be 0; the components are about the kept rows' mean.
        whiten: give transformed rows unit variances.
        random_state: of the randomised solver that scikit-learn takes for many columns.
        components_: (n_components, d) float64, by descending variance.
        explained_variance_: (n_components,) float64, over the number of kept rows less 1.
        mean_: (d,) float64.
        support_: (n,) bool, the rows that were kept.
    """

    def __init__(
        self,
        n_components: float | str | None = None,
        *,
        eps: float = 0.1,
        tau: float = 0.1,
        decay: float | None = None,
        assume_centered: bool = False,
        whiten: bool = False,
        random_state: Any = None,  # noqa: ANN401 (a seed, a generator, or None)
    ) -> None:
        super().__init__(n_components=n_components, whiten=whiten, random_state=random_state)
        self.eps = eps
        self.tau = tau
        self.decay = decay
        self.assume_centered = assume_centered

    def fit(self, X: Any, y: object = None) -> FilteredPCA:  # noqa: ANN401, ARG002 (their contract)
        """Filter the rows and find the components of those that are kept.

        Args:
            X: (n, d) numbers, finite, n > d.
            y: not used.

        Raises:
            InputError: a parameter is out of its range, or there are too few rows.
            ValueError: `X` is no matrix of finite numbers, or has fewer than `n_components` columns.
        """
        rows = _rows(self, X)
        self.support_ = _support(self, rows)
        super().fit(rows[self.support_])
        return _named(self, X)

    def fit_transform(self, X: Any, y: object = None) -> Any:  # noqa: ANN401, ARG002 (their contract)
        """(n, n_components) float64, the scores of all rows. Arguments and errors as `fit`."""
        return self.fit(X).transform(X)

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401 (scikit-learn has no types)
        """As PCA's, but no sparse matrices or other libraries' arrays, and what it gives is float64."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.array_api_support = False
        tags.transformer_tags.preserves_dtype = ["float64"]
        return tags


def _rows(estimator: BaseEstimator, X: Any) -> Matrix:  # noqa: ANN401 (anything like an array)
    rows: Matrix = check_array(X, dtype=np.float64, ensure_min_samples=2, estimator=estimator)
    return rows


def _support(estimator: RobustCovariance | FilteredPCA, rows: Matrix) -> Mask:
    return keep(
        rows,
        estimator.eps,
        tau=estimator.tau,
        decay=estimator.decay,
        centred=estimator.assume_centered,
    )


def _named(estimator: Fitted, X: Any) -> Fitted:  # noqa: ANN401 (as above)
    """The estimator, with the names that the columns of a frame have: it was fitted to float64 rows."""
    validate_data(estimator, X, skip_check_array=True)
    return estimator


def keep(
    rows: Matrix, eps: float, *, tau: float = 0.1, decay: float | None = None, centred: bool = False
) -> Mask:
    """Which rows the covariance filter keeps; see `RobustCovariance`.

    Args:
        rows: (n, d) float64, finite.
        eps: the part that may be arbitrary, in [0, 1/2).
        tau: the probability of failure that the thresholds allow, in (0, 1).
        decay: how fast the tails are taken to fall off; None tunes it.
        centred: the mean is known to be 0.

    Returns:
        (n,) bool.

    Raises:
        InputError: a parameter is out of its range, or n <= d.
    """
    n, d = rows.shape
    if not 0 <= number(eps) < 0.5:
        raise InputError(f"eps must be in [0, 1/2), got {eps!r}")
    if not 0 < number(tau) < 1:
        raise InputError(f"tau must be in (0, 1), got {tau!r}")
    if decay is not None and not number(decay) > 0:
        raise InputError(f"decay must be positive, or None to have it tuned, got {decay!r}")
    eps, tau, decay = number(eps), number(tau), None if decay is None else number(decay)
    if n <= d:
        raise InputError(f"{n} samples of {d} features say nothing about outliers; give more than {d}")
    if eps == 0:
        return np.ones(n, bool)
    seen: dict[bytes, View] = {}

    def look(kept: Mask) -> View:  # trials differ in the tail constant only, so they begin alike
        if (key := kept.tobytes()) not in seen:
            seen[key] = view(rows[kept], tau, centred=centred)
        return seen[key]

    trial = partial(sift, look, n, eps=eps, tau=tau)
    return trial(decay=decay, most=n) if decay else tuned(trial, n, eps)


@dataclass(frozen=True, eq=False)
class View:
    """What one whitening shows of m rows.

    Attributes:
        near: (m,) bool, whose norm may be a Gaussian's.
        deviations: (m,) T along the quadratic form with the largest variance; 0 where no form has more
            variance than a Gaussian's, or where some rows are not near.
        rank: how many directions the rows have.
    """

    near: Mask
    deviations: Vector
    rank: int


def view(rows: Matrix, tau: float, *, centred: bool) -> View:
    """Whiten rows by their own covariance and look for what sticks out. Arguments as `keep`."""
    white = whitened(rows, centred=centred)
    m, rank = white.shape
    near, nothing = np.ones(m, bool), np.zeros(m)
    if not 0 < rank < m - 1:
        return View(near, nothing, rank)
    log = math.log(m / tau)
    bound = max(0.4 * rank * log, rank + 2 * math.sqrt(rank * log) + 2 * log)
    near = (white**2).sum(axis=1) <= bound
    if not near.all():
        return View(near, nothing, rank)
    T = deviations(white)
    return View(near, T if (T**2).mean() >= 1 else nothing, rank)


def sift(
    look: Callable[[Mask], View], n: int, *, eps: float, tau: float, decay: float, most: float
) -> Mask:
    """(n,) bool: drop what is far or passes the tails, until nothing is or over `most` are gone."""
    kept = np.ones(n, bool)
    while n - kept.sum() <= most:
        seen = look(kept)
        stay = seen.near if not seen.near.all() else within_tails(seen, eps, tau, decay)
        if stay.all():
            break
        kept[np.flatnonzero(kept)[~stay]] = False
    return kept


def tuned(trial: Callable[..., Mask], n: int, eps: float) -> Mask:
    """(n,) bool of the trial that drops 0.5 to 1.5 eps n rows, or of the nearest to that."""
    least, most = 0.5 * eps * n, 1.5 * eps * n
    low, decay, high = 0.0, 2.0, math.inf
    best, closest = np.ones(n, bool), math.inf
    for _ in range(_TRIALS):
        kept = trial(decay=decay, most=most)
        lost = n - kept.sum()
        miss = max(least - lost, lost - most, 0.0)
        if miss < closest:
            best, closest = kept, miss
        if not miss:
            break
        low, high = (low, decay) if lost > most else (decay, high)
        decay = 2 * low if math.isinf(high) else (low + high) / 2
    return best


def within_tails(seen: View, eps: float, tau: float, decay: float) -> Mask:
    """(m,) bool: the rows up to the first deviation that too many pass; of equal ones all or none.

    Arguments as `keep`.
    """
    T, m = seen.deviations, len(seen.deviations)
    ascending = np.sort(T)
    beyond = m - 1 - np.arange(m)
    floor = 3 * eps / (max(seen.rank, 1) * math.log(m / tau)) ** 2
    too_many = np.flatnonzero(beyond > m * (12 * np.exp(-decay * ascending) + floor))
    if not len(too_many) or too_many[0] == 0:  # the smallest deviation is no tail
        return np.ones(m, bool)
    # Copies of a row follow the first of them, so all of them are beyond the one before.
    stay: Mask = ascending[too_many[0] + 1] > T
    return stay


def whitened(rows: Matrix, *, centred: bool) -> Matrix:
    """(m, r) float64: linear images of the rows with covariance I, r the rank of the covariance.

    Columns are brought to one scale first, so that neither their units nor the largest row's overflow
    decide which directions count as none.
    """
    scaled = rows / _peaks(rows, 0.0)
    if not centred:
        scaled = scaled - scaled.mean(axis=0)
        scaled /= _peaks(scaled, 1e-12)  # a smaller spread is the rounding of a constant
    values, vectors = np.linalg.eigh(scaled.T @ scaled / len(rows))
    spread = values > max(rows.shape) * np.finfo(float).eps * values[-1]
    white: Matrix = scaled @ (vectors[:, spread] / np.sqrt(values[spread]))
    return white


def _peaks(rows: Matrix, least: float) -> Vector:
    peaks = np.abs(rows).max(axis=0)
    return np.asarray(np.where(peaks > least, peaks, np.inf))


def deviations(white: Matrix) -> Vector:
    """(m,) |y^T V y - mean| / sqrt 2 for the unit V for which this is largest in the mean square.

    Args:
        white: (m, r) y, with second moment I.
    """
    m, r = white.shape

    def centred_form(V: Matrix) -> Vector:
        form = np.einsum("ij,ij->i", white @ V, white)
        return np.asarray(form - form.mean())

    def apply(flat: Vector) -> Vector:
        image: Vector = white.T @ (white * centred_form(flat.reshape(r, r))[:, None]) / m
        return image.ravel()

    if r == 1:
        return np.asarray(np.abs(centred_form(np.eye(1))) / math.sqrt(2))
    # The norms' own form, which turns with the rows, and a little of everything that it may miss.
    start = apply(np.eye(r).ravel())
    other = np.random.default_rng(0).standard_normal((r, r))
    other = (other + other.T) / np.linalg.norm(other)
    start = start / (np.linalg.norm(start) or 1.0) + 0.1 * other.ravel()
    operator = LinearOperator((r * r, r * r), matvec=apply, dtype=np.float64)
    _, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE)
    return np.asarray(np.abs(centred_form(vectors[:, 0].reshape(r, r))) / math.sqrt(2))
