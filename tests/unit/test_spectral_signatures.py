"""Poisoned examples of a class are found among its representations; training goes on without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from fedrobust import InputError
from fedrobust.attacks import Trigger
from fedrobust.data import load
from fedrobust.reproductions import backdoor
from fedrobust.statistics import SpectralSignatures
from fedrobust.statistics.spectral_signatures import top_direction
from fedrobust.trials import Trial

Matrix = Any


def poisoned(n: int = 200, p: int = 30, part: float = 0.1, seed: int = 0) -> tuple[Matrix, Matrix, int]:
    """Two classes; in the first one the first examples are shifted together."""
    rng = np.random.default_rng(seed)
    X, count = rng.normal(size=(2 * n, p)), round(part * n)
    X[n:] += 20.0  # classes lie far apart, which must not count
    X[:count] += 9.0 * np.eye(p)[3]
    return X, np.repeat([0, 1], n), count


@pytest.mark.parametrize("rule", [None, "filter", "entropy_filter"])
def test_the_poisoned_ones_go(rule: str | None) -> None:
    X, y, count = poisoned()
    found = SpectralSignatures(0.1, rule=rule).fit(X, y)
    assert not found.support_[:count].any()
    for label in (0, 1):
        assert (~found.support_[y == label]).sum() == 30
    assert found.scores_[:count].min() > np.median(found.scores_[count:200])


@pytest.mark.parametrize("rule", [None, "filter", "entropy_filter"])
@pytest.mark.parametrize(("dtype", "offset"), [(np.float32, 1e3), (np.float32, 1e5), (np.float64, 1e9)])
def test_what_representations_have_in_common_does_not_count(
    rule: str | None, dtype: type[np.floating], offset: float
) -> None:
    X, y, count = poisoned()
    found = SpectralSignatures(0.1, rule=rule).fit((X + offset).astype(dtype), y)
    assert not found.support_[:count].any()
    plain = SpectralSignatures(0.1, rule=rule).fit(X, y)
    np.testing.assert_allclose(found.scores_, plain.scores_, rtol=0.05, atol=0.1 * plain.scores_.max())


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_both_sides_give_the_squared_projections(shape: tuple[int, int]) -> None:
    X = np.random.default_rng(1).normal(size=shape)
    centred = X - X.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(top_direction(X), (s[0] * u[:, 0]) ** 2, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 100.0))
def test_neither_place_nor_scale_nor_order_of_the_representations_matters(
    seed: int, scale: float
) -> None:
    X, y, _ = poisoned(60, 5)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(X))
    moved = (scale * X + rng.normal(size=5))[order]
    plain = SpectralSignatures().fit(X, y).support_
    np.testing.assert_array_equal(SpectralSignatures().fit(moved, y[order]).support_, plain[order])


def test_without_labels_all_are_one_class() -> None:
    X, _, count = poisoned()
    found = SpectralSignatures(0.1)
    np.testing.assert_array_equal(found.fit_predict(X[:200]), np.where(found.support_, 1, -1))
    assert not found.support_[:count].any()
    assert clone(found).get_params() == {"eps": 0.1, "factor": 1.5, "rule": None}


def test_a_class_of_one() -> None:
    found = SpectralSignatures().fit(np.eye(4), [0, 0, 0, 1])
    assert found.scores_[3] == 0
    assert found.support_[3]


def test_the_contract_of_scikit_learn() -> None:
    check_estimator(SpectralSignatures(), on_skip=None)


@pytest.mark.parametrize(
    ("parameters", "y", "message"),
    [
        ({"eps": 0.0}, None, "eps must be above 0 and below 1/2, got 0.0"),
        ({"factor": 0.5}, None, "factor must be at least 1"),
        ({"eps": 0.4, "factor": 3.0}, None, "factor eps below 1, got 3.0"),
        ({"eps": "0.1"}, None, "eps must be above 0 and below 1/2, got '0.1'"),
        ({"factor": None}, None, "factor must be at least 1, .* got None"),
        ({}, [0, 1, float("nan"), 1, 0], r"a label for every row, got .*nan.* for row 2"),
        ({"rule": "median"}, None, "gives no scores"),
        ({}, [0, 1], r"y must be \(5,\), a label for every row"),
    ],
)
def test_bad_input(parameters: dict[str, Any], y: list[float] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpectralSignatures(**parameters).fit(np.eye(5), y)


def test_planting() -> None:
    data = load("digits")
    trigger = Trigger(1, size=2)
    planted = backdoor.plant(data, 7, trigger, 0.1, seed=0)
    (stamped,) = torch.nonzero(planted.poisoned, as_tuple=True)
    assert len(stamped) == round(0.1 * int((data.train_y == 1).sum()))
    assert (data.train_y[stamped] == 7).all()
    assert (planted.y[stamped] == 1).all()
    assert (planted.x[stamped, :, -2:, -2:] == data.train_x[data.train_y == 7].amax()).all()
    rest = ~planted.poisoned
    assert torch.equal(planted.x[rest], data.train_x[rest])
    assert torch.equal(planted.y[rest], data.train_y[rest])


def test_the_experiment_on_digits(tmp_path: Path) -> None:
    setting = {"dataset": "digits", "fraction": 0.2, "pixels": 3, "examples": 1437, "epochs": 8}
    plan = [Trial(setting, 0, {}, 0.0)]
    (found,) = backdoor.EXPERIMENT.run(plan, tmp_path)
    assert found.figures["turned"] > 60
    assert found.figures["turned clean"] < 20
    for score in backdoor.SCORES:
        assert found.figures[f"left {score}"] <= 0.2 * found.figures["poisons"]
        assert found.figures[f"turned {score}"] < 20
        assert found.figures[f"natural {score}"] > 90
    assert "| dropped by QUE |" in (tmp_path / "README.md").read_text()


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the directory with --data-dir or FEDROBUST_DATA"):
        backdoor.EXPERIMENT.run(backdoor.EXPERIMENT.plan(quick=True), tmp_path / "to", tmp_path)


def test_rounding_leaves_one_example_at_least() -> None:
    X = np.random.default_rng(0).normal(size=(10, 3))
    assert SpectralSignatures(eps=0.49, factor=2).fit(X).support_.sum() == 1
