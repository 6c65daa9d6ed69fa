"""The estimators go where scikit-learn's own go: pipelines, searches, cross-validation, frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone, is_classifier, is_outlier_detector, is_regressor
from sklearn.datasets import make_blobs, make_regression
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fedrobust import InputError
from fedrobust.statistics import (
    FilteredPCA,
    ModuleClassifier,
    ModuleRegressor,
    QUEDetector,
    RobustCovariance,
    RobustMean,
    SeverClassifier,
    SeverRegressor,
    SpectralSignatures,
)

ALL = [
    FilteredPCA(n_components=2),
    QUEDetector(),
    RobustCovariance(),
    RobustMean(),
    SeverClassifier(LogisticRegression()),
    SeverRegressor(Ridge()),
    SpectralSignatures(),
]
NAMES = [type(estimator).__name__ for estimator in ALL]


@pytest.fixture
def classes() -> tuple[Any, Any]:
    """Two classes in five dimensions; some examples are shifted together and carry the other label."""
    X, y = make_blobs(n_samples=[150, 150], n_features=5, cluster_std=1.0, random_state=0)
    X[:15], y[:15] = X[:15] + 25, 1 - y[:15]
    order = np.random.default_rng(0).permutation(len(X))
    return X[order], y[order]


@pytest.fixture
def line() -> tuple[Any, Any]:
    """A linear function of five columns; a tenth of the examples pull it elsewhere."""
    X, y = make_regression(n_samples=300, n_features=5, noise=1.0, random_state=0)
    bad = np.random.default_rng(0).choice(300, 30, replace=False)
    X[bad], y[bad] = 3 * X[bad], -1000
    return X, y


def share(estimator: Any) -> str:
    """The parameter that says how many rows may be bad; detectors call it as scikit-learn's do."""
    return "contamination" if is_outlier_detector(estimator) else "eps"


def frame(X: Any) -> pd.DataFrame:
    return pd.DataFrame(X, columns=[f"column {i}" for i in range(X.shape[1])])


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_it_is_cloned_unfitted_with_its_parameters(estimator: Any, classes: tuple[Any, Any]) -> None:
    ready = clone(estimator).set_params(**{share(estimator): 0.07}).fit(*classes)
    again = clone(ready)
    assert again.get_params()[share(estimator)] == 0.07
    assert {k: repr(v) for k, v in again.get_params().items()} == {
        k: repr(v) for k, v in ready.get_params().items()
    }
    assert not hasattr(again, "n_features_in_")


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_parameters_are_set_through_a_pipeline(estimator: Any, classes: tuple[Any, Any]) -> None:
    pipeline = Pipeline([("scale", StandardScaler()), ("robust", clone(estimator))])
    pipeline.set_params(**{f"robust__{share(estimator)}": 0.3}).fit(*classes)
    assert pipeline["robust"].get_params()[share(estimator)] == 0.3
    assert pipeline["robust"].n_features_in_ == 5


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_frames_give_their_names(estimator: Any, classes: tuple[Any, Any]) -> None:
    X, y = classes
    named, plain = clone(estimator).fit(frame(X), y), clone(estimator).fit(X, y)
    assert list(named.feature_names_in_) == list(frame(X).columns)
    assert not hasattr(plain, "feature_names_in_")
    for fitted in ("location_", "covariance_", "components_", "scores_"):
        if hasattr(plain, fitted):
            np.testing.assert_allclose(getattr(named, fitted), getattr(plain, fitted), rtol=1e-10)


def test_scikit_learn_knows_what_each_is() -> None:
    assert is_classifier(SeverClassifier())
    assert is_classifier(make_pipeline(StandardScaler(), SeverClassifier()))
    assert is_regressor(SeverRegressor())
    assert is_outlier_detector(QUEDetector())


def test_components_are_frames_where_frames_are_asked_for(classes: tuple[Any, Any]) -> None:
    X, _ = classes
    pca = make_pipeline(StandardScaler(), FilteredPCA(n_components=2)).set_output(transform="pandas")
    found = pca.fit_transform(frame(X).set_index(np.arange(len(X)) + 7))
    assert list(found.columns) == ["filteredpca0", "filteredpca1"]
    assert list(found.index[:2]) == [7, 8]
    np.testing.assert_array_equal(pca.transform(frame(X)), found)


def test_a_search_over_eps_finds_how_many_are_bad(line: tuple[Any, Any]) -> None:
    pipeline = make_pipeline(StandardScaler(), SeverRegressor(Ridge()))
    grid = {"severregressor__eps": [0.0, 0.1], "severregressor__estimator__alpha": [0.1, 1e4]}
    search = GridSearchCV(pipeline, grid, scoring="neg_median_absolute_error", cv=3).fit(*line)
    assert search.best_params_ == {"severregressor__eps": 0.1, "severregressor__estimator__alpha": 0.1}


def test_a_search_over_components_and_eps(classes: tuple[Any, Any]) -> None:
    pipeline = make_pipeline(FilteredPCA(), SeverClassifier(LogisticRegression(), random_state=0))
    grid = {"filteredpca__eps": [0.05, 0.1], "filteredpca__n_components": [1, 2]}
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(*classes)
    assert search.best_score_ > 0.8


def test_cross_validation_of_sever_beats_that_of_its_estimator(line: tuple[Any, Any]) -> None:
    scoring = "neg_median_absolute_error"
    plain = cross_val_score(Ridge(), *line, scoring=scoring)
    robust = cross_val_score(SeverRegressor(Ridge(), eps=0.15), *line, scoring=scoring)
    assert -robust.mean() < 2 < 20 < -plain.mean()  # noqa: PLR0133 (reads as the gap that it is)


def test_cross_validated_probabilities(classes: tuple[Any, Any]) -> None:
    found = cross_val_predict(SeverClassifier(LogisticRegression()), *classes, method="predict_proba")
    assert found.shape == (300, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_search_over_a_detector_by_what_it_labels(classes: tuple[Any, Any]) -> None:
    X, _ = classes
    bad = X[:, 0] > 15

    def found(detector: QUEDetector, X: Any, y: Any) -> float:
        return float(((detector.predict(X) == -1) == y).mean())

    search = GridSearchCV(QUEDetector(), {"contamination": [0.01, 0.05]}, scoring=found, cv=3).fit(
        X, bad
    )
    assert search.best_params_ == {"contamination": 0.05}


def test_a_location_is_scored_by_its_likelihood(classes: tuple[Any, Any]) -> None:
    X, _ = classes
    search = GridSearchCV(RobustCovariance(), {"eps": [0.01, 0.1]}, cv=3, error_score="raise").fit(X)
    assert np.isfinite(search.best_score_)


def test_a_bad_eps_in_a_pipeline_is_named(line: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="eps"):
        make_pipeline(StandardScaler(), SeverRegressor(eps=0.7)).fit(*line)


@pytest.mark.parametrize("kind", [ModuleRegressor, ModuleClassifier])
def test_estimators_of_modules_are_cloned(kind: Any, classes: tuple[Any, Any]) -> None:
    import torch  # noqa: PLC0415

    module = torch.nn.Linear(5, 1 if kind is ModuleRegressor else 2)
    ready = make_pipeline(StandardScaler(), kind(module)).fit(*classes)
    again = clone(ready)
    assert again[-1].get_params().keys() == ready[-1].get_params().keys()
    assert cross_val_score(again, *classes, cv=2, error_score="raise").shape == (2,)
