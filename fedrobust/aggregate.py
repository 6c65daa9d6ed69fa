"""Robust aggregation in one minute: mix in client space, reduce per coordinate.

    aggregate(X) = reduce(W X),   W = mix(Gram(X))

The rows of X (n x d) are the clients' updates. A rule looks at their n x n Gram matrix and answers
with a mixing matrix W (k x n); where k > 1 every coordinate of W X is reduced on its own. Forming the
Gram matrix and forming reduce(W X) are the only large work. Both split over coordinates, so the rows
may lie in one process (`LocalRows`) or in shards of a cluster: anything that is a `Rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.certificate import Certificate, certify
from fedrobust.errors import InputError
from fedrobust.gram import LARGEST_MATRIX, Gram
from fedrobust.kernels import Block, Matrix, Vector
from fedrobust.rules import Aggregator, CoordinateWise, Rule, parse_rule
from fedrobust.rules.fraction import DEFAULT_EPS, assume
from fedrobust.text import brief
from fedrobust.threads import few_threads
from fedrobust.trees import Tree, rebuild, tabulate, with_anchors
from fedrobust.verdict import Verdict, judge

LARGEST_NORM = 1e60
"""Longer rows are refused: beyond every float32 row, and the fourth power is still a float64. Of rows
shorter than 1e-150 the squares are no float64 any more, and they count as zeros."""
_HUGE = 1e37
"""No number of shorter rows is near the largest of float32, 3.4e38."""
_MOST_COORDINATES = 2048
"""With more rows than coordinates, up to so many of these, an eigenproblem in their space is cheap."""


class Rows(Protocol):
    """n updates of d coordinates, wherever they lie, cut into blocks of coordinates."""

    def sum(self, part: Callable[[Block], Matrix]) -> Matrix:
        """The sum over all blocks of what `part` makes of each."""
        ...

    def map(self, part: Callable[[Block], Tensor]) -> Any:  # noqa: ANN401 (local or remote)
        """What `part` makes of every block; left where it is if the rows are remote."""
        ...

    def ending(self, count: int) -> Rows:
        """The last `count` coordinates of the same rows."""
        ...


@dataclass(frozen=True)
class LocalRows:
    """Rows in this process."""

    blocks: tuple[Block, ...]

    def sum(self, part: Callable[[Block], Matrix]) -> Matrix:
        """The sum over all blocks, one at a time."""
        total = part(self.blocks[0])
        for block in self.blocks[1:]:
            total = total + part(block)
        return total

    def map(self, part: Callable[[Block], Tensor]) -> list[Tensor]:
        """One result a block."""
        return [part(block) for block in self.blocks]

    def ending(self, count: int) -> LocalRows:
        """The last `count` coordinates, not copied."""
        blocks: list[Block] = []
        for block in reversed(self.blocks):
            width = min(block.width, count)
            blocks = [block.ending(width), *blocks] if width else blocks
            count -= width
        return replace(self, blocks=tuple(blocks))

    @property
    def width(self) -> int:
        """Number of coordinates, d."""
        return sum(block.width for block in self.blocks)

    def matrix(self) -> Matrix:
        """(n, d) float64: the rows themselves, measured from the reference."""
        parts = [block.tile(slice(0, block.width)).double() for block in self.blocks]
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy())


@dataclass(frozen=True)
class Aggregated:
    """What a round came to.

    Attributes:
        value: the aggregate, of the form of one update.
        weights: (n,) weight of every client, or None for a coordinate-wise rule. What they lack of
            the sum 1 is weight on the reference (clipping); a rule that lengthens rows (fltrust) may
            bring them above 1.
        scores: (n,) how suspicious every client is by the rule's own measure, higher is more; None
            where the rule has none. Infinite for a refused client. For the operator, never for the
            clients: a score told to an attacker is an oracle.
        verdict: whether something stands out, in the round as it came and as it was weighted.
        certificate: how far the malicious clients can have moved the value; None without weights.
        notes: the rule's figures for the log.
        refused: why an update was left out, by its index.
    """

    value: Any
    weights: Vector | None
    scores: Vector | None
    verdict: Verdict
    certificate: Certificate | None
    notes: Mapping[str, float]
    refused: Mapping[int, str] = field(default_factory=dict)

    def over(self, n: int, kept: Sequence[int], value: Any, refused: Mapping[int, str]) -> Aggregated:  # noqa: ANN401
        """This answer for the `kept` ones of n updates as an answer for all of them."""
        return replace(
            self,
            value=value,
            weights=_spread(self.weights, kept, n, 0.0),
            scores=_spread(self.scores, kept, n, np.inf),
            refused=refused,
        )


def aggregate(  # noqa: PLR0913 (the front door)
    updates: Tree,
    rule: str | Rule | Aggregator,
    shares: Sequence[float] | Vector | None = None,
    *,
    eps: float | str | None = None,
    reference: Tree = None,
    anchors: Mapping[str, Tree] | None = None,
    seed: int = 0,
    certified: bool = True,
    bfloat16: bool = False,
) -> Aggregated:
    """The robust mean of n updates.

    A malformed update (not finite, or not of the form of the others) is left out and named in
    `refused`; it never spoils the round. The floating leaves of an update together are one vector of
    d coordinates. Integer leaves (counters) are no part of it: they take their lower median.

    Args:
        updates: (n, d) numpy array or torch tensor of floats, or a sequence of n equal trees (dict,
            list or tuple of arrays, nested): gradients, state dicts. float32 rows are the usual case;
            float64 stays float64, half precision is computed in float32.
        rule: a rule, a composition, or its text: "nnm | filter(eps=0.2)".
        shares: (n,) non-negative mass of each client, normalised here; None is uniform. A client that
            reports its own example count chooses its own mass: cap it before.
        eps: the fraction of clients that may be malicious, where the rule does not name it; "auto"
            estimates it from the spectrum.
        reference: a point that the server knows, of the form of one update; rows are measured from
            it. Give the broadcast model when updates are models rather than differences.
        anchors: rows of the server's own, each of the form of one update, that some rules look at
            beside the clients': {"root": gradient on the server's data} for fltrust and monna.
        seed: for rules that draw; change it from round to round.
        certified: False leaves certificate and verdict out; rules that need lengths alone (clip, arc,
            centered_clipping) or few inner products (fltrust, monna, geometric_median(steps=3)) then do
            without the others, which is ten times faster for a thousand rows.
        bfloat16: multiply float32 rows in bfloat16, as `kernels.gram`, where torch has a product for
            that, and change nothing elsewhere; for updates that differ by as much as they share.

    Raises:
        InputError: no usable update, too few for the rule, or a bad rule, share, eps, reference or
            anchor.

    >>> import numpy as np
    >>> honest = np.random.default_rng(0).normal(size=(8, 50))
    >>> result = aggregate([*honest, np.full(50, 9.0), np.full(50, 9.0)], "filter")
    >>> bool(np.linalg.norm(result.value - honest.mean(0)) < result.certificate.bound())
    True
    >>> result.weights[-2:], result.verdict.value
    (array([0., 0.]), 'outliers removed')
    """
    aggregator = composition(rule)
    check_seed(seed)
    check_anchors(anchors)
    table, names = tabulate(updates, reference), tuple(anchors or ())
    rows = LocalRows(with_anchors(table, anchors) if anchors else table.blocks)
    if not rows.width:
        raise InputError("the updates hold no values, so there is nothing to aggregate")
    if names:
        _check_anchors(rows, names)
    inner = partial(kernels.gram, bfloat16=bfloat16)
    matrix, squares = _first_pass(rows, aggregator, inner, certified=certified)
    norms = np.sqrt(squares)
    finite = np.flatnonzero(norms < LARGEST_NORM)
    kept = [table.kept[i] for i in finite]
    refused = table.refused | {table.kept[i]: reason for i, reason in unsound(norms).items()}
    n = len(table.kept) + len(table.refused)
    if not kept:
        raise InputError(f"none of the {n} updates is usable; the first {refused[0]}")
    if len(finite) < len(norms):
        rows = LocalRows(tuple(block.select(finite.tolist()) for block in rows.blocks))
        matrix, squares = None if matrix is None else matrix[np.ix_(finite, finite)], squares[finite]
    gram = gram_of(
        rows,
        masses(shares, n)[kept],
        squares,
        seed,
        names,
        certified=certified,
        inner=inner,
        matrix=matrix,
        precision=kernels.BFLOAT16
        if bfloat16 and any(map(kernels.lowers, rows.blocks))
        else precision([block.dtype for block in rows.blocks]),
    )
    gram = replace(gram, width=rows.width)
    result = combine(rows, aggregator, gram, eps, certified=certified)
    counters = [lower_median([leaf[i] for i in finite]) for leaf in table.counters]
    leaves = [leaf.to(block.dtype) for leaf, block in zip(result.value, rows.blocks, strict=True)]
    value = rebuild(table.like, leaves, counters)
    result = replace(result, certificate=of_rounded(result.certificate, result.value, leaves))
    return result.over(n, kept, value, dict(sorted(refused.items())))


def aggregate_rows(
    rows: Rows,
    rule: str | Rule | Aggregator,
    shares: Vector,
    norms: Vector,
    eps: float | str | None = None,
    seed: int = 0,
    anchors: tuple[str, ...] = (),
) -> Aggregated:
    """The robust mean of rows that may be remote; `aggregate` without its door.

    Args:
        rows: n finite rows.
        rule: as for `aggregate`.
        shares: (n,) non-negative mass of the rows; normalised here.
        norms: (n,) lengths of the rows, measured from the reference.
        eps: as for `aggregate`.
        seed: as for `aggregate`.
        anchors: names of the blocks' anchors, in their order.

    Returns:
        An `Aggregated` whose value is what `rows.map` returns.

    Raises:
        InputError: as `aggregate`.
    """
    check_seed(seed)
    return combine(rows, rule, gram_of(rows, shares, norms**2, seed, anchors), eps)


def gram_of(  # noqa: PLR0913 (all that may be known of the rows)
    rows: Rows,
    shares: Vector,
    squares: Vector,
    seed: int = 0,
    anchors: tuple[str, ...] = (),
    *,
    certified: bool = True,
    inner: Callable[[Block], Matrix] = kernels.gram,
    matrix: Matrix | None = None,
    precision: float = kernels.FLOAT32,
) -> Gram:
    """The statistic of rows that may be remote; no pass is made before a rule asks.

    Args:
        rows: n finite rows.
        shares: (n,) non-negative mass of the rows; normalised here.
        squares: (n,) squared norms of the rows, measured from the reference.
        seed: for rules that draw.
        anchors: names of the blocks' anchors, in their order.
        certified: whether the certificate, which needs the whole matrix, will be asked for.
        inner: makes a block's inner products.
        matrix: (n, n) inner products, if they are at hand.
        precision: of inner products, in units of the rows' lengths.

    Raises:
        InputError: the rows have no share at all.
    """
    if not shares.sum() > 0:
        raise InputError("the usable updates have no share at all")

    def multiply(vectors: Matrix) -> Matrix:
        return rows.sum(partial(kernels.products, vectors=vectors, norms=np.sqrt(squares)))

    def ending(count: int) -> Gram:
        seen = rows.ending(count)
        return gram_of(
            seen,
            shares,
            seen.sum(kernels.squared_norms),
            seed,
            anchors,
            certified=certified,
            inner=inner,
            precision=precision,
        )

    without = matrix is None and (not certified or len(shares) > LARGEST_MATRIX)
    if without and precision > kernels.FLOAT64:
        precision = max(precision, kernels.MULTIPLIED)
    return Gram(
        compute=lambda: rows.sum(inner) if matrix is None else matrix,
        shares=shares / shares.sum(),
        eps=DEFAULT_EPS,
        seed=seed,
        anchors=anchors,
        beside=lambda: rows.sum(kernels.beside_anchors),
        count_signs=lambda mixing: rows.sum(partial(kernels.sign_counts, matrix=mixing)),
        multiply=multiply if without else None,
        ending=ending,
        factor=rows.matrix() if isinstance(rows, LocalRows) and _few_coordinates(rows) else None,
        norms=squares,
        precision=precision,
    )


def combine(
    rows: Rows,
    rule: str | Rule | Aggregator,
    gram: Gram,
    eps: float | str | None = None,
    *,
    certified: bool = True,
) -> Aggregated:
    """What a rule makes of rows that may be remote, given their statistic.

    Args:
        rows: n finite rows.
        rule: as for `aggregate`.
        gram: their statistic, as `gram_of` makes it.
        eps: as for `aggregate`.
        certified: as for `aggregate`.

    Returns:
        An `Aggregated` whose value is what `rows.map` returns.

    Raises:
        InputError: as `aggregate`.
    """
    aggregator = composition(rule)
    with few_threads(gram.n):
        gram = assume(gram, aggregator.eps, eps)
        decision = aggregator(gram)
        weights, verdict, certificate = None, decision.verdict, None
        if decision.reducer is None and (weighing := decision.matrix) is not None:
            weights = weighing[0]
            if certified:
                certificate, kept = certify(gram, decision.mixings)
                if verdict is Verdict.NOT_JUDGED:
                    verdict = judge(gram, weights, kept)
    huge = bool(gram.squared_norms.max() > _HUGE**2)
    value = rows.map(
        partial(kernels.mix_and_reduce, matrix=decision.matrix, reducer=decision.reducer, huge=huge)
    )
    return Aggregated(value, weights, decision.scores, verdict, certificate, decision.notes)


def of_rounded(
    certificate: Certificate | None, exact: Sequence[Tensor], value: Sequence[Tensor]
) -> Certificate | None:
    """The certificate of a value whose leaves are less exact than those that were worked out."""
    moved = [
        float(torch.linalg.vector_norm((rounded.to(leaf) - leaf).double()))
        for leaf, rounded in zip(exact, value, strict=True)
        if rounded.dtype != leaf.dtype
    ]
    return replace(certificate, rounding=math.hypot(*moved)) if certificate and moved else certificate


def _check_anchors(rows: LocalRows, names: tuple[str, ...]) -> None:
    """Raises InputError: one of the blocks' anchors is too long."""
    norms = np.sqrt(rows.sum(lambda b: kernels.squared_norms(Block(b.anchors, b.reference))))
    for name, norm in zip(names, norms, strict=True):
        if not norm < LARGEST_NORM:
            raise InputError(f"the anchor {name!r} has norm {norm:.3g}, more than {LARGEST_NORM:.0g}")


def _few_coordinates(rows: LocalRows) -> bool:
    """Whether the rows themselves say in fewer numbers what their inner products do."""
    return rows.width < rows.blocks[0].n and rows.width <= _MOST_COORDINATES


def _first_pass(
    rows: LocalRows, aggregator: Aggregator, inner: Callable[[Block], Matrix], *, certified: bool
) -> tuple[Matrix | None, Vector]:
    """The inner products, if they will be needed in any case, and the rows' squared norms."""
    weighs = not isinstance(aggregator.rules[-1], CoordinateWise)
    n = rows.blocks[0].n
    if weighs and certified and n <= min(rows.width, LARGEST_MATRIX):
        matrix = rows.sum(inner)
        return matrix, np.asarray(np.diag(matrix))
    return None, rows.sum(kernels.squared_norms)


def unsound(norms: Vector) -> dict[int, str]:
    """Why rows of these (n,) lengths cannot be used, by their place.

    A row that float64 cannot square counts as one that is not finite.
    """
    reasons = {}
    for index in np.flatnonzero(~(norms < LARGEST_NORM)).tolist():
        huge = f"has norm {norms[index]:.3g}, more than {LARGEST_NORM:.0g}"
        reasons[index] = huge if np.isfinite(norms[index]) else "holds values that are not finite"
    return reasons


def precision(dtypes: Sequence[torch.dtype]) -> float:
    """Of inner products of rows whose coordinates have these dtypes, in units of the rows' lengths."""
    double = all(dtype == torch.float64 for dtype in dtypes)
    return kernels.FLOAT64 if double else kernels.FLOAT32


def check_seed(seed: object) -> None:
    """Raises InputError: it is none."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")


def check_anchors(anchors: object) -> None:
    """Raises InputError: it is no dict."""
    if not isinstance(anchors, Mapping | None):
        raise InputError(f"anchors must be a dict of rows by name, got {type(anchors).__name__}")


def composition(rule: object) -> Aggregator:
    """The rules that are to be applied. Raises InputError: there are no such rules."""
    if isinstance(rule, str):
        return parse_rule(rule)
    if isinstance(rule, Aggregator):
        return rule
    if isinstance(rule, Rule):
        return Aggregator((rule,))
    raise InputError(f"rule must be a rule such as fedrobust.Filter(), or its text, got {rule!r}")


def masses(shares: Sequence[float] | Vector | None, n: int) -> Vector:
    """(n,) shares over the largest of them; all 1 where there are none given.

    Raises:
        InputError: they are not n numbers, finite and not negative.
    """
    if shares is None:
        return np.ones(n)
    try:
        found = np.asarray(shares, dtype=complex if np.iscomplexobj(shares) else float)
    except (TypeError, ValueError, OverflowError):
        found = np.asarray(None)
    if found.dtype != float:
        raise InputError(f"shares must be numbers, got {brief(shares)}")
    if found.shape != (n,):
        raise InputError(f"expected {n} shares, one an update, got shape {found.shape}")
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise InputError(f"shares must be finite and not negative, got {found.min()}")
    return found / (found.max(initial=0.0) or 1.0)


def lower_median(values: Sequence[Tensor]) -> Tensor:
    """What integer leaves come to: the (n - 1) // 2-th smallest of n, element by element."""
    stacked = torch.stack(list(values))
    return torch.sort(stacked, dim=0).values[(len(values) - 1) // 2].to(stacked.dtype)


def _spread(values: Vector | None, kept: Sequence[int], n: int, fill: float) -> Vector | None:
    if values is None:
        return None
    full = np.full(n, fill)
    full[list(kept)] = values
    return full
