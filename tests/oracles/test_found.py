"""Rounds in which a rule once did not keep what it says: each was found by a search or by a reader."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedrobust import InputError, aggregate
from fedrobust.integrations.defence import Defence, Offer
from fedrobust.optimisers import parse_optimiser
from fedrobust.statistics import RobustMean

Rows = npt.NDArray[np.float64]


def off(X: Rows, f: int, rule: str, **options: object) -> float:
    """How far a value is from the mean of the honest rows, which are the first ones, in their spread."""
    honest = X[: len(X) - f]
    value = np.asarray(aggregate(X, rule, **options).value)  # type: ignore[arg-type]
    spread = np.sqrt(np.linalg.eigvalsh(np.cov(honest.T, bias=True))[-1])
    return float(np.linalg.norm(value - honest.mean(axis=0)) / spread)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eps", [0.2, 0.4])
def test_no_regret_gives_attackers_at_one_point_no_weight(seed: int, eps: float) -> None:
    """Rows were marked down alike in every direction: it gave them what honest rows lost in theirs."""
    rng, f = np.random.default_rng(seed), round(20 * eps)
    X = np.vstack([rng.normal(size=(20 - f, 10)), np.full((f, 10), 1e3)])
    assert off(X, f, "no_regret", eps=eps) < 1
    few = rng.normal(size=(40, 100)) / np.arange(1, 101)
    X = np.vstack([few, np.full((10, 100), 3.0)])
    assert off(X, 10, "no_regret", eps=0.2) < 1


@pytest.mark.parametrize("rule", ["filter(sigma=4.5)", "entropy_filter(sigma=4.5)", "filter"])
def test_filters_bear_rows_of_twenty_magnitudes(rule: str) -> None:
    """Beside a known level, the rounding of a row of 1e20 was taken for directions of its own."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.linspace(0, 20, 20)[:, None]
    X = np.vstack([rng.normal(size=(30, 300)), sizes * rng.normal(size=(20, 300))])
    assert off(X.astype(np.float32), 20, rule, eps=0.4) < 1


def test_eps_is_estimated_beside_rows_of_many_magnitudes_too() -> None:
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.array([2.0, 5.0, 8.0, 12.0])[:, None]
    X = np.vstack([rng.normal(size=(16, 100)), sizes * rng.normal(size=(4, 100))])
    assert off(X, 4, 'filter(eps="auto")') < 1
    assert off(X, 4, "krum", eps="auto") < 3


@pytest.mark.parametrize(("n", "f"), [(20, 4), (10, 2), (30, 6), (20, 0)])
@pytest.mark.parametrize("shift", [5.0, 10.0, 30.0, 100.0])
def test_an_estimate_counts_every_row_that_the_filter_takes(n: int, f: int, shift: float) -> None:
    """Soft removal leaves each a little, and rules that count rows took one of them for honest."""
    for seed in range(5):
        X = np.random.default_rng(seed).normal(size=(n, 500))
        X[:f] += shift
        found = aggregate(X, "multi_krum", eps="auto")
        assert found.certificate is not None
        assert f / n <= found.certificate.eps <= f / n * (1 + 1e-5)
        assert np.linalg.norm(found.value - X[f:].mean(axis=0)) < 4


def test_eps_that_cannot_be_estimated_is_not_zero() -> None:
    X = np.random.default_rng(0).normal(size=(2000, 20))
    X[:200] += 1000
    with pytest.raises(InputError, match="eps cannot be estimated"):
        RobustMean("auto").fit(X)
    with pytest.raises(InputError, match="eps cannot be estimated"):
        aggregate(X[:50, :1], 'filter(eps="auto")')
    with pytest.raises(InputError, match="eps cannot be estimated"):
        aggregate(X[:3], 'filter(eps="auto")')
    copied = np.random.default_rng(0).normal(size=(20, 200))
    copied[11:] = copied[10]
    assert off(copied, 9, 'filter(eps="auto")') < 4
    alike = aggregate(np.ones((5, 3)), 'filter(eps="auto")')
    np.testing.assert_allclose(np.asarray(alike.value), 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_flame_clips_beside_rows_that_cancel_in_a_bucket(seed: int) -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(17, 30))
    honest /= np.linalg.norm(honest, axis=1, keepdims=True)
    y = rng.normal(size=30)
    y *= 1e8 / np.linalg.norm(y)
    X = np.vstack([honest, y, -y * (1 + 1e-16), 1e6 * honest[0]])
    assert np.linalg.norm(aggregate(X, "bucketing | flame", eps=0.15, seed=seed).value) < 2


@pytest.mark.parametrize(("n", "f", "size"), [(51, 25, 1e20), (101, 50, 1e30), (100, 45, 1e30)])
def test_the_geometric_median_forgets_rows_of_any_size_at_any_eps(n: int, f: int, size: float) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 20))
    X[n - f :] = size
    honest = X[: n - f]
    value = np.asarray(aggregate(X, "geometric_median").value)
    furthest = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(value - honest.mean(axis=0)) <= 2 * (n - f) / (n - 2 * f) * furthest


@pytest.mark.parametrize("rule", ["mean", "filter", "median"])
def test_updates_without_any_values_are_refused(rule: str) -> None:
    with pytest.raises(InputError, match="the updates hold no values"):
        aggregate(np.zeros((3, 0)), rule)


def test_a_tensor_without_values_is_nothing() -> None:
    offers = [
        Offer(i, {"w": np.full(30, i, np.float32), "e": np.zeros((0, 3), np.float32)}) for i in range(6)
    ]
    like = {"w": np.zeros(30, np.float32), "e": np.zeros((0, 3), np.float32)}
    for rule in ("mean", "filter", "median", "krum"):
        found = Defence(rule, eps=0.1).decide(1, 6, offers, {}, like)
        assert not found.skipped
        assert found.result is not None
        assert found.result.value["e"].shape == (0, 3)


@pytest.mark.parametrize(("n", "f"), [(5, 1), (10, 4), (20, 8)])
def test_an_unlucky_draw_does_not_end_the_filter(n: int, f: int) -> None:
    X = np.random.default_rng(0).normal(size=(n, 100))
    X[n - f :] = 1e4
    worst = max(off(X, f, 'filter(removal="random")', eps=f / n, seed=seed) for seed in range(150))
    assert worst < 50


@pytest.mark.parametrize("text", ["adam(beta2=0.0)", "yogi(beta2=0.0)", "adagrad"])
def test_an_optimiser_survives_an_aggregate_beyond_its_squares(text: str) -> None:
    optimiser = parse_optimiser(text)
    state = optimiser.begin(torch.zeros(2))
    for aggregated in ([1e20, 0.1], [0.1, 0.1]):
        optimiser.step(state, torch.tensor(aggregated))
    assert torch.isfinite(state[0]).all()
