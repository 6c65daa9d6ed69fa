"""The robust mean: what it removes, what it is equivariant to, and scikit-learn's contract."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from fedrobust import InputError, Verdict
from fedrobust.kernels import Matrix
from fedrobust.reproductions.rivals import geometric_median, lai_rao_vempala
from fedrobust.reproductions.robust_mean import ESTIMATORS, EXPERIMENT, NOISES, published_size
from fedrobust.statistics import RobustMean
from fedrobust.statistics import tail_filter as tails
from fedrobust.trials import Trial

FORMS = [
    {"covariance": covariance, "method": method}
    for covariance in ("bounded", "identity")
    for method in ("filter", "entropy")
]


def named(form: dict[str, Any]) -> str:
    return "-".join(map(str, form.values()))


def sample(n: int = 4000, d: int = 30, eps: float = 0.1, shift: float = 2.0, seed: int = 0) -> Matrix:
    """A Gaussian about the origin; the first eps of it is shifted by this much in every coordinate."""
    X = np.random.default_rng(seed).normal(size=(n, d))
    X[: int(eps * n)] += shift
    return X


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that a check of optional libraries is skipped

    @pytest.mark.filterwarnings("ignore")
    @parametrize_with_checks([RobustMean(**form) for form in FORMS])
    def test_the_contract_of_scikit_learn(estimator: RobustMean, check: Any) -> None:
        check(estimator)


@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_shifted_cluster_hardly_moves_it(form: dict[str, Any], dtype: Any) -> None:
    X = sample().astype(dtype)
    found = RobustMean(eps=0.1, **form).fit(X)
    assert np.linalg.norm(X.mean(axis=0)) > 1
    assert np.linalg.norm(found.location_) < 0.2
    assert found.weights_[:400].sum() < 0.01
    assert found.weights_.sum() == pytest.approx(1)
    assert found.location_ == pytest.approx(found.weights_ @ X, abs=1e-4)
    assert found.scores_[:400].min() > np.median(found.scores_[400:])
    assert np.linalg.norm(found.location_ - X[400:].mean(axis=0)) <= found.certificate_.bound(1.1)


@pytest.mark.parametrize("method", ["filter", "entropy"])
@pytest.mark.parametrize("d", [1, 2, 10, 100])
def test_an_honest_gaussian_is_left_alone(method: str, d: int) -> None:
    X = sample(5000, d, eps=0)
    found = RobustMean(covariance="identity", method=method).fit(X)
    assert np.count_nonzero(found.weights_) >= 4995
    assert found.verdict_ in (Verdict.CLEAR, Verdict.REMOVED)


@pytest.mark.parametrize("method", ["filter", "entropy"])
def test_the_error_does_not_grow_with_the_dimension(method: str) -> None:
    errors = []
    for d in (10, 40, 160):
        X = sample(200 * d, d, shift=1.0)
        robust = RobustMean(covariance="identity", method=method).fit(X)
        clean = np.linalg.norm(X[20 * d :].mean(axis=0))
        errors.append(float(np.linalg.norm(robust.location_) - clean))
    assert max(errors) < 0.06


@pytest.mark.parametrize("method", ["filter", "entropy"])
def test_passes_instead_of_a_matrix_come_to_the_same(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = sample(3000, 200)
    formed = RobustMean(covariance="identity", method=method).fit(X)
    monkeypatch.setattr(tails, "MOST_COORDINATES", 100)
    passed = RobustMean(covariance="identity", method=method).fit(X)
    assert np.mean((formed.weights_ > 0) != (passed.weights_ > 0)) < 0.01
    assert passed.location_ == pytest.approx(formed.location_, abs=0.02)
    assert passed.certificate_.spread == pytest.approx(formed.certificate_.spread, rel=0.02)


def test_clusters_in_many_directions_below_the_published_threshold() -> None:
    X = sample(20_000, 100, eps=0)
    X[:2000] += 10 * np.eye(100)[np.arange(2000) % 20]
    plain = RobustMean(covariance="identity").fit(X)
    entropy = RobustMean(covariance="identity", method="entropy").fit(X)
    assert np.linalg.norm(plain.location_) > 0.15
    assert np.linalg.norm(entropy.location_) < 0.1


@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("size", [1e6, 1e20, 1e50])
def test_enormous_rows_take_nothing_from_the_others(form: dict[str, Any], size: float) -> None:
    X = sample(1000, 10, shift=0.0)
    X[:100] = np.random.default_rng(1).normal(size=(100, 10)) * size
    found = RobustMean(eps=0.1, **form).fit(X)
    assert np.linalg.norm(found.location_) < 0.3
    assert found.weights_[:100].max() < 1e-6


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("size", [30, 1e3, 1e6])
def test_what_is_left_is_seen_as_it_is_once_far_rows_are_cut(
    size: float, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not formed:
        monkeypatch.setattr(tails, "MOST_COORDINATES", 1)
    rng = np.random.default_rng(11)
    X = rng.normal(size=(1000, 5))
    X[:110] = size * rng.normal(size=(2, 5)).repeat(55, axis=0)
    X[110:120, 3] += 10
    found = RobustMean(eps=0.05, covariance="identity").fit(X)
    assert not found.weights_[:120].any()
    left = np.cov(X[found.weights_ > 0].T, bias=True)
    assert found.certificate_.spread**2 == pytest.approx(np.linalg.eigvalsh(left).max(), rel=1e-3)


def test_what_is_still_there_when_the_budget_is_spent_is_told() -> None:
    rng = np.random.default_rng(10)
    X = rng.normal(size=(1000, 5))
    X[:110] = 1e6 * rng.normal(size=5)
    X[110:150, 3] += 10
    found = RobustMean(eps=0.05, covariance="identity").fit(X)
    assert found.weights_[110:150].any()
    assert found.verdict_ is Verdict.EXCEEDED


@pytest.mark.parametrize("eps", [0.1, 0.2, "auto"])
@pytest.mark.parametrize("method", ["filter", "entropy"])
def test_rows_too_large_to_be_looked_at_are_outliers(method: str, eps: float | str) -> None:
    X = sample(200, 400, shift=0.0)
    assert RobustMean(eps=eps, method=method).fit(X).verdict_ is Verdict.CLEAR
    X[:20] = 1e100
    found = RobustMean(eps=eps, method=method).fit(X)
    assert found.verdict_ is Verdict.REMOVED
    assert not found.weights_[:20].any()
    assert np.isinf(found.scores_[:20]).all()
    assert np.linalg.norm(found.location_ - X[20:].mean(axis=0)) < 0.1


@pytest.mark.parametrize(("eps", "bad"), [(0.0, 1), (0.1, 4)])
def test_more_rows_too_large_than_there_may_be_are_named(eps: float, bad: int) -> None:
    X = sample(30, 3, shift=0.0)
    X[-bad:, 0] = 1e100
    with pytest.raises(InputError, match=rf"{bad} of 30 rows .* row {30 - bad} has norm 1e\+100"):
        RobustMean(eps=eps).fit(X)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3), form=st.sampled_from(FORMS))
def test_it_moves_with_the_rows(seed: int, shift: float, form: dict[str, Any]) -> None:
    X = sample(500, 8, seed=seed)
    there, here = (RobustMean(eps=0.1, **form).fit(rows) for rows in (X + shift, X))
    # A row at the very edge of a cut may fall on the other side of it.
    assert there.location_ - shift == pytest.approx(here.location_, abs=0.03)
    assert np.abs(there.weights_ - here.weights_).sum() < 0.02


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), form=st.sampled_from(FORMS))
def test_the_order_of_the_rows_says_nothing(seed: int, form: dict[str, Any]) -> None:
    X = sample(500, 8, seed=seed)
    order = np.random.default_rng(seed).permutation(500)
    mixed, plain = (RobustMean(eps=0.1, **form).fit(rows) for rows in (X[order], X))
    assert mixed.location_ == pytest.approx(plain.location_, abs=0.03)
    assert np.abs(mixed.weights_ - plain.weights_[order]).sum() < 0.02


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(0.02, 0.4),
    shift=st.floats(-20, 20),
    form=st.sampled_from(FORMS),
)
def test_the_certificate_holds(seed: int, eps: float, shift: float, form: dict[str, Any]) -> None:
    X = sample(400, 6, eps, shift, seed)
    honest = X[int(eps * 400) :]
    found = RobustMean(eps=eps, **form).fit(X)
    off = float(np.linalg.norm(found.location_ - honest.mean(axis=0)))
    spread = float(np.linalg.norm(honest - honest.mean(axis=0), 2) / np.sqrt(len(honest)))
    assert off <= found.certificate_.bound(spread) * (1 + 1e-5) + 1e-6
    assert off <= found.certificate_.bound() * (1 + 1e-5) + 1e-6


def test_sigma_is_the_unit() -> None:
    X = sample()
    unit = RobustMean(covariance="identity").fit(X)
    scaled = RobustMean(covariance="identity", sigma=7.0).fit(7 * X)
    assert scaled.location_ == pytest.approx(7 * unit.location_, abs=1e-2)
    assert scaled.certificate_.spread == pytest.approx(7 * unit.certificate_.spread, rel=1e-3)


def test_data_that_is_no_gaussian_of_that_width_is_named() -> None:
    found = RobustMean(covariance="identity").fit(10 * sample(eps=0))
    assert found.verdict_ is Verdict.EXCEEDED
    with pytest.raises(InputError, match="standard deviations from their median: give sigma"):
        RobustMean(covariance="identity", sigma=1e-20).fit(sample())


@pytest.mark.parametrize("size", [1e-30, 1e21, 1e40])
def test_the_fraction_is_estimated_whatever_the_unit(size: float) -> None:
    X = np.random.default_rng(0).normal(size=(20, 100))
    X[:3] += 4
    ours, scaled = (RobustMean(eps="auto").fit(rows) for rows in (X, size * X))
    assert scaled.location_ / size == pytest.approx(ours.location_, abs=1e-6)
    assert scaled.certificate_.eps == pytest.approx(ours.certificate_.eps)
    assert ours.certificate_.eps > 0


def test_no_eps_is_the_mean() -> None:
    X = sample(100, 5)
    for form in FORMS:
        assert RobustMean(eps=0.0, **form).fit(X).location_ == pytest.approx(X.mean(axis=0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"covariance": "unit"}, "covariance"),
        ({"method": "sieve"}, "method"),
        ({"eps": 0.5}, "eps"),
        ({"eps": 0.6, "covariance": "identity"}, "got 0.6"),
        ({"eps": "auto", "covariance": "identity"}, "got 'auto'"),
        ({"sigma": -1.0}, "sigma must be positive"),
        ({"eps": None}, "eps must be .* got None"),
        ({"eps": None, "covariance": "identity"}, "got None"),
        ({"eps": "0.1", "covariance": "identity"}, "got '0.1'"),
        ({"sigma": 0.0, "covariance": "identity"}, "sigma must be positive"),
    ],
)
def test_bad_parameters_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RobustMean(**bad).fit(sample(50, 3))


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match="NaN"):
        RobustMean().fit(np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="2D"):
        RobustMean().fit(np.zeros(10))


def test_it_can_be_cloned_and_repeats_itself() -> None:
    estimator = RobustMean(eps=0.2, covariance="identity", method="entropy", random_state=5)
    assert clone(estimator).get_params() == estimator.get_params()
    X = sample()
    assert (clone(estimator).fit(X).location_ == estimator.fit(X).location_).all()


@pytest.mark.parametrize("method", ["filter", "entropy"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_short_sample_is_not_cut_to_nothing(method: str, seed: int, shift: float) -> None:
    X = sample(2000, 300, shift=shift, seed=seed)
    found = RobustMean(covariance="identity", method=method).fit(X)
    assert np.count_nonzero(found.weights_[200:]) > 1600  # of 1800
    assert np.count_nonzero(found.weights_[:200]) <= (1 if shift else 200)


def test_a_small_form_of_the_experiment(tmp_path: Path) -> None:
    plan = [
        Trial({"noise": noise, "d": d, "n": published_size(d) if d == 5 else 30 * d}, 0, {}, 0.0)
        for noise in NOISES
        for d in (5, 60)
    ]
    trials = EXPERIMENT.run(plan, tmp_path)
    for trial in trials:
        assert set(trial.figures) == {"sampling", *ESTIMATORS}
        if trial.setting["d"] == 60:
            assert trial.figures["entropy filter"] < 0.1
    assert "| two parts | 60 | 1800 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_rivals_agree_on_a_clean_sample() -> None:
    X = sample(20_000, 12, eps=0) + 3
    for name, estimate in ESTIMATORS.items():
        assert np.linalg.norm(estimate(X.astype(np.float32)) - 3) < 0.12, name


def test_the_geometric_median_is_where_unit_vectors_cancel() -> None:
    X = sample(500, 4)
    away = X - geometric_median(X, steps=1000)
    assert np.linalg.norm((away / np.linalg.norm(away, axis=1, keepdims=True)).mean(axis=0)) < 1e-4


def test_the_agnostic_mean_of_one_column_is_of_the_shortest_interval() -> None:
    column = np.array([[0.0], [0.1], [0.2], [0.3], [9.0], [-9.0]])
    np.testing.assert_allclose(lai_rao_vempala(column, 0.19), [0.15])
