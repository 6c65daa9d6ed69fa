"""White-box attackers try their rows on the server's rule before they send them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.attacks.view import View
from fedrobust.errors import InputError
from fedrobust.gram import Gram
from fedrobust.kernels import Block, Matrix, Vector
from fedrobust.rules import Aggregator, Decision, Weighting
from fedrobust.rules.fraction import DEFAULT_EPS, assume
from fedrobust.rules.signguard import SignGuard

_COORDINATES = 4096


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """A round in which the malicious rows are combinations of a few vectors, tried out at no cost in d.

    A weighting rule looks at inner products alone. So with V the K vectors, and L any K x K matrix with
    L L^T = V V^T, the rule does to the rows C L what it does to the rows C V: weights, distances and
    certificates are the same, and one trial costs n K^2 instead of n^2 d. A rule that reduces
    coordinates, or counts their signs, has no such short cut. It is tried on the coordinates
    themselves, on an even sample of 4096 if there are more.

    The malicious clients come first, as in `fedrobust_clients`; rules break ties by that order.

    Attributes:
        vectors: V, K of (d,): the honest updates, then whatever else rows are made of.
        honest: how many of them are honest updates.
        malicious: f.
        rule: how the server aggregates.
        eps: the malicious fraction that the rule assumes.
        seed: of the server's own draws in this round.
        root: (d,) the server's own row, the last of the vectors then. Where the rule looks at one that
            the coalition does not know, it takes the honest mean for it.
    """

    vectors: tuple[Tensor, ...]
    honest: int
    malicious: int
    rule: Aggregator
    eps: float | str
    seed: int
    root: Tensor | None = None

    @classmethod
    def of(
        cls,
        view: View,
        extra: Sequence[Tensor] = (),
        default: Aggregator | None = None,
        root: Tensor | None = None,
    ) -> Rehearsal:
        """Rehearse the round of a view.

        Args:
            view: `honest`, `rule`, `eps` and `seed` are looked at.
            extra: vectors of (d,) that rows are made of besides the honest updates.
            default: the rule to assume where the coalition does not know it.
            root: the server's own row, where the coalition knows it; rows may be made of it.

        Raises:
            InputError: the coalition does not know the rule, and there is no default.
        """
        rule = view.rule or default
        if rule is None:
            raise InputError(
                "this attack tries its rows on the server's rule, but the view has none; "
                "construct View with rule=parse_rule(...)"
            )
        eps = next(e for e in (rule.eps, view.eps, DEFAULT_EPS) if e is not None)
        # A model that has diverged is no reason for the attack to fail.
        known = (*view.honest, *extra, *(() if root is None else (root,)))
        vectors = tuple(_finite(vector) for vector in known)
        return cls(vectors, len(view.honest), view.malicious, rule, eps, view.seed, root)

    @property
    def mean(self) -> Vector:
        """(K,) the honest mean as a combination of the vectors."""
        return np.where(np.arange(len(self.vectors)) < self.honest, 1 / self.honest, 0.0)

    @cached_property
    def gram(self) -> Matrix:
        """(K, K) inner products of the vectors."""
        return kernels.gram(Block(self.vectors))

    @cached_property
    def points(self) -> Matrix:
        """(K, c) what the vectors are replaced by: L, or their (sampled) coordinates."""
        last = self.rule.rules[-1]
        if isinstance(last.parts[-1], Weighting) and not isinstance(last, SignGuard):
            values, vectors = np.linalg.eigh(self.gram)
            root: Matrix = vectors * np.sqrt(np.maximum(values, 0.0))
            return root
        size = len(self.vectors[0])
        sample = np.linspace(0, size - 1, min(size, _COORDINATES)).astype(np.int64)
        columns = torch.stack([vector[torch.from_numpy(sample)] for vector in self.vectors])
        points: Matrix = columns.double().cpu().numpy() * np.sqrt(size / len(sample))
        return points

    def weights(self, coefficients: Matrix) -> Vector | None:
        """(n,) what each row would weigh, the f malicious first; None where the rule has no weights.

        Args:
            coefficients: (f, K), or (K,) for rows that are all the same.
        """
        decision = self._decide(self._everything(coefficients))
        return None if decision.reducer or decision.matrix is None else decision.matrix[0]

    def error(self, coefficients: Matrix) -> float:
        """How far the aggregate is from the honest mean with these rows; argument as for `weights`."""
        clients = self._everything(coefficients)
        decision = self._decide(clients)
        block = Block(torch.from_numpy(clients @ self.points))
        value = kernels.mix_and_reduce(block, decision.matrix, decision.reducer).numpy()
        return float(np.linalg.norm(value - self.mean @ self.points))

    def rows(self, coefficients: Matrix) -> Tensor:
        """(f, d) float32: the rows themselves, to be sent."""
        every = self._each(coefficients)
        rows = torch.zeros(self.malicious, len(self.vectors[0]), device=self.vectors[0].device)
        for column, vector in zip(every.T, self.vectors, strict=True):
            if column.any():
                rows += torch.tensor(column).to(vector)[:, None] * vector
        return rows

    def _each(self, coefficients: Matrix) -> Matrix:
        return np.broadcast_to(coefficients, (self.malicious, len(self.vectors)))

    def _everything(self, coefficients: Matrix) -> Matrix:
        """(n, K) all clients' rows as combinations of the vectors."""
        return np.vstack([self._each(coefficients), np.eye(self.honest, len(self.vectors))])

    def _decide(self, clients: Matrix) -> Decision:
        anchors = self.rule.anchors
        known = self.mean if self.root is None else np.eye(len(self.vectors))[-1]
        own = np.broadcast_to(known, (len(anchors), len(known)))
        every = np.vstack([clients, own])
        rows, root = clients @ self.points, own @ self.points

        seen = partial(
            Gram,
            shares=np.full(len(clients), 1 / len(clients)),
            eps=DEFAULT_EPS,
            seed=self.seed,
            anchors=anchors,
        )

        def ending(count: int) -> Gram:
            inner = self._last(count)
            return seen(lambda: clients @ inner @ clients.T, beside=lambda: every @ inner @ own.T)

        gram = seen(
            lambda: rows @ rows.T,
            beside=lambda: np.vstack([rows, root]) @ root.T,
            count_signs=partial(_count_signs, rows),
            ending=ending,
            width=len(self.vectors[0]),
        )
        return self.rule(assume(gram, self.eps))

    def _last(self, count: int) -> Matrix:
        """(K, K) inner products of the vectors' last coordinates."""
        if count not in self._ends:
            self._ends[count] = kernels.gram(Block(self.vectors).ending(count))
        return self._ends[count]

    @cached_property
    def _ends(self) -> dict[int, Matrix]:
        return {}


def best_scale(error: Callable[[float], float], low: float, high: float, budget: int) -> float:
    """The scale in low .. high with the largest error: a geometric grid, zoomed in on twice.

    (A method that trusts the error to be smooth stops short of the cliff where a rule starts to notice.)

    Args:
        error: any function; the better it behaves, the closer the answer to the maximum.
        low: above 0.
        high: above `low`.
        budget: how often the error may be worked out, at least 6; half of it goes to the first grid.
    """
    scales = np.geomspace(low, high, budget // 2)
    errors = np.array([error(float(scale)) for scale in scales])
    for _ in range(2):
        best = int(np.argmax(errors))
        ends = scales[max(best - 1, 0)], scales[min(best + 1, len(scales) - 1)]
        finer = np.geomspace(*ends, budget // 4 + 2)[1:-1]
        found = [error(float(scale)) for scale in finer]
        scales, errors = np.append(scales, finer), np.append(errors, found)
        order = np.argsort(scales)
        scales, errors = scales[order], errors[order]
    return float(scales[np.argmax(errors)])


def stepped_scale(error: Callable[[float], float], step: float, budget: int) -> float:
    """A scale from 0 on with a large error: steps that double as long as they help, then shrink by 0.8.

    What ByzFL's attacks do (`Optimal_InnerProductManipulation`). It never steps back.

    Args:
        error: any function.
        step: the first one.
        budget: how often the error may be worked out, at least 1.
    """
    best, most, helps = 0.0, error(0.0), True
    for _ in range(budget - 1):
        found = error(best + step)
        helps = helps and found > most
        if found > most:
            best, most = best + step, found
        step *= 2.0 if helps else 0.8
    return best


def _count_signs(rows: Matrix, mixing: Matrix | None) -> Matrix:
    return kernels.sign_counts(Block(torch.from_numpy(rows)), mixing)


def _finite(vector: Tensor) -> Tensor:
    return vector if bool(torch.isfinite(vector).all()) else torch.nan_to_num(vector, 0.0, 0.0, 0.0)
