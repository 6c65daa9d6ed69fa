"""Every example's own gradient: in closed form for linear models, by torch.func for modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix, diags, hstack, issparse
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, is_classifier
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    LinearRegression,
    LogisticRegression,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.svm import SVC, LinearSVC
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.statistics.severing import Gradients

Loss = Callable[[Tensor, Tensor], Tensor]
"""(m, ...) outputs of a module and m targets -> their mean loss, as torch.nn.functional's losses."""

_SQUARED = (Ridge, LinearRegression, Lasso, ElasticNet)


class Differentiable(Protocol):
    """A fitted estimator that knows its own gradients."""

    def per_example_gradients(self, X: Gradients, y: npt.NDArray[np.generic]) -> Gradients:
        """(n, p) of the loss of each row of (n, d) X with its target in (n,) y."""


def linear_gradients(model: BaseEstimator, X: Gradients, y: npt.NDArray[np.generic]) -> Gradients:
    """Per-example gradients of a fitted linear model's loss, in its coefficients and intercept.

    Known: squared loss (Ridge, LinearRegression, Lasso, ElasticNet, SGDRegressor, RidgeClassifier),
    logistic loss (LogisticRegression, SGDClassifier), hinge and squared hinge (LinearSVC, SVC with the
    linear kernel and two classes, SGDClassifier). Several classes are taken one against the rest, so not
    LinearSVC with multi_class="crammer_singer"; LogisticRegression by softmax, unless it was fitted one
    against the rest, as by liblinear. The regulariser's gradient, the same for all examples, is left
    out. At a hinge's kink the gradient is 0, so that examples exactly on the margin are not seen; the
    dual variables of an exact solver tell what they weigh.

    Args:
        model: fitted.
        X: (n, d) float64, or a sparse matrix.
        y: (n,) targets, or labels among `model.classes_`.

    Returns:
        (n, k (d + 1)) float64, k the outputs of the model (1 for regression and two classes): for each
        of them d coefficients and the intercept; k d without an intercept. Sparse if X is.

    Raises:
        InputError: the model is none of these.
    """
    slopes = _slopes(model, X, y)
    inputs = X
    if getattr(model, "fit_intercept", True):
        ones = np.ones((X.shape[0], 1))
        inputs = hstack([X, ones], format="csr") if issparse(X) else np.hstack([X, ones])
    if issparse(inputs):
        return csr_matrix(hstack([diags(column) @ inputs for column in slopes.T]))
    product: Matrix = (slopes[:, :, None] * inputs[:, None, :]).reshape(len(slopes), -1)
    return product


def _slopes(model: BaseEstimator, X: Gradients, y: npt.NDArray[np.generic]) -> Matrix:
    """(n, k) derivatives of each example's loss in the k outputs of the model."""
    loss = _loss_of(model)
    if not is_classifier(model):
        residuals: Vector = model.predict(X) - y
        return residuals.reshape(len(y), 1)
    outputs = np.asarray(model.decision_function(X), np.float64).reshape(len(y), -1)
    chosen = np.asarray(y)[:, None] == (model.classes_[1:] if outputs.shape[1] == 1 else model.classes_)
    signs = np.where(chosen, 1.0, -1.0)
    if loss == "softmax" and outputs.shape[1] > 1:
        return np.asarray(softmax(outputs, axis=1) - chosen)
    return _SLOPES[loss](outputs, signs)


_SLOPES: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "softmax": lambda f, s: -s * expit(-s * f),
    "log_loss": lambda f, s: -s * expit(-s * f),
    "hinge": lambda f, s: np.where(s * f < 1, -s, 0.0),
    "squared_hinge": lambda f, s: -2 * s * np.maximum(1 - s * f, 0.0),
    "squared_error": lambda f, s: f - s,
}
"""d loss / d output, of outputs and signs; softmax here is that of two classes with one output."""


def _loss_of(model: BaseEstimator) -> str:
    loss = ""
    if isinstance(model, LinearSVC):
        loss = model.loss if model.multi_class == "ovr" else ""  # crammer_singer's is of all outputs
    elif isinstance(model, SGDClassifier | SGDRegressor):
        loss = model.loss
    elif isinstance(model, SVC) and model.kernel == "linear" and len(model.classes_) == 2:
        loss = "hinge"
    elif isinstance(model, LogisticRegression):
        # Up to scikit-learn 1.7; later releases fit several classes by softmax, or not at all.
        against_rest = model.solver == "liblinear" or getattr(model, "multi_class", "") == "ovr"
        loss = "log_loss" if against_rest else "softmax"
    elif isinstance(model, (*_SQUARED, RidgeClassifier)):
        loss = "squared_error"
    if loss not in (_SLOPES if is_classifier(model) else ("squared_error",)):
        raise InputError(
            f"no closed-form gradients for {model!r}; give gradients=f, f(model, X, y) -> (n, p)"
        )
    return loss


def module_gradients(
    module: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, *, chunk: int = 256
) -> Matrix:
    """Per-example gradients of a module's loss in all parameters that are trained.

    Taken in evaluation mode: what an example's gradient is must not depend on the others, nor on chance.
    The module and its parts are left in the modes that they were in.

    Args:
        module: any that torch.func can differentiate.
        loss: of a batch of outputs and targets, such as `torch.nn.functional.cross_entropy`.
        inputs: (n, ...) of the module's dtype.
        targets: (n, ...).
        chunk: so many at a time.

    Returns:
        (n, p) float64, parameters in the order of `named_parameters`, each flattened.
    """
    parameters = {k: v.detach() for k, v in module.named_parameters() if v.requires_grad}
    others = {k: v.detach() for k, v in module.named_parameters() if not v.requires_grad}
    others |= dict(module.named_buffers())

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(module, {**values, **others}, (x[None],)), y[None])

    training = {part: part.training for part in module.modules()}  # some may be frozen
    module.eval()
    try:
        each = vmap(grad(loss_of_one), in_dims=(None, 0, 0), chunk_size=chunk)
        found = each(parameters, inputs, targets)
    finally:
        for part, flag in training.items():
            part.training = flag
    flat = torch.cat([found[name].flatten(1) for name in parameters], dim=1)
    return np.asarray(flat.double().cpu().numpy())
