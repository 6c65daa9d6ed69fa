"""The mean of a sample of which a part may be anything."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from fedrobust.aggregate import aggregate
from fedrobust.certificate import Certificate
from fedrobust.errors import InputError
from fedrobust.kernels import Vector
from fedrobust.rules import EntropyFilter, Filter
from fedrobust.rules.fraction import AUTO
from fedrobust.statistics.parameters import number
from fedrobust.statistics.tail_filter import sample_of, tail_filter
from fedrobust.text import choose
from fedrobust.verdict import Verdict

_METHODS = ("entropy", "filter")
_COVARIANCES = ("bounded", "identity")


class RobustMean(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Mean of rows of which a fraction eps may be anything, with an error that does not grow with d.

    `covariance="bounded"` asks of the honest rows only that no direction has more variance than
    sigma^2: `fedrobust.Filter`, or `fedrobust.EntropyFilter`. Error O(sigma sqrt eps). Without sigma the
    rows' own bulk is the measure where there are more coordinates than bad rows; in longer samples it
    filters to its budget of 2 eps and keeps the best iterate. Rows more than 1e60 from the median go
    first, with an infinite score.

    `covariance="identity"` takes the honest rows to be Gaussian with covariance sigma^2 I and cuts
    where tails are heavier than that. Error O(sigma eps sqrt log(1/eps)), for n well above d / eps^2;
    a few passes over the rows, in float32, whatever their number.

    Sources: Diakonikolas, Kamath, Kane, Li, Moitra, Stewart 2017 (ICML, arXiv 1703.00893); entropy
    scores: Dong, Hopkins, Li 2019 (arXiv 1906.11366). Deviations are named with the filters.

    Args:
        eps: the fraction of the rows that may be anything, 0 <= eps < 1/2; with bounded covariance
            also "auto", to estimate it from the spectrum.
        covariance: "bounded" or "identity": what is known of the honest rows.
        method: "filter" looks at one direction at a time, "entropy" at all large ones together.
        sigma: honest standard deviation, at most (bounded) or exactly (identity); None is unknown
            where it is bounded, and 1 for the identity.
        random_state: seed of what is drawn: the rows that give a centre, and starting vectors.

    Attributes:
        location_: (d,) float64, the mean.
        weights_: (n,) float64 of the rows in it, sum 1.
        scores_: (n,) float64, how far out every row is: the largest squared distance along the
            directions met, in units of what is tolerated.
        certificate_: `fedrobust.Certificate`: how far whatever eps of the rows can have moved the mean.
            With identity covariance and d > 2048 its eigenvalues are good to a hundredth.
        verdict_: `fedrobust.Verdict`: whether anything stood out, and still does.
        n_features_in_: d.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(2000, 20))
    >>> X[:200] += 1.5
    >>> robust = RobustMean(eps=0.1, covariance="identity").fit(X)
    >>> bool(np.linalg.norm(X.mean(axis=0)) > 3 * np.linalg.norm(robust.location_))
    True
    """

    def __init__(
        self,
        eps: float | str = 0.1,
        covariance: str = "bounded",
        method: str = "filter",
        sigma: float | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.eps = eps
        self.covariance = covariance
        self.method = method
        self.sigma = sigma
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: object = None) -> RobustMean:  # noqa: ARG002 (scikit-learn's)
        """Estimate the mean.

        Args:
            X: (n, d) float32 or float64; other numbers become float64.
            y: ignored.

        Raises:
            InputError: a parameter is none of its choices, sigma does not fit the rows, or more than eps
                of them are too large to be used.
            ValueError: X is not a finite matrix.
        """
        choose(self.covariance, _COVARIANCES, "covariance")
        choose(self.method, _METHODS, "method")
        rows = validate_data(self, X, dtype=(np.float64, np.float32))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if self.covariance == "identity":
            self._fit_identity(rows, seed)
        else:
            self._fit_bounded(rows, seed)
        return self

    def _fit_bounded(self, rows: npt.NDArray[np.floating], seed: int) -> None:
        if self.eps is None:  # which a rule takes for its caller's
            raise InputError("eps must be in [0, 0.5), or 'auto', got None")
        kind = EntropyFilter if self.method == "entropy" else Filter
        centre = sample_of(rows, 1.0, seed).centre
        rule = kind(eps=self.eps, sigma=self.sigma)
        found = aggregate(rows, rule, reference=centre, seed=seed)
        eps = found.certificate.eps if found.certificate and self.eps != AUTO else 0.5
        n, refused = len(rows), found.refused
        if len(refused) > eps * n * (1 + 1e-12):
            row, reason = next(iter(refused.items()))
            raise InputError(
                f"{len(refused)} of {n} rows cannot be used, more than eps = {eps:g} allows; "
                f"row {row} {reason}: divide all rows by a constant, or name a larger eps"
            )
        unseen = refused and found.verdict is Verdict.CLEAR  # the rule did not meet those rows
        verdict = Verdict.REMOVED if unseen else found.verdict
        self._keep(found.value, found.weights, found.scores, found.certificate, verdict)

    def _fit_identity(self, rows: npt.NDArray[np.floating], seed: int) -> None:
        eps, sigma = number(self.eps), 1.0 if self.sigma is None else number(self.sigma)
        if not 0 <= eps < 0.5:
            raise InputError(f"eps must be in [0, 0.5) with covariance='identity', got {self.eps!r}")
        if not 0 < sigma < math.inf:
            raise InputError(f"sigma must be positive and finite, got {self.sigma!r}")
        sample = sample_of(rows, sigma, seed)
        found = tail_filter(sample, eps, method=self.method, seed=seed)
        removed = 1 - float(found.kept.mean())
        certificate = Certificate(
            # All rows that are left count in full, so the worst eps of them is eps.
            variation=min(removed + eps, 1.0),
            spread=sigma * math.sqrt(found.last),
            honest_spread=sigma * math.sqrt(found.first / (1 - eps)),
            eps=eps,
        )
        verdict = Verdict.REMOVED if found.steps else Verdict.CLEAR
        if eps > 0 and found.last > found.threshold:
            verdict = Verdict.EXCEEDED
        weights = found.kept / np.count_nonzero(found.kept)
        self._keep(sample.mean(found.kept), weights, found.scores, certificate, verdict)

    def _keep(
        self,
        location: npt.ArrayLike,
        weights: Vector | None,
        scores: Vector | None,
        certificate: Certificate | None,
        verdict: Verdict,
    ) -> None:
        self.location_ = np.asarray(location, dtype=np.float64)
        self.weights_ = weights
        self.scores_ = scores
        self.certificate_ = certificate
        self.verdict_ = verdict
