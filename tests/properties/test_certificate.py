"""The certificate holds for every honest set and every attack: always, not with high probability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrobust import (
    CATALOG,
    Aggregated,
    Certificate,
    InputError,
    RunningAggregate,
    aggregate,
    certificate,
)
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules import Mixing, Weighting

ENDS = [name for name, cls in CATALOG.items() if isinstance(cls().parts[-1], Weighting)]
MIXINGS = [name for name, cls in CATALOG.items() if issubclass(cls, Mixing)]
Rng = np.random.Generator


@dataclass(frozen=True)
class Round:
    """A round whose honest clients are known."""

    X: Matrix
    honest: Any
    shares: Vector
    rule: str
    eps: float
    seed: int = 0

    def aggregate(self) -> Aggregated:
        root = {"root": np.median(self.X, axis=0)}
        return aggregate(self.X, self.rule, self.shares, eps=self.eps, seed=self.seed, anchors=root)

    def honest_rows(self) -> tuple[Matrix, Vector, float]:
        """The honest rows, their mean, and their spread about it: by the definition, in d-space."""
        rows, mass = self.X[self.honest], self.shares[self.honest] / self.shares[self.honest].sum()
        mean = mass @ rows
        return rows, mean, float(np.linalg.norm(np.sqrt(mass)[:, None] * (rows - mean), 2))


def violated(case: Round) -> list[str]:
    """Which bounds the round breaks: with nothing assumed, and with the true honest spread known."""
    result = case.aggregate()
    assert result.certificate is not None
    rows, mean, spread = case.honest_rows()
    error = float(np.linalg.norm(result.value - mean))
    rounding = 1e-6 * np.linalg.norm(rows, axis=1).max()
    bounds = {
        "nothing assumed": result.certificate.bound(),
        "honest spread known": result.certificate.bound(sigma=spread),
    }
    return [name for name, bound in bounds.items() if not error <= bound * (1 + 1e-6) + rounding]


# Rounds ---------------------------------------------------------------------------------------------


HONEST: dict[str, Callable[[Rng, int, int], Matrix]] = {
    "alike": lambda rng, n, d: np.tile(rng.normal(size=d), (n, 1)),
    "gaussian": lambda rng, n, d: rng.normal(size=(n, d)),
    "common part": lambda rng, n, d: rng.normal(size=(n, d)) + 100 * rng.normal(size=d),
    "stretched": lambda rng, n, d: rng.normal(size=(n, d)) * 10 ** rng.uniform(-3, 3, d),
    "two camps": lambda rng, n, d: rng.normal(size=(n, d)) + 30.0 * rng.integers(0, 2, (n, 1)),
    "heavy tails": lambda rng, n, d: rng.standard_cauchy((n, d)),
    "one far out": lambda rng, n, d: rng.normal(size=(n, d)) + 1e4 * (np.arange(n) == 0)[:, None],
}
MALICIOUS: dict[str, Callable[[Rng, int, Matrix], Matrix]] = {
    "huge": lambda rng, f, H: 1e30 * rng.choice([-1.0, 1.0], (f, H.shape[1])),
    "magnitudes": lambda rng, f, H: (
        10.0 ** rng.uniform(-8, 16, (f, 1)) * rng.normal(size=(f, H.shape[1]))
    ),
    "shift": lambda rng, f, H: np.tile(H.mean(0) + rng.uniform(0, 20) * H.std(), (f, 1)),
    "hardly moved": lambda rng, f, H: H.mean(0) + 1e-9 * rng.normal(size=(f, H.shape[1])),
    "in the tail": lambda rng, f, H: H.mean(0) + rng.uniform(0.5, 3) * H.std(0) * np.ones((f, 1)),
    "top direction": lambda rng, f, H: np.tile(
        H.mean(0) + rng.uniform(0, 3) * len(H) ** 0.5 * np.linalg.svd(H - H.mean(0))[2][0] * H.std(),
        (f, 1),
    ),
    "copies": lambda rng, f, H: H[rng.integers(0, len(H), f)],
    "reversed": lambda rng, f, H: -rng.uniform(0, 5) * np.tile(H.mean(0), (f, 1)),
    "zero": lambda _, f, H: np.zeros((f, H.shape[1])),
}
SHARES: dict[str, Callable[[Rng, int], Vector]] = {
    "uniform": lambda _, n: np.ones(n),
    "uneven": lambda rng, n: rng.uniform(0.1, 1, n),
    "very uneven": lambda rng, n: rng.pareto(1, n) + 1e-3,
    "some without": lambda rng, n: (
        rng.uniform(size=n) * (rng.uniform(size=n) < 0.7) + 1.0 * (np.arange(n) == 0)
    ),
}


@st.composite
def rounds(draw: Any) -> Round:
    """Shapes and kinds are hypothesis's to choose and to shrink; numbers come from a seed."""
    n, d = draw(st.integers(2, 16)), draw(st.sampled_from([1, 2, 3, 8, 60]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = SHARES[draw(st.sampled_from(sorted(SHARES)))](rng, n)
    shares = shares / shares.sum()
    order = rng.permutation(n)
    f = draw(st.integers(0, n // 2))
    while shares[order[:f]].sum() >= 0.45:
        f -= 1
    honest = np.sort(order[f:])
    X = np.empty((n, d))
    X[honest] = HONEST[draw(st.sampled_from(sorted(HONEST)))](rng, n - f, d) * 10.0 ** rng.integers(
        -4, 5
    )
    X[order[:f]] = MALICIOUS[draw(st.sampled_from(sorted(MALICIOUS)))](rng, f, X[honest])
    mass = float(shares[order[:f]].sum())
    eps = draw(st.sampled_from([mass, min(mass + 0.05, 0.49), max(mass, 0.3)]))
    mixings = draw(st.lists(st.sampled_from(MIXINGS), max_size=2))
    rule = " | ".join([*mixings, draw(st.sampled_from(ENDS))])
    return Round(X, honest, shares, rule, eps, draw(st.integers(0, 3)))


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds())
def test_the_bound_holds(case: Round) -> None:
    try:
        broken = violated(case)
    except InputError:  # too few clients for this rule: no answer, nothing to certify
        return
    assert not broken


# The variation, against every honest set there can be -----------------------------------------------


def worst_variation(shares: Vector, weights: Vector, eps: float) -> float:
    """The largest total-variation distance between `weights` and the shares of any honest set."""
    n, worst = len(shares), 0.0
    for size in range(1, n + 1):
        for honest in map(list, itertools.combinations(range(n), size)):
            if shares[honest].sum() >= 1 - eps - 1e-12:
                p = np.zeros(n)
                p[honest] = shares[honest] / shares[honest].sum()
                worst = max(worst, 1 - np.minimum(p, weights[:n]).sum())
    return worst


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 8), st.sampled_from(ENDS), st.floats(0, 0.49), st.booleans(), st.integers(0, 10**6)
)
def test_the_variation_covers_every_honest_set(
    n: int, rule: str, eps: float, uniform: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shares = np.ones(n) / n if uniform else rng.dirichlet(np.ones(n))
    try:
        X = rng.normal(size=(n, 3)) * rng.choice([1, 10], (n, 1))
        result = aggregate(X, rule, shares, eps=eps, anchors={"root": np.ones(3)})
    except InputError:
        return
    assert result.certificate is not None
    assert result.weights is not None
    assert result.certificate.variation >= worst_variation(shares, result.weights, eps) - 1e-9


@pytest.mark.parametrize("f", [0, 1, 2, 3])
def test_the_variation_of_the_mean_is_eps_exactly(f: int) -> None:
    X = np.random.default_rng(0).normal(size=(8, 3))
    result = aggregate(X, "mean", eps=f / 8)
    assert result.certificate is not None
    assert result.certificate.variation == pytest.approx(f / 8, abs=1e-12)
    assert worst_variation(np.ones(8) / 8, np.ones(8) / 8, f / 8) == pytest.approx(f / 8, abs=1e-12)


# Clipped rows, as rows of their own -------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["clip | mean", "arc | mean", "centered_clipping", "clip | filter"])
@pytest.mark.parametrize("far", [1e2, 1e6, 1e30])
def test_the_bound_does_not_grow_with_a_row_that_is_clipped(rule: str, far: float) -> None:
    X = np.random.default_rng(0).normal(size=(20, 5))
    honest = X[2:].mean(0)
    X[:2] *= far
    result = aggregate(X, rule, eps=0.1)
    spread = float(np.linalg.norm(X[2:] - honest, 2)) / math.sqrt(18)
    assert result.certificate is not None
    assert np.linalg.norm(result.value - honest) <= result.certificate.bound(spread) < 5 * spread


def test_of_two_views_the_smaller_bound_is_taken() -> None:
    """Hardly clipped rows count as the clients' own; as rows of their own they would be lost mass."""
    X = np.random.default_rng(0).normal(size=(20, 5))
    longest = float(np.linalg.norm(X, axis=1).max())
    hardly = aggregate(X, f"clip({0.999 * longest}) | mean", eps=0.1).certificate
    plain = aggregate(X, "mean", eps=0.1).certificate
    assert hardly is not None
    assert plain is not None
    assert hardly.variation == pytest.approx(plain.variation, abs=1e-3)


# These tests can fail: every term of the formula is needed --------------------------------------------


def line(*rows: float) -> Matrix:
    return np.array(rows)[:, None] * np.ones((1, 4))


# One client of four pulls the mean: honest rows alike, so the bound is reached exactly.
PULLED = Round(line(0, 0, 0, 1), np.arange(3), np.ones(4), "mean", 0.25)
# All eight are honest, and the five that are alike are kept: no weighted spread, all of it honest.
KEPT = Round(line(0, 0, 0, 0, 0, 1, 1, 1), np.arange(8), np.ones(8), "multi_krum(m=5)", 0.0)


def bound(self: Certificate, sigma: float | None = None) -> float:
    honest = self.honest_spread if sigma is None else sigma
    return math.sqrt(self.variation / (1 - self.variation)) * (self.spread + honest)


def without_knapsack(shares: Vector, weights: Vector, eps: float) -> float:
    return 1.0 - float(np.minimum(shares, weights).sum())


def without_common_part(self: Certificate, sigma: float | None = None) -> float:
    return math.sqrt(1 - self.variation) * bound(self, sigma)


def without_weighted_spread(self: Certificate, sigma: float | None = None) -> float:
    return bound(self, sigma) - bound(self, 0.0)


def without_honest_spread(self: Certificate, sigma: float | None = None) -> float:
    return bound(self, 0.0)


@pytest.mark.parametrize("case", [PULLED, KEPT], ids=["pulled", "kept"])
def test_the_bound_is_reached(case: Round) -> None:
    result, (_, mean, spread) = case.aggregate(), case.honest_rows()
    assert result.certificate is not None
    assert result.certificate.bound(spread) == pytest.approx(np.linalg.norm(result.value - mean))
    assert not violated(case)


@pytest.mark.parametrize(
    ("target", "attribute", "mutant", "case"),
    [
        (certificate, "_variation", without_knapsack, PULLED),
        (Certificate, "bound", without_common_part, PULLED),
        (Certificate, "bound", without_weighted_spread, PULLED),
        (Certificate, "bound", without_honest_spread, KEPT),
    ],
    ids=["knapsack", "common part", "weighted spread", "honest spread"],
)
def test_a_formula_without_one_of_its_terms_is_caught(
    monkeypatch: pytest.MonkeyPatch, target: Any, attribute: str, mutant: Any, case: Round
) -> None:
    monkeypatch.setattr(target, attribute, mutant)
    assert "honest spread known" in violated(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", [False, True])
def test_the_bound_counts_the_rounding_of_updates_in_half_precision(
    dtype: torch.dtype, known: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.randn(20_000, generator=generator).to(dtype)
    rows = [(model + 0.002 * torch.randn(20_000, generator=generator)).to(dtype) for _ in range(50)]
    honest = torch.stack(rows[5:]).double().mean(dim=0)
    running = RunningAggregate(50, like=model, reference=model if known else None)
    for row in rows:
        running.add(row)
    for result in (
        aggregate(rows, "mean", eps=0.1, reference=model if known else None),
        running.result("mean", eps=0.1),
    ):
        assert result.value.dtype == dtype
        assert result.certificate is not None
        off = float((result.value.double() - honest).norm())
        assert off <= result.certificate.bound()
        assert 0.1 * off < result.certificate.rounding <= off
