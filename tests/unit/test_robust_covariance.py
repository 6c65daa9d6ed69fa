"""The covariance filter: what it keeps, what it must not depend on, and its published experiment."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import check_estimator

from fedrobust import InputError
from fedrobust.kernels import Matrix
from fedrobust.reproductions import covariance_rivals as rivals
from fedrobust.reproductions.robust_covariance import EXPERIMENT, spoiled
from fedrobust.statistics import FilteredPCA, RobustCovariance
from fedrobust.statistics.covariance import deviations, keep, whitened

SEEDS = st.integers(0, 2**32 - 1)


def shifted(seed: int, *, n: int = 2000, d: int = 8, eps: float = 0.1) -> tuple[Matrix, int]:
    """Rows about (5, ..., 5), the last of them planted in a cluster 12 standard deviations away."""
    rng = np.random.default_rng(seed)
    bad = round(eps * n)
    direction = np.ones(d) / np.sqrt(d)
    cluster = 12 * direction + 0.1 * rng.standard_normal((bad, d))
    return 5 + np.vstack([rng.standard_normal((n - bad, d)), cluster]), bad


@pytest.mark.parametrize(
    "estimator",
    [RobustCovariance(), RobustCovariance(assume_centered=True), FilteredPCA()],
    ids=["covariance", "centred covariance", "components"],
)
def test_scikit_learns_contract(estimator: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that provoke them
        check_estimator(estimator, on_skip=None)  # there are no expected failures


@pytest.mark.parametrize("centred", [True, False])
def test_skewed_rows_cost_next_to_nothing(centred: bool) -> None:
    sample = spoiled("skewed", 20, np.random.default_rng(0))
    robust = RobustCovariance(eps=0.05, assume_centered=centred).fit(sample.rows)
    sampling = sample.error(np.cov(sample.good.T))
    assert sample.error(np.cov(sample.rows.T)) > 100
    assert sample.error(robust.covariance_) < sampling + 0.01
    lost = ~robust.support_
    assert lost[-sample.planted :].mean() > 0.9
    assert lost[: -sample.planted].mean() < 0.01


def test_the_mean_is_found_with_the_covariance() -> None:
    rows, bad = shifted(0)
    robust = RobustCovariance().fit(rows)
    assert np.abs(rows.mean(axis=0) - 5).min() > 0.3
    assert np.abs(robust.location_ - 5).max() < 0.1
    assert not robust.support_[-bad:].any()
    assert np.linalg.norm(robust.covariance_ - np.eye(8)) < 0.6


def test_it_is_the_plain_estimate_of_the_rows_kept() -> None:
    rows, _ = shifted(1)
    robust = RobustCovariance().fit(rows)
    plain = EmpiricalCovariance().fit(rows[robust.support_])
    for name in ("location_", "covariance_", "precision_"):
        np.testing.assert_array_equal(getattr(robust, name), getattr(plain, name))
    np.testing.assert_array_equal(robust.mahalanobis(rows), plain.mahalanobis(rows))
    assert robust.score(rows) == plain.score(rows)
    assert robust.weights_.sum() == pytest.approx(1)
    np.testing.assert_array_equal(robust.weights_ > 0, robust.support_)


def test_components_are_those_of_the_rows_kept() -> None:
    rows, _ = shifted(2)
    filtered = FilteredPCA(n_components=3).fit(rows)
    plain = PCA(n_components=3).fit(rows[filtered.support_])
    for name in ("components_", "explained_variance_", "mean_"):
        np.testing.assert_array_equal(getattr(filtered, name), getattr(plain, name))
    scores = FilteredPCA(n_components=3).fit_transform(rows)
    assert scores.shape == (len(rows), 3)
    np.testing.assert_array_equal(scores, filtered.transform(rows))
    whole = FilteredPCA().fit(rows)
    np.testing.assert_allclose(whole.inverse_transform(whole.transform(rows)), rows)


@pytest.mark.parametrize("kind", ["int8", "float32", "object", "frame"])
@pytest.mark.parametrize(
    "estimator",
    [RobustCovariance(), RobustCovariance(assume_centered=True), FilteredPCA(n_components=2)],
    ids=["covariance", "centred covariance", "components"],
)
def test_whole_and_narrow_numbers_are_as_wide_ones(estimator: Any, kind: str) -> None:
    wide = np.round(np.random.default_rng(0).normal(size=(500, 4)) * [4, 12, 20, 28]).clip(-127, 127)
    wide = wide + 1e6 if kind == "float32" else wide
    given: Any = wide.astype("int8" if kind == "frame" else kind)
    given = pd.DataFrame(given) if kind == "frame" else given
    plain, found = clone(estimator).fit(wide), clone(estimator).fit(given)
    for name in ("location_", "covariance_", "components_", "explained_variance_", "mean_"):
        if hasattr(plain, name):
            np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
            assert getattr(found, name).dtype == np.float64


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_affine_maps_change_nothing(seed: int) -> None:
    rows, _ = shifted(seed % 7)
    rng = np.random.default_rng(seed)
    turns = [np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2)]
    linear = turns[0] @ np.diag(10 ** rng.uniform(-2, 2, 8)) @ turns[1]
    ours = RobustCovariance().fit(rows)
    mapped = RobustCovariance().fit(rows @ linear + 10 * rng.standard_normal(8))
    # Rows at the very threshold may change sides with the iterations' last digits.
    assert (mapped.support_ != ours.support_).mean() <= 0.002
    if (mapped.support_ == ours.support_).all():
        expected = linear.T @ ours.covariance_ @ linear
        scale = np.abs(expected).max()
        np.testing.assert_allclose(mapped.covariance_ / scale, expected / scale, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    rows, _ = shifted(seed % 7)
    order = np.random.default_rng(seed).permutation(len(rows))
    assert (keep(rows, 0.1)[order] != keep(rows[order], 0.1)).mean() <= 0.002


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, eps=st.floats(0.0, 0.3))
def test_clean_rows_lose_little(seed: int, eps: float) -> None:
    rows = np.random.default_rng(seed).standard_normal((400, 3))
    lost = (~keep(rows, eps)).mean()
    assert lost <= 1.5 * eps + 0.01


def test_nothing_is_dropped_for_an_eps_of_zero() -> None:
    rows, _ = shifted(3)
    robust = RobustCovariance(eps=0).fit(rows)
    np.testing.assert_array_equal(robust.covariance_, EmpiricalCovariance().fit(rows).covariance_)


def test_the_form_has_the_largest_variance_there_is() -> None:
    white = whitened(shifted(4, d=5)[0], centred=False)
    products = np.einsum("ni,nj->nij", white, white).reshape(len(white), -1)
    explicit = np.linalg.eigvalsh(np.cov(products.T, bias=True))[-1] / 2
    assert (deviations(white) ** 2).mean() == pytest.approx(explicit, rel=1e-3)


@pytest.mark.parametrize("size", [1e3, 1e30, 1e160, 1e300])
def test_size_does_not_help_an_attacker(size: float) -> None:
    rng = np.random.default_rng(5)
    rows = np.vstack([rng.standard_normal((950, 4)), size * rng.standard_normal((50, 4))])
    kept = keep(rows, 0.05)
    assert not kept[-50:].any()
    assert kept[:-50].mean() > 0.97


@pytest.mark.parametrize("size", [12, 1e4])
@pytest.mark.parametrize("different", [1, 2])
def test_copies_of_a_row_do_not_hide_behind_each_other(size: float, different: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4000, 5))
    rows[:200] = size if different == 1 else size * rng.standard_normal((2, 5)).repeat(100, axis=0)
    for order in (slice(None), slice(None, None, -1)):
        kept = keep(rows[order], 0.05)[order]
        assert not kept[:200].any()
        assert kept[200:].mean() > 0.98


def test_columns_without_spread_are_no_direction() -> None:
    rows, bad = shifted(6, d=5)
    rows = np.hstack([rows, np.full((len(rows), 1), 0.1), rows[:, :1] + rows[:, 1:2]])
    assert not keep(rows, 0.1)[-bad:].any()
    assert keep(np.ones((10, 2)), 0.1).all()


@pytest.mark.parametrize(("centred", "most"), [(False, (1 - 3**-0.5) / 2), (True, 1 / 3)])
def test_a_far_cluster_breaks_it_from_the_breakdown_point_on(centred: bool, most: float) -> None:
    rng = np.random.default_rng(0)
    for eps, found in ((most - 0.05, True), (most + 0.03, False)):
        rows = rng.standard_normal((5000, 10))
        bad = round(eps * len(rows))
        rows[:bad] += 1e3
        kept = keep(rows, eps, centred=centred)
        assert kept[:bad].any() != found


def test_a_fixed_decay_is_not_tuned() -> None:
    rows, bad = shifted(7)
    gentle, eager = (RobustCovariance(decay=decay).fit(rows).support_ for decay in (0.3, 1.0))
    assert gentle.sum() >= eager.sum()
    assert not eager[-bad:].any()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"eps": 0.5}, r"eps must be in \[0, 1/2\), got 0.5"),
        ({"eps": -0.1}, r"eps must be in"),
        ({"eps": "0.1"}, r"eps must be in .* got '0.1'"),
        ({"eps": None}, r"eps must be in .* got None"),
        ({"tau": "0.1"}, r"tau must be in .* got '0.1'"),
        ({"decay": "1"}, r"decay must be positive, .* got '1'"),
        ({"tau": 0}, r"tau must be in \(0, 1\), got 0"),
        ({"decay": 0.0}, r"decay must be positive, or None to have it tuned, got 0.0"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    for kind in (RobustCovariance, FilteredPCA):
        with pytest.raises(InputError, match=message):
            kind(**parameters).fit(np.zeros((9, 2)))


def test_bad_rows() -> None:
    with pytest.raises(InputError, match="3 samples of 3 features say nothing about outliers"):
        RobustCovariance().fit(np.eye(3))
    with pytest.raises(ValueError, match="NaN"):
        RobustCovariance().fit([[np.nan, 1.0], [0.0, 1.0], [1.0, 1.0]])


def test_rivals_on_clean_rows() -> None:
    rng, spread = np.random.default_rng(8), np.arange(1, 13)
    rows = rng.standard_normal((4000, 12)) * spread
    estimates = [
        rivals.pruned(rows),
        rivals.lai_rao_vempala(rows, 0.02),
        rivals.ransac(rows, 0.02, rng, draws=20),
        rivals.ransac(rows, 0.02, rng, as_released=True),
    ]
    for estimate, tolerance in zip(estimates, (0.15, 0.3, 0.6, 0.6), strict=True):
        assert np.abs(estimate / np.outer(spread, spread) - np.eye(12)).max() < tolerance


def test_pruning_takes_what_is_far() -> None:
    rows = np.vstack([np.random.default_rng(9).standard_normal((2000, 10)), np.full((5, 10), 50.0)])
    assert np.abs(rivals.pruned(rows) - np.eye(10)).max() < 0.2


def test_the_experiment_in_small() -> None:
    plan = [t for t in EXPERIMENT.plan(quick=True) if t.setting["d"] == 10]
    trials = [
        type(t)(t.setting, t.seed, EXPERIMENT.trial({**t.setting, "slow": False}, t.seed, None), 0.0)
        for t in plan
    ]
    isotropic, skewed = (trial.figures for trial in trials)
    assert abs(skewed["filter"]) < 0.02
    assert min(skewed[name] for name in ("plain", "ransac_released")) > 50
    assert skewed["lost_bad"] > 0.9
    assert isotropic["plain"] < isotropic["filter"] < 0.3  # d^2 / eps^2 rows are more than there are
    page = EXPERIMENT.tables(trials)
    assert "(145)" in page  # the published number beside ours
    assert len(EXPERIMENT.draw(trials).axes) == 4
