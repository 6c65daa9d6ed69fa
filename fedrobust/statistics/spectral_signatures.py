"""Spectral signatures: the examples of a class that were poisoned stand out in what a network sees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from fedrobust.aggregate import aggregate
from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules import Rule
from fedrobust.statistics.parameters import number


class SpectralSignatures(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Drops the examples of each class that are most likely to carry a backdoor.

    In a class of which a part eps was poisoned, the poisoned examples have a direction of their own in a
    late layer's representations. Each class is centred and scored by itself, and its factor eps n
    examples with the largest scores go; train again on the rest.

    The paper's score is the squared projection on the top right singular vector; another one may be put
    in its place: that of any rule of the library, such as "filter", which takes the variance along
    several directions away one after the other, or "entropy_filter", all large directions at once.

    Guarantee (the paper, lemma 3.1): if the means of clean and poisoned representations are
    sqrt(6 sigma^2 / eps) apart, sigma^2 their spread, the top singular vector separates the two.

    Source: Tran, Li, Madry, "Spectral signatures in backdoor attacks", NeurIPS 2018 (arXiv 1811.00636),
    algorithm 1. The authors' code projects representations that are not centred; the paper, and this,
    centres them.

    Args:
        eps: the part of a class that may be poisoned, above 0 and below 1/2.
        factor: how many examples to drop, in units of eps n; at least 1.
        rule: what scores are taken from, a rule or its text; None is the paper's.

    Attributes:
        scores_: (n,) float64, how suspicious each example is among its class; higher is more.
        support_: (n,) bool, the examples that are kept.
        classes_: the labels met.
        n_features_in_: p.
    """

    def __init__(self, eps: float = 0.1, factor: float = 1.5, rule: str | Rule | None = None) -> None:
        self.eps, self.factor, self.rule = eps, factor, rule

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> SpectralSignatures:
        """Score all examples, each among those of its label.

        Args:
            X: (n, p) representations; each class is converted to float64.
            y: (n,) the labels that were trained on; None takes all examples for one class.

        Raises:
            InputError: a parameter out of its range.
            ValueError: X is not a finite matrix, or y is not as long.
        """
        eps, factor = number(self.eps), number(self.factor)
        if not 0 < eps < 0.5:
            raise InputError(f"eps must be above 0 and below 1/2, got {self.eps!r}")
        if not 1 <= factor < 1 / eps:
            raise InputError(f"factor must be at least 1, and factor eps below 1, got {self.factor!r}")
        rows: Matrix = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        labels = np.zeros(len(rows), int) if y is None else np.asarray(y)
        if labels.shape != (len(rows),):
            raise InputError(f"y must be ({len(rows)},), a label for every row, got {labels.shape}")
        strange = np.flatnonzero(labels != labels)  # noqa: PLR0124 (NaN, and no label, is not itself)
        if len(strange):
            row = strange[0]
            raise InputError(f"y must hold a label for every row, got {labels[row]!r} for row {row}")
        self.classes_ = np.unique(labels)
        self.scores_ = np.zeros(len(rows))
        self.support_ = np.ones(len(rows), bool)
        for label in self.classes_:
            members = np.flatnonzero(labels == label)
            scores = self._scores(rows[members].astype(np.float64))
            self.scores_[members] = scores
            # Ties go by the order of the examples, so that a run repeats.
            order = np.argsort(-scores, kind="stable")
            out = min(round(factor * eps * len(members)), len(members) - 1)
            self.support_[members[order[:out]]] = False
        return self

    def fit_predict(self, X: npt.ArrayLike, y: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """`fit`, and what came of it: (n,), 1 for an example that is kept and -1 for another."""
        return np.where(self.fit(X, y).support_, 1, -1)

    def _scores(self, members: Matrix) -> Vector:
        if len(members) == 1:
            return np.zeros(1)  # nothing to compare it with
        if self.rule is None:
            return top_direction(members)
        middle = np.median(members, axis=0)  # classes may lie anywhere, and rules measure from a point
        found = aggregate(members, self.rule, eps=self.eps, reference=middle, certified=False).scores
        if found is None:
            raise InputError(f"the rule {self.rule} gives no scores; take filter or entropy_filter")
        return found


def top_direction(X: Matrix) -> Vector:
    """(n,) squared projections of the centred rows on their top right singular vector.

    By the smaller of the two sides: p x p or n x n.
    """
    centred = X - X.mean(axis=0)
    if len(X) <= X.shape[1]:
        values, vectors = np.linalg.eigh(centred @ centred.T)
        top: Vector = values[-1] * vectors[:, -1] ** 2
        return top
    projections: Vector = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return projections**2
