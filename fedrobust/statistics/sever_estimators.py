"""SEVER around scikit-learn's estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, RegressorMixin, clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, has_fit_parameter, validate_data

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix
from fedrobust.statistics.gradients import linear_gradients
from fedrobust.statistics.severing import Gradients, sever

PerExample = Callable[[Any, Gradients, npt.NDArray[Any]], Gradients]
"""A fitted estimator, (n, d) X and (n,) y -> (n, p)."""


class _Sever(MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """What both have; see `SeverRegressor`."""

    def __init__(
        self,
        estimator: BaseEstimator | None = None,
        *,
        eps: float = 0.1,
        removal: str = "quantile",
        rounds: int | None = None,
        sigma: float | None = None,
        gradients: PerExample | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.eps = eps
        self.removal = removal
        self.rounds = rounds
        self.sigma = sigma
        self.gradients = gradients
        self.random_state = random_state

    def _sever(
        self, base: BaseEstimator, X: Gradients, y: npt.NDArray[Any], groups: npt.NDArray[Any] | None
    ) -> None:
        if self.removal == "soft" and not has_fit_parameter(base, "sample_weight"):
            raise InputError(f"removal='soft' needs sample_weight, which {base!r} does not take")

        def fit(weights: npt.NDArray[np.float64]) -> Any:  # noqa: ANN401 (whatever the estimator is)
            some = np.flatnonzero(weights)
            # Lesser weights are the soft form's alone; a removed example must not even be looked at.
            options = {"sample_weight": weights[some]} if self.removal == "soft" else {}
            return clone(base).fit(X[some], y[some], **options)

        result = sever(
            fit,
            lambda model: self._gradients(model, X, y),
            X.shape[0],
            eps=self.eps,
            removal=self.removal,
            rounds=self.rounds,
            sigma=self.sigma,
            groups=groups,
            seed=check_random_state(self.random_state).randint(2**31 - 1),
        )
        self.estimator_ = result.model
        self.scores_ = result.scores
        self.support_ = result.weights > 0
        self.weights_ = result.weights

    def _gradients(self, model: Any, X: Gradients, y: npt.NDArray[Any]) -> Gradients:  # noqa: ANN401
        if self.gradients is not None:
            return self.gradients(model, X, y)
        if hasattr(model, "per_example_gradients"):
            found: Gradients = model.per_example_gradients(X, y)
            return found
        return linear_gradients(model, X, y)

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """(m,) for (m, d), by the estimator fitted last."""
        check_is_fitted(self)
        found: npt.NDArray[Any] = self.estimator_.predict(self._again(X))
        return found

    def _again(self, X: npt.ArrayLike) -> Gradients:
        checked: Gradients = validate_data(self, X, accept_sparse="csr", reset=False)
        return checked

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401 (scikit-learn has no types)
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class SeverRegressor(RegressorMixin, _Sever):  # type: ignore[misc] # scikit-learn has no types
    """Regression on data of which a share may be hostile: `sever` around any differentiable regressor.

    Args:
        estimator: Ridge() if None; LinearRegression, Lasso, ElasticNet, SGDRegressor with squared loss,
            `ModuleRegressor` (any torch module and loss), whatever has a method
            `per_example_gradients(X, y)`, or any at all with `gradients`.
        eps: the share of the examples that may be bad.
        removal: "quantile", "random" or "soft" (needs an estimator with sample_weight), see `sever`.
        rounds: at most so many removals, see `sever`.
        sigma: the spread of good gradients, if known, see `sever`.
        gradients: f(fitted estimator, X, y) -> (n, p), where the estimator has none that are known.
        random_state: of random removal.

    Attributes:
        estimator_: fitted to what was left.
        support_: (n,) bool, the examples that it was fitted to.
        scores_: (n,) float64, how far out each example's gradient at `estimator_` is.
        weights_: (n,) float64 in 0 .. 1, 0 or 1 but for soft removal.
        n_features_in_: d.

    The columns should have comparable scales, since the spectrum has no scale but theirs.

    Source: arXiv 1803.02815, section 4; `sever` says where this differs.

    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((500, 5))
    >>> y = X @ np.arange(1.0, 6.0)
    >>> X[:25], y[:25] = [0, 0, 0, 0, 3], -30
    >>> SeverRegressor(eps=0.1).fit(X, y).estimator_.coef_.round(1)
    array([1., 2., 3., 4., 5.])
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> SeverRegressor:
        """Fit to (n, d) X, dense or sparse, and (n,) y.

        Raises:
            InputError: an argument is out of range, or the estimator's gradients are not known.
            ValueError: X and y are not what scikit-learn takes.
        """
        inputs, targets = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True
        )
        self._sever(Ridge() if self.estimator is None else self.estimator, inputs, targets, None)
        return self


def _has(name: str) -> Callable[[_Sever], bool]:
    """Whether the estimator has a method, the fitted one if there is one."""

    def found(self: _Sever) -> bool:
        base = LogisticRegression() if self.estimator is None else self.estimator
        return hasattr(getattr(self, "estimator_", base), name)

    return found


class SeverClassifier(ClassifierMixin, _Sever):  # type: ignore[misc] # scikit-learn has no types
    """Classification on data of which a share may be hostile: `sever` in each class.

    Args:
        estimator: LogisticRegression() if None; LinearSVC (one against the rest), SGDClassifier with
            hinge, squared hinge, log or squared loss, SVC with the linear kernel for two classes,
            RidgeClassifier, `ModuleClassifier` (any torch module and loss), whatever has a method
            `per_example_gradients(X, y)`, or any at all with `gradients`.
        eps: the share of each class that may be bad. Where eps' of all examples may be and all of them
            may carry one label, that of a class with the share c, it is eps' / c.
        removal: as `SeverRegressor`.
        rounds: as `SeverRegressor`.
        sigma: as `SeverRegressor`.
        gradients: as `SeverRegressor`.
        random_state: as `SeverRegressor`.

    Attributes:
        classes_: (k,) the labels.
        estimator_: as `SeverRegressor`.
        support_: as `SeverRegressor`.
        scores_: as `SeverRegressor`, each in its class.
        weights_: as `SeverRegressor`.
        n_features_in_: d.

    Source: arXiv 1803.02815, section 4.2: centred and filtered class by class.
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> SeverClassifier:
        """Fit to (n, d) X, dense or sparse, and (n,) labels.

        Raises:
            InputError: an argument is out of range, or the estimator's gradients are not known.
            ValueError: X and y are not what scikit-learn takes.
        """
        inputs, labels = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, groups = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y must have at least two classes, got one class, {self.classes_[0]!r}")
        base = LogisticRegression() if self.estimator is None else self.estimator
        self._sever(base, inputs, labels, groups)
        return self

    @available_if(_has("decision_function"))  # type: ignore[untyped-decorator] # scikit-learn has no types
    def decision_function(self, X: npt.ArrayLike) -> Matrix:
        """(m,), or (m, k) for several classes."""
        check_is_fitted(self)
        return np.asarray(self.estimator_.decision_function(self._again(X)))

    @available_if(_has("predict_proba"))  # type: ignore[untyped-decorator] # scikit-learn has no types
    def predict_proba(self, X: npt.ArrayLike) -> Matrix:
        """(m, k), in the order of `classes_`."""
        check_is_fitted(self)
        return np.asarray(self.estimator_.predict_proba(self._again(X)))
