"""Attacks that try their rows on the server's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrobust import InputError, aggregate
from fedrobust.attacks import (
    ALIE,
    IPM,
    Adaptive,
    Attack,
    Gaussian,
    Mimic,
    MinMax,
    MinSum,
    OptimalALIE,
    OptimalIPM,
    SignFlip,
    Tail,
    View,
    worst_error,
)
from fedrobust.attacks.adaptive import Moves
from fedrobust.attacks.rehearsal import Rehearsal, best_scale
from fedrobust.attacks.search import rounds
from fedrobust.kernels import Matrix
from fedrobust.rules import parse_rule

RULES = [
    "mean", "filter", "filter(sigma=1.5)", "krum", "multi_krum", "geometric_median", "clip | mean",
    "nnm | krum", "bucketing | filter", "median", "trimmed_mean", "nnm | trimmed_mean",
]  # fmt: skip
H, F, D = 12, 3, 30


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def honest(d: int = D, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(0.2, 1, (H, d))


def seen(rule: str | None = None, d: int = D, eps: float | None = F / (H + F)) -> View:
    return View.of(honest(d), honest(d, 1)[:F], rule=None if rule is None else parse_rule(rule), eps=eps)


def error(view: View, sent: Tensor) -> float:
    """How far the rule is driven, on the real rows."""
    assert view.rule is not None
    rows = torch.cat([sent, view.honest]).double().numpy()
    value = aggregate(rows, view.rule, eps=view.eps, seed=view.round).value
    return float(np.linalg.norm(value - view.honest.double().numpy().mean(0)))


# The rehearsal is the round ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("d", [2, D, 500])
def test_a_trial_says_what_the_server_would(rule: str, d: int) -> None:
    view = seen(rule, d)
    stage = Rehearsal.of(view, [torch.ones(d)])
    for coefficients in (
        np.random.default_rng(2).normal(size=(F, H + 1)),
        100 * np.random.default_rng(3).normal(size=(F, H + 1)),
        stage.mean,
    ):
        sent = stage.rows(coefficients)
        assert stage.error(coefficients) == pytest.approx(error(view, sent), rel=1e-4, abs=1e-5)
        weights = stage.weights(coefficients)
        real = aggregate(torch.cat([sent, view.honest]), rule, eps=view.eps).weights
        if real is None:
            assert weights is None
        else:
            assert weights is not None
            np.testing.assert_allclose(weights, real, atol=1e-4)


def test_rows_are_the_combinations() -> None:
    stage = Rehearsal.of(seen("mean"), [torch.ones(D)])
    C = np.random.default_rng(4).normal(size=(F, H + 1))
    V = np.vstack([honest(), np.ones(D)])
    np.testing.assert_allclose(stage.rows(C), C @ V, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stage.gram, V @ V.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stage.mean @ V, honest().mean(0), atol=1e-6)


def test_many_coordinates_are_sampled_for_a_coordinate_wise_rule() -> None:
    view = seen("median", d=9000)
    stage = Rehearsal.of(view)
    assert stage.points.shape == (H, 4096)
    assert stage.error(-stage.mean) == pytest.approx(error(view, stage.rows(-stage.mean)), rel=0.05)


def test_the_rules_own_eps_comes_first() -> None:
    assert Rehearsal.of(seen("krum(eps=0.1)", eps=0.3)).eps == 0.1
    assert Rehearsal.of(seen("krum", eps=0.3)).eps == 0.3
    assert Rehearsal.of(seen("krum", eps=None)).eps == 0.2


@pytest.mark.parametrize("attack", [OptimalIPM(), OptimalALIE(), Adaptive()], ids=repr)
def test_the_rule_must_be_known(attack: Attack) -> None:
    with pytest.raises(InputError, match="the view has none; construct View with rule"):
        attack(seen(), rng())


def test_too_few_clients_for_the_rule() -> None:
    view = View.of(honest()[:3], honest()[:1], rule=parse_rule("krum"), eps=0.25)
    with pytest.raises(InputError, match="2 f \\+ 3"):
        Adaptive(50)(view, rng())


@pytest.mark.parametrize("attack", [OptimalIPM(), OptimalALIE(), Adaptive(50), Tail()], ids=repr)
@pytest.mark.parametrize("rule", ["filter", "geometric_median"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1.0, 3e38])
def test_they_survive_diverged_and_identical_updates(attack: Attack, rule: str, value: float) -> None:
    view = View.of(np.full((5, 3), value), np.zeros((1, 3)), rule=parse_rule(rule))
    assert attack(view, rng()).shape == (1, 3)


# Line searches -----------------------------------------------------------------------------------


def test_best_scale_finds_a_peak_and_a_cliff() -> None:
    assert best_scale(lambda s: -((s - 3.7) ** 2), 0.01, 100, 40) == pytest.approx(3.7, rel=0.02)
    assert best_scale(lambda s: s if s < 3.7 else 0.0, 0.01, 100, 40) == pytest.approx(3.7, rel=0.02)
    assert best_scale(lambda s: s, 0.01, 100, 40) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("budget", [6, 7, 20, 40])
def test_best_scale_keeps_to_its_budget(budget: int) -> None:
    tried: list[float] = []
    best_scale(lambda s: tried.append(s) or s, 0.01, 100, budget)  # type: ignore[func-returns-value]
    assert len(tried) <= budget
    assert 0.01 <= min(tried) <= max(tried) <= 100 * (1 + 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_optimal_scale_is_no_worse_than_any_of_many(rule: str) -> None:
    view = seen(rule)
    for found, family in ((OptimalIPM(), IPM), (OptimalALIE(), ALIE)):
        best = error(view, found(view, rng()))
        tried = [error(view, family(float(s))(view, rng())) for s in np.geomspace(0.011, 99, 25)]
        assert best >= 0.9 * max(tried)


def test_optimal_forms_are_what_they_say() -> None:
    view = seen("krum")
    mean, std = view.honest.mean(0), view.honest.std(0, correction=0)
    sent = OptimalIPM()(view, rng())
    scale = float((sent[0] @ mean) / (mean @ mean))
    torch.testing.assert_close(sent, (scale * mean).repeat(F, 1))
    assert -100 <= scale <= -0.01
    z = (mean - OptimalALIE()(view, rng())) / std
    torch.testing.assert_close(z, torch.full_like(z, float(z.mean())), rtol=1e-3, atol=1e-3)


# Lie in the tail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["unit", "std", "sign"])
@pytest.mark.parametrize("rule", ["filter", "multi_krum", "geometric_median", "filter(sigma=2.0)"])
def test_tail_is_just_below_the_threshold(rule: str, direction: str) -> None:
    view = seen(rule)
    sent, mean = Tail(direction)(view, rng()), view.honest.mean(0)
    assert float((sent - mean).norm()) > 0
    shares = []
    for stretch in (1.0, 1.01):
        rows = torch.cat([mean + stretch * (sent - mean), view.honest])
        weights = aggregate(rows, rule, eps=view.eps).weights
        assert weights is not None
        shares.append(weights[:F].sum())
    whole = F / (F + H)
    assert shares[0] >= whole * (1 - 1e-3)
    assert shares[1] < whole * (1 - 1e-6)


def test_tail_assumes_the_filter_when_it_does_not_know_the_rule() -> None:
    torch.testing.assert_close(Tail()(seen(), rng()), Tail()(seen("filter"), rng()))


def test_tail_of_a_rule_that_never_notices_is_bounded() -> None:
    view = seen("mean")
    mean = view.honest.mean(0)
    reach = float((view.honest - mean).norm(dim=1).max())
    moved = float((Tail()(view, rng())[0] - mean).norm())
    assert moved == pytest.approx(1e4 * reach, rel=0.01)


def test_tail_has_nothing_to_say_to_a_median() -> None:
    with pytest.raises(InputError, match="no weights to hide behind"):
        Tail()(seen("median"), rng())


# The adaptive search -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_search_beats_the_fixed_attacks(rule: str) -> None:
    view = seen(rule)
    worst = error(view, Adaptive(800)(view, rng()))
    fixed = [IPM(), IPM(0.5), ALIE(), ALIE(1.5), Mimic(), SignFlip(), Gaussian(), MinMax(), MinSum()]
    for attack in [*fixed, OptimalIPM(), OptimalALIE()]:
        assert worst >= 0.97 * error(view, attack(view, rng())), attack


@pytest.mark.parametrize("rule", ["foolsgold", "dnc"])
def test_the_search_finds_rules_that_bear_only_rows_alike(rule: str) -> None:
    found = rounds(parse_rule(rule), n=20, eps=0.2, d=100, budget=900)
    assert np.median([round_.error_over_spread for round_ in found]) > 100
    assert all(round_.error < round_.bound for round_ in found)


@pytest.mark.parametrize(("far", "further"), [(1e3, 1e6), (1e6, 1e10)])
def test_two_rows_undo_dnc_and_not_the_filter(far: float, further: float) -> None:
    """One row draws all attention to itself, the other hides beside it."""
    honest = rng().standard_normal((18, 100))
    rows = np.vstack([np.zeros((2, 100)), honest])
    rows[0, 0], rows[1, 0], rows[1, 1] = further, further / 1e5, far
    mean = honest.mean(axis=0)
    assert np.linalg.norm(aggregate(rows, "dnc", eps=0.2).value - mean) > far / 20
    assert np.linalg.norm(aggregate(rows, "filter", eps=0.2).value - mean) < 0.1


@pytest.mark.parametrize("budget", [50, 80, 333])
def test_the_search_keeps_to_its_budget(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, whole = [], Rehearsal.error

    def counted(self: Rehearsal, coefficients: Matrix) -> float:
        tried.append(whole(self, coefficients))
        return tried[-1]

    monkeypatch.setattr(Rehearsal, "error", counted)
    plan = Adaptive(budget).plan(seen("geometric_median"), rng())
    assert len(tried) == budget
    assert whole(plan.stage, plan.coefficients) == max(tried)


def test_the_same_generator_gives_the_same_rows() -> None:
    view = seen("nnm | filter")
    first, second = (Adaptive(100)(view, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("d", [1, 2, 11, 14, 15, 17, 400])
def test_directions_have_the_length_of_the_spread(d: int) -> None:
    view = seen("mean", d)
    moves = Moves.of(view, rng())
    X = view.honest.double().numpy()
    spread = np.linalg.norm(X - X.mean(0), 2) / math.sqrt(H)
    vectors = torch.stack(moves.stage.vectors).double().numpy()
    directions = moves.directions @ vectors
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), spread, rtol=1e-3)
    assert ("fresh" in moves.names) == (d > H + 3)
    if "fresh" in moves.names:
        others = np.vstack([X, vectors[H : H + 3]])
        inner = others @ directions[moves.names.index("fresh")]
        assert np.abs(inner).max() < 1e-2 * spread * np.linalg.norm(others, axis=1).max()


def test_a_plan_says_what_it_is() -> None:
    plan = Adaptive(100).plan(seen("krum"), rng())
    assert str(plan).startswith("mean ")
    assert "disguise" in str(plan)


# The worst case ----------------------------------------------------------------------------------


def test_worst_error_measures_the_real_round() -> None:
    found = worst_error(parse_rule("filter"), n=15, eps=0.2, d=40, budget=500, seed=3)
    assert found == worst_error(parse_rule("filter"), n=15, eps=0.2, d=40, budget=500, seed=3)
    assert 0 < found.error_over_spread <= found.bound_over_spread < math.inf
    assert found.error_over_spread == found.error / found.spread
    assert found.kappa == pytest.approx((found.error / found.deviation) ** 2)
    assert found.spread <= found.deviation
    assert found.honest
    assert found.attack


def test_worst_error_tells_the_mean_from_the_filter() -> None:
    mean, robust = (worst_error(parse_rule(r), 15, 0.2, 40, 500) for r in ("mean", "filter"))
    assert mean.error_over_spread > 1000
    assert robust.error_over_spread < 2


@pytest.mark.parametrize(
    ("n", "eps", "d", "budget", "message"),
    [
        (4, 0.2, 5, 500, "0 malicious of 4"),
        (4, 0.5, 5, 500, "2 malicious of 4"),
        (10, 0.2, 0, 500, "0 parameters"),
        (10, 0.2, 5, 200, "budget must be at least 50"),
    ],
)
def test_worst_error_of_nonsense(n: int, eps: float, d: int, budget: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        worst_error(parse_rule("mean"), n, eps, d, budget)
