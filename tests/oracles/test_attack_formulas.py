"""Attacks against naive transcriptions of what their papers, or their code's formulas, say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from fedrobust import aggregate
from fedrobust.attacks import Attack, Chain, Fang, FangKrum, SignFlip, SignShuffle, View
from fedrobust.kernels import Matrix, Vector

SHAPES = [(1, 1, 1), (1, 3, 2), (2, 1, 3), (6, 1, 4), (8, 3, 40), (12, 5, 200)]
"""How many honest and malicious clients, and parameters."""


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def honest(h: int, d: int, seed: int = 0, common: float = 0.3) -> Matrix:
    rows = np.random.default_rng(seed).normal(0, 1, (h, d)) + common
    return rows.astype(np.float32).astype(np.float64)


def sent(attack: Attack, X: Matrix, f: int, model: Vector | None = None) -> Matrix:
    view = View.of(X, np.zeros((f, X.shape[1])), model=model)
    return np.asarray(attack(view, rng()).double().numpy())


# Fang et al., the trimmed mean and the median --------------------------------------------------------


def interval(values: Vector, sign: float, b: float) -> tuple[float, float]:
    """Section 3.3: where a malicious value is drawn from, given the honest ones of one parameter."""
    low, high = min(values), max(values)
    if sign == -1:
        return (high, b * high) if high > 0 else (high, high / b)
    return (low / b, low) if low > 0 else (b * low, low)


@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("b", [1.5, 2.0, 10.0])
@pytest.mark.parametrize(("h", "f", "d"), SHAPES)
def test_fang_draws_from_the_papers_intervals(h: int, f: int, d: int, b: float, models: bool) -> None:
    for seed, common in enumerate([0.0, 0.3, -3.0, 3.0]):
        X, w = honest(h, d, seed, common), honest(1, d, 9)[0]
        start = w if models else np.zeros(d)
        rows = sent(Fang(b, models), X, f, w)
        for j in range(d):
            low, high = interval(start[j] + X[:, j], np.sign(X[:, j].mean()), b)
            slack = 1e-6 * (abs(low) + abs(high) + abs(start[j]))
            assert (low - slack <= start[j] + rows[:, j]).all()
            assert (start[j] + rows[:, j] <= high + slack).all()


def test_fang_draws_evenly_and_each_row_by_itself() -> None:
    X = honest(5, 4000)
    rows = sent(Fang(), X, 3)
    ends = np.array([interval(X[:, j], np.sign(X[:, j].mean()), 2.0) for j in range(4000)]).T
    drawn = np.sort(((rows - ends[0]) / (ends[1] - ends[0])).ravel())
    assert np.abs(drawn - np.linspace(0, 1, len(drawn))).max() < 0.02
    assert (rows[0] != rows[1]).mean() > 0.99


@pytest.mark.parametrize("h", [7, 12])
def test_fang_costs_a_trimmed_mean_the_honest_values_on_one_side(h: int) -> None:
    """It cuts the malicious values off one end, and as many honest ones off the other."""
    f, X = 3, honest(h, 300)
    against = -np.sign(X.mean(axis=0))
    everything = np.vstack([sent(Fang(), X, f), X])
    left = np.sort(against * X, axis=0)[f:]
    value = aggregate(everything, "trimmed_mean", eps=f / (h + f)).value
    np.testing.assert_allclose(value, against * left.mean(axis=0), rtol=1e-5, atol=1e-6)
    median = aggregate(everything, "median").value
    ordered = np.sort(np.vstack([against * X, np.full((f, 300), np.inf)]), axis=0)
    middle = ordered[[(h + f - 1) // 2, (h + f) // 2]].mean(axis=0)
    np.testing.assert_allclose(median, against * middle, rtol=1e-5, atol=1e-6)


def test_fang_where_the_honest_agree_or_do_not_move() -> None:
    X = np.tile([0.0, 4.0, -4.0], (5, 1))
    rows = sent(Fang(2.0), X, 50)
    assert not rows[:, 0].any()
    assert (rows[:, 1] >= 2).all()
    assert (rows[:, 1] <= 4).all()
    assert (rows[:, 2] <= -2).all()
    assert (rows[:, 2] >= -4).all()
    huge = sent(Fang(1.5), 1e38 * honest(5, 20, common=1.0).clip(-2, 2), 2)
    assert np.isfinite(huge).all()


# Fang et al., Krum -----------------------------------------------------------------------------------


def krum(X: Matrix, f: int) -> int:
    """Blanchard et al. 2017; of equal scores the first."""
    n = len(X)
    D = [[float(((x - y) ** 2).sum()) for y in X] for x in X]
    scores = [sum(sorted(D[i][:i] + D[i][i + 1 :])[: n - f - 2]) for i in range(n)]
    return int(np.argmin(scores))


def lambda_of_the_paper(X: Matrix, f: int, threshold: float) -> tuple[float, float]:
    """Section 3.2: the upper bound (theorem 1), then halved until Krum chooses the crafted row.

    The broadcast model is 0; every sign counts.
    """
    m, d = len(X) + f, X.shape[1]
    D = [[math.dist(x, y) for y in X] for x in X]
    sums = [sum(v**2 for v in sorted(D[i][:i] + D[i][i + 1 :])[: m - f - 2]) for i in range(len(X))]
    largest = math.sqrt(min(sums) / ((m - 2 * f - 1) * d))
    largest += max(math.dist(x, np.zeros(d)) for x in X) / math.sqrt(d)
    s, value = np.sign(X.mean(axis=0)), largest
    while value >= threshold and krum(np.vstack([np.tile(-value * s, (f, 1)), X]), f) >= f:
        value /= 2
    return value, largest


@pytest.mark.parametrize(("h", "f", "d"), [(4, 1, 3), (6, 1, 4), (8, 3, 40), (12, 5, 200), (20, 9, 30)])
@pytest.mark.parametrize("common", [0.05, 0.3, 2.0])
def test_fang_krum_is_the_paper_s(h: int, f: int, d: int, common: float) -> None:
    for seed in range(5):
        X = honest(h, d, seed, common)
        value, largest = lambda_of_the_paper(X, f, 1e-5)
        rows = sent(FangKrum(), X, f)
        expected = np.tile(-value * np.sign(X.mean(axis=0)), (f, 1))
        np.testing.assert_allclose(rows, expected, rtol=1e-4)
        for scale, chosen in [(1.0, value >= 1e-5), (2.0, False)]:
            if scale * value <= largest:
                weights = aggregate(np.vstack([scale * rows, X]), "krum", eps=f / (h + f)).weights
                assert weights is not None
                assert bool(weights[:f].sum() == 1) is chosen


def test_no_lambda_above_the_bound_is_chosen() -> None:
    for seed in range(20):
        X = honest(8, 20, seed)
        _, largest = lambda_of_the_paper(X, 3, 1e-5)
        row = -1.001 * largest * np.sign(X.mean(axis=0))
        assert krum(np.vstack([np.tile(row, (3, 1)), X]), 3) >= 3


def test_fang_krum_stops_at_its_threshold() -> None:
    """Honest rows that are all alike have scores of 0, which no other row has."""
    X = np.ones((6, 4))
    row = sent(FangKrum(0.1), X, 2)
    assert 0.05 <= -row.max() < 0.1
    assert not sent(FangKrum(), np.zeros((6, 4)), 2).any()
    assert np.isfinite(sent(FangKrum(), 1e30 * honest(6, 4), 2)).all()


def test_fang_krum_sees_what_nearly_equal_updates_differ_by() -> None:
    X = honest(8, 100, common=0.0) * 1e-4
    X = (X + 1).astype(np.float32).astype(np.float64)
    value, _ = lambda_of_the_paper(X, 3, 1e-9)
    np.testing.assert_allclose(-sent(FangKrum(1e-9), X, 3), value, rtol=1e-2)


def test_fang_krum_leaves_alone_what_nobody_moves() -> None:
    X = honest(8, 30)
    still = np.hstack([X, np.zeros((8, 70))])
    rows = sent(FangKrum(), still, 3)
    assert not rows[:, 30:].any()
    np.testing.assert_allclose(rows[:, :30], sent(FangKrum(), X, 3), rtol=1e-6)


# Blades, SignGuard -----------------------------------------------------------------------------------


def signs(row: Vector) -> Vector:
    return np.array([(row > 0).sum(), (row == 0).sum(), (row < 0).sum()])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_sign_shuffle_keeps_the_signs_and_the_length(h: int, f: int, d: int, seed: int) -> None:
    X = honest(h, d, seed) * (np.random.default_rng(seed).random((h, d)) < 0.7)
    length = np.sort(np.linalg.norm(X, axis=1))[(h - 1) // 2]
    rows = sent(SignShuffle(), X, f)
    if length > 0:
        assert np.abs(signs(rows[0]) - np.mean([signs(x) for x in X], axis=0)).max() <= 1
    assume(rows[0].any())
    assert np.linalg.norm(rows[0]) == pytest.approx(length, rel=1e-5)
    assert (rows == rows[0]).all()


def test_signguard_takes_shuffled_signs_for_honest_ones() -> None:
    f = 4
    for seed in range(5):
        X = honest(16, 2000, seed)
        for attack, passes in [(SignShuffle(), True), (SignFlip(), False)]:
            rows = attack(View.of(X, honest(f, 2000, 50 + seed)), rng()).double().numpy()
            weights = aggregate(np.vstack([rows, X]), "signguard", eps=0.2).weights
            assert weights is not None
            assert bool(weights[:f].sum() >= 0.2 - 1e-9) is passes
        row, mean = sent(SignShuffle(), X, f)[0], X.mean(axis=0)
        assert row @ mean < 0.3 * np.linalg.norm(row) * np.linalg.norm(mean)


# Blades, clipped clustering --------------------------------------------------------------------------


def cosine_distances(X: Matrix) -> Matrix:
    units = X / np.linalg.norm(X, axis=1, keepdims=True)
    return np.asarray(np.maximum(1 - units @ units.T, 0))


def two_clusters(X: Matrix) -> tuple[Vector, float]:
    """Labels by single linkage on cosine distances, and the distance between the clusters."""
    D = cosine_distances(X)[np.triu_indices(len(X), 1)]
    labels = fcluster(linkage(D, "single"), 2, "maxclust")
    whole = cosine_distances(X)
    return labels, float(min(whole[i, j] for i, j in np.ndindex(whole.shape) if labels[i] != labels[j]))


@pytest.mark.parametrize(("h", "f", "d"), [(6, 1, 40), (8, 3, 40), (12, 5, 200), (12, 20, 3000)])
def test_a_chain_is_built_by_blades_formula(h: int, f: int, d: int) -> None:
    for seed in range(5):
        X = honest(h, d, seed)
        labels, distance = two_clusters(X)
        larger = X[labels == np.bincount(labels).argmax()]
        mean = X.mean(axis=0) / np.linalg.norm(X.mean(axis=0))
        cosines = larger @ mean / np.linalg.norm(larger, axis=1)
        row = larger[cosines.argmin()] / np.linalg.norm(larger[cosines.argmin()])
        theta, cross = math.acos(cosines.min()), 0.95 * math.acos(1 - distance)
        rows = sent(Chain(), X, f)
        length = np.sort(np.linalg.norm(X, axis=1))[(h - 1) // 2]
        for k in range(f):
            if theta + cross >= math.pi:
                row, cross = -mean, 0.0
            else:
                a = math.cos(theta + cross) - math.sin(theta + cross) / math.tan(theta)
                b = math.cos(cross) + math.sin(cross) / math.tan(theta)
                row, theta = a * mean + b * row, theta + cross
            np.testing.assert_allclose(rows[k] / length, row, atol=2e-3)


@pytest.mark.parametrize("f", [1, 3, 7])
def test_single_linkage_takes_a_chain_for_a_part_of_the_larger_cluster(f: int) -> None:
    for seed in range(10):
        X = honest(8, 500, seed, common=1.0)
        X[0] = honest(1, 500, 100 + seed, common=0.0)[0]  # one who stands apart
        alone, _ = two_clusters(X)
        labels, _ = two_clusters(np.vstack([X, sent(Chain(), X, f)]))
        assert (alone[1:] == alone[1]).all()
        assert (labels[1:] == labels[1]).all()
        assert labels[0] != labels[1]


def test_a_chain_ends_at_the_opposite_of_the_mean() -> None:
    X = honest(8, 500, common=3.0)
    rows, mean = sent(Chain(), X, 30), X.mean(axis=0)
    cosines = rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)
    assert cosines[0] > cosines[1] > cosines[2]
    np.testing.assert_allclose(cosines[-1], -1, atol=1e-6)


@pytest.mark.parametrize(
    "X", [np.zeros((5, 3)), np.ones((5, 3)), np.ones((1, 3)), 1e-30 * np.ones((2, 3))]
)
def test_a_chain_without_a_direction_stays_where_the_mean_is(X: Matrix) -> None:
    np.testing.assert_allclose(sent(Chain(), X, 4), np.tile(X[0], (4, 1)), rtol=1e-5, atol=1e-29)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_a_chain_has_the_honest_length(h: int, f: int, d: int, seed: int) -> None:
    X = honest(h, d, seed)
    assume(np.linalg.norm(X.mean(axis=0)) > 1e-3)
    length = np.sort(np.linalg.norm(X, axis=1))[(h - 1) // 2]
    np.testing.assert_allclose(np.linalg.norm(sent(Chain(), X, f), axis=1), length, rtol=1e-3)
