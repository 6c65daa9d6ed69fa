"""The filter for samples of a Gaussian with known covariance: cut where tails are too heavy.

`fedrobust.rules.Filter` asks nothing of the honest rows but bounded covariance, and marks rows down in
proportion. Where they are Gaussian, more is known: how many of them can be so far out. What is beyond
is cut, the rest keeps its whole weight, and the error falls from O(sqrt eps) to O(eps sqrt log(1/eps)).

Samples are long: all work is a few passes over the rows, in chunks of float32 about a centre that
outliers cannot move, added up in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.special import erfc

from fedrobust.errors import InputError
from fedrobust.gram import lanczos
from fedrobust.kernels import Matrix, Vector

Mask = npt.NDArray[np.bool_]

MOST_COORDINATES = 2048
"""Up to so many a d x d covariance is formed; beyond, its products with a vector are passes."""
_CHUNK = 1 << 22  # elements: large enough for a fast product, small enough to stay in the cache
_DIRECTIONS = 64
_LANCZOS_STEPS = 60
_CENTRED_BY = 1000  # rows whose median is the centre
_CHERNOFF = 2.5  # how many times as many rows as expected are too many; of the authors' code
_MARGIN = 1.05  # for the fluctuations of a clean sample's largest eigenvalue
_TAU = 0.1  # the probability of failure in the authors' code
_FARTHEST = 1e15  # squares are still float32
_LEFT = 0.1  # of the sum of squares; where less is, it is lost in the rounding of float32 products


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows, seen from a centre in units of their standard deviation.

    Attributes:
        X: (n, d) float32 or float64.
        centre: (d,) of the same dtype.
        sigma: standard deviation in every direction.
    """

    X: npt.NDArray[np.floating]
    centre: npt.NDArray[np.floating]
    sigma: float

    @property
    def shape(self) -> tuple[int, int]:
        """n, d."""
        return self.X.shape[0], self.X.shape[1]

    def chunks(
        self, chosen: Mask | None = None, *, exact: bool = False
    ) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.floating]]]:
        """Indices and (m, d) rows, a chunk at a time.

        Args:
            chosen: (n,) which rows; None is all.
            exact: in their own dtype rather than float32.
        """
        n, d = self.shape
        size = max(_CHUNK // d, 1)
        for start in range(0, n, size):
            span = slice(start, start + size)
            part, index = self.X[span], np.arange(start, min(start + size, n))
            if chosen is not None and not chosen[span].all():
                part, index = part[chosen[span]], index[chosen[span]]
            if len(index):
                seen = (part - self.centre) / part.dtype.type(self.sigma)
                yield index, seen if exact else seen.astype(np.float32, copy=False)

    def squares(self) -> Vector:
        """(n,) squared distances from the centre."""
        found = np.empty(self.shape[0])
        with np.errstate(over="ignore"):
            for index, part in self.chunks(exact=True):
                found[index] = np.einsum("ij,ij->i", part, part)
        return found

    def mean(self, chosen: Mask) -> Vector:
        """(d,) of the chosen rows, in X's own units."""
        total = np.zeros(self.shape[1])
        for _, part in self.chunks(chosen, exact=True):
            total += part.sum(axis=0)
        return np.asarray(self.centre + self.sigma * total / np.count_nonzero(chosen))

    def project(self, chosen: Mask, vectors: Matrix) -> Matrix:
        """(n, k) the chosen rows on (d, k) directions; the others are zero."""
        found = np.zeros((self.shape[0], vectors.shape[1]))
        narrow = vectors.astype(np.float32)
        for index, part in self.chunks(chosen):
            found[index] = part @ narrow
        return found


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over some rows of a sample: their number, the rows, their outer products.

    Attributes:
        count: how many rows.
        total: (d,).
        square: (d, d), or None where it is too large.
    """

    count: int
    total: Vector
    square: Matrix | None

    def __sub__(self, other: Moments) -> Moments:
        """Without rows that were among these."""
        left = None if self.square is None or other.square is None else self.square - other.square
        return Moments(self.count - other.count, self.total - other.total, left)

    @property
    def mean(self) -> Vector:
        """(d,)."""
        return self.total / self.count


@dataclass(frozen=True, eq=False)
class Filtered:
    """What a filter left.

    Attributes:
        kept: (n,) which rows.
        scores: (n,) the largest squared distance from the median along any direction met, over the
            threshold.
        first: top eigenvalue of the covariance of all rows, in units of sigma^2.
        last: that of the rows that were kept; within a hundredth where d > 2048.
        threshold: above it the last eigenvalue says that something is left.
        steps: in how many rounds rows were cut.
    """

    kept: Mask
    scores: Vector
    first: float
    last: float
    threshold: float
    steps: int


def tail_filter(sample: Sample, eps: float, *, method: str = "filter", seed: int = 0) -> Filtered:
    """Cut until no direction has more variance than honest rows have.

        lambda, v <- top eigenpairs of the covariance of the n rows that are left
        s <- 1 + sqrt(d/n)
        stop if no lambda passes the threshold, max(1 + 3 eps ln(1/eps), 1.05 s^2)
        m <- median of <v, x_i>,  T_i <- |<v, x_i> - m| / s - 2 eps
        cut from the first row on, in the order of T, beyond which there are more rows than
            2.5 n (P[N(0, 1) > T_i] + eps / (d ln(d eps / 0.1)))

    Every eigenvector that passes the threshold, 64 at most, is cut along before the next
    eigenproblem. The rows' second moments are corrected by those of the rows that were cut, so later
    rounds look at few rows, unless those were so far out that little is left of the sums. By "entropy"
    one cut serves all directions together (`_entropy_cut`), and what is tolerated is only what clean
    samples show, 1.05 s^2: a cut that finds no heavy tail ends it, so a low threshold costs little, and
    clusters that hide below the other are found.

    Source: Diakonikolas, Kamath, Kane, Li, Moitra, Stewart 2017, "Being Robust (in High Dimensions) Can
    Be Practical" (ICML, arXiv 1703.00893), section 3 and its authors' constants. Deviations: s, 1 in the
    paper, for samples that are not much longer than d: a direction that was chosen for its variance has
    heavier tails than another, and without s an honest sample of 10 d rows would be cut to nothing;
    a budget, as no more than 5 eps can be right; several directions an eigenproblem; rows that no
    honest row can be near go first (`within_reach`); the slack's d is at least 30, for below that its
    logarithm ends.

    Args:
        sample: of a Gaussian with covariance sigma^2 I, eps of it replaced.
        eps: 0 <= eps < 1/2.
        method: "filter" or "entropy".
        seed: of Lanczos' starting vector.

    Raises:
        InputError: the rows are so far apart that sigma cannot be their standard deviation.
    """
    n, d = sample.shape
    squares = sample.squares()
    kept = within_reach(squares, d, eps)
    steps, first = int(not kept.all()), math.nan
    scores = np.where(kept, 0.0, squares)
    moments, summed = moments_of(sample, kept), squares[kept].sum()
    while True:
        values, vectors = leading(sample, kept, moments, seed)
        mean = moments.mean
        if math.isnan(first):  # no less than that of all rows: the far ones count in every direction
            far = np.sqrt(squares[~kept]) + math.sqrt(mean @ mean)
            first = (moments.count * values[0] + far @ far) / n
        spread, threshold = tolerance(moments.count, d, eps)
        least = threshold if method == "filter" else _MARGIN * spread**2
        loud = max(int(np.count_nonzero(values > least)), 1)
        seen = sample.project(kept, np.column_stack([vectors[:, :loud], mean]))[kept]
        along = np.abs(seen[:, :loud] - np.median(seen[:, :loud], axis=0))
        scores[kept] = np.maximum(scores[kept], along.max(axis=1) ** 2)
        if eps == 0 or values[0] <= least:
            break
        squared = squares[kept] - 2 * seen[:, loud] + mean @ mean
        rest = np.maximum(squared - (along**2).sum(axis=1), 0.0)
        stay = _CUTS[method](eps, d)(along / spread, values[:loud], rest, least / spread**2)
        if stay.all() or np.count_nonzero(stay) < n * (1 - _budget(eps)):
            break
        gone = np.zeros(n, dtype=bool)
        gone[kept] = ~stay
        kept, steps = kept & ~gone, steps + 1
        if squares[kept].sum() > _LEFT * summed:
            moments = moments - moments_of(sample, gone)
        else:
            moments, summed = moments_of(sample, kept), squares[kept].sum()
    return Filtered(kept, scores / threshold, float(first), float(values[0]), threshold, steps)


def tolerance(n: int, d: int, eps: float) -> tuple[float, float]:
    """How far clean samples are spread in their widest direction, and the variance that is tolerated.

    Args:
        n: number of rows.
        d: number of coordinates.
        eps: what may be malicious.

    Returns:
        1 + sqrt(d/n), the largest standard deviation along any direction (Bai & Yin 1993); and
        max(1 + 3 eps ln(1/eps), 1.05 times its square).
    """
    spread = 1 + math.sqrt(d / n)
    noise = 3 * eps * math.log(1 / eps) if eps > 0 else 0.0
    return spread, max(1 + noise, _MARGIN * spread**2)


def _budget(eps: float) -> float:
    """The fraction of the rows that may be cut, and half of the honest ones at most.

    Where a tail is too heavy by half, one in five of the rows that are cut is bad.
    """
    return min(5 * eps, (1 + eps) / 2)


def within_reach(squares: Vector, d: int, eps: float) -> Mask:
    """(n,) rows so near the centre that they may be honest, at least 1 - 2 eps of all.

    An honest row is about sqrt(d) from the mean, and the centre is, too, at worst.

    Args:
        squares: (n,) squared distances from the centre, in units of sigma^2.
        d: number of coordinates.
        eps: what may be malicious.

    Raises:
        InputError: most rows are so far away that sigma cannot be their standard deviation.
    """
    usual = math.sqrt(np.quantile(squares, 1 - 2 * eps, method="higher")) if eps else np.inf
    reach = max(3 * math.sqrt(d) + 5 + math.sqrt(2 * math.log(len(squares))), usual)
    kept: Mask = squares <= reach**2
    farthest = math.sqrt(squares[kept].max())
    if not farthest < _FARTHEST:
        raise InputError(
            f"rows are {farthest:.3g} standard deviations from their median: give sigma, the "
            "standard deviation of the honest rows, or choose covariance='bounded'"
        )
    return kept


def sample_of(X: npt.NDArray[np.floating], sigma: float, seed: int = 0) -> Sample:
    """The rows about the coordinate-wise median of a thousand of them.

    Args:
        X: (n, d) float32 or float64.
        sigma: the standard deviation of honest rows in every direction.
        seed: of the choice of the thousand.
    """
    n = len(X)
    few = np.random.default_rng(seed).choice(n, min(n, _CENTRED_BY), replace=False)
    return Sample(X, np.median(X[few], axis=0).astype(X.dtype), sigma)


def moments_of(sample: Sample, chosen: Mask) -> Moments:
    """Of the chosen rows, about the centre."""
    d = sample.shape[1]
    total = np.zeros(d)
    square = np.zeros((d, d)) if d <= MOST_COORDINATES else None
    for _, part in sample.chunks(chosen):
        total += part.sum(axis=0)
        if square is not None:
            square += part.T @ part
    return Moments(int(np.count_nonzero(chosen)), total, square)


def leading(sample: Sample, kept: Mask, moments: Moments, seed: int = 0) -> tuple[Vector, Matrix]:
    """The largest eigenvalues of the covariance of the kept rows, (k,), and (d, k) eigenvectors.

    Args:
        sample: all rows.
        kept: (n,) which of them.
        moments: of the kept ones.
        seed: of Lanczos' starting vector.
    """
    d, mean = sample.shape[1], moments.mean
    if moments.square is not None:
        covariance = moments.square / moments.count - np.outer(mean, mean)
        values, vectors = eigh(covariance, subset_by_index=(max(d - _DIRECTIONS, 0), d - 1))
        return np.maximum(values[::-1], 0.0), vectors[:, ::-1]

    def apply(vector: Vector) -> Vector:
        found, narrow = np.zeros(d), vector.astype(np.float32)
        for _, part in sample.chunks(kept):
            found += part.T @ (part @ narrow)
        return np.asarray(found / moments.count - mean * (mean @ vector))

    start = np.random.default_rng(seed).standard_normal(d)
    values, images, _ = lanczos(apply, start, _LANCZOS_STEPS)
    # Images under the covariance are nearer the eigenvectors than what they are images of.
    vectors, _ = np.linalg.qr(images[:, :_DIRECTIONS])
    return values[:_DIRECTIONS], vectors


def _slack(eps: float, d: int) -> float:
    """The fraction of a sample by which its tails may be heavier than the Gaussian's."""
    many = max(d, 30)
    return eps / (many * max(math.log(many * eps / _TAU), 1.0))


def _light(chances: Vector, slack: float) -> Mask:
    """(m,) the rows to keep, up to the first one from which on the tail is too heavy.

    Args:
        chances: (m,) how likely an honest row is as far out as this one, at most.
        slack: the fraction of the sample that is allowed on top.
    """
    order = np.argsort(-chances, kind="stable")
    beyond = np.arange(len(chances) - 1, -1, -1)
    heavy = beyond > _CHERNOFF * len(chances) * (chances[order] + slack)
    keep = np.ones(len(chances), dtype=bool)
    if heavy.any():
        keep[order[int(np.argmax(heavy)) + 1 :]] = False
    return keep


Cut = Callable[[Matrix, Vector, Vector, float], Mask]
"""(m, k) distances from the median along k directions in units of the spread, the (k,) variances,
(m,) squared distances along all other directions, and the tolerated variance, to the (m,) rows to keep.
"""


def _gaussian_cut(eps: float, d: int) -> Cut:
    """Along one direction after the other, as long as its variance passes the threshold."""

    def cut(along: Matrix, _values: Vector, _rest: Vector, tolerated: float) -> Mask:
        keep = np.ones(len(along), dtype=bool)
        for column, distances in enumerate(along.T):
            left = np.flatnonzero(keep)
            # About the median: no less than the variance, and the first column passes in any case.
            if column == 0 or np.mean(distances[left] ** 2) > tolerated:
                far = np.maximum(distances[left] - 2 * eps, 0.0)
                keep[left] = _light(erfc(far / math.sqrt(2)) / 2, _slack(eps, d))
        return keep

    return cut


def _entropy_cut(eps: float, d: int) -> Cut:
    """By quantum-entropy scores, which see every large direction at once.

        tau_i <- (x_i - mu)^T U (x_i - mu),  U = exp(alpha Sigma / ||Sigma||)

    For an honest row tau is a sum of squares with the eigenvalues u of U for weights, and beyond
    tr U + 2 |u|_2 sqrt(t) + 2 |u|_max t with a probability of at most exp(-t) (Laurent & Massart 2000,
    lemma 1): this stands in for the Gaussian tail. alpha is 4, then 32; where the bound for a sum
    is too loose for either to find anything, the large directions are cut one after the other.
    Directions other than the large ones count as if they had variance 1.

    Source: Dong, Hopkins, Li 2019, "Quantum Entropy Scoring for Fast Robust Mean Estimation and Improved
    Outlier Detection" (arXiv 1906.11366). Deviations: the test; leading eigenvectors, not sketches.
    """
    along_directions = _gaussian_cut(eps, d)

    def cut(along: Matrix, values: Vector, rest: Vector, tolerated: float) -> Mask:
        squares = np.maximum(along - 2 * eps, 0.0) ** 2
        keep = np.ones(len(along), dtype=bool)
        for alpha in (4.0, 32.0):
            u, small = np.exp(alpha * (values / values[0] - 1)), np.exp(alpha * (1 / values[0] - 1))
            others = max(d - len(u), 0)
            length = math.sqrt(u @ u + others * small**2)
            excess = np.maximum(squares @ u + small * rest - u.sum() - others * small, 0.0)
            # excess = 2 length s + 2 s^2 for t = s^2, u's largest entry being 1
            root = (np.sqrt(length**2 + 2 * excess) - length) / 2
            keep = _light(np.exp(-(root**2)), _slack(eps, d))
            if not keep.all():
                return keep
        return along_directions(along, values, rest, tolerated)

    return cut


_CUTS = {"entropy": _entropy_cut, "filter": _gaussian_cut}
