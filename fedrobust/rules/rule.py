"""What a rule is: a frozen dataclass that looks at a Gram matrix and says how rows are mixed.

Four kinds, told apart by what they may stand before: a `Lens` chooses what is looked at, a `Mixing`
turns n rows into k rows, a `Weighting` into one, and a `CoordinateWise` rule reduces each coordinate of
the rows it is given. `|` chains any number of the first two and one of the others; a `Composite` is such
a chain that has a name of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np

from fedrobust.errors import InputError
from fedrobust.gram import LARGEST_MATRIX, Gram
from fedrobust.kernels import Matrix, Reducer, Vector
from fedrobust.text import Textual
from fedrobust.verdict import Verdict


@dataclass(frozen=True)
class Mixed:
    """A rule's answer in client space.

    Attributes:
        matrix: (k, n) weights of the n rows in each of k new rows; what a row lacks of the sum 1 is
            weight on the reference.
        shares: (k,) mass of the new rows.
        eps: mass of the new rows that may be malicious.
        scores: (n,) how suspicious each row is, or None.
        verdict: what the rule says of the round, if it judges it.
        notes: figures for the log.
    """

    matrix: Matrix
    shares: Vector
    eps: float
    scores: Vector | None = None
    verdict: Verdict = Verdict.NOT_JUDGED
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Rule(Textual):
    """Base of every rule.

    Attributes:
        eps: the fraction of the clients that may be malicious, 0 <= eps < 1/2, or "auto" to estimate it
            from the spectrum; None leaves it to the other parts of the composition, to the caller of
            `aggregate`, or to 0.2, in this order.
    """

    eps: float | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 0 <= self.eps < 0.5 if isinstance(self.eps, int | float) else self.eps in (None, "auto")
        self.require(fits, "eps must be in [0, 0.5), or 'auto'")

    def __or__(self, other: Rule | Aggregator) -> Aggregator:
        return Aggregator((self,)) | other

    @property
    def parts(self) -> tuple[Rule, ...]:
        """What the rule is made of: itself, unless its name stands for a composition."""
        return (self,)

    @property
    def anchors(self) -> tuple[str, ...]:
        """Names of the rows of the server's own that the rule looks at."""
        return ()


class Lens(Rule):
    """What the rules after it look at; the rows that they mix, and the certificate, are whole."""

    @abstractmethod
    def __call__(self, gram: Gram) -> Gram:
        """What is seen of these rows."""


class Mixing(Rule):
    """A rule that turns n rows into k, to be followed by another."""

    @abstractmethod
    def __call__(self, gram: Gram) -> Mixed:
        """Mix the rows of this Gram matrix."""


class Weighting(Rule):
    """A rule that ends in one weight a row."""

    @abstractmethod
    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows of this Gram matrix: k = 1."""


class CoordinateWise(Rule):
    """A rule that reduces every coordinate on its own."""

    @abstractmethod
    def reducer(self, shares: Vector, eps: float) -> Reducer:
        """What becomes of a coordinate of rows with these (k,) shares, eps of them malicious."""


class Composite(Rule):
    """A rule whose published form is a composition: any number of mixings and a rule of another kind.

    Its parts take eps from the composition that they stand in, so they name none.
    """

    @property
    @abstractmethod
    def parts(self) -> tuple[Rule, ...]:
        """The mixings in their order, and the rule at the end."""


def weigh(
    weights: Vector,
    scores: Vector | None = None,
    verdict: Verdict = Verdict.NOT_JUDGED,
    notes: Mapping[str, float] | None = None,
) -> Mixed:
    """The answer of a weighting rule. Arguments as the attributes of `Mixed`; weights is (n,)."""
    return Mixed(weights[None, :], np.ones(1), 0.0, scores, verdict, notes or {})


@dataclass(frozen=True)
class Decision:
    """A composition's answer: mix the rows by each of `mixings`, then reduce every coordinate.

    Attributes:
        mixings: (k, n), then (k', k) and so on; none at all is the identity.
        reducer: k values of a coordinate to one; None where k = 1.
        scores: (n,) pulled back from the mixed rows to the clients, or None.
        verdict: what the last rule says of the round; mixed rows say nothing of it.
        notes: figures for the log.
    """

    mixings: tuple[Matrix, ...]
    reducer: Reducer | None
    scores: Vector | None
    verdict: Verdict
    notes: Mapping[str, float]

    @property
    def matrix(self) -> Matrix | None:
        """(k, n) weights of the rows in the mixed rows; None is the identity."""
        return reduce(np.matmul, reversed(self.mixings)) if self.mixings else None


@dataclass(frozen=True, repr=False)
class Aggregator:
    """Lenses, mixings and one final rule: aggregate(X) = reduce(W X), W = mix(Gram(X)).

    Raises:
        InputError: something other than a mixing or a lens stands before the end, a lens stands where
            nothing looks through it, or two parts name different eps.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise InputError("a composition needs at least one rule")
        for rule in self.rules[:-1]:
            if not isinstance(rule, Mixing | Lens):
                raise InputError(
                    f"{self!r}: {rule!r} gives the final answer and cannot stand before another "
                    "rule; only mixings (nnm, bucketing, clip) and last can"
                )
        for rule, following in pairwise(self.rules):
            if isinstance(rule, Lens) and isinstance(following.parts[0], CoordinateWise):
                raise InputError(
                    f"{self!r}: {following!r} takes every coordinate by itself: {rule!r} changes nothing"
                )
        named = {rule.eps for rule in self.rules if rule.eps is not None}
        if len(named) > 1:
            raise InputError(
                f"{self!r}: names more than one eps ({', '.join(sorted(map(str, named)))}); eps is "
                "the fraction of malicious clients, one for the whole composition"
            )

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.rules))

    def __or__(self, other: Rule | Aggregator) -> Aggregator:
        tail = other.rules if isinstance(other, Aggregator) else (other,)
        return Aggregator((*self.rules, *tail))

    @property
    def eps(self) -> float | str | None:
        """The eps that the composition names, if any."""
        return next((rule.eps for rule in self.rules if rule.eps is not None), None)

    @property
    def anchors(self) -> tuple[str, ...]:
        """Names of the rows of the server's own that the composition looks at."""
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.anchors))

    def __call__(self, gram: Gram) -> Decision:
        """Decide, in client space alone, how the rows are to be combined.

        Raises:
            InputError: too few rows for the rule at this eps, or no rule that answers at the end.
        """
        matrix: Matrix | None = None
        mixings: list[Matrix] = []
        scores: Vector | None = None
        notes: dict[str, float] = {}
        verdict, all_seen = Verdict.NOT_JUDGED, True
        for part in (part for rule in self.rules for part in rule.parts):
            if isinstance(part, CoordinateWise):
                reducer = part.reducer(gram.shares, gram.eps)
                return Decision(tuple(mixings), reducer, scores, Verdict.NOT_JUDGED, notes)
            if isinstance(part, Lens):
                gram, all_seen = part(gram), False
                continue
            if isinstance(part, Mixing) and gram.n > LARGEST_MATRIX:
                raise InputError(
                    f"{part!r} says of every row how it is mixed from the others, and {gram.n} of them "
                    f"are too many for that (at most {LARGEST_MATRIX})"
                )
            if not isinstance(part, Mixing | Weighting):
                raise TypeError(f"{part!r} is neither a lens, a mixing, a weighting nor coordinate-wise")
            mixed = part(gram)
            if mixed.scores is not None:
                scores = _pull_back(mixed.scores, matrix)
            # Of the round as it came: not of mixed rows, nor of what a lens shows of them.
            verdict = mixed.verdict if matrix is None and all_seen else Verdict.NOT_JUDGED
            notes |= mixed.notes
            mixings.append(mixed.matrix)
            matrix = mixed.matrix if matrix is None else mixed.matrix @ matrix
            gram = gram.through(mixed.matrix, mixed.shares, mixed.eps)
        if isinstance(self.rules[-1], Mixing | Lens):
            does = "mixes" if isinstance(self.rules[-1], Mixing) else "looks"
            raise InputError(f"{self!r} only {does}; end it with a rule, as in {self!r} | filter")
        return Decision(tuple(mixings), None, scores, verdict, notes)


def _pull_back(scores: Vector, matrix: Matrix | None) -> Vector:
    """Scores of mixed rows as scores of clients: the average over the rows a client is part of."""
    if matrix is None:
        return scores
    mass = matrix.sum(axis=0)
    pulled: Vector = np.divide(matrix.T @ scores, mass, out=np.zeros_like(mass), where=mass > 0)
    return pulled
