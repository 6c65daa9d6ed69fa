"""SEVER recovers what its base learner loses, and its gradients are those of the losses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.io import savemat
from scipy.sparse import csr_matrix
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import (
    HuberRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, pad, softplus

from fedrobust import InputError
from fedrobust.reproductions import Experiment, sever_defences, sever_regression, sever_svm
from fedrobust.reproductions.sever_defences import DEFENCES, below, distances
from fedrobust.statistics import (
    ModuleClassifier,
    ModuleRegressor,
    SeverClassifier,
    SeverRegressor,
    linear_gradients,
    module_gradients,
    sever,
)
from fedrobust.statistics.severing import REMOVALS, spectral_scores
from fedrobust.trials import Trial

Data = tuple[np.ndarray, np.ndarray]


@parametrize_with_checks([SeverRegressor(), SeverClassifier()])
def test_the_contract_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


class AnyWidth(nn.Module):
    """Linear, of inputs of any width up to 40, as the contract's checks give."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(40, outputs).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(pad(x, (0, 40 - x.shape[-1]))))


def expected(_estimator: Any) -> dict[str, str]:
    return {"check_estimators_overwrite_params": "joblib's hash of a module's copy is another one"}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@parametrize_with_checks(
    [ModuleRegressor(AnyWidth(1)), ModuleClassifier(AnyWidth(10))],
    expected_failed_checks=expected,
)
def test_the_contract_of_scikit_learn_by_modules(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def regression(seed: int = 0, n: int = 600, d: int = 20, bad: int = 30) -> tuple[Data, np.ndarray]:
    """The first `bad` examples turn the model round: hostile in x and y, no y of them out of range."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    theta = rng.standard_normal(d) / np.sqrt(d)
    y = X @ theta + 0.1 * rng.standard_normal(n)
    pull = X.T @ y / bad
    X[:bad] = (pull + np.linalg.norm(pull) * rng.standard_normal((bad, d)) / 10 / np.sqrt(d)) / 4
    y[:bad] = -4
    return (X, y), theta


def classes(seed: int = 0, n: int = 600, d: int = 10, bad: int = 36) -> tuple[Data, Data]:
    """Two classes, the first `bad` examples far out on the wrong side; and clean data to test on."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((2 * n, d))
    y = np.where(X[:, 0] + X[:, 1] > 0, "spam", "ham")
    test = X[n:].copy(), y[n:].copy()
    X[:bad], y[:bad] = rng.standard_normal((bad, d)) / 3, "spam"
    X[:bad, :2] -= 6
    return (X[:n], y[:n]), test


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("base", [Ridge(), LinearRegression(), SGDRegressor(random_state=0)], ids=str)
def test_a_regression_recovers(base: Any, removal: str) -> None:
    (X, y), theta = regression()
    robust = SeverRegressor(base, eps=0.1, removal=removal, random_state=0).fit(X, y)
    assert np.linalg.norm(base.fit(X, y).coef_ - theta) > 0.5
    assert np.linalg.norm(robust.estimator_.coef_ - theta) < 0.1
    assert not robust.support_[:30].any()
    assert robust.support_[30:].mean() > 0.8
    assert np.median(robust.scores_[:30]) > 5 * np.median(robust.scores_[30:])
    assert robust.n_features_in_ == 20


@pytest.mark.parametrize(
    "base",
    [
        LogisticRegression(),
        LinearSVC(loss="hinge", max_iter=20_000, random_state=0),
        SGDClassifier(loss="hinge", random_state=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("removal", ["quantile", "random"])
def test_a_classification_recovers(base: Any, removal: str) -> None:
    train, (X, y) = classes()
    robust = SeverClassifier(base, eps=0.24, removal=removal, random_state=0).fit(*train)
    assert base.fit(*train).score(X, y) < 0.9
    assert robust.score(X, y) > 0.92
    assert not robust.support_[:36].any()
    assert list(robust.classes_) == ["ham", "spam"]


def test_sparse_is_as_dense() -> None:
    (X, y), _ = classes()
    X = np.where(np.abs(X) > 0.5, X, 0.0)
    dense = SeverClassifier(LinearSVC(random_state=0)).fit(X, y)
    sparse = SeverClassifier(LinearSVC(random_state=0)).fit(csr_matrix(X), y)
    assert np.array_equal(dense.support_, sparse.support_)
    assert np.array_equal(dense.predict(X), sparse.predict(csr_matrix(X)))


def test_a_module_recovers() -> None:
    (X, y), theta = regression(bad=20, n=400)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 1))
    robust = SeverRegressor(ModuleRegressor(module, weight_decay=1e-4), eps=0.1).fit(X, y)
    clean = np.random.default_rng(1).standard_normal((200, 20))
    assert np.mean((ModuleRegressor(module).fit(X, y).predict(clean) - clean @ theta) ** 2) > 0.2
    assert np.mean((robust.predict(clean) - clean @ theta) ** 2) < 0.02
    assert not robust.support_[:20].any()


def test_a_module_classifies() -> None:
    train, (X, y) = classes(n=300, bad=12)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2))
    robust = SeverClassifier(ModuleClassifier(module, weight_decay=1e-2), eps=0.16).fit(*train)
    assert robust.score(X, y) > 0.9
    assert robust.support_[:12].sum() <= 1
    assert not hasattr(robust, "predict_proba")  # as its estimator


def test_every_part_of_a_module_keeps_its_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    module[1].eval()
    modes = [part.training for part in module.modules()]
    x, y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    first, again = (module_gradients(module, cross_entropy, x, y) for _ in range(2))
    assert np.array_equal(first, again)
    assert [part.training for part in module.modules()] == modes
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module_gradients(module, cross_entropy, torch.ones(4), y)
    assert [part.training for part in module.modules()] == modes


def test_a_module_scores_two_classes_by_one_number_and_more_by_one_each() -> None:
    _, (X, y) = classes(n=300)
    module = ModuleClassifier(nn.Linear(10, 4)).fit(X, y)  # with more outputs than classes
    scores = module.decision_function(X)
    assert scores.shape == (300,)
    assert np.array_equal(module.predict(X), np.where(scores > 0, "spam", "ham"))
    for estimator in (module, SeverClassifier(module, eps=0.2)):
        areas = cross_val_score(estimator, X, y, scoring="roc_auc", cv=2, error_score="raise")
        assert areas.min() > 0.9
    three = np.arange(300) % 3
    assert module.fit(X, three).decision_function(X).shape == (300, 3)


def test_a_module_refuses_what_are_no_labels_of_its_own() -> None:
    (X, y), _ = classes(n=300)
    module = ModuleClassifier(nn.Linear(10, 2))
    with pytest.raises(NotFittedError):
        module.predict(X)
    with pytest.raises(NotFittedError):
        module.per_example_gradients(X, y)
    with pytest.raises(ValueError, match="continuous"):
        module.fit(X, X[:, 0])
    with pytest.raises(InputError, match=r"y holds the label .*eggs.*, which is none of the 2 classes"):
        module.fit(X, y).per_example_gradients(X[:3], np.array(["ham", "spam", "eggs"]))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (ModuleClassifier(nn.Linear(10, 2)), r"each of 3 classes, shape \(2, 3\).*gives \(2, 2\)"),
        (ModuleClassifier(nn.Flatten(0)), r"each of 3 classes, .*gives \(20,\)"),
        (ModuleClassifier(nn.Linear(9, 3)), r"inputs of shape \(2, 10\); it raised .*multiplied"),
        (ModuleClassifier(nn.Linear(10, 3), steps=0), "steps must be .* at least 1, got 0"),
        (ModuleRegressor(nn.Linear(10, 2)), r"one output for a row, .*gives \(2, 2\)"),
        (ModuleRegressor(nn.Linear(9, 1)), r"inputs of shape \(2, 10\); it raised .*multiplied"),
        (ModuleRegressor(nn.LSTM(10, 1)), "must give a tensor, got tuple"),
        (ModuleRegressor(nn.Linear(10, 1), steps=1.5), "steps must be an integer .*got 1.5"),
    ],
    ids=str,
)
def test_a_module_that_does_not_fit_is_told_so(estimator: Any, message: str) -> None:
    X = np.random.default_rng(0).standard_normal((30, 10))
    with pytest.raises(InputError, match=message):
        estimator.fit(X, np.arange(30) % 3)


def test_a_module_for_regression_has_no_gradients_before_it_is_fitted() -> None:
    with pytest.raises(NotFittedError):
        ModuleRegressor(nn.Linear(2, 1)).per_example_gradients(np.eye(2), np.ones(2))


def test_a_module_without_penalty_is_least_squares() -> None:
    (X, y), _ = regression()
    weights = np.linspace(0, 1, len(y))
    module = ModuleRegressor(nn.Linear(20, 1).double(), weight_decay=0).fit(X, y, weights)
    wanted = LinearRegression().fit(X, y, weights)
    assert np.allclose(module.predict(X), wanted.predict(X), atol=1e-4)


def by_torch(
    model: Any, X: np.ndarray, y: np.ndarray, loss: Callable[[Tensor, Tensor], Tensor]
) -> np.ndarray:
    """The same gradients by torch.func, in the order of `linear_gradients`."""
    coef = np.atleast_2d(model.coef_)
    module = nn.Linear(coef.shape[1], coef.shape[0]).double()
    module.weight.data = torch.tensor(coef)
    module.bias.data = torch.tensor(np.broadcast_to(model.intercept_, len(coef)).copy())
    flat = module_gradients(module, loss, torch.tensor(X), torch.tensor(y), chunk=7)
    k, d = coef.shape
    weights = flat[:, : k * d].reshape(-1, k, d)
    return np.concatenate([weights, flat[:, k * d :, None]], axis=2).reshape(len(X), -1)


def against_rest(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of signed outputs, one class against the rest."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        chosen = y[:, None] == (torch.tensor([1]) if f.shape[1] == 1 else torch.arange(f.shape[1]))
        return of(torch.where(chosen, f, -f)).sum()

    return loss


LOSSES: list[tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = [
    (LogisticRegression(), cross_entropy),
    (SGDClassifier(loss="log_loss", random_state=0), against_rest(lambda m: softplus(-m))),
    (LinearSVC(random_state=0), against_rest(lambda m: torch.relu(1 - m) ** 2)),
    (LinearSVC(loss="hinge", random_state=0), against_rest(lambda m: torch.relu(1 - m))),
    (RidgeClassifier(), against_rest(lambda m: (1 - m) ** 2 / 2)),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize(("model", "loss"), LOSSES, ids=lambda value: repr(value)[:30])
def test_closed_forms_of_classifiers(
    model: Any, loss: Callable[[Tensor, Tensor], Tensor], labels: int
) -> None:
    X, y = load_iris(return_X_y=True)
    X, y = X[y < labels], y[y < labels]
    model.fit(X, y)
    if labels == 2 and loss is cross_entropy:
        loss = against_rest(lambda m: softplus(-m))  # softmax over f and 0
    assert np.allclose(linear_gradients(model, X, y), by_torch(model, X, y, loss), atol=1e-10)
    assert np.allclose(
        linear_gradients(model, csr_matrix(X), y).toarray(), linear_gradients(model, X, y)
    )


@pytest.mark.parametrize("options", [{"solver": "liblinear"}, {"multi_class": "ovr"}], ids=str)
def test_logistic_regression_one_against_the_rest(options: dict[str, str]) -> None:
    """As scikit-learn up to 1.7 fits it; put together here, since later releases refuse to."""
    X, y = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=1000).fit(X, y)
    parts = [LogisticRegression(solver="liblinear").fit(X, y == label) for label in range(3)]
    model.coef_ = np.concatenate([part.coef_ for part in parts])
    model.intercept_ = np.concatenate([part.intercept_ for part in parts])
    vars(model).update(options)
    wanted = by_torch(model, X, y, against_rest(lambda m: softplus(-m)))
    assert np.allclose(linear_gradients(model, X, y), wanted, atol=1e-10)


@pytest.mark.parametrize("model", [Ridge(), LinearRegression(), Lasso()], ids=repr)
def test_closed_forms_of_regressors(model: Any) -> None:
    (X, y), _ = regression()
    model.fit(X, y)
    wanted = by_torch(model, X, y, lambda f, t: mse_loss(f[:, 0], t) / 2)
    assert np.allclose(linear_gradients(model, X, y), wanted, atol=1e-10)


def test_no_intercept_no_column() -> None:
    (X, y), _ = regression()
    assert linear_gradients(Ridge(fit_intercept=False).fit(X, y), X, y).shape == (600, 20)
    two = np.sign(y)
    assert linear_gradients(SVC(kernel="linear").fit(X, two), X, two).shape == (600, 21)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("labels", [2, 3])
def test_a_loss_over_all_classes_is_not_taken_for_one_against_the_rest(labels: int) -> None:
    X, y = load_iris(return_X_y=True)
    X, y = X[y < labels], y[y < labels]
    model = LinearSVC(multi_class="crammer_singer", random_state=0).fit(X, y)
    with pytest.raises(InputError, match="no closed-form gradients for LinearSVC"):
        linear_gradients(model, X, y)


def test_given_gradients_serve_any_estimator() -> None:
    (X, y), theta = regression()
    with pytest.raises(InputError, match="no closed-form gradients for HuberRegressor"):
        SeverRegressor(HuberRegressor()).fit(X, y)
    with pytest.raises(InputError, match="give gradients="):
        SeverClassifier(KNeighborsClassifier()).fit(X, np.sign(y))
    robust = SeverRegressor(
        HuberRegressor(max_iter=1000),
        gradients=lambda model, X, y: np.clip(model.predict(X) - y, -1, 1)[:, None] * X,
    ).fit(X, y)
    assert np.linalg.norm(robust.estimator_.coef_ - theta) < 0.1


values = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))
small = st.tuples(st.integers(2, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=values)
)
large = st.builds(
    lambda n, d, seed: np.random.default_rng(seed).uniform(-1e3, 1e3, (n, d)).round(3),
    st.integers(2, 90),
    st.integers(1, 90),
    st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
@given(small | large, st.floats(-50, 50), st.integers(-150, 150))
def test_scores_move_with_the_rows(rows: np.ndarray, shift: float, power: int) -> None:
    """Neither a common part nor the order counts, and the scale is the rows'; huge ones do no harm."""
    weights = np.ones(len(rows))
    scores = spectral_scores(rows, weights)
    assert scores.shape == weights.shape
    variance = (scores**2).mean()
    top = np.linalg.norm(rows - rows.mean(0), 2) ** 2 / len(rows)
    assert variance == pytest.approx(top, rel=1e-6, abs=1e-12)
    shifted = spectral_scores(rows + shift, weights)
    assert (shifted**2).mean() == pytest.approx(top, rel=1e-5, abs=1e-9)
    scaled = spectral_scores(rows * 10.0**power, weights)
    assert np.sqrt(((scaled / 10.0**power) ** 2).mean()) == pytest.approx(
        np.sqrt(top), rel=1e-5, abs=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60),
    st.floats(0, 0.49),
    st.sampled_from(sorted(REMOVALS)),
    st.integers(1, 30),
    st.integers(0, 2**31),
)
def test_no_more_is_removed_than_the_budget(
    n: int, eps: float, removal: str, rounds: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, groups = rng.standard_cauchy((n, 3)), rng.integers(0, 3, n)
    fitted: list[np.ndarray] = []

    def fit(weights: np.ndarray) -> np.ndarray:
        fitted.append(weights)
        return weights @ x / weights.sum()

    got = sever(
        fit,
        lambda mean: mean - x,
        n,
        eps=eps,
        removal=removal,
        rounds=rounds,
        groups=groups,
        seed=seed,
    )
    assert len(fitted) == got.rounds + 1 <= rounds + 1
    assert np.array_equal(fitted[-1], got.weights)
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(fitted))
    for group in range(3):
        size = (groups == group).sum()
        lost = size - got.weights[groups == group].sum()
        share = 2 * eps if removal != "quantile" else min(1.0, rounds * eps)
        assert lost <= share * size + 1e-6 + (rounds if removal == "quantile" else 0)
        assert size == 0 or got.weights[groups == group].sum() > 0


def test_what_is_within_sigma_is_left_alone() -> None:
    (X, y), _ = regression()
    clean = slice(30, None)
    spread = 1.5 * 0.1  # of residual times x, whose parts are independent
    assert SeverRegressor(eps=0.1, sigma=spread).fit(X[clean], y[clean]).support_.all()
    assert not SeverRegressor(eps=0.1, sigma=spread).fit(X, y).support_[:30].any()


def test_nothing_can_be_removed_at_eps_0() -> None:
    (X, y), _ = regression()
    robust = SeverRegressor(eps=0.0).fit(X, y)
    assert robust.support_.all()
    assert np.array_equal(robust.estimator_.coef_, Ridge().fit(X, y).coef_)


def test_a_large_spectrum_is_exact() -> None:
    rng = np.random.default_rng(0)
    for shape in [(300, 80), (80, 300)]:
        rows, weights = rng.standard_normal(shape), rng.random(shape[0])
        mean = weights @ rows / weights.sum()
        v = np.linalg.svd(np.sqrt(weights)[:, None] * (rows - mean))[2][0]
        assert np.allclose(spectral_scores(rows, weights), np.abs((rows - mean) @ v), atol=1e-6)
        assert spectral_scores(np.ones(shape), weights).max() < 1e-12


def refused(**options: Any) -> None:
    arguments = {"n": 4, "eps": 0.1, **options}
    n = arguments.pop("n")
    sever(lambda w: w.sum(), lambda _: np.zeros((4, 2)), n, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 5}, r"a row for each of 5 examples, got shape \(4, 2\)"),
        ({"eps": 0.5}, r"below 1/2, got 0\.5"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": -0.1}, r"got -0\.1"),
        ({"eps": "0.1"}, "eps must be .* got '0.1'"),
        ({"eps": None}, "eps must be .* got None"),
        ({"sigma": "1"}, "sigma must be positive, got '1'"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": 1.5}, "rounds must be an integer, .* got 1.5"),
        ({"rounds": True}, "rounds must be an integer, .* got True"),
        ({"sigma": 0.0}, r"sigma must be positive, got 0\.0"),
        ({"removal": "hard"}, "unknown removal 'hard'.*quantile, random, soft"),
        ({"groups": [1, 2]}, r"for each of 4 examples, got shape \(2,\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        refused(**options)


def test_bad_gradients() -> None:
    with pytest.raises(InputError, match="must be finite"):
        sever(lambda w: w, lambda _: np.full((4, 2), np.inf), 4, eps=0.1)


def test_bad_estimators() -> None:
    (X, y), _ = regression()
    with pytest.raises(InputError, match="a torch module is needed"):
        SeverRegressor(ModuleRegressor()).fit(X, y)
    with pytest.raises(InputError, match="needs sample_weight"):
        SeverClassifier(KNeighborsClassifier(), removal="soft").fit(X, np.sign(y))
    with pytest.raises(InputError, match=r"sample_weight must be 600 numbers, got shape \(599,\)"):
        ModuleRegressor(nn.Linear(20, 1)).fit(X, y, np.ones(599))
    with pytest.raises(InputError, match=r"must add up to more than zero, got 0\.0"):
        ModuleRegressor(nn.Linear(20, 1)).fit(X, y, np.zeros(600))
    with pytest.raises(InputError, match="at least two classes, got one class"):
        SeverClassifier().fit(X, np.ones(600))


def test_published_thresholds() -> None:
    scores = np.array([3.0, 1.0, 2.0, 2.0])
    assert list(below(scores, 0.0)) == [False, True, True, True]  # the largest goes whatever eps is
    assert list(below(scores, 0.25)) == [False, True, False, False]  # and whatever ties
    assert list(below(np.array([0.0, 0.0, 1.0]), 0.5)) == [True, True, False]


def test_distances_of_sparse_rows() -> None:
    rows = np.random.default_rng(0).poisson(0.5, (30, 12)).astype(float)
    wanted = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    assert np.allclose(distances(rows, centred=True), wanted)
    assert np.allclose(distances(csr_matrix(rows), centred=True), wanted)
    assert np.allclose(distances(csr_matrix(rows), centred=False), np.linalg.norm(rows, axis=1))


def test_the_ridge_is_that_of_standardised_columns() -> None:
    (X, y), _ = regression()
    X = X * np.arange(1, 21) + 3
    theta = sever_regression.ridge(X, y, 7.0)
    scale = X.std(axis=0, ddof=1)
    wanted = Ridge(alpha=7.0).fit(X / scale, y)
    assert np.allclose(theta[1:], wanted.coef_ / scale)
    assert theta[0] == pytest.approx(wanted.intercept_)


def test_a_small_regression_experiment() -> None:
    data = sever_regression.synthetic(0, n=600, d=40)
    found = sever_regression.errors(data, 0.05, 4.0, 0)
    assert found["sever"] < 1.1 * found["uncorrupted"]
    assert min(found[name] for name in ("none", "l2", "ransac")) > 0.2


def test_a_small_svm_experiment() -> None:
    setting = {"data": "synthetic", "eps": 0.03, "reach": 1, "draw": 0, "n": 500, "d": 50}
    found = sever_svm.trial(setting, 0, None)
    assert found["sever"] <= min(found[name] for name in ("none", "l2", "gradient", "ransac"))


def test_the_dual_is_the_subgradient_of_the_optimum() -> None:
    """Mean of the gradients is minus that of the penalty, and the same examples have the same ones."""
    data = sever_svm.synthetic(1, 300, 20)
    X, y = sever_svm.synthetic_attack(data, 0.05, 2, 1)
    problem = sever_svm.problem(data, X, y)
    machine = problem.fit(np.ones(315))
    rows = problem.gradients(machine)
    assert np.allclose(rows.mean(axis=0), -data.decay * machine.weights, atol=1e-6)
    assert np.ptp(machine.pulls[300:]) < 1e-12
    margins = problem.groups * (problem.inputs @ machine.weights + machine.bias)
    assert (machine.pulls[margins < 0.99] > 1 - 1e-9).all()
    assert (machine.pulls[margins > 1.01] == 0).all()


def real_data(name: str) -> None:
    try:
        sever_defences.read(name, None)
    except InputError as error:
        pytest.skip(str(error))


def test_drug_discovery_as_published() -> None:
    real_data("qsar.npz")
    found = sever_regression.trial({"data": "qsar", "eps": 0.05}, 0, None)
    for name, error in {"none": 1.367, "l2": 1.233, "loss": 1.626, "sever": 1.225}.items():
        assert found[name] == pytest.approx(error, rel=0.02)


def test_enron_as_published() -> None:
    real_data("enron.npz")
    found = sever_svm.trial({"data": "enron", "eps": 0.01, "suite": "grad", "attack": 8}, 0, None)
    for name, error in {"uncorrupted": 0.03, "none": 0.168116, "l2": 0.16715, "loss": 0.033816}.items():
        assert found[name] == pytest.approx(error, abs=1e-3)
    assert found["sever"] < 0.0734
    assert found["sever"] < found["gradient"] < found["gradientCentered"] < found["none"]


def test_the_published_files_are_converted(tmp_path: Path) -> None:
    rng, source = np.random.default_rng(0), tmp_path / "clone"
    data, suites = source / "svm" / "data", source / "svm" / "diaries" / "enron"
    mails = {name: csr_matrix(rng.integers(0, 2, (n, 4))) for name, n in (("X_train", 6), ("X_test", 3))}
    labels = {"y_train": np.ones((6, 1)), "y_test": -np.ones((3, 1))}
    data.mkdir(parents=True)
    savemat(data / "enron_data.mat", {**mails, **labels})
    (source / "linreg" / "data").mkdir(parents=True)
    savemat(
        source / "linreg" / "data" / "qsar.mat",
        {**{name: matrix.toarray() for name, matrix in mails.items()}, **labels},
    )
    for kind, eps in itertools.product(("L2_grad", "L2"), (5, 10, 20, 30)):
        folder = suites / f"eps-{eps}_wd-9_exact_{kind}_rep-2_all_attacks"
        folder.mkdir(parents=True)
        for number in (10, 9):
            rows = csr_matrix(np.full((2, 4), eps + number))
            savemat(folder / f"{number}.mat", {"X_attack": rows, "y_attack": [[1], [-1]]})
    program = Path(__file__).parents[2] / "examples" / "sever_data.py"
    subprocess.run([sys.executable, program, source, tmp_path / "data"], check=True)
    setting = {"eps": 0.02, "suite": "plain", "attack": 10}
    rows, found = sever_svm.enron_attack(setting, tmp_path / "data")
    assert rows.toarray().tolist() == [[30.0] * 4] * 2
    assert found.tolist() == [1, -1]
    loaded = sever_svm.enron(tmp_path / "data")
    assert (loaded.X_test != mails["X_test"]).nnz == 0
    assert loaded.y.tolist() == [1] * 6
    assert np.array_equal(sever_regression.qsar(0, tmp_path / "data").X, mails["X_train"].toarray())


def test_absent_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDROBUST_DATA", raising=False)
    with pytest.raises(InputError, match=r"sever/qsar\.npz.*no directory.*--data-dir or FEDROBUST_DATA"):
        sever_regression.trial({"data": "qsar", "eps": 0.05}, 0, None)
    with pytest.raises(InputError, match=r"eps10_grad\.npz.*looked in: .*--data-dir"):
        sever_svm.enron_attack({"eps": 0.01, "suite": "grad", "attack": 8}, tmp_path)
    (tmp_path / "qsar.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot be read"):
        sever_defences.read("qsar.npz", tmp_path)


def test_seeds_are_no_further_attacks() -> None:
    """Only RANSAC draws, so only its errors have a spread."""
    same = dict.fromkeys(("uncorrupted", *DEFENCES), 0.1)
    trials = [
        Trial(t.setting, t.seed, {**same, "ransac": 0.1 * t.seed}, 0.0)
        for t in sever_svm.EXPERIMENT.plan(quick=True, seeds=3)
        if t.setting["data"] == "enron"
    ]
    attacks = len(trials) // 3
    page = sever_svm.tables(trials)
    assert f"over {attacks} attacks" in page
    assert f"| 0.03 | {attacks // 2} | 0.1 ± 0 (" in page
    assert "| 0.1 ± 0.1 | 0.1 ± 0 (" in page


@pytest.mark.parametrize("experiment", [sever_regression.EXPERIMENT, sever_svm.EXPERIMENT])
def test_pages_of_experiments(experiment: Experiment) -> None:
    """Tables and figures are made of whatever trials there are."""
    trials = [
        Trial(t.setting, t.seed, dict.fromkeys(("uncorrupted", *DEFENCES), 0.1), 0.0)
        for t in experiment.plan(quick=True)
    ]
    assert "published" in experiment.tables(trials)
    assert len(experiment.draw(trials).axes) >= 2
    only = [t for t in trials if t.setting["data"] == "synthetic"]
    assert experiment.tables(only)
    experiment.draw(only)
