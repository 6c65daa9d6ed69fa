"""The worst that can be found: a white-box search against the rule itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.attacks.attack import Attack
from fedrobust.attacks.rehearsal import Rehearsal, best_scale
from fedrobust.attacks.view import View
from fedrobust.kernels import Matrix, Vector

_FURTHEST = 1e4
_LINES = 6


@dataclass(frozen=True, repr=False)
class Adaptive(Attack):
    """Search for the rows that move the given rule furthest from the honest mean.

        argmax_rows |aggregate(rows, honest) - mean(honest)|

    Rows are searched for in the form

        row_j = mean + m_j sum_k a_k v_k + t (x_j - mean),    m_j = 1 for the first half, m for the rest

    with the v_k of the length of the honest spread: the mean, the honest covariance's first, second and
    last eigenvectors, the furthest honest client, the deviations by coordinate, the signs of the mean
    (these seven are what ipm, alie, mimic, min_max and their kin move along), the deviations toward each
    coordinate's longer tail (rows far out on the other side cost a trimmed mean that tail: the tight
    case of coordinate-wise rules), the server's own row where the rule has one and, where d leaves
    room, one fresh direction orthogonal to all of them. The disguise t gives each row an honest
    client's own deviation; a large one sends the rows far out and apart from each other, which rules
    that look for alike rows take for honest. m splits the coalition, to the point of turning one half
    against the other.

    The search: each v_k alone and the disguise alone, both ways, at scales between 0.3 and 30 and at
    1e4, and half of the rows as decoys with the others hidden behind them; the best six lines refined;
    then, from the best point and in all unknowns, Nelder-Mead and a random walk that keeps what is
    better (rules jump where they start to notice, which stalls a simplex). A trial needs the Gram
    matrix alone (see `Rehearsal`), unless the rule is coordinate-wise. What it finds is a lower bound
    on what an attacker can do, not the maximum.

    Sees: `honest`, `rule`, `eps`.

    Source: ours; white-box ("aggregator-tailored") attacks as in Fang, Cao, Jia, Gong, USENIX Security
    2020 (arXiv 1911.11815) and Shejwalkar, Houmansadr, NDSS 2021, freed from a single direction.

    Attributes:
        budget: how often the rule is tried, at least 50.
    """

    name = "adaptive"

    budget: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget >= 50, "budget must be at least 50")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        """Send the worst rows found."""
        plan = self.plan(view, rng)
        return plan.stage.rows(plan.coefficients)

    def plan(self, view: View, rng: np.random.Generator, root: Tensor | None = None) -> Plan:
        """The worst rows found, and what they are made of; beside the server's own row, if given."""
        moves = Moves.of(view, rng, root)
        trials = _Trials(moves, self.budget)
        starts = moves.starts(scales=max(2, self.budget // (4 * len(moves.names) + 4)))
        lines: dict[tuple[float, ...], Vector] = {}
        for start in sorted(starts, key=trials):
            if np.abs(start).max() < _FURTHEST:  # further out many rules have the same answer to all
                lines.setdefault(tuple(np.sign(start)), start)
        for start in list(lines.values())[:_LINES]:
            best_scale(partial(trials.along, start), 0.4, 2.5, max(6, self.budget // 20))
        _descend(trials, trials.left // 2)
        _wander(trials, rng)
        return Plan(moves, trials.best)


@dataclass(frozen=True, eq=False)
class Moves:
    """What rows can be made of.

    Attributes:
        stage: where they are tried.
        names: of the k directions.
        directions: (k, K) coefficients of directions, each of the length of the honest spread.
        noise: (f, K) coefficients of an honest client's deviation, one a row.
    """

    stage: Rehearsal
    names: tuple[str, ...]
    directions: Matrix
    noise: Matrix

    @classmethod
    def of(cls, view: View, rng: np.random.Generator, root: Tensor | None = None) -> Moves:
        """The moves in the round of a view; the fresh direction is drawn."""
        drawn = torch.from_numpy(rng.standard_normal(view.size, dtype=np.float32))
        std, mean = view.honest.std(dim=0, correction=0), view.honest.mean(dim=0)
        tails = std * ((view.honest - mean) / std.clamp(min=1e-30)).pow(3).sum(dim=0).sign()
        stage = Rehearsal.of(view, [std, mean.sign(), tails, drawn.to(std)], root=root)
        residuals = np.eye(stage.honest, len(stage.vectors)) - stage.mean
        values, vectors = np.linalg.eigh(residuals @ stage.gram @ residuals.T)
        candidates = _candidates(stage, residuals, vectors, values > 1e-4 * values[-1])
        spread = float(np.sqrt(max(float(values[-1]), 0.0) / stage.honest)) or 1.0
        lengths = {k: float(np.sqrt(max(float(v @ stage.gram @ v), 0.0))) for k, v in candidates.items()}
        names = tuple(k for k in candidates if lengths[k] > 1e-6 * spread) or ("fresh",)
        directions = [candidates[k] * spread / (lengths[k] or 1.0) for k in names]
        noise = residuals[np.arange(stage.malicious) % stage.honest]
        return cls(stage, names, np.array(directions), noise)

    def coefficients(self, unknowns: Vector) -> Matrix:
        """(f, K) of the rows for the unknowns (a_1 .. a_k, t, m)."""
        *along, disguise, split = _within(unknowns)
        shift = np.array(along) @ self.directions
        half = -(-self.stage.malicious // 2)
        turn = np.where(np.arange(self.stage.malicious) < half, 1.0, split)
        row = self.stage.mean + disguise * self.noise
        return np.asarray(row + turn[:, None] * shift)

    def starts(self, scales: int) -> list[Vector]:
        """Each direction, and the disguise, alone, both ways, at that many scales, and decoys.

        One of the scales is the furthest, the others are near the honest.
        """
        sizes = [_FURTHEST, *np.geomspace(30.0, 0.3, scales + 1)[1:-1]]
        axes = np.eye(len(self.names) + 1)
        # The first half is far out; the others are apart from each other, and along the first half's way
        # where the mean of all rows is.
        half = -(-self.stage.malicious // 2)
        decoys = _FURTHEST * (axes[-2] + 0.1 * axes[-1])
        return [
            np.array([*decoys, half / (self.stage.honest + half)]),
            *(
                np.array([*(sign * size * axis), 1.0])
                for size in sizes
                for axis in axes
                for sign in (1.0, -1.0)
            ),
        ]


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows to send.

    Attributes:
        moves: what they are made of.
        unknowns: (k + 2,) how.
    """

    moves: Moves
    unknowns: Vector

    @property
    def stage(self) -> Rehearsal:
        """Where they were tried."""
        return self.moves.stage

    @property
    def coefficients(self) -> Matrix:
        """(f, K) the rows as combinations of the rehearsal's vectors."""
        return self.moves.coefficients(self.unknowns)

    def __str__(self) -> str:
        *along, disguise, split = _within(self.unknowns)
        furthest = float(np.abs(self.unknowns[:-1]).max())
        least = max(0.1 * furthest, 0.01)  # what is shorter hardly matters
        parts = [
            f"{a:+.3g} {name}" for a, name in zip(along, self.moves.names, strict=True) if abs(a) > least
        ]
        turned = f", second half x {split:.2g}" if self.stage.malicious > 1 else ""
        return f"{' '.join(['mean', *parts])}, disguise {disguise + 0.0:.2g}{turned}"


@dataclass(eq=False)
class _Trials:
    """Minus the error of tried unknowns, as minimisers want it; counts, and keeps the best."""

    moves: Moves
    left: int
    best: Vector = field(default_factory=lambda: np.zeros(0))
    least: float = np.inf

    def __call__(self, unknowns: Vector) -> float:
        if self.left == 0:
            return 0.0
        self.left -= 1
        unknowns = _within(unknowns)
        value = -self.moves.stage.error(self.moves.coefficients(unknowns))
        if value < self.least:
            self.best, self.least = unknowns, value
        return value

    def along(self, start: Vector, scale: float) -> float:
        """The error of these unknowns with all but the split multiplied."""
        return -self(np.array([*(scale * start[:-1]), start[-1]]))


def _candidates(
    stage: Rehearsal, residuals: Matrix, vectors: Matrix, real: npt.NDArray[np.bool_]
) -> dict[str, Vector]:
    """(K,) coefficients of directions, of any length.

    Args:
        stage: of the honest updates, their deviations, the signs of their mean, their deviations
            toward the longer tails, a drawn vector, and the server's own row if there is one.
        residuals: (n - f, K) what the honest updates differ from their mean by.
        vectors: eigenvectors of the residuals' inner products, in order of their eigenvalues.
        real: which of them are more than rounding.
    """
    principal = (vectors * real).T @ residuals
    unit = np.eye(len(stage.vectors))
    root = {} if stage.root is None else {"server's row": unit[-1] - stage.mean}
    return {
        "mean": stage.mean,
        "top eigenvector": principal[-1],
        "second eigenvector": principal[max(len(principal) - 2, 0)],
        "last eigenvector": principal[np.argmax(real)],
        "furthest client": residuals[np.argmax(np.diag(residuals @ stage.gram @ residuals.T))],
        "deviations": unit[stage.honest],
        "signs": unit[stage.honest + 1],
        "longer tails": unit[stage.honest + 2],
        **root,
        "fresh": _orthogonal(stage.gram, stage.honest + 3),
    }


def _descend(trials: _Trials, budget: int) -> None:
    """Nelder-Mead from the best point so far."""
    if budget == 0:
        return
    start = trials.best
    simplex = np.vstack([start, start + np.diag(_steps(start))])
    options = {"maxfev": budget, "initial_simplex": simplex, "adaptive": True}
    from scipy.optimize import minimize  # noqa: PLC0415 (takes a third of a second)

    minimize(trials, start, method="Nelder-Mead", options=options)


def _wander(trials: _Trials, rng: np.random.Generator) -> None:
    """A random walk from the best point so far: longer steps after a success, else shorter ones."""
    length = 1.0
    while trials.left > 0:
        least, among = trials.least, rng.random(len(trials.best)) < 0.4
        trials(trials.best + length * among * _steps(trials.best) * rng.standard_normal(len(among)))
        length = min(1.5 * length, 3.0) if trials.least < least else max(0.93 * length, 1e-3)


def _steps(unknowns: Vector) -> Vector:
    """Changes worth trying: a third of how far rows are, of t, or of 1 if t is less, and of m."""
    disguise = abs(float(unknowns[-2]))
    furthest = max(float(np.abs(unknowns[:-2]).max()), 0.3 * disguise, 0.1)
    return 0.3 * np.array([*np.full(len(unknowns) - 2, furthest), max(disguise, 1.0), -1.0])


def _within(unknowns: Vector) -> Vector:
    """The nearest unknowns that rows may have."""
    limits = np.full(len(unknowns), _FURTHEST)
    limits[-1] = 1.0
    return np.clip(unknowns, -limits, limits)


def _orthogonal(gram: Matrix, which: int) -> Vector:
    """(K,) a vector less its projection on the others, as a combination; 0 if nothing is left."""
    others = np.delete(np.arange(len(gram)), which)
    rest = np.zeros(len(gram))
    rest[which] = 1.0
    rest[others] = -np.linalg.lstsq(gram[np.ix_(others, others)], gram[others, which], rcond=1e-9)[0]
    remains = float(rest @ gram @ rest)
    return rest if remains > 1e-4 * gram[which, which] else np.zeros(len(gram))
