"""Outliers by quantum-entropy scores: every direction of large variance at once."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.filter import emphasis
from fedrobust.text import choose

_NOTHING = 1e-12
"""What has this part of the largest variance, or less, counts as having none."""
_FLOOR = 1e-8
"""Whitening takes no variance to be below this part of the largest."""
_NORM_TOLERANCE = 1e-4
"""How exact ||Sigma|| is where it is found by iteration."""
_POLYNOMIAL_TOLERANCE = 1e-3
"""How far the polynomial may be from the root that it stands for, where that is smallest."""
_SMALL = 64
"""Up to this size an eigenproblem costs nothing."""


class QUEDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    r"""Outlier detection by quantum-entropy scores.

        tau(x) = (x - mu)^T U (x - mu),   U = exp(alpha Sigma / ||Sigma||) / trace

    with mu and Sigma the mean and covariance of the points fitted. Outliers that lie together stretch
    Sigma, and U counts every direction that is stretched, not the largest alone: alpha = 0 scores by
    the distance from the mean, alpha -> infinity by the top direction ("naive spectral").

    Only the growth U has beyond the identity takes work: with S^T S = exp(alpha Sigma / ||Sigma||) - I,

        tau(x) = (|x - mu|^2 + |S (x - mu)|^2) / (d + ||S||_F^2).

    exact: S from the eigenvectors of Sigma, in O(n d min(n, d)).
    sketched: S = Q X f(Sigma) with k rows, X the centred points, Q random signs / sqrt k (Johnson and
    Lindenstrauss) and f a Chebyshev polynomial for sqrt((exp(z) - 1) / z), in O(n d k deg f): linear in
    n and in d. For any point |S (x - mu)|^2 has the right expectation, and a standard deviation of at
    most sqrt(2 / k) of it; k = 2 / accuracy^2. So has ||S||_F^2, which scales all scores alike.
    ||Sigma|| is then good to 2e-4.

    Source: Dong, Hopkins, Li, "Quantum Entropy Scoring for Fast Robust Mean Estimation and Improved
    Outlier Detection", NeurIPS 2019 (arXiv 1906.11366), its QUE scores. Deviation: what is sketched is
    U less its identity part, so that alpha = 0 is exact; theirs is all of U.

    Args:
        alpha: how much more directions of large variance count, 0 to 10 000; the paper recommends 4.
        contamination: the part of the points fitted that `predict` calls outliers, above 0 and at
            most 0.5.
        whiten: (m, d) points known to be good, m several times d: points are measured in units of
            their spread first (`whitening`, O(m d^2)). None takes the data as they are. Whitening is
            half of the method where the data's own variances differ by much.
        method: "exact", "sketched", or "auto": whichever is expected to take less time.
        accuracy: of |S (x - mu)|^2 where sketched: its relative standard deviation is at most this.
        random_state: of the sketch.

    Attributes:
        n_features_in_: d.
        location_: (d,) float64, mu after whitening.
        whitening_: (d, d) float64, or None.
        growth_: (k, d) float64, S over exp(alpha / 2), so that no alpha overflows.
        trace_: d + ||S||_F^2, over exp(alpha).
        method_: "exact" or "sketched".
        offset_: the score at which outliers begin.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> good, bad = rng.normal(size=(90, 5)), rng.normal(size=(10, 5)) + [9, 0, 0, 0, 0]
    >>> QUEDetector(contamination=0.1).fit_predict(np.concatenate([good, bad]))[-12:].tolist()
    [1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]
    """

    def __init__(
        self,
        alpha: float = 4.0,
        *,
        contamination: float = 0.1,
        whiten: npt.ArrayLike | None = None,
        method: str = "auto",
        accuracy: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.alpha = alpha
        self.contamination = contamination
        self.whiten = whiten
        self.method = method
        self.accuracy = accuracy
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: object = None) -> QUEDetector:  # noqa: ARG002 (scikit-learn's)
        """Learn mu, U and where outliers begin.

        Args:
            X: (n, d), n at least 2; converted to float64.
            y: ignored.

        Raises:
            InputError: a parameter is out of range, `whiten` does not have d columns, or values are so
                large that their squares overflow.
            ValueError: X is no finite matrix (scikit-learn's own words).
        """
        self._check_parameters()
        points: Matrix = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self.whitening_: Matrix | None = None
        if self.whiten is not None:
            self.whitening_ = whitening(self.whiten)
            if len(self.whitening_) != points.shape[1]:
                raise InputError(
                    f"whiten has {len(self.whitening_)} columns, but the data {points.shape[1]}; "
                    "give points of the same features"
                )
            points = points @ self.whitening_
        self.location_: Vector = points.mean(axis=0)
        centred = points - self.location_
        if not np.isfinite(np.vdot(centred, centred)):
            raise InputError(
                f"values up to {np.abs(centred).max():.3g} from the mean overflow when squared; "
                "divide the data by a constant: scores only scale"
            )
        sketch = sketch_size(self.accuracy)
        self.method_ = self.method
        if self.method == "auto":
            self.method_ = "sketched" if sketching_pays(centred.shape, self.alpha, sketch) else "exact"
        if self.method_ == "sketched":
            rng = check_random_state(self.random_state)
            self.growth_ = sketched_growth(centred, self.alpha, sketch, rng)
        else:
            self.growth_ = exact_growth(centred, self.alpha)
        identity = math.exp(-self.alpha) * centred.shape[1]
        # Where all points are one and alpha is large, nothing is left of the trace; nor of the scores.
        self.trace_ = identity + float(np.vdot(self.growth_, self.growth_)) or 1.0
        self.offset_ = float(np.percentile(-self._tau(centred), 100 * self.contamination))
        return self

    def score_samples(self, X: npt.ArrayLike) -> Vector:
        """(n,) float64 -tau of each point: the higher, the more normal, 0 at most.

        It is -inf for a point so far away that its square overflows.

        Args:
            X: (n, d).

        Raises:
            NotFittedError: before `fit`.
            ValueError: X is no finite matrix of d columns.
        """
        check_is_fitted(self)
        points: Matrix = validate_data(self, X, dtype=np.float64, reset=False)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.whitening_ is not None:
                points = points @ self.whitening_
            tau = self._tau(points - self.location_)
        # What overflows to both sides, or has no weight left, is no number; but it is far away.
        return np.where(np.isnan(tau), -np.inf, -tau)

    def decision_function(self, X: npt.ArrayLike) -> Vector:
        """(n,) float64 `score_samples` less `offset_`: negative for outliers. Raises as it does."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int_]:
        """(n,) 1 for what is normal, -1 for outliers. Raises as `score_samples`."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _tau(self, centred: Matrix) -> Vector:
        lengths = np.einsum("ij,ij->i", centred, centred)
        along = centred @ self.growth_.T
        grown = np.einsum("ij,ij->i", along, along)
        tau: Vector = (math.exp(-self.alpha) * lengths + grown) / self.trace_
        return tau

    def _check_parameters(self) -> None:
        for name, lowest, highest in (
            ("alpha", 0.0, 1e4),
            ("contamination", 1e-12, 0.5),
            ("accuracy", 1e-3, 1.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, Real | Integral) or not lowest <= float(value) <= highest:
                raise InputError(f"{name} must be between {lowest:g} and {highest:g}, got {value!r}")
        choose(self.method, ("auto", "exact", "sketched"), "method of QUEDetector")


def whitening(reference: npt.ArrayLike) -> Matrix:
    """(d, d) W, float64: the reference times W has covariance I.

    Where the reference does not vary (below 1e-8 of its largest variance) the matrix is as if it
    varied by that much, so that it stays finite.

    Args:
        reference: (m, d) points, m several times d; converted to float64.

    Raises:
        InputError: all points are one.
        ValueError: it is no finite matrix of at least 2 rows.
    """
    points: Matrix = check_array(reference, dtype=np.float64, ensure_min_samples=2)
    centred = points - points.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    if values[-1] <= 0:
        raise InputError(f"whiten needs points that differ; all {len(points)} are the same")
    matrix: Matrix = vectors / np.sqrt(np.maximum(values, _FLOOR * values[-1]))
    return matrix


def exact_growth(centred: Matrix, alpha: float) -> Matrix:
    """(k, d) S with exp(alpha) S^T S = exp(alpha Sigma / ||Sigma||) - I, from all eigenvectors of Sigma.

    Args:
        centred: (n, d) points less their mean.
        alpha: at least 0.
    """
    wide = centred.shape[1] > len(centred)
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(centred)
    values, vectors = np.linalg.eigh(gram)
    kept = values > _NOTHING * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    if len(values) == 0:
        return np.zeros((0, centred.shape[1]))
    if wide:
        vectors = centred.T @ vectors / np.sqrt(len(centred) * values)
    grown = np.maximum(emphasis(values, alpha) - math.exp(-alpha), 0.0)
    growth: Matrix = np.sqrt(grown)[:, None] * vectors.T
    return growth


def sketched_growth(centred: Matrix, alpha: float, size: int, rng: np.random.RandomState) -> Matrix:
    """(size, d) S of which E[exp(alpha) S^T S] = exp(alpha Sigma / ||Sigma||) - I.

    With A = alpha Sigma / ||Sigma|| and X the centred points, exp(A) - I = c X^T g(A) X over n for
    g(z) = (exp(z) - 1) / z, which has no zero near [0, alpha]: its root is smooth, and a polynomial
    of low degree. |S x|^2 has a standard deviation of sqrt(2 / size) of its expectation at most.

    Args:
        centred: (n, d) points less their mean.
        alpha: at least 0.
        size: rows of the sketch.
        rng: for its signs, and the start of the iteration for ||Sigma||.
    """
    count = len(centred)
    norm = top_variance(centred, rng)
    if norm == 0:
        return np.zeros((0, centred.shape[1]))

    def stretched(rows: Matrix) -> Matrix:
        """Rows times 2 Sigma / ||Sigma|| - I, whose spectrum is in [-1, 1]."""
        product: Matrix = (rows @ centred.T) @ centred
        product *= 2 / (count * norm)
        product -= rows
        return product

    signs = rng.choice([-1.0, 1.0], size=(size, count))
    before = signs @ centred
    now = stretched(before)
    first, second, *others = growth_polynomial(alpha)
    growth: Matrix = first * before + second * now
    for coefficient in others:
        before, now = now, 2 * stretched(now) - before
        growth += coefficient * now
    growth *= math.sqrt(alpha / (norm * count * size))
    return growth


def growth_polynomial(alpha: float) -> Vector:
    """(degree + 1,) Chebyshev coefficients on [0, alpha] of sqrt((exp(z) - 1) / z), over exp(alpha / 2).

    Off by at most 1e-3 of the function's smallest value, that at 0, or by 1e-9 where that is more.
    """

    def root(t: Vector) -> Vector:
        z = np.maximum(alpha * (t + 1) / 2, 1e-12)
        values: Vector = np.sqrt(-np.expm1(-z) / z * np.exp(z - alpha))
        return values

    degree = min(32 + int(4 * alpha), 1024)
    coefficients: Vector = chebyshev.chebinterpolate(root, degree)  # type: ignore[arg-type]  # takes all t at once
    tails = np.cumsum(np.abs(coefficients[::-1]))[::-1]
    tolerance = max(_POLYNOMIAL_TOLERANCE * math.exp(-alpha / 2), 1e-9)
    needed: Vector = coefficients[: max(int((tails > tolerance).sum()), 2)]
    return needed


def top_variance(centred: Matrix, rng: np.random.RandomState) -> float:
    """||Sigma||, from above by 2e-4 of it at most.

    Args:
        centred: (n, d) points less their mean.
        rng: for the start of Lanczos' iteration.
    """
    count, features = centred.shape
    if min(count, features) <= _SMALL:
        return float(np.linalg.norm(centred, 2) ** 2 / count)
    if not centred.any():
        return 0.0
    covariance = LinearOperator(
        (features, features), matvec=lambda v: centred.T @ (centred @ v) / count, dtype=np.float64
    )
    start = rng.standard_normal(features)
    (top,) = eigsh(covariance, k=1, v0=start, tol=_NORM_TOLERANCE, return_eigenvectors=False)
    return float(top) * (1 + _NORM_TOLERANCE)


def sketch_size(accuracy: float) -> int:
    """How many rows a sketch needs for this relative standard deviation of a score."""
    return math.ceil(2 / accuracy**2)


def sketching_pays(shape: tuple[int, ...], alpha: float, size: int) -> bool:
    """Whether a sketch is expected to take less time than all eigenvectors.

    Counted in multiplications of matrices; those of an eigenproblem are slower (measured).
    """
    count, features = shape
    least = min(count, features)
    exact = 2 * count * features * least + 20 * least**3
    sketched = 2 * (len(growth_polynomial(alpha)) + 1) * count * features * size
    return sketched < exact
