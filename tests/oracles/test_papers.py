"""Each rule against a naive transcription of its paper: loops over rows, no Gram matrix, no sharing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, MeanShift, estimate_bandwidth

from fedrobust import MDA, SMEA, InputError, aggregate
from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules import mda as mda_rule
from fedrobust.verdict import ALARMING, VISIBLE

SHAPES = [(9, 4, 2), (12, 40, 3), (15, 1, 3), (16, 7, 3), (20, 6, 0)]
DTYPES = [(np.float32, 1e-5), (np.float64, 1e-9)]


def rows(n: int, d: int, f: int, seed: int = 0) -> Matrix:
    X = np.random.default_rng(seed).normal(size=(n, d))
    X[:f] += 4
    return X


def square(x: Vector) -> float:
    return float(sum(v * v for v in x))


def mean(X: Matrix) -> Vector:
    return np.asarray(sum(X) / len(X))


def as_gram(X: Matrix, f: int) -> Gram:
    return Gram(lambda: X @ X.T, np.full(len(X), 1 / len(X)), f / len(X))


# Transcriptions: (X, f) -> the aggregate -------------------------------------------------------------


def krum_scores(X: Matrix, f: int) -> list[float]:
    """Blanchard et al. 2017, section 4: s(i) sums over the n - f - 2 closest vectors to V_i."""
    scores = []
    for i, x in enumerate(X):
        distances = sorted(square(x - y) for j, y in enumerate(X) if j != i)
        scores.append(sum(distances[: len(X) - f - 2]))
    return scores


def krum(X: Matrix, f: int) -> Vector:
    scores = krum_scores(X, f)
    return np.asarray(X[scores.index(min(scores))])


def multi_krum(X: Matrix, f: int) -> Vector:
    """Section 6, with m = n - f: the mean of the m vectors of the smallest scores."""
    scores = krum_scores(X, f)
    return mean(X[sorted(range(len(X)), key=scores.__getitem__)[: len(X) - f]])


def median(X: Matrix, f: int) -> Vector:
    """Yin et al. 2018, definition 1."""
    result = []
    for column in X.T:
        values, half = sorted(column), len(column) // 2
        result.append(values[half] if len(column) % 2 else (values[half - 1] + values[half]) / 2)
    return np.array(result)


def trimmed_mean(X: Matrix, f: int) -> Vector:
    """Yin et al. 2018, definition 2: without the largest and smallest fraction beta = f / n."""
    return np.array([sum(sorted(column)[f : len(X) - f]) / (len(X) - 2 * f) for column in X.T])


def nnm(X: Matrix, f: int) -> Matrix:
    """Allouah et al. 2023, algorithm 2: y_i = the mean of the n - f nearest neighbours of x_i."""

    def neighbours(x: Vector) -> list[int]:
        return sorted(range(len(X)), key=lambda j: square(x - X[j]))[: len(X) - f]

    return np.array([mean(X[neighbours(x)]) for x in X])


def clip(X: Matrix, radius: float) -> Matrix:
    """x_i min(1, tau / ||x_i||), as in Karimireddy, He, Jaggi 2021, algorithm 2."""
    return np.array([x * min(1.0, radius / math.sqrt(square(x))) for x in X])


def default_radius(X: Matrix, f: int) -> float:
    return sorted(math.sqrt(square(x)) for x in X)[len(X) - f - 1]


def entropy_scores(along: list[Vector], variances: list[float], alpha: float) -> Vector:
    """(x - mu)^T U (x - mu) over the largest eigenvalue of U; the top direction alone as alpha grows."""
    if alpha == math.inf:
        return np.asarray(along[int(np.argmax(variances))] ** 2)
    emphasis = [math.exp(alpha * (v / max(variances) - 1)) for v in variances]
    return np.sum([u * a**2 for u, a in zip(emphasis, along, strict=True)], axis=0)


def filtered(
    X: Matrix,
    f: int,
    shares: Vector | None = None,
    alpha: float = math.inf,
    factor: float = VISIBLE,
) -> Vector:
    """Diakonikolas & Kane 2019, section 3, in d-space: soft weights, the singular vectors of the rows.

    The thresholds are ours: `VISIBLE` times lambda_{f+2} of the raw round, `ALARMING` times once f/n of
    the mass is gone; lambda of the rows as if their shares were equal, times the largest share over
    that. And so is the use of all singular vectors before they are worked out anew. Finite
    alpha: Dong, Hopkins, Li 2019, scores (x - mu)^T U (x - mu).
    """
    n, d = X.shape
    b = np.ones(n) / n if shares is None else shares
    w, edge, best, smallest = b.copy(), None, b, math.inf

    def level() -> float | None:
        fresh = 1 - sum(w) < f / n - 1e-9
        return edge and edge * factor * (1 if fresh else ALARMING / VISIBLE)

    while True:
        p = w / sum(w)
        mu = p @ X
        _, singular, directions = np.linalg.svd(np.sqrt(p)[:, None] * (X - mu), full_matrices=False)
        spectrum = [*singular**2, *[0.0] * n]
        gone, kept = sum(w == 0), p / b
        u = kept / sum(kept)
        even = np.linalg.svd(np.sqrt(u)[:, None] * (X - u @ X), compute_uv=False) ** 2
        if edge is None and f - gone + 2 <= min(n, d) and even[f - gone + 1] > 1e-9 * even[0]:
            edge = even[f - gone + 1] * sum(kept) * max(b[w > 0])
        if spectrum[0] < smallest:
            best, smallest = p, spectrum[0]
        if f == 0 or spectrum[0] <= (level() or 0.0):
            return best
        steps = 0
        while True:
            p = w / sum(w)
            along = [(X - p @ X) @ v for v in directions]
            variances = [p @ a**2 for a in along]
            if max(variances) <= (level() or spectrum[0]) * (1 - 1e-9):
                break
            tau = entropy_scores(along, variances, alpha)
            after = w * (1 - tau / max(t for t, mass in zip(tau, w, strict=True) if mass > 0))
            after[after < 1e-12] = 0
            if 1 - sum(after) > 2 * f / n + 1e-9:
                break
            w, steps = after, steps + 1
        if not steps:
            return best


def spectral_filter(X: Matrix, f: int, shares: Vector | None = None, alpha: float = math.inf) -> Vector:
    return filtered(X, f, shares, alpha) @ X


def without_loud(X: Matrix, f: int, factor: float) -> Vector:
    """1 / n for rows that keep half of their weight in a filter of this factor, if they are n - f."""
    n = len(X)
    if f + 2 > min(X.shape):
        return np.full(n, 1 / n)
    quiet = filtered(X, f, factor=factor) >= 0.5 / n
    return np.asarray(quiet / n if sum(quiet) >= n - f else np.full(n, 1 / n))


def root(X: Matrix) -> Vector:
    """The server's own row in these tests."""
    return np.asarray(0.7 * X[-1] + 0.1)


def meamed(X: Matrix, f: int) -> Vector:
    """Xie et al. 2018: of every coordinate the mean of the n - f values nearest to the median."""
    middle = median(X, f)
    return np.array(
        [
            sum(sorted(column, key=lambda v, m=m: (abs(v - m), v))[: len(X) - f]) / (len(X) - f)
            for column, m in zip(X.T, middle, strict=True)
        ]
    )


def sign_majority(X: Matrix, f: int) -> Vector:
    """Bernstein et al. 2018, algorithm 1: sign(sum of signs)."""
    return np.array([np.sign(sum(int(np.sign(v)) for v in column)) for column in X.T], dtype=float)


def bulyan(X: Matrix, f: int) -> Vector:
    """El Mhamdi et al. 2018, section 4: theta = n - 2f choices of Krum, beta = theta - 2f values."""
    if len(X) < 4 * f + 3:
        raise InputError("needs at least 4 f + 3")
    left, chosen = list(X), []
    while len(chosen) < len(X) - 2 * f:
        scores = []
        for i, x in enumerate(left):
            distances = sorted(square(x - y) for j, y in enumerate(left) if j != i)
            scores.append((sum(distances[: max(len(left) - f - 2, 1)]), sum(distances)))
        chosen.append(left.pop(scores.index(min(scores))))
    return meamed(np.array(chosen), 2 * f)


def medoid(X: Matrix, f: int) -> Vector:
    return np.asarray(min(X, key=lambda x: sum(math.sqrt(square(x - y)) for y in X)))


def centered_clipping(X: Matrix, f: int, steps: int, radius: float | None = None) -> Vector:
    """Karimireddy et al. 2021, algorithm 2, from the centre 0."""
    v = np.zeros(X.shape[1])
    for _ in range(steps):
        tau = default_radius(X - v, f) if radius is None else radius
        v = v + mean(clip(X - v, tau))
    return v


def monna(X: Matrix, f: int, trusted: Vector) -> Vector:
    """Farhadkhani et al. 2023: the mean of the n - f vectors nearest to one's own."""
    return mean(np.array(sorted(X, key=lambda x: square(x - trusted))[: len(X) - f]))


def caf(X: Matrix, f: int) -> Vector:
    """Allouah et al. 2025, algorithm 2, with unit weights; exact eigenvector, max over the support."""
    c, best, smallest = np.ones(len(X)), mean(X), math.inf
    while sum(c) > len(X) - 2 * f + 1e-7:
        mu = c @ X / sum(c)
        covariance = sum(
            weight * np.outer(x - mu, x - mu) for weight, x in zip(c, X, strict=True)
        ) / sum(c)
        values, vectors = np.linalg.eigh(covariance)
        if values[-1] < smallest:
            best, smallest = mu, values[-1]
        tau = np.array([((x - mu) @ vectors[:, -1]) ** 2 for x in X])
        c = c * (1 - tau / max(t for t, weight in zip(tau, c, strict=True) if weight > 0))
        c[c < 1e-12] = 0
    return best


def subsets(X: Matrix, f: int) -> Any:
    return itertools.combinations(range(len(X)), len(X) - f)


def mda(X: Matrix, f: int) -> Vector:
    """By enumeration: the set whose pairs, the farthest first, are least."""

    def pairs(chosen: tuple[int, ...]) -> list[float]:
        found = [square(X[i] - X[j]) for i, j in itertools.combinations(chosen, 2)]
        return sorted(found, reverse=True)

    return mean(X[list(min(subsets(X, f), key=pairs))])


def smea(X: Matrix, f: int) -> Vector:
    """Allouah et al. 2023, by enumeration: the set of smallest top eigenvalue."""

    def spread(chosen: tuple[int, ...]) -> float:
        part = X[list(chosen)]
        return float(np.linalg.svd(part - mean(part), compute_uv=False)[0])

    return mean(X[list(min(subsets(X, f), key=spread))])


def dnc(X: Matrix, f: int, c: float) -> Vector:
    """Shejwalkar & Houmansadr 2021, algorithm 2, with all coordinates and one iteration."""
    centred = X - mean(X)
    v = np.linalg.svd(centred)[2][0]
    scores = [(x @ v) ** 2 for x in centred]
    return mean(X[sorted(range(len(X)), key=scores.__getitem__)[: len(X) - int(c * f)]])


def cosine(x: Vector, y: Vector) -> float:
    return float(sum(x * y)) / math.sqrt(square(x) * square(y))


def fltrust(X: Matrix, f: int) -> Vector:
    """Cao et al. 2021, algorithm 2."""
    g0 = root(X)
    trust = [max(0.0, cosine(x, g0)) for x in X]
    scaled = [t * math.sqrt(square(g0) / square(x)) * x for t, x in zip(trust, X, strict=True)]
    return np.asarray(sum(scaled) / sum(trust))


def foolsgold(X: Matrix, f: int) -> Vector:
    """Fung et al. 2018, algorithm 1; the mean by the weights, all alike if none has any."""
    n = len(X)
    cs = [[0.0 if i == j else cosine(X[i], X[j]) for j in range(n)] for i in range(n)]
    v = [max(row) for row in cs]
    for i, j in itertools.permutations(range(n), 2):
        if v[j] > v[i]:
            cs[i][j] *= v[i] / v[j]
    alpha = [min(max(1 - max(row), 0.0), 1.0) for row in cs]
    if max(alpha) < 1e-6:
        return mean(X)
    alpha = [min(max(a / max(alpha), 1e-9), 0.99) for a in alpha]
    alpha = [min(max(math.log(a / (1 - a)) + 0.5, 0.0), 1.0) for a in alpha]
    return np.asarray(np.array(alpha) @ X / sum(alpha))


def flame(X: Matrix, f: int) -> Vector:
    """Nguyen et al. 2022, algorithm 1, without the noise; clusters grow by the shortest link."""
    n, clusters, longest = len(X), [{i} for i in range(len(X))], 2.0
    links = sorted((1 - cosine(X[i], X[j]), i, j) for i, j in itertools.combinations(range(n), 2))
    for length, i, j in links:
        if length > longest + 1e-6:  # links of one length are all made
            break
        merged = next(c for c in clusters if i in c) | next(c for c in clusters if j in c)
        clusters = [c for c in clusters if not c & merged] + [merged]
        if max(map(len, clusters)) > n // 2:
            longest = min(longest, length)
    merged = max(clusters, key=len)
    lengths = [math.sqrt(square(x)) for x in X]
    return mean(clip(X[sorted(merged)], float(np.median(lengths))))


def two_clusters(X: Matrix, far: Callable[[list[float]], float]) -> list[list[int]]:
    """The two closest clusters become one until two are left; far: of the distances of all pairs."""
    table = [[1 - cosine(x, y) for y in X] for x in X]
    clusters = [[i] for i in range(len(X))]
    while len(clusters) > 2:
        a, b = min(
            itertools.combinations(clusters, 2),
            key=lambda pair: far([table[i][j] for i, j in itertools.product(*pair)]),
        )
        clusters = [c for c in clusters if c not in (a, b)] + [a + b]
    return sorted(clusters, key=len)


def larger_cluster(X: Matrix, far: Callable[[list[float]], float]) -> Matrix:
    smaller, larger = two_clusters(X, far)
    if len(smaller) == len(larger):
        raise InputError("the paper does not say which of two equal clusters")
    return X[sorted(larger)]


def clustering(X: Matrix, f: int) -> Vector:
    """Sattler et al. 2020, by complete linkage as in Blades."""
    return mean(larger_cluster(X, max))


def clipped_clustering(X: Matrix, f: int) -> Vector:
    """Li, Ngai, Voigt 2023, in a first round: no lengths are known before."""
    lengths = [math.sqrt(square(x)) for x in X]
    return mean(larger_cluster(clip(X, float(np.median(lengths))), lambda d: sum(d) / len(d)))


def signguard(X: Matrix, f: int) -> Vector:
    """Xu et al. 2022, algorithm 2, plain."""
    lengths = np.array([math.sqrt(square(x)) for x in X])
    m = sorted(lengths)[(len(X) - 1) // 2]
    features = np.array([[np.mean(x > 0), np.mean(x == 0), np.mean(x < 0)] for x in X])
    bandwidth = estimate_bandwidth(features, quantile=0.5)
    if bandwidth == 0:
        raise InputError("the paper does not say how wide to look where half of the rows are alike")
    labels = MeanShift(bandwidth=bandwidth).fit(features).labels_
    for nearly in (bandwidth * (1 - 1e-9), bandwidth * (1 + 1e-9)):
        if (MeanShift(bandwidth=nearly).fit(features).labels_ != labels).any():
            raise InputError("rows a bandwidth apart: rounding decides whether they are together")
    counts = [sum(labels == k) for k in range(max(labels) + 1)]
    if counts.count(max(counts)) > 1:
        raise InputError("the paper does not say which of two largest clusters")
    chosen = (labels == counts.index(max(counts))) & (lengths >= 0.1 * m) & (lengths <= 3 * m)
    return mean(clip(X[chosen], m))


def capped(p: Vector, cap: float) -> Vector:
    """The nearest distribution to p in relative entropy with no weight above cap: by bisection."""
    low, high = 0.0, cap / min(p[p > 0])
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(np.minimum(cap, middle * p)) < 1 else (low, middle)
    return np.minimum(cap, high * p)


def no_regret(X: Matrix, f: int) -> Vector:
    """Hopkins, Li, Zhang 2020, algorithm 2, with the filter's threshold, along all that passes it."""
    n, edge, best, smallest, cap = len(X), None, None, math.inf, 1 / (len(X) - f)
    w = without_loud(X, f, 30.0)
    w = w / sum(w)
    for _ in range(50 + f):
        mu = w @ X
        values, vectors = np.linalg.eigh((X - mu).T @ np.diag(w) @ (X - mu))
        spectrum = [*values[::-1], *[0.0] * n]
        if values[-1] < smallest:
            best, smallest = w, values[-1]
        gone = sum(w == 0)
        if edge is None and f - gone + 2 <= min(sum(w > 0), X.shape[1]):
            edge = spectrum[f - gone + 1] if spectrum[f - gone + 1] > 1e-9 * spectrum[0] else None
        if f == 0 or spectrum[0] <= VISIBLE * (edge or 0.0):
            break
        marked = w.copy()
        for value, v in zip(values[::-1], vectors.T[::-1], strict=True):
            if value >= (VISIBLE * edge if edge else spectrum[0]):
                tau = ((X - mu) @ v) ** 2
                tau[w == 0] = 0
                marked *= 1 - (0.5 if edge else 1.0) * tau / max(tau)
        if sum(marked > 0) < n - f:
            break
        w = capped(marked, cap)
    return best @ X


def arc(X: Matrix, f: int) -> Matrix:
    """Allouah et al. 2024, algorithm 2: the k longest are clipped to the (k + 1)-th."""
    lengths = sorted((math.sqrt(square(x)) for x in X), reverse=True)
    return clip(X, lengths[math.floor(2 * f / len(X) * (len(X) - f))])


ORACLES: dict[str, Callable[[Matrix, int], Vector]] = {
    "mean": lambda X, _: mean(X),
    "krum": krum,
    "multi_krum": multi_krum,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "filter": spectral_filter,
    "entropy_filter": lambda X, f: spectral_filter(X, f, alpha=4.0),
    "entropy_filter(alpha=20.0)": lambda X, f: spectral_filter(X, f, alpha=20.0),
    "no_regret": no_regret,
    "meamed": meamed,
    "sign_majority": sign_majority,
    "sign_majority(scale=0.25)": lambda X, f: 0.25 * sign_majority(X, f),
    "bulyan": bulyan,
    "medoid": medoid,
    "centered_clipping": lambda X, f: centered_clipping(X, f, 1),
    "centered_clipping(steps=4)": lambda X, f: centered_clipping(X, f, 4),
    "centered_clipping(0.7, 3)": lambda X, f: centered_clipping(X, f, 3, 0.7),
    "monna": lambda X, f: monna(X, f, root(X)),
    "monna(index=5)": lambda X, f: monna(X, f, X[5]),
    "caf": caf,
    "mda": mda,
    "smea": smea,
    "dnc": lambda X, f: dnc(X, f, 1.0),
    "dnc(c=1.5)": lambda X, f: dnc(X, f, 1.5),
    "fltrust": fltrust,
    "foolsgold": foolsgold,
    "flame": flame,
    "clustering": clustering,
    "clipped_clustering": clipped_clustering,
    "signguard": signguard,
    "arc | mean": lambda X, f: mean(arc(X, f)),
    "arc | smea": lambda X, f: smea(arc(X, f), f),
    "nnm | mean": lambda X, f: mean(nnm(X, f)),
    "nnm | median": lambda X, f: median(nnm(X, f), f),
    "nnm | krum": lambda X, f: krum(nnm(X, f), f),
    "nnm | filter": lambda X, f: spectral_filter(nnm(X, f), f),
    "clip(1.5) | mean": lambda X, _: mean(clip(X, 1.5)),
    "clip | trimmed_mean": lambda X, f: trimmed_mean(clip(X, default_radius(X, f)), f),
    "clip(2.0) | nnm | multi_krum": lambda X, f: multi_krum(nnm(clip(X, 2.0), f), f),
}


@pytest.mark.parametrize("rule", ORACLES)
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_as_the_paper_says(
    rule: str, n: int, d: int, f: int, dtype: Any, precision: float, seed: int
) -> None:
    X = rows(n, d, f, seed).astype(dtype)
    anchors = {"root": root(X.astype(float))}
    try:
        expected = ORACLES[rule](X.astype(float), f)
    except InputError as reason:
        pytest.skip(str(reason))
    value = aggregate(X, rule, eps=f / n, anchors=anchors).value
    np.testing.assert_allclose(value, expected, atol=precision * 10)


@pytest.mark.parametrize(("n", "d"), [(10, 4), (11, 40), (30, 7), (31, 100)])
@pytest.mark.parametrize("seed", range(5))
def test_flame_admits_whom_hdbscan_does(n: int, d: int, seed: int) -> None:
    X = rows(n, d, n // 4, seed) + 1
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    clusters = HDBSCAN(
        min_cluster_size=n // 2 + 1,
        min_samples=1,
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    )
    labels = clusters.fit(np.maximum(1 - unit @ unit.T, 0)).labels_
    weights = aggregate(X, "flame").weights
    assert weights is not None
    np.testing.assert_array_equal(weights > 0, labels >= 0)


@pytest.mark.parametrize(
    ("X", "admitted"),
    [
        (np.ones((10, 3)), range(10)),
        (np.zeros((9, 3)), range(9)),
        (np.array([[1.0, 2.0]]), [0]),
        (np.array([[1.0, 2.0], [-3.0, 1.0]]), [0, 1]),
        (np.array([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]), [0, 1]),
        (np.array([[2.0], [1.0], [3.0], [-5.0]]), [0, 1, 2]),
        (np.repeat([[1.0, 0.0], [0.0, 1.0]], [6, 4], axis=0), range(6)),
        (np.repeat([[1.0, 0.0], [0.0, 1.0]], 5, axis=0), range(10)),  # no majority: all or nothing
        (np.concatenate([np.zeros((4, 3)), 1 + np.eye(7, 3) / 9]), range(4, 11)),
        (np.concatenate([np.full((4, 3), -1e30), 1 + np.eye(7, 3) / 9]), range(4, 11)),
        # Rows along one line, of any length: the last digit of a float32 cosine admits or refuses none.
        (np.outer(np.linspace(1, 9, 11), [0.3, 0.7, 0.1]).astype(np.float32), range(11)),
    ],
)
def test_flame_with_ties_zeros_and_few_rows(X: Matrix, admitted: Any) -> None:
    result = aggregate(X, "flame")
    assert result.weights is not None
    outside = np.setdiff1d(np.arange(len(X)), admitted)
    assert not result.weights[outside].any()
    if X.any():
        assert (result.weights[list(admitted)] > 0).all()
    if result.scores is not None:
        assert not result.scores[list(admitted)].any()
        assert (result.scores[outside] > 0).all()


ALIKE = [
    (np.ones((10, 3)), range(10)),
    (np.zeros((9, 3)), range(9)),
    (np.eye(5), range(5)),  # all at right angles: no two clusters
    (np.array([[1.0, 2.0]]), [0]),
    (np.array([[1.0, 2.0], [-3.0, 1.0]]), [0, 1]),
    (np.array([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]), [0, 1]),
    (np.array([[2.0], [1.0], [3.0], [-5.0]]), [0, 1, 2]),
    (np.repeat([[1.0, 0.0], [0.0, 1.0]], [6, 4], axis=0), range(6)),
    (np.repeat([[1.0, 0.0], [0.0, 1.0]], 5, axis=0), range(10)),  # neither is larger
    (np.concatenate([np.zeros((4, 3)), 1 + np.eye(7, 3) / 9]), range(4, 11)),
    (np.concatenate([np.zeros((6, 3)), 1 + np.eye(5, 3) / 9]), range(6)),
    (np.concatenate([np.full((4, 3), -1e30), 1 + np.eye(7, 3) / 9]), range(4, 11)),
    (np.outer(np.linspace(1, 9, 11), [0.3, 0.7, 0.1]).astype(np.float32), range(11)),
]


@pytest.mark.parametrize("rule", ["clustering", "clipped_clustering"])
@pytest.mark.parametrize("linkage", ["complete", "average", "single"])
@pytest.mark.parametrize(("X", "admitted"), ALIKE)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_two_clusters_with_ties_zeros_and_few_rows(
    rule: str, linkage: str, X: Matrix, admitted: Any, eps: float
) -> None:
    result = aggregate(X, f"{rule}(linkage={linkage!r})", eps=eps)
    assert result.weights is not None
    assert result.scores is not None
    assert np.isfinite(result.scores).all()
    if np.median(np.linalg.norm(X, axis=1)) > 0 or rule == "clustering":
        outside = np.setdiff1d(np.arange(len(X)), admitted)
        assert not result.weights[outside].any()
        assert (result.weights[list(admitted)] > 0).all()
        assert not result.scores[list(admitted)].any()
        assert (result.scores[outside] > 0).all()
    else:
        assert not result.value.any()


@pytest.mark.parametrize("linkage", ["complete", "average", "single"])
@pytest.mark.parametrize(("n", "d"), [(10, 4), (11, 40), (30, 7), (31, 100)])
@pytest.mark.parametrize("seed", range(5))
def test_two_clusters_are_those_of_scikit_learn(linkage: str, n: int, d: int, seed: int) -> None:
    X = rows(n, d, n // 4, seed) + 1
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    found = AgglomerativeClustering(n_clusters=2, metric="precomputed", linkage=linkage)
    labels = found.fit(np.maximum(1 - unit @ unit.T, 0)).labels_
    larger = labels == np.argmax(np.bincount(labels))
    larger |= 2 * larger.sum() == n
    for rule in ("clustering", "clipped_clustering"):
        weights = aggregate(X, f"{rule}(linkage={linkage!r})").weights
        assert weights is not None
        np.testing.assert_array_equal(weights > 0, larger)


@pytest.mark.parametrize("seed", range(20))
def test_single_linkage_is_the_papers_bipartition(seed: int) -> None:
    """Sattler et al. 2020: of all bipartitions the one whose largest cosine across is smallest."""
    X = np.random.default_rng(seed).normal(size=(7, 3))

    def across(part: tuple[int, ...]) -> float:
        return max(cosine(X[i], X[j]) for i in part for j in range(7) if j not in part)

    parts = [p for size in range(1, 4) for p in itertools.combinations(range(7), size)]
    smaller = min(parts, key=across)
    weights = aggregate(X, "clustering(linkage='single')").weights
    assert weights is not None
    np.testing.assert_array_equal(np.flatnonzero(weights == 0), smaller)


@pytest.mark.parametrize("rule", ["clustering", "clipped_clustering"])
def test_clusters_are_as_heavy_as_their_mass(rule: str) -> None:
    X = np.array([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2]])
    heavy = aggregate(X, rule, [3, 3, 1, 1, 1]).weights
    level = aggregate(X, rule, [3, 3, 2, 2, 2]).weights
    assert heavy is not None
    assert level is not None
    np.testing.assert_array_equal(heavy > 0, [True, True, False, False, False])
    assert (level > 0).all()


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_crowd_with_next_to_no_share_is_no_heavy_cluster(share: float) -> None:
    honest = 1 + np.random.default_rng(0).normal(size=(9, 30)) / 4
    crowd = -1e-3 * np.abs(np.random.default_rng(1).normal(size=(20, 30)))
    shares = [*np.full(20, share), *np.ones(9)]
    for rule in ("clustering", "clipped_clustering"):
        result = aggregate(np.concatenate([crowd, honest]), rule, shares)
        assert result.weights is not None
        assert not result.weights[:20].any()
        if share == 0:
            np.testing.assert_allclose(result.value, aggregate(honest, rule).value)
        assert np.linalg.norm(result.value) > 0.9 * np.linalg.norm(mean(honest))


def test_clients_without_share_split_nobody() -> None:
    X = np.random.default_rng(0).normal(size=(12, 5)) + 1
    X[0] = -X[1:].mean(0)
    shares = [0.0, *np.ones(11)]
    for rule in ("clustering", "clipped_clustering"):
        with_guest = aggregate(X, rule, shares).value
        np.testing.assert_allclose(with_guest, aggregate(X[1:], rule).value)


def nearest_point(X: Matrix, alphas: Vector, z: Vector) -> Vector:
    """argmin_z sum_i alpha_i ||x_i - z|| by Weiszfeld's algorithm from z."""
    for _ in range(20_000):
        closeness = alphas / np.maximum(np.linalg.norm(X - z, axis=1), 1e-12)
        before, z = z, closeness @ X / sum(closeness)
        if math.sqrt(square(z - before)) < 1e-13:
            break
    return z


def auto_gm(X: Matrix, c: float) -> Vector:
    """Li, Ngai, Voigt 2023, algorithm 1, with lambda = c n times the median distance at first."""
    n = len(X)
    z = nearest_point(X, np.full(n, 1 / n), mean(X))
    lam = c * n * sorted(np.linalg.norm(X - z, axis=1))[(n - 1) // 2]
    for _ in range(200):
        distances = np.linalg.norm(X - z, axis=1)
        eta, nearest = math.inf, sorted(distances)
        for p in range(1, n + 1):
            candidate = (sum(nearest[:p]) + lam) / p
            if candidate < nearest[p - 1]:
                break
            eta = candidate
        alphas = np.array([max(eta - d, 0) / lam for d in distances])
        assert sum(alphas) == pytest.approx(1)
        before, z = z, nearest_point(X, alphas, z)
        if math.sqrt(square(z - before)) < 1e-12:
            break
    return z


@pytest.mark.parametrize("c", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("n", "d", "f"), [shape for shape in SHAPES if shape[1] > 1])
@pytest.mark.parametrize("seed", range(3))
def test_the_auto_weighted_median_is_the_papers(c: float, n: int, d: int, f: int, seed: int) -> None:
    X = rows(n, d, f, seed)
    value = aggregate(X, f"auto_gm(regulariser={c})", eps=f / n).value
    np.testing.assert_allclose(value, auto_gm(X, c), atol=1e-3 if c < 1 else 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_auto_weights_come_from_the_median_to_the_nearest_rows(seed: int) -> None:
    X = rows(20, 6, 0, seed)
    median = aggregate(X, "geometric_median")
    smooth = aggregate(X, "auto_gm(regulariser=1e9)")
    np.testing.assert_allclose(smooth.value, median.value, atol=1e-6)
    sharp = aggregate(X, "auto_gm(regulariser=1e-9)")
    assert median.scores is not None
    np.testing.assert_allclose(sharp.value, X[np.argmin(median.scores)], atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("c", [0.3, 1.0, 3.0])
def test_the_bound_that_auto_gm_states(seed: int, c: float) -> None:
    X, honest, f = attacked(seed)
    eps = f / len(X)
    result, median = aggregate(X, f"auto_gm(regulariser={c})"), aggregate(X, "geometric_median")
    assert median.scores is not None
    typical = sorted(median.scores)[(len(X) - 1) // 2]
    assert typical <= max(median.scores[f:]) * (1 + 1e-6)
    if c > 2 * eps / (1 - 2 * eps):
        nearest = min(math.sqrt(square(result.value - x)) for x in honest)
        assert nearest <= 4 * (1 + c) * typical


@pytest.mark.parametrize(
    ("X", "value"),
    [
        (np.ones((10, 3)), np.ones(3)),
        (np.zeros((9, 3)), np.zeros(3)),
        (np.array([[1.0, 2.0]]), [1.0, 2.0]),
        (np.array([[1.0, 2.0], [3.0, 0.0]]), [2.0, 1.0]),
        (np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), [0.0, 0.0]),
        (np.concatenate([np.zeros((6, 3)), np.full((5, 3), 1e30)]), np.zeros(3)),
        (np.concatenate([np.full((4, 3), 1e30), 1 + np.zeros((7, 3))]), np.ones(3)),
        (np.array([[0.0], [1.0], [2.0]]), [1.0]),
    ],
)
@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("c", [1e-9, 1.0, 1e9])
def test_auto_gm_with_ties_zeros_and_few_rows(X: Matrix, value: Any, eps: float, c: float) -> None:
    result = aggregate(X, f"auto_gm(regulariser={c})", eps=eps)
    assert result.weights is not None
    assert result.scores is not None
    assert np.isfinite(result.scores).all()
    assert result.weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(result.value, value, atol=1e-6)


@pytest.mark.parametrize("rule", ["mda", "smea"])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("d", [1, 2, 30])
def test_branch_and_bound_finds_what_enumeration_finds(rule: str, seed: int, d: int) -> None:
    X = np.random.default_rng(seed).normal(size=(11, d))
    X[:3] *= 10.0 ** np.random.default_rng(seed).uniform(-2, 2)
    found = aggregate(X, rule, eps=4 / 11).value
    np.testing.assert_allclose(found, {"mda": mda, "smea": smea}[rule](X, 4), atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "equal rows", "long row", "signs", "one dimension"])
@pytest.mark.parametrize("seed", range(4))
def test_smea_searches_as_it_enumerates(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sets are enumerated; here the search has to find what is the least among them."""
    rng = np.random.default_rng(seed)
    X = {
        "normal": rng.normal(size=(12, 40)),
        "equal rows": np.repeat(rng.normal(size=(6, 40)), 2, axis=0),
        "long row": rng.normal(size=(12, 40)) * np.where(np.arange(12) < 1, 1e15, 1.0)[:, None],
        "signs": rng.choice([-1.0, 1.0], size=(12, 5)),
        "one dimension": rng.normal(size=(12, 1)),
    }[kind]
    enumerated = SMEA()(as_gram(X, 4))
    assert enumerated.notes["search_nodes"] == 0
    monkeypatch.setattr("fedrobust.rules.smea._FEW", 0)
    searched = SMEA()(as_gram(X, 4))
    least = enumerated.notes["kept_eigenvalue"]
    assert searched.notes["kept_eigenvalue"] == pytest.approx(least, rel=1e-8)
    if kind in {"normal", "one dimension"}:  # elsewhere sets tie
        np.testing.assert_allclose(searched.matrix, enumerated.matrix)


@pytest.mark.parametrize(
    ("kind", "nodes", "problems"), [("flat", 2e5, 5e3), ("shifted", 8e5, 1e4), ("orthonormal", 1, 1e3)]
)
def test_smea_of_forty_with_eight_malicious_is_searched_whatever_they_send(
    kind: str, nodes: float, problems: float
) -> None:
    X = np.random.default_rng(1).normal(size=(40, 1000))
    X[:8] += 0.2 if kind == "shifted" else 0.0
    gram = as_gram(np.eye(40) if kind == "orthonormal" else X, 8)
    found = SMEA()(gram)
    assert found.notes["search_nodes"] <= nodes
    assert found.notes["search_eigenproblems"] <= problems
    kept = np.flatnonzero(found.matrix[0])
    assert len(kept) == 32
    for out, row in itertools.product(np.setdiff1d(np.arange(40), kept), range(32)):  # no swap is better
        weights = np.zeros(40)
        weights[[*np.delete(kept, row), out]] = 1 / 32
        assert gram.eigenvalues(weights)[0] >= found.notes["kept_eigenvalue"] * (1 - 1e-8)


def test_smea_gives_up_on_ties_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrobust.rules.smea._PROBLEMS", 10)
    with pytest.raises(InputError, match="eigenproblems do not tell the best"):
        SMEA()(as_gram(rows(40, 100, 0), 8))


@pytest.mark.parametrize("shift", [0.0, 0.2, 4.0])
def test_mda_of_forty_with_eight_malicious_takes_few_nodes(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = np.random.default_rng(0).normal(size=(40, 1000))
    X[:8] += shift
    calls: list[int] = []
    monkeypatch.setattr(mda_rule, "_cover", lambda *a, real=mda_rule._cover: calls.append(1) or real(*a))
    weights = MDA()(as_gram(X, 8)).matrix[0]
    assert np.count_nonzero(weights) == 32
    assert len(calls) < 1000
    assert shift < 4 or not weights[:8].any()


@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_geometric_median_minimises_the_sum_of_distances(
    n: int, d: int, f: int, seed: int, weighted: bool
) -> None:
    X = rows(n, d, f, seed)
    mass = np.random.default_rng(seed).uniform(0.5, 1, n) if weighted else np.ones(n)

    def objective(z: Vector) -> float:
        return float(sum(m * math.sqrt(square(z - x) + 1e-24) for m, x in zip(mass, X, strict=True)))

    starts = [mean(X), median(X, f), *X] if d == 1 else [mean(X)]
    oracle = min(
        (minimize(objective, start, tol=1e-12) for start in starts), key=lambda found: found.fun
    )
    value = aggregate(X, "geometric_median", mass).value
    assert objective(value) <= oracle.fun * (1 + 1e-6)
    if d > 1:
        np.testing.assert_allclose(value, oracle.x, atol=1e-4)


@pytest.mark.parametrize(("n", "s"), [(8, 2), (9, 2), (9, 4), (5, 1), (3, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_bucketing_averages_each_row_once_in_buckets_of_s(n: int, s: int, seed: int) -> None:
    """Karimireddy, He, Jaggi 2022, algorithm 1, seen through rules that show what is in a bucket."""
    X = 2.0 ** np.arange(n)[:, None]  # sums of powers of two tell which rows they are made of

    def buckets(rule: str) -> Any:
        return aggregate(X, f"bucketing({s}) | {rule}", eps=0, seed=seed).value[0]

    assert buckets("mean") == pytest.approx(X.mean())
    chosen = aggregate(X, f"bucketing({s}) | multi_krum(m=1)", eps=0, seed=seed) if n // s >= 3 else None
    if chosen is not None and chosen.weights is not None:
        members = np.count_nonzero(chosen.weights)
        assert members in {s, n % s or s}
        np.testing.assert_allclose(chosen.weights[chosen.weights > 0], 1 / members)


def test_a_bucket_weighs_its_rows_by_their_shares() -> None:
    shares = np.array([1.0, 2.0, 3.0, 4.0])
    X = np.arange(4.0)[:, None]
    assert aggregate(X, "bucketing(4) | median", shares, eps=0).value[0] == pytest.approx(2.0)
    assert aggregate(X, "bucketing(2) | mean", shares, eps=0).value[0] == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_filter(seed: int) -> None:
    """Shares come in as the starting weights; f is how many of the lightest rows eps covers."""
    X = rows(14, 30, 2, seed)
    X[:2] += 6
    shares = np.random.default_rng(seed).uniform(0.9, 1.1, 14)
    shares /= shares.sum()
    result = aggregate(X, "filter", shares, eps=float(np.sort(shares)[:2].sum()))
    np.testing.assert_allclose(result.value, spectral_filter(X, 2, shares), atol=0.05)


def weighted_median(column: Vector, shares: Vector) -> tuple[float, float]:
    """The ends of the interval that minimises sum_i b_i |z - x_i|."""
    costs = [(round(float(shares @ np.abs(column - z)), 12), z) for z in column]
    least = [z for cost, z in costs if cost == min(costs)[0]]
    return min(least), max(least)


@pytest.mark.parametrize("seed", range(10))
def test_the_weighted_median_minimises_the_sum_of_absolute_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, shares = rng.normal(size=(9, 6)), rng.integers(0, 4, 9) + 1.0 * (np.arange(9) == 0)
    for value, column in zip(aggregate(X, "median", shares).value, X.T, strict=True):
        low, high = weighted_median(column, shares / shares.sum())
        assert value == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("eps", [0.1, 0.25, 0.4])
def test_the_weighted_trimmed_mean_cuts_eps_of_the_mass_at_each_end(seed: int, eps: float) -> None:
    """By brute force: each client is as many equal particles as its share, and particles are cut."""
    rng = np.random.default_rng(seed)
    X, counts = rng.normal(size=(7, 5)), rng.integers(1, 9, 7)
    counts[0] += 100 - counts.sum()
    particles = np.sort(np.repeat(X, counts, axis=0), axis=0)
    cut = round(100 * eps)
    expected = particles[cut : 100 - cut].mean(0)
    shares = counts.astype(float)
    np.testing.assert_allclose(aggregate(X, "trimmed_mean", shares, eps=eps).value, expected)


def test_shares_that_differ_by_rounding_trim_as_equal_ones() -> None:
    X = np.random.default_rng(0).normal(size=(11, 5))
    value = aggregate(X, "trimmed_mean", [0.1 + 0.2, *[0.3] * 10], eps=0.2).value
    np.testing.assert_allclose(value, trimmed_mean(X, 2))


def test_many_light_rows_next_to_the_middle_are_a_trimmed_mean() -> None:
    """Each holds less than what is taken for rounding; together they hold all that is left."""
    X = np.concatenate([[[-1.0], [1.0]], np.linspace(-0.01, 0.01, 25_000)[:, None]])
    shares = [1.0, 1.0, *np.full(25_000, 2e-10)]
    value = aggregate(X, "trimmed_mean", shares, eps=0.4999999).value
    assert abs(value[0]) <= 0.01


def attacked(seed: int) -> tuple[Matrix, Matrix, int]:
    """All rows, the honest ones among them, f: malicious rows at any distance, alike or not."""
    rng = np.random.default_rng(seed)
    f = int(rng.integers(1, 5))
    honest = rng.normal(size=(int(rng.integers(f + 3, 12)), int(rng.choice([1, 3, 30]))))
    sent = rng.normal(size=honest.shape[1]) * 10.0 ** rng.uniform(-1, 2)
    return (
        np.concatenate([sent + rng.uniform(0, 1) * rng.normal(size=(f, len(sent))), honest]),
        honest,
        f,
    )


def diameter(X: Matrix) -> float:
    return max(math.sqrt(square(x - y)) for x in X for y in X)


@pytest.mark.parametrize("seed", range(40))
def test_the_bounds_that_the_docstrings_state(seed: int) -> None:
    X, honest, f = attacked(seed)
    n, eps, centre = len(X), f / len(X), mean(honest)
    medoid = aggregate(X, "medoid").value
    farthest = max(math.sqrt(square(medoid - x)) for x in honest)
    assert farthest <= 2 * (1 - eps) / (1 - 2 * eps) * diameter(honest) + 1e-9
    neighbours = aggregate(X, f"monna(index={f})", eps=eps).value
    assert math.sqrt(square(neighbours - centre)) <= 2 * f / (n - f) * diameter(honest) + 1e-9
    around = aggregate(X, "meamed", eps=eps).value
    width = honest.max(0) - honest.min(0)
    assert (around >= honest.min(0) - width - 1e-9).all()
    assert (around <= honest.max(0) + width + 1e-9).all()
    spread = sum(square(x - centre) for x in honest) / len(honest)
    if n >= 2 * f + 3:
        chosen = aggregate(X, "krum", eps=eps).value
        assert square(chosen - centre) <= 6 * (1 + f / (n - 2 * f)) * spread + 1e-9


def test_a_value_without_share_is_no_middle_value() -> None:
    X = np.array([[0.0], [10.0], [3.0]])
    assert aggregate(X, "median", [1, 1, 0]).value[0] == pytest.approx(5.0)


@pytest.mark.parametrize("seed", range(20))
def test_mda_behind_a_mixing_of_identical_rows(seed: int) -> None:
    """What is left of their distances is rounding, which must not confuse the search."""
    shares = np.random.default_rng(seed).uniform(0.01, 1, 9)
    X = np.full((9, 2), -2.32503077)
    value = aggregate(X, "bucketing | mda", shares, eps=0.0, seed=seed).value
    np.testing.assert_allclose(value, X[0])


@pytest.mark.filterwarnings("ignore:Binning data failed")
@pytest.mark.parametrize("seed", range(30))
def test_signguard_keeps_the_largest_cluster_that_scikit_learn_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(4, 80)), int(rng.choice([8, 50, 1000]))
    X = rng.normal(size=(n, d)) + rng.choice([0, 0.3, 3]) * (np.arange(n) < n // 4)[:, None]
    X *= rng.random(X.shape) < rng.choice([0.8, 1.0])
    features = np.array([[np.mean(x > 0), np.mean(x == 0), np.mean(x < 0)] for x in X])
    bandwidth = estimate_bandwidth(features, quantile=0.5)
    labels = MeanShift(bandwidth=bandwidth, bin_seeding=True).fit(features).labels_
    sizes = np.bincount(labels)
    kept = aggregate(X, "signguard(low=0.0, high=1e9)").weights > 0
    assert kept.sum() == sizes.max()
    assert len(set(labels[kept])) == 1


def test_signguard_of_rows_none_of_which_is_near_another() -> None:
    """Each has a cell of its own, of which scikit-learn warns."""
    X = np.array([[1, -1, -1, -1, -1, -1, -1, -1], [1] * 8, [-1] * 8, [1, 1, 1, 1, -1, -1, -1, -1]])
    weights = aggregate(X * 1.0, "signguard", [0.96, 0.0, 0.04, 0.0], eps=0.0).weights
    assert weights.sum() == pytest.approx(1.0)
