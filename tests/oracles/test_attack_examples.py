"""The examples in the documentation of ByzFL (github.com/LPD-EPFL/byzfl), on three honest vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedrobust import aggregate
from fedrobust.attacks import ALIE, IPM, Attack, Inf, Mimic, OptimalALIE, OptimalIPM, SignFlip, View
from fedrobust.kernels import Vector
from fedrobust.rules import parse_rule

HONEST = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])

# ByzFL moves by +tau standard deviations with n - 1 in the denominator, we by -z with n.
BYZFL_Z = -math.sqrt(3 / 2)


def seen(rule: str | None = None) -> View:
    """The member's own update is the honest mean, which is what ByzFL's sign flip negates."""
    own = HONEST.mean(axis=0, keepdims=True)
    return View.of(HONEST, own, rule=None if rule is None else parse_rule(rule), eps=0.25)


def row(attack: Attack, view: View) -> Vector:
    (sent,) = attack(view, np.random.default_rng(0)).double().numpy()
    return np.asarray(sent)


@pytest.mark.parametrize(
    ("attack", "documented"),
    [
        (SignFlip(), [-4, -5, -6]),
        (IPM(2.0), [-8, -10, -12]),
        (ALIE(1.5 * BYZFL_Z), [8.5, 9.5, 10.5]),
        (Mimic(0), [1, 2, 3]),
        (Inf(), [math.inf] * 3),
    ],
    ids=repr,
)
def test_fixed_attacks(attack: Attack, documented: list[float]) -> None:
    np.testing.assert_allclose(row(attack, seen()), documented, rtol=1e-6)


@pytest.mark.parametrize(
    ("attack", "documented"),
    [
        (OptimalIPM(), [-2.74877907, -3.43597384, -4.1231686]),
        (OptimalALIE(), [12.91985116, 13.91985116, 14.91985116]),
    ],
    ids=repr,
)
def test_optimal_attacks_go_at_least_as_far(attack: Attack, documented: list[float]) -> None:
    """Against NNM and the trimmed mean, which the documented rows were searched against."""
    view = seen("nnm | trimmed_mean")

    def error(sent: Vector) -> float:
        value = aggregate(np.vstack([sent, HONEST]), "nnm | trimmed_mean", eps=0.25).value
        return float(np.linalg.norm(value - HONEST.mean(axis=0)))

    assert error(row(attack, view)) >= error(np.array(documented))


def test_byzfls_own_search_comes_to_the_documented_row() -> None:
    sent = row(OptimalIPM(20, step=10.0), seen("nnm | trimmed_mean"))
    np.testing.assert_allclose(sent, [-2.74877907, -3.43597384, -4.1231686], rtol=1e-6)
