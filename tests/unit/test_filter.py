"""What the filter removes, what it leaves alone, and what it says of the round."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from fedrobust import Aggregated, Filter, InputError, NoRegret, Verdict, aggregate
from fedrobust.gram import Gram
from fedrobust.kernels import Matrix


def attacked(n: int, d: int, f: int, shift: float, seed: int = 0) -> Matrix:
    """Isotropic clients about the origin, the first f of them moved together in one direction."""
    rng = np.random.default_rng(seed)
    X, direction = rng.normal(size=(n, d)), rng.normal(size=d)
    X[:f] += shift * direction / np.linalg.norm(direction)
    return X


def uniform(result: Aggregated) -> bool:
    return result.weights is not None and bool(np.allclose(result.weights, 1 / len(result.weights)))


def error(result: Aggregated) -> float:
    return float(np.linalg.norm(result.value))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "d", "f"), [(20, 2000, 4), (50, 2000, 10), (50, 200, 5), (10, 5000, 1)])
def test_a_coordinated_shift_above_the_bulk_is_removed(n: int, d: int, f: int, seed: int) -> None:
    # eps (1 - eps) s^2 against a bulk of about d / n: fifty times above.
    shift = np.sqrt(50 * (1 + np.sqrt(d / n)) ** 2 / (f / n * (1 - f / n)))
    X = attacked(n, d, f, shift, seed)
    result = aggregate(X, Filter(eps=f / n))
    assert result.verdict == Verdict.REMOVED
    assert result.weights is not None
    assert result.weights[:f].sum() < 0.02
    assert error(result) <= 1.2 * np.linalg.norm(X[f:].mean(0))
    assert error(aggregate(X, "mean")) > 2 * error(result)


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_below_the_bulk_is_invisible_and_everybody_is_kept(seed: int) -> None:
    result = aggregate(attacked(50, 5000, 10, 4.0, seed), Filter(eps=0.2))
    assert result.verdict == Verdict.CLEAR
    assert uniform(result)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [5, 6, 10, 15, 20, 40, 80])
@pytest.mark.parametrize("ratio", [20, 60])
def test_an_honest_round_keeps_everybody(n: int, ratio: int, seed: int) -> None:
    result = aggregate(attacked(n, ratio * n, 0, 0.0, seed), "filter")
    assert result.verdict == Verdict.CLEAR
    assert uniform(result)


@pytest.mark.parametrize("attackers", [15, 20])
def test_far_more_attackers_than_eps_exceed_the_bound(attackers: int) -> None:
    result = aggregate(attacked(50, 500, attackers, 200.0), Filter(eps=0.1))
    assert result.verdict == Verdict.EXCEEDED


@pytest.mark.parametrize(
    ("sigma", "shift", "verdict"),
    [
        (20.0, 20.0, Verdict.CLEAR),
        (8.0, 40.0, Verdict.REMOVED),
        (8.0, 0.0, Verdict.CLEAR),
        (1e-3, 0.0, Verdict.EXCEEDED),
    ],
)
def test_a_known_spread_is_the_threshold(sigma: float, shift: float, verdict: Verdict) -> None:
    result = aggregate(attacked(50, 1000, 5, shift), Filter(sigma=sigma, eps=0.1))
    assert result.verdict == verdict
    assert result.notes["threshold"] == pytest.approx(sigma**2 / 0.8)


@pytest.mark.parametrize(("n", "eps"), [(4, 0.2), (30, 0.0), (1, 0.4), (2, 0.49)])
def test_nobody_is_removed_where_nobody_can_be_malicious(n: int, eps: float) -> None:
    result = aggregate(attacked(n, 20, 1, 1e6), Filter(eps=eps))
    assert uniform(result)
    assert result.verdict == aggregate(attacked(n, 20, 1, 1e6), "mean", eps=eps).verdict
    assert result.verdict == {1: Verdict.CLEAR, 2: Verdict.NOT_JUDGED}.get(n, Verdict.EXCEEDED)
    honest = aggregate(attacked(n, 20, 0, 0.0), Filter(eps=eps))
    assert honest.verdict == (Verdict.NOT_JUDGED if n == 2 else Verdict.CLEAR)


@pytest.mark.parametrize("rule", ["mean", "filter", "no_regret", "caf"])
@pytest.mark.parametrize("sizes", [0.5, 1.0, 1.5])
def test_an_honest_round_of_unequal_shares_is_no_attack(rule: str, sizes: float) -> None:
    """With more coordinates than rows the spectrum tells the shares."""
    for seed in range(5):
        shares = np.exp(sizes * np.random.default_rng(seed).normal(size=30))
        result = aggregate(attacked(30, 3000, 0, 0.0, seed), rule, shares)
        assert result.verdict == Verdict.CLEAR
        if rule == "filter":
            np.testing.assert_allclose(result.weights, shares / shares.sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [0.5, 1.0])
def test_an_attack_is_seen_whatever_the_shares(sizes: float) -> None:
    for seed in range(5):
        shares = np.exp(sizes * np.random.default_rng(seed).normal(size=30))
        shares /= shares.sum()
        f = int(np.count_nonzero(np.cumsum(shares) <= 0.2))
        X = attacked(30, 3000, f, 300.0, seed)
        assert aggregate(X, "mean", shares).verdict == Verdict.EXCEEDED
        result = aggregate(X, "filter", shares)
        assert result.verdict == Verdict.REMOVED
        assert result.weights[:f].sum() < 0.02  # type: ignore[index]


@pytest.mark.parametrize("rule", ["mean", "filter", "no_regret", "caf", "bucketing | filter"])
def test_clients_without_a_share_change_nothing(rule: str) -> None:
    X = attacked(20, 200, 3, 200.0)
    alone = aggregate(X, rule)
    for more in (1, 5, 14, 20):
        Z, shares = np.vstack([X, np.zeros((more, 200))]), np.r_[np.ones(20), np.zeros(more)]
        result = aggregate(Z, rule, shares)
        assert result.verdict == alone.verdict
        if "bucketing" not in rule:  # which draws
            np.testing.assert_allclose(result.value, alone.value, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scores_rank_the_malicious_first(seed: int) -> None:
    result = aggregate(attacked(40, 800, 8, 100.0, seed), "filter")
    assert result.scores is not None
    assert set(np.argsort(-result.scores)[:8]) == set(range(8))
    assert result.scores[:8].min() > 1 > result.scores[8:].max() / 20


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_stay_comparable_beside_a_huge_row(dtype: Any) -> None:
    X = attacked(40, 800, 7, 100.0).astype(dtype)
    huge = np.full((1, 800), 1e30, dtype)
    beside, alone = aggregate(np.concatenate([X, huge]), "filter"), aggregate(X, "filter")
    assert beside.scores is not None
    assert alone.scores is not None
    assert np.isfinite(beside.scores).all()
    assert np.argmax(beside.scores) == 40
    assert set(np.argsort(-beside.scores)[1:8]) == set(range(7))
    ratio = beside.scores[:7] / alone.scores[:7]
    assert 0.1 < ratio.min() <= ratio.max() < 10


@pytest.mark.parametrize("n", [10, 100])
def test_rows_of_many_magnitudes_cannot_make_it_loop_for_long(n: int) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 50)) * 10.0 ** np.linspace(0, 16, n)[:, None]
    result = aggregate(X, Filter(eps=0.4))
    assert result.notes["steps"] <= n
    assert np.isfinite(result.value).all()


@pytest.mark.parametrize("rule", ["filter", "entropy_filter", "filter(removal='random')", "no_regret"])
@pytest.mark.parametrize("n", [100, 400])
def test_rows_of_many_magnitudes_do_not_take_honest_ones_along(rule: str, n: int) -> None:
    """Beyond 256 rows eigenvectors are approximate."""
    X = attacked(n, 2000, 0, 0.0).astype(np.float32)
    X[: n // 5] *= np.logspace(2, 16, n // 5, dtype=np.float32)[:, None]
    result = aggregate(X, rule, eps=0.2)
    assert result.weights is not None
    assert result.weights[: n // 5].max() < 1e-6 / n
    np.testing.assert_allclose(result.weights[n // 5 :], 1 / (n - n // 5), rtol=0.05)


@pytest.mark.parametrize("rule", ["filter", "entropy_filter", "filter(removal='random')"])
def test_rows_of_many_magnitudes_take_few_passes_without_a_bulk(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, leading = [], Gram.leading

    def counted(gram: Gram, *where: Any) -> Any:
        passes.append(where)
        return leading(gram, *where)

    monkeypatch.setattr(Gram, "leading", counted)
    n, d, f = 1000, 10, 200
    X = np.random.default_rng(0).normal(size=(n, d))
    X[:f] *= np.logspace(0, 28, f)[:, None]
    tracemalloc.start()
    result = aggregate(X, rule, eps=f / n, certified=False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.notes["steps"] > 100
    assert len(passes) < 80
    assert most < 50 * X.nbytes
    assert result.weights is not None
    assert result.weights[20:f].max() < 1e-6 / n  # the others are not far out
    assert error(result) < 0.3
    assert result.scores is not None
    assert result.scores[20:f].min() > result.scores[f:].max()


@pytest.mark.parametrize("removal", ["soft", "random"])
def test_randomised_removal_leaves_as_little(removal: str) -> None:
    X = attacked(50, 2000, 10, 200.0)
    result = aggregate(X, Filter(removal=removal), seed=3)
    assert result.weights is not None
    assert result.weights[:10].sum() < 0.02
    assert error(result) <= 1.2 * np.linalg.norm(X[10:].mean(0))
    kept = result.weights[10:]
    assert removal == "soft" or set(np.round(kept / kept.max(), 9)) <= {0.0, 1.0}


@pytest.mark.parametrize(("malicious", "shift"), [(0, 0.0), (5, 200.0), (10, 200.0), (20, 200.0)])
def test_eps_is_estimated_from_the_spectrum(malicious: int, shift: float) -> None:
    result = aggregate(attacked(50, 1000, malicious, shift), "filter(eps='auto')")
    assert result.certificate is not None
    assert result.certificate.eps == pytest.approx(malicious / 50, abs=0.021)
    assert error(result) < 1.5 * np.linalg.norm(attacked(50, 1000, 0, 0.0)[malicious:].mean(0))


@pytest.mark.parametrize("d", [5, 40])
def test_more_rows_than_coordinates(d: int) -> None:
    """Statistics: a d x d eigenproblem, no n x n matrix, and without a bulk the best iterate."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30_000, d))
    X[:3000, 0] += 30.0
    result = aggregate(X, "filter", eps=0.1)
    assert result.weights is not None
    assert result.weights[:3000].sum() < 0.01
    assert error(result) < 0.1
    assert result.certificate is not None
    assert error(result) <= result.certificate.bound(1.1)
    for rule in ["mean", "caf", "geometric_median", "dnc"]:
        assert np.isfinite(aggregate(X, rule, eps=0.1).value).all()
    assert np.isfinite(aggregate(X, "no_regret", eps=0.001).value).all()  # steps as many as bad rows
    with pytest.raises(InputError, match="compares every pair of rows, and 30000"):
        aggregate(X, "krum", eps=0.1)


def test_many_rows_and_many_coordinates_go_without_any_matrix() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(21_000, 2100)).astype(np.float32)
    X[:2100] += 1.0
    result = aggregate(X, "filter", eps=0.1)
    assert error(result) < 2 * np.linalg.norm(X[2100:].mean(0))
    assert error(aggregate(X, "mean")) > 3


@pytest.mark.parametrize("size", [10.0, 1e10, 1e30])
@pytest.mark.parametrize("alike", [0.0, 1e-12, 1e-7, 1e-3])
def test_nothing_is_left_of_rows_that_are_removed_together(size: float, alike: float) -> None:
    """A rounding error is too much of a weight: 1e-16 of 1e30 is 1e14."""
    X = attacked(20, 50, 0, 0.0)
    X[:4] = size * (10 + alike * X[:4])
    result = aggregate(X, "filter")
    assert result.weights is not None
    assert result.weights[:4].sum() * size < 1e-3
    np.testing.assert_allclose(result.weights[4:], 1 / 16, rtol=0.5)


def test_the_notes_tell_what_happened() -> None:
    notes = aggregate(attacked(50, 1000, 10, 100.0), "filter").notes
    assert notes["top_eigenvalue"] > notes["threshold"] > notes["kept_eigenvalue"]
    assert notes["removed"] == pytest.approx(0.2, abs=0.01)
    assert notes["steps"] >= 1


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_no_regret_takes_no_more_steps_than_it_may(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that remove a row, and there are none here."""
    looks, leading = [], Gram.leading

    def looked(gram: Gram, *where: Any) -> Any:
        looks.append(where)
        return leading(gram, *where)

    monkeypatch.setattr(Gram, "leading", looked)
    monkeypatch.setattr("fedrobust.rules.no_regret.without_loud", lambda gram, _: gram.shares)
    X = np.random.default_rng(0).normal(size=(300, 80))
    result = aggregate(X, NoRegret(steps), eps=0.2, certified=False)
    assert result.weights is not None
    assert result.weights.all()
    assert len(looks) == steps + 1  # before the first and after each


def test_no_regret_removes_rows_of_many_magnitudes_beside_its_steps() -> None:
    X = np.random.default_rng(0).normal(size=(100, 5))
    X[:10] *= np.logspace(3, 20, 10)[:, None]
    result = aggregate(X, NoRegret(steps=1), eps=0.1)
    assert result.weights is not None
    assert not result.weights[2:10].any()
