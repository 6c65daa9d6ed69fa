"""Torch modules as estimators with scikit-learn's interface, fitted to an optimum, with gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, mse_loss

from fedrobust.errors import InputError
from fedrobust.imports import told
from fedrobust.kernels import Matrix, Vector
from fedrobust.statistics.gradients import Loss, module_gradients
from fedrobust.statistics.parameters import is_integer
from fedrobust.text import printable


class _Module(BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A module and its loss.

    Args:
        module: a template; it is copied before it is fitted, which starts from the copy's values.
        loss: of a batch of outputs and targets, their mean; None is the usual one.
        weight_decay: lambda of the penalty lambda/2 |parameters|^2.
        steps: of L-BFGS at most; it ends sooner at an optimum.

    Attributes:
        module_: fitted, in evaluation mode.
        n_features_in_: d.
    """

    module_: nn.Module

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        loss: Loss | None = None,
        weight_decay: float = 1e-3,
        steps: int = 200,
    ) -> None:
        self.module = module
        self.loss = loss
        self.weight_decay = weight_decay
        self.steps = steps

    def _descend(
        self, loss: Loss, inputs: Tensor, targets: Tensor, sample_weight: npt.ArrayLike | None
    ) -> None:
        shares = np.ones(len(inputs)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        if shares.shape != (len(inputs),):
            raise InputError(f"sample_weight must be {len(inputs)} numbers, got shape {shares.shape}")
        if not shares.sum() > 0:
            raise InputError(f"sample_weight must add up to more than zero, got {shares.sum()}")
        weights = torch.as_tensor(shares / shares.sum(), dtype=inputs.dtype)
        each = vmap(lambda output, target: loss(output[None], target[None]))
        # In evaluation mode throughout, so that what is fitted is what the gradients are taken of.
        module = self.module_.eval()
        trained = [p for p in module.parameters() if p.requires_grad]
        descent = torch.optim.LBFGS(trained, max_iter=self.steps, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            descent.zero_grad()
            penalty = sum(((p**2).sum() for p in trained), torch.zeros((), dtype=inputs.dtype))
            value = weights @ each(module(inputs), targets) + self.weight_decay / 2 * penalty
            value.backward()  # type: ignore[no-untyped-call]
            return value

        descent.step(objective)  # type: ignore[no-untyped-call]

    def _start(self, inputs: Matrix) -> tuple[int, ...]:
        """Copy the module; the shape of what it gives for the first two of (n, d) inputs, or the one."""
        if self.module is None:
            raise InputError("a torch module is needed: module=nn.Linear(d, k), for instance")
        if not is_integer(self.steps) or self.steps < 1:
            raise InputError(f"steps must be an integer of at least 1, got {self.steps!r}")
        self.module_ = copy.deepcopy(self.module).eval()
        first = self._tensor(inputs[:2])
        try:
            with torch.no_grad():
                outputs = self.module_(first)
        except Exception as error:
            raise InputError(
                f"the module must take inputs of shape {tuple(first.shape)}; it raised "
                f"{printable(told(error))}"
            ) from error
        if not isinstance(outputs, Tensor):
            raise InputError(f"the module must give a tensor, got {type(outputs).__name__}")
        return tuple(outputs.shape)

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        first = next(self.module_.parameters(), None)
        return torch.as_tensor(values, dtype=torch.float32 if first is None else first.dtype)

    def _outputs(self, X: npt.ArrayLike) -> Tensor:
        check_is_fitted(self, "module_")
        with torch.no_grad():
            outputs: Tensor = self.module_(self._tensor(validate_data(self, X, reset=False)))
        return outputs


class ModuleRegressor(RegressorMixin, _Module):  # type: ignore[misc] # scikit-learn has no types
    """Regression by a torch module of one output; squared loss unless another is given."""

    @property
    def _loss(self) -> Loss:
        loss = self.loss or mse_loss
        # A target of shape (m,) beside outputs of shape (m, 1) would be broadcast to (m, m).
        return lambda outputs, targets: loss(outputs.reshape(targets.shape), targets)

    def fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
    ) -> ModuleRegressor:
        """Fit to (n, d) X and (n,) y under (n,) weights.

        Raises:
            InputError: a parameter is out of its range, or the module does not fit X or a target.
            ValueError: X and y are not what scikit-learn takes.
        """
        inputs, targets = validate_data(self, X, y, y_numeric=True)
        shape, rows = self._start(inputs), min(len(inputs), 2)
        if shape[:1] != (rows,) or math.prod(shape) != rows:
            raise InputError(
                f"the module must give one output for a row, shape ({rows},) or ({rows}, 1) for {rows} "
                f"rows; it gives {shape}"
            )
        self._descend(self._loss, self._tensor(inputs), self._tensor(targets), sample_weight)
        return self

    def predict(self, X: npt.ArrayLike) -> Vector:
        """(m,) float64 for (m, d)."""
        return np.asarray(self._outputs(X).reshape(-1).double().numpy())

    def per_example_gradients(self, X: Matrix, y: npt.NDArray[Any]) -> Matrix:
        """(n, p) float64 of the loss at the fitted parameters."""
        check_is_fitted(self, "module_")
        return module_gradients(self.module_, self._loss, self._tensor(X), self._tensor(y))


class ModuleClassifier(ClassifierMixin, _Module):  # type: ignore[misc] # scikit-learn has no types
    """Classification by a torch module with an output for each class; cross-entropy unless another.

    Attributes:
        classes_: (k,) the labels, in the order of the outputs.
    """

    @property
    def _loss(self) -> Loss:
        return self.loss or cross_entropy

    def fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
    ) -> ModuleClassifier:
        """Fit to (n, d) X and (n,) labels under (n,) weights.

        Raises:
            InputError: a parameter is out of its range, or the module does not fit X or the classes.
            ValueError: X and y are not what scikit-learn takes.
        """
        inputs, labels = validate_data(self, X, y)
        check_classification_targets(labels)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        shape, rows, least = self._start(inputs), min(len(inputs), 2), len(self.classes_)
        if len(shape) != 2 or shape[0] != rows or shape[1] < least:
            raise InputError(
                f"the module must give an output for each of {least} classes, shape ({rows}, {least}) "
                f"for {rows} rows; it gives {shape}"
            )
        self._descend(self._loss, self._tensor(inputs), torch.as_tensor(targets), sample_weight)
        return self

    def decision_function(self, X: npt.ArrayLike) -> Matrix:
        """(m, k) float64, the module's outputs; for two classes (m,), the second's less the first's.

        So that a larger one speaks for the second of two classes, as scikit-learn's scorers take it.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """(m,) the labels with the largest output."""
        largest = self._scores(X).argmax(axis=1)
        chosen: npt.NDArray[Any] = self.classes_[largest]
        return chosen

    def _scores(self, X: npt.ArrayLike) -> Matrix:
        return np.asarray(self._outputs(X).double().numpy())[:, : len(self.classes_)]

    def per_example_gradients(self, X: Matrix, y: npt.NDArray[Any]) -> Matrix:
        """(n, p) float64 of the loss at the fitted parameters.

        Raises:
            InputError: a label is none of `classes_`.
        """
        check_is_fitted(self, "module_")
        strange = np.setdiff1d(y, self.classes_)
        if len(strange):
            raise InputError(
                f"y holds the label {strange[0]!r}, which is none of the {len(self.classes_)} classes "
                "fitted to; give labels that are in classes_"
            )
        targets = torch.as_tensor(np.searchsorted(self.classes_, y))
        return module_gradients(self.module_, self._loss, self._tensor(X), targets)
