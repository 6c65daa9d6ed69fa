"""The spectral filter: remove what stretches the covariance until nothing stands out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.rule import Mixed, Weighting, weigh
from fedrobust.text import choose
from fedrobust.verdict import VISIBLE, Levels, Verdict, has_bulk, read_levels

_REMEMBERED = 8
"""How many directions of a pass are kept for the scores."""
_HIDING = 1e-8
"""Beside a bulk that cannot be read, what has this part of the top eigenvalue is loud."""
_FAR = 1e4
"""Without any bulk, so many times the usual squared distance a variance may be for a pass to end."""


@dataclass(frozen=True, eq=False)
class State:
    """Where a filter has got to.

    Attributes:
        weights: (n,) soft weights, below the shares; their sum is what is left of the mass.
        levels: None as long as they cannot be read off the round.
        steps: how many steps were taken.
    """

    weights: Vector
    levels: Levels | None
    steps: int = 0

    def level(self, eps: float) -> float | None:
        """The eigenvalue that is tolerated now."""
        if self.levels is None:
            return None
        fresh = 1 - self.weights.sum() < eps * (1 - 1e-9)
        return self.levels.visible if fresh else self.levels.alarming


@dataclass(frozen=True, repr=False)
class Filter(Weighting):
    """Robust mean for bounded covariance, by spectral filtering.

        w <- b
        while lambda, the top eigenvalue of the covariance under w/|w|, passes the threshold:
            V <- eigenvectors of the covariance whose eigenvalues pass it
            while some v in V has var_w <v, x> above the threshold, for the v with the largest:
                tau_i <- <v, x_i - mu_w>^2
                w_i   <- w_i (1 - tau_i / max tau)   # max over the rows that still carry weight
            stop before the mass removed passes 2 eps
        return the iterate with the smallest lambda

    Any direction with more variance than honest rows have may be filtered, so one eigenproblem serves
    for all that stand out: the number of eigenproblems does not grow with what the clients send.

    Three regimes, by what is known:
    `sigma` and eps: the threshold is sigma^2 / (1 - 2 eps); no weighting that keeps 1 - 2 eps of the
    mass, all of it honest, has a larger lambda.
    eps alone: `factor` times the edge of the round's own bulk, which an attacker cannot move beyond the
    honest spread (`fedrobust.verdict`). Rows so large that the bulk cannot be read beside them go first;
    if they were honest after all, the honest spread is far above any threshold found later, so the
    guarantee stands. Where there is no bulk (fewer than eps n + 2 coordinates) there is no threshold: it
    filters step by step to the budget and returns the best iterate, as `caf`; steps that a variance of
    10 000 times the usual squared distance asks for share an eigenproblem.
    Neither: `eps="auto"` estimates eps from the spectrum (`fedrobust.rules.fraction`).

    The threshold is for the first eps of the mass; from there on it is twice as high, because what is
    left should be honest, and honest clients differ.

    Guarantee: error O(sigma sqrt eps) whatever d is, sigma^2 the honest covariance's top eigenvalue;
    the certificate gives the number. With n << d a coordinated shift s with eps s^2 below the bulk is
    invisible to every spectral rule: then the verdict is "no visible attack" and everybody is kept,
    since dropping clients would only lose honest ones.

    Scores: the largest <v, x_i - mu>^2 over the directions v met, measured from the returned mean, over
    the threshold (over the first eigenvalue where no bulk gives one).
    Weighted by shares. Breakdown point eps < 1/2.
    Cost: as a rule two eigenproblems of size min(n, d); more only if variances of different directions
    are 1e8 times apart.

    Sources: Diakonikolas, Kamath, Kane, Li, Moitra, Stewart 2016 (arXiv 1604.06443) and 2017
    (1703.00893); bounded covariance, soft weights and randomised removal: Diakonikolas & Kane 2019
    (1911.05911), section 3. Deviations: the threshold against the bulk and several directions at once.

    Attributes:
        sigma: a bound on the honest spread (the square root of the honest covariance's top
            eigenvalue), in the updates' units; None judges the round against its own bulk.
        factor: how far above the bulk's edge the threshold is, where sigma is not known.
        removal: "soft" multiplies weights by 1 - tau_i / max tau; "random" removes row i outright with
            probability tau_i / max tau, drawn from the round's seed, but softly where that would take
            more than the budget.
    """

    name = "filter"
    sigma: float | None = field(default=None, kw_only=True)
    factor: float = field(default=VISIBLE, kw_only=True)
    removal: str = field(default="soft", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sigma is None or self.sigma > 0, "sigma must be positive")
        self.require(self.factor > 1, "factor must be above 1")
        choose(self.removal, ("random", "soft"), f"removal of {self.name}")

    def measure(self, squares: Matrix, variances: Vector, rest: Vector) -> Vector:  # noqa: ARG002
        """(m,) tau, how far out each row is.

        Args:
            squares: (m, k) squared distances from the mean along k orthogonal directions.
            variances: (k,) their weighted means.
            rest: (m,) squared distances from the mean along all other directions.
        """
        tau: Vector = squares[:, np.argmax(variances)].copy()
        return tau

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        return self.down_to(gram, None if self.sigma is None else self.sigma**2 / (1 - 2 * gram.eps))

    def down_to(self, gram: Gram, known: float | None) -> Mixed:
        """Weigh the rows, whatever sigma is.

        Args:
            gram: of the rows.
            known: the eigenvalue that is tolerated; None judges the round against its own bulk.
        """
        state = State(gram.shares, None if known is None else Levels(known, known))
        best, smallest, first = gram.shares, np.inf, 0.0
        directions: list[Matrix] = []  # each column one, as `_direction` has it
        near, rng = None, np.random.default_rng(gram.seed)
        while True:
            normalised = state.weights / state.weights.sum()
            support = np.flatnonzero(normalised)
            values, projections = gram.leading(normalised, near)
            top = float(values[0])
            first = first if state.steps else top
            if top < smallest:
                best, smallest = normalised, top
            if state.levels is None:
                state = replace(state, levels=read_levels(gram, normalised, values, self.factor))
            level = state.level(gram.eps)
            hiding, rounding = _HIDING * top, gram.rounding(normalised)
            # Directions with less are nothing but the rounding of what is loud.
            buried = has_bulk(gram, normalised) if level is None else level < hiding
            loud = values > max(level or 0.0, hiding, rounding)
            loud[0] = top > rounding  # what is nothing but rounding has no direction
            few = np.flatnonzero(loud)[:_REMEMBERED]
            found = np.zeros((gram.n, len(few)))
            found[support] = normalised[support, None] * projections[:, few] / values[few]
            directions.append(_direction(gram, found))
            if gram.f_with_share == 0 or top <= max(level or 0.0, rounding):
                break
            seen = projections[:, loud] if buried else projections
            swept = self._sweep(gram, state, seen, hiding if buried else None, rng)
            if swept is state:
                break
            near, state = np.zeros(gram.n), swept
            near[support] = projections[:, 0]
        return self._answer(gram, state, best, (first, smallest), directions)

    def _sweep(
        self,
        gram: Gram,
        state: State,
        projections: Matrix,
        floor: float | None,
        rng: np.random.Generator,
    ) -> State:
        """Steps along the given directions for as long as one of them stands out, within the budget.

        Args:
            gram: of all rows.
            state: where the sweep starts.
            projections: (m, k) of the rows that carry weight on k directions, orthogonal under it.
            floor: what is tolerated at least; None for a single step where there is no level either, and
                for as many as there are with variances far above what is usual.
            rng: for randomised removal.
        """
        support, before = np.flatnonzero(state.weights), state.steps
        full = state.weights / state.weights.sum()
        rest = np.zeros(len(support))
        if state.levels is not None and projections.shape[1] < len(support):
            rest = np.maximum(gram.centred_norms(full)[support] - (projections**2).sum(axis=1), 0.0)
        while True:
            weights = state.weights[support]
            normalised = weights / weights.sum()
            squares = (projections - normalised @ projections) ** 2
            variances = normalised @ squares
            tolerated = max((t for t in (state.level(gram.eps), floor) if t is not None), default=None)
            if tolerated is None and state.steps > before:
                tolerated = max(_FAR * _usual(projections, variances, normalised), gram.rounding(full))
            if tolerated is not None and variances.max() <= tolerated * (1 - 1e-9):
                return state
            tau = self.measure(squares, variances, rest)
            tau[weights == 0] = 0.0
            lost = tau / tau.max()
            most = 2 * gram.eps * (1 + 1e-9)
            kept = weights * (1 - lost)
            if self.removal == "random":
                drawn = weights * (rng.random(len(lost)) >= lost)
                kept = drawn if 1 - drawn.sum() <= most else kept  # else an unlucky draw would end it
            kept[kept < 1e-12 * gram.shares[support]] = 0.0  # what is as good as removed
            if 1 - kept.sum() > most:
                return state
            after = np.zeros(gram.n)
            after[support] = kept
            state = replace(state, weights=after, steps=state.steps + 1)

    def _answer(
        self,
        gram: Gram,
        state: State,
        best: Vector,
        eigenvalues: tuple[float, float],
        directions: list[Matrix],
    ) -> Mixed:
        """What comes of a filter that has ended with these first and smallest top eigenvalues."""
        first, smallest = eigenvalues
        visible = state.levels.visible if state.levels else 0.0
        tolerated = max(state.levels.alarming if state.levels else 0.0, gram.rounding(best))
        if gram.f_with_share == 0:  # nothing may go, and so nothing was looked for
            verdict = Verdict.NOT_JUDGED
        elif smallest <= tolerated:
            verdict = Verdict.REMOVED if state.steps else Verdict.CLEAR
        else:
            verdict = Verdict.EXCEEDED if state.levels else Verdict.NOT_JUDGED
        return weigh(
            best,
            _scores(gram, directions, best) / (visible or first or 1.0),
            verdict,
            {
                "steps": state.steps,
                "top_eigenvalue": first,
                "kept_eigenvalue": smallest,
                "threshold": visible,
                "removed": 1 - float(np.minimum(best, gram.shares).sum()),
            },
        )


@dataclass(frozen=True, repr=False)
class EntropyFilter(Filter):
    """The filter with quantum-entropy scores: every large direction at once instead of the top one.

        tau_i <- (x_i - mu_w)^T U (x_i - mu_w),  U = exp(alpha Sigma_w / ||Sigma_w||) / trace

    All else is `filter`: threshold, budget, removal, verdict, scores. A soft step marks rows down in all
    large directions together; alpha = 0 scores by distance alone, a large alpha by the top direction.

    Guarantee: as `filter`, in a number of steps that does not grow with d. Breakdown point eps < 1/2.
    Weighted by shares. Source: Dong, Hopkins, Li 2019, "Quantum Entropy Scoring for Fast Robust Mean
    Estimation and Improved Outlier Detection" (arXiv 1906.11366). Deviations: no sketching; from the
    exact spectrum in client space or, where that is larger than 256, from its leading part, all smaller
    directions counting as if they had no variance (exp(alpha lambda / lambda_1) is 1 for them); the
    filter's own threshold; U's trace is left out, since only proportions count; within a pass the
    directions are kept and their variances worked out anew. Cost: as `filter`.

    Attributes:
        sigma: as `filter`.
        removal: as `filter`.
        alpha: how much larger directions count for more.
    """

    name = "entropy_filter"
    alpha: float = field(default=4.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, "alpha must not be negative")

    def measure(self, squares: Matrix, variances: Vector, rest: Vector) -> Vector:
        """(m,) tau by U, over U's largest eigenvalue."""
        tau: Vector = squares @ emphasis(variances, self.alpha) + np.exp(-self.alpha) * rest
        return tau


def emphasis(variances: Vector, alpha: float) -> Vector:
    """(k,) what directions of these variances count for: exp(alpha variance / largest), 1 at most.

    The eigenvalues of exp(alpha Sigma / ||Sigma||) over the largest of them (Dong, Hopkins, Li 2019,
    arXiv 1906.11366), so that no alpha overflows.
    """
    weights: Vector = np.exp(alpha * (variances / variances.max() - 1))
    return weights


def without_loud(gram: Gram, factor: float) -> Vector:
    """(n,) the shares without rows that stretch the covariance far beyond the bulk, eps of them at most.

    For rules that mark down one direction at a time: rows of many magnitudes would make as many steps of
    them. What such a rule would remove anyway goes first.

    Args:
        gram: of the rows.
        factor: how far beyond the bulk's edge.
    """
    rows = np.count_nonzero(gram.shares)
    if not has_bulk(gram, gram.shares) or gram.f_with_share > 2 * gram.eps * rows:
        return gram.shares  # with that many clients of next to no share, too, the bulk says nothing
    kept: Vector = Filter(factor=factor)(gram).matrix[0]
    quiet: Vector = np.where(kept >= 0.5 * gram.shares, gram.shares, 0.0)
    return quiet if quiet.sum() >= 1 - gram.eps - 1e-9 else gram.shares


def _direction(gram: Gram, found: Matrix) -> Matrix:
    """Directions given as (n, k) combinations of the rows: where these are at hand, as (d, k) vectors.

    With few coordinates there may be as many passes as malicious rows, and n numbers a direction would
    be more than the round itself.
    """
    return found if gram.factor is None else np.asarray(gram.factor.T @ found)


def _scores(gram: Gram, directions: list[Matrix], weights: Vector) -> Vector:
    """(n,) the largest squared distance from the weighted mean along any of the directions."""
    scores, toward = np.zeros(gram.n), gram.product(1)
    if gram.factor is None:
        directions = [toward(np.concatenate(directions, axis=1))]  # one pass over the rows for all
    for direction in directions:
        along = direction if gram.factor is None else gram.factor @ direction
        np.maximum(scores, ((along - weights @ along) ** 2).max(axis=1, initial=0.0), out=scores)
    return scores


def _usual(projections: Matrix, variances: Vector, weights: Vector) -> float:
    """The median squared distance from the median, by mass, along the direction of most variance."""
    along = projections[:, np.argmax(variances)]
    return _middle((along - _middle(along, weights)) ** 2, weights)


def _middle(values: Vector, weights: Vector) -> float:
    """The lower median of (m,) values by weights of sum 1."""
    order = np.argsort(values)
    first = int(np.searchsorted(np.cumsum(weights[order]), 0.5 - 1e-9))
    return float(values[order[min(first, len(order) - 1)]])
