"""Smallest-maximum-eigenvalue averaging: the n - f rows that are spread least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, islice

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from fedrobust.errors import InputError
from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.exact import refusal
from fedrobust.rules.majority import require_majority
from fedrobust.rules.rule import Mixed, Weighting, weigh

Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

_RATE = 1e7
"""Sets a second that the search gets through on one core when it can leave out hardly any."""

_FEW = 2_000
"""So many sets are looked at one by one."""

_TIE = 1e-9
"""Top eigenvalues that differ by less than this part of themselves are equal."""

_GROWTH = 1e8
"""By how much rounding may have grown before an inverse is formed anew."""

_SLACK = 1e-8
"""What rounding can have done by then, with a margin, to an inverse whose entries were at most 1."""

_SHIFTS = np.array([0.0, 3e-6, 1e-5, 3e-5])
"""How far a threshold is raised where it meets an eigenvalue: that only costs more checks."""

_BATCH = 1 << 16
"""Numbers in the matrices that are worked on together: they should fit a core's cache."""

_CHECKED = 1024
"""Sets whose eigenvalues are computed together."""

_PROBLEMS = 1_000_000
"""The most eigenproblems in a search, some 2e4 a second; rows with ties without number need as many."""


@dataclass(frozen=True, repr=False)
class SMEA(Weighting):
    """The mean of the n - f rows whose covariance has the smallest top eigenvalue, exactly.

        S = argmin over |S| = n - f of lambda_max(Sigma_S),     value = mu_S

    Method: branch and bound on the f rows to remove. Let best be the smallest eigenvalue so far, from
    greedy removal and swaps, tau its unnormalised form just below, and C the rows' inner products about
    their mean. S beats it iff tau - C_S is positive definite on the vectors of sum zero, that is, iff
    the f x f block of the rows R that S lacks in the bordered inverse,

        B = [tau - C, 1; 1^T, 0]^-1,     B_RR has as many negative eigenvalues as C has above tau

    (Haynsworth's inertia additivity). Removing a row is one step of elimination, B - b b^T / B_ii, and
    takes an eigenvalue below tau iff B_ii < 0. The last two rows need no branching: two by two
    determinants say which pairs will do. So a set costs some ten floating-point operations, done by
    numpy for thousands of branches at once, and no eigenproblem. Branches are left

    - when more eigenvalues are above tau than rows may still go (interlacing);
    - when every row that goes must take one down, and too few can;
    - when every block that can still be chosen is diagonally dominant, so positive definite.

    Rows farther apart than S can bear are removed before (as in MDA), and of rows that are equal the
    first go first. Rounding is watched: where elimination meets a small pivot, B is formed anew, and a
    set that looks better counts only once its own eigenvalues say so. Top eigenvalues within 1e-9 of
    each other, relatively, are ties, which go to the set that is met first.

    Guarantee: ||value - mu_H||^2 <= 4 f / (n - 2 f) lambda_max(Sigma_H) for any n - f honest rows H: S
    shares n - 2 f rows with them and is spread no more than they are (the certificate's inequality with
    t = f / (n - f)). So kappa = O(f / n) in every dimension, and the error O(sigma sqrt eps). Breakdown
    point 1/2. Shares only tell how many rows can be malicious (the paper has no weighted form). No
    scores. Notes: the eigenvalue kept, and how many nodes and eigenproblems the search took.
    Deviations: none in what is found, up to ties; the search, where the paper enumerates.
    Cost: n! / (f! (n - f)!) sets at worst, some 1e7 a second, which also bounds what malicious rows can
    make of it: n = 40, f = 8 (7.7e7 sets) takes seconds on Gaussian rows in any dimension, with or
    without shifted ones. Beyond `budget` sets the rule refuses, by n and f alone, rather than let a
    round hang. Sets that rounding cannot tell from the best take an eigenproblem each; beyond a million
    of those, an error says so.
    Source: Allouah, Guerraoui, Gupta, Pinot, Stephan 2023, "On the Privacy-Robustness-Utility
    Trilemma in Distributed Learning" (arXiv 2302.04787).

    Attributes:
        budget: the most sets that may have to be looked at.
    """

    name = "smea"
    budget: int = 200_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget >= 1, "budget must be at least 1")

    def __call__(self, gram: Gram) -> Mixed:
        """Choose n - f rows."""
        n, f = gram.n, gram.f
        require_majority(self, n, f)
        sets = math.comb(n, f)
        self.require(sets <= self.budget, refusal(n, f, sets, "sets of rows", _RATE, self.budget))
        found = _smallest(gram, f)
        weights = np.zeros(n)
        weights[found.kept] = 1 / (n - f)
        notes = {
            "kept_eigenvalue": found.value / (n - f),
            "search_nodes": float(found.nodes),
            "search_eigenproblems": float(found.problems),
        }
        return weigh(weights, notes=notes)


@dataclass(frozen=True)
class _Found:
    """A set of rows, the top eigenvalue of its scatter, and what it took to find it."""

    kept: Rows
    value: float
    nodes: int = 0
    problems: int = 0


def _smallest(gram: Gram, f: int) -> _Found:
    """The n - f rows whose scatter has the smallest top eigenvalue."""
    matrix, n = gram.matrix, gram.n
    if math.comb(n, f) <= _FEW:
        return _least(matrix, _subsets(np.arange(n), n - f))
    # Inner products of float32 rows are good to some 1e-8 of their lengths: below that all sets tie.
    floor = 1e-8 * float(np.sort(np.diag(matrix))[: n - f].sum())
    start = _swapped(matrix, _greedy(matrix, f), floor)
    if start.value <= floor:
        return start
    # A pair's own scatter has eigenvalue ||x - y||^2 / 2, so no set as good as the start holds one that
    # is farther apart. What is left is of the scale of the best set, whatever malicious rows are like.
    alive = _bearable(gram.squared_distances > 2.000001 * start.value, f)
    left = len(alive) - (n - f)
    if math.comb(len(alive), left) <= _FEW:
        rest = _least(matrix, _subsets(alive, n - f))
        return rest if rest.value < start.value else start
    order, twins = _order(gram, alive, start.value)
    search = _Search(
        matrix=_scatter(matrix, order[None])[0],
        left=left,
        twins=twins,
        floor=floor,
        best=_Found(np.flatnonzero(np.isin(order, start.kept)), start.value),
    )
    search.run()
    return replace(
        search.best, kept=order[search.best.kept], nodes=search.nodes, problems=search.problems
    )


def _subsets(rows: Rows, size: int) -> Rows:
    """(c, size) all sets of so many of the rows."""
    return rows[np.array(list(combinations(range(len(rows)), size)), dtype=np.intp)]


def _scatter(matrix: Matrix, sets: Rows) -> Matrix:
    """(c, k, k) inner products of each set's rows about their mean.

    Args:
        matrix: (n, n) inner products.
        sets: (c, k).
    """
    part = matrix[sets[:, :, None], sets[:, None, :]]
    means = part.mean(axis=1)
    return np.asarray(part - means[:, :, None] - means[:, None, :] + means.mean(axis=1)[:, None, None])


def _tops(matrix: Matrix, sets: Rows) -> Vector:
    """(c,) top eigenvalues of the sets' scatters."""
    size = max(1, min(_CHECKED, (1 << 22) // sets.shape[1] ** 2))
    parts = [_scatter(matrix, sets[at : at + size]) for at in range(0, len(sets), size)]
    return np.concatenate([np.linalg.eigvalsh(part)[:, -1] for part in parts])


def _spectra(matrices: Matrix) -> tuple[Matrix, Matrix]:
    """(c, k) eigenvalues of each of c symmetric matrices, ascending, and (c, k, k) eigenvectors."""
    # Not numpy's eigh: its divide and conquer lets threads meet at each of many tiny products, which
    # takes ten times as long as soon as another process is busy on one of the cores.
    pairs = [eigh(matrix, driver="evr", check_finite=False) for matrix in matrices]
    return np.stack([values for values, _ in pairs]), np.stack([vectors for _, vectors in pairs])


def _least(matrix: Matrix, sets: Rows) -> _Found:
    """The first of the sets whose top eigenvalue is the smallest."""
    tops = _tops(matrix, sets)
    at = int(np.argmin(tops))
    return _Found(sets[at], float(tops[at]), problems=len(sets))


def _greedy(matrix: Matrix, f: int) -> _Found:
    """Without the f rows that stand out, one after another, along the top direction of those left."""
    kept = np.arange(len(matrix))
    for _ in range(f):
        vectors = _spectra(_scatter(matrix, kept[None]))[1]
        kept = np.delete(kept, int(np.argmax(np.abs(vectors[0, :, -1]))))
    return _least(matrix, kept[None])


def _swapped(matrix: Matrix, found: _Found, floor: float) -> _Found:
    """Swap one row for another until no swap is for the better, or all sets are as good as equal."""
    while found.value > floor:
        out = np.setdiff1d(np.arange(len(matrix)), found.kept)
        wider = np.array([np.append(found.kept, row) for row in out])
        inverses, above, _ = _inverse(_scatter(matrix, wider), _below(found.value))
        # Of a set with one row too many, the removal of each row with a negative entry will do.
        gains = np.where(above[:, None] == 1, np.diagonal(inverses, axis1=1, axis2=2), np.inf)
        steepest = np.argsort(gains, axis=None)[: min(64, np.count_nonzero(gains < _SLACK))]
        if not len(steepest):
            break
        sets = [np.delete(wider[at // gains.shape[1]], at % gains.shape[1]) for at in steepest]
        better = _least(matrix, np.sort(np.array(sets), axis=1))
        if better.value >= _below(found.value):
            break
        found = better
    return found


def _below(value: float) -> float:
    """Smaller than the value by more than a tie."""
    return value * (1 - _TIE)


def _bearable(apart: Mask, f: int) -> Rows:
    """The rows left when those go that are too far apart from more rows than may go."""
    alive = np.arange(len(apart))
    while True:
        left = f - (len(apart) - len(alive))
        crowded = apart[np.ix_(alive, alive)].sum(axis=1) > left
        if not crowded.any():
            return alive
        alive = np.delete(alive, int(np.argmax(crowded)))


def _order(gram: Gram, alive: Rows, value: float) -> tuple[Rows, Mask]:
    """The rows in the order in which removals are tried, and which of them equal the one before.

    Those whose removal takes no eigenvalue down come first: the branches that waste a removal on them
    are left soonest, and later branches no longer can.
    """
    inverses, _, _ = _inverse(_scatter(gram.matrix, alive[None]), _below(value))
    order = alive[np.argsort(-np.diag(inverses[0]), kind="stable")]
    norms = np.diag(gram.matrix)[order]
    equal = gram.squared_distances[np.ix_(order, order)] <= 1e-15 * (norms[:, None] + norms[None, :])
    first = np.argmax(equal, axis=1)  # equal rows move up to the first of them
    places = np.argsort(first, kind="stable")
    first = first[places]
    return order[places], np.append(False, first[1:] == first[:-1])


def _inverse(scatters: Matrix, threshold: float) -> tuple[Matrix, Rows, Rows]:
    """The rows' blocks of [threshold - C, 1; 1^T, 0]^-1, and how many eigenvalues are above.

    Where an eigenvalue is next to the threshold, the inverse is of one raised by up to 3e-5 of the
    spectrum's width: counted are the eigenvalues above that, and above the threshold as it is given.

    Rows and columns are scaled so that the block's absolute value (in the sense of its spectrum) has a
    unit diagonal: no entry is larger than 1, and the size of a pivot says what it does to rounding.

    Args:
        scatters: (c, k, k) scatters C of k rows each.
        threshold: positive.
    """
    values, vectors = _spectra(scatters)
    count = values.shape[1]
    # Rows in many dimensions have a spectrum so flat that only differences in it mean anything.
    spread = np.maximum(threshold - np.median(values, axis=1), 1e-6 * threshold)[:, None]
    raised = threshold + spread * _SHIFTS  # (c, shifts)
    distances = np.abs(raised[:, :, None] - values[:, None, :]).min(axis=2)
    chosen = np.where(distances[:, 0] > 1e-6 * spread[:, 0], 0, np.argmax(distances, axis=1))[:, None]
    raised = np.take_along_axis(raised, chosen, axis=1)
    gaps = (raised - values) / spread
    gaps[gaps == 0] = np.finfo(float).tiny
    # C 1 = 0, so all that the border takes away is the vector 1, of gap `raised`.
    border = spread / raised / count
    inverses = (vectors / gaps[:, None, :]) @ vectors.swapaxes(1, 2) - border[:, :, None]
    sizes = np.maximum((vectors**2 / np.abs(gaps)[:, None, :]).sum(axis=2) - border, 1e-12)
    scales = 1 / np.sqrt(sizes)
    inverses *= scales[:, :, None] * scales[:, None, :]
    return inverses, (gaps < 0).sum(axis=1), (values > threshold).sum(axis=1)


@dataclass(frozen=True)
class _Nodes:
    """Branches whose last removed row is the same: those that may go next are the m rows after it.

    Attributes:
        inverse: (m, m, c) the block of each branch's inverse.
        above: (c,) how many eigenvalues have yet to be taken down.
        growth: (c,) by how much rounding may have grown since the inverse was formed.
        removed: (k, c) rows removed, ascending.
    """

    inverse: Matrix
    above: Rows
    growth: Vector
    removed: Rows

    def __len__(self) -> int:
        return len(self.above)

    def only(self, mask: Mask) -> _Nodes:
        """The nodes under the (c,) mask."""
        if mask.all():
            return self
        return _Nodes(
            self.inverse[:, :, mask], self.above[mask], self.growth[mask], self.removed[:, mask]
        )


def _join(parts: list[_Nodes]) -> _Nodes:
    """The nodes of all parts."""
    if len(parts) == 1:
        return parts[0]
    return _Nodes(
        np.concatenate([part.inverse for part in parts], axis=2),
        np.concatenate([part.above for part in parts]),
        np.concatenate([part.growth for part in parts]),
        np.concatenate([part.removed for part in parts], axis=1),
    )


@dataclass
class _Search:
    """Branch and bound over the rows to remove, from a good set on.

    Attributes:
        matrix: (n, n) inner products, in the order in which rows are tried.
        left: how many rows are to be removed.
        twins: (n,) whether a row equals the one before; then it goes only after that one.
        floor: eigenvalues up to this are as good as zero.
        best: the best set so far.
        nodes: how many have been looked at.
        problems: how many eigenproblems have been solved.
    """

    matrix: Matrix
    left: int
    twins: Mask
    floor: float
    best: _Found
    nodes: int = 0
    problems: int = 0
    waiting: dict[tuple[int, int], list[_Nodes]] = field(default_factory=dict)

    def run(self) -> None:
        """Find the best set."""
        if self.left <= 2:
            roots = [np.zeros((0, 1), dtype=np.intp)]
        else:
            firsts = range(len(self.matrix) - self.left + 1)
            roots = [np.array([[first]]) for first in firsts if not self.twins[first]]
        for root in roots:
            while self.best.value > self.floor and self.improves(root):
                pass  # the same branch again, with a lower threshold

    def improves(self, root: Rows) -> bool:
        """Look for a better set in one branch, and improve that by swaps."""
        self.waiting = {}
        left = self.left - len(root)
        self.put(left, self.formed(root, left))
        while self.waiting:
            for removed in self.candidates(*self.take()):
                self.count(problems=removed.shape[1])
                kept = np.ones((removed.shape[1], len(self.matrix)), dtype=bool)
                kept[np.arange(len(kept)), removed] = False
                found = _least(self.matrix, np.nonzero(kept)[1].reshape(len(kept), -1))
                if found.value < _below(self.best.value):
                    self.best = _swapped(self.matrix, found, self.floor)
                    return True
        return False

    def count(self, nodes: int = 0, problems: int = 0) -> None:
        """Keep account of the work."""
        self.nodes += nodes
        self.problems += problems
        if self.problems > _PROBLEMS:
            raise InputError(
                f"smea: {_PROBLEMS:.0e} eigenproblems do not tell the best of sets that all but tie; "
                f"all {math.comb(len(self.matrix), self.left):.2g} sets may take one each"
            )

    def put(self, left: int, nodes: _Nodes) -> None:
        """Let nodes wait that have `left` rows to remove."""
        if len(nodes):
            self.waiting.setdefault((left, nodes.inverse.shape[0]), []).append(nodes)

    def take(self) -> tuple[int, _Nodes]:
        """The deepest nodes that are enough for a batch, or else the least deep ones."""
        full = [
            key for key, parts in self.waiting.items() if sum(map(len, parts)) * key[1] ** 2 >= _BATCH
        ]
        key = min(full) if full else max(self.waiting)
        return key[0], _join(self.waiting.pop(key))

    def formed(self, removed: Rows, left: int) -> _Nodes:
        """Nodes with inverses that owe nothing to others, but for those that are not worth it.

        Args:
            removed: (k, c) rows removed, ascending, the last one the same in all.
            left: how many rows are yet to be removed.
        """
        count, n = removed.shape[1], len(self.matrix)
        self.count(problems=count)
        kept = np.ones((count, n), dtype=bool)
        kept[np.arange(count), removed] = False
        alive = np.nonzero(kept)[1].reshape(count, -1)
        inverses, above, sharp = _inverse(_scatter(self.matrix, alive), _below(self.best.value))
        start = int(removed[-1, 0]) + 1 if len(removed) else 0
        m = n - start
        block = inverses[:, inverses.shape[1] - m :, inverses.shape[1] - m :]
        nodes = _Nodes(np.ascontiguousarray(block.transpose(1, 2, 0)), above, np.ones(count), removed)
        return nodes.only(sharp <= left)

    def candidates(self, left: int, nodes: _Nodes) -> Iterator[Rows]:
        """Put the children of nodes; (f, c) removals that may be better than the best set's."""
        self.count(nodes=len(nodes))
        blurred = nodes.growth > _GROWTH
        if blurred.any():
            nodes = _join([nodes.only(~blurred), self.formed(nodes.removed[:, blurred], left)])
        nodes = nodes.only(nodes.above <= left)
        for at in np.flatnonzero(nodes.above == 0):  # every set below is better, or nearly so
            yield from self.completed(left, nodes.removed[:, at])
        nodes = nodes.only(nodes.above > 0)
        if left == 1:
            yield from self.chosen(nodes, _diagonals(nodes)[:, None] < 0)
        elif left == 2:
            yield from self.chosen(nodes, _pairs(nodes))
        elif len(nodes):
            self.branch(left, nodes.only(~_definite(nodes, left)))

    def completed(self, left: int, removed: Rows) -> Iterator[Rows]:
        """All removals of `left` more rows."""
        start = int(removed[-1]) + 1 if len(removed) else 0
        further = combinations(range(start, len(self.matrix)), left)
        while chunk := list(islice(further, 32)):
            yield np.array([[*removed, *rows] for rows in chunk]).T

    def chosen(self, nodes: _Nodes, hits: Mask) -> Iterator[Rows]:
        """Removals of the rows that are hit.

        Args:
            nodes: c of them.
            hits: (m, 1, c) rows or (m, m, c) pairs of rows.
        """
        start = len(self.matrix) - hits.shape[0]
        first, second, at = np.nonzero(hits)
        further = [first + start] if hits.shape[1] == 1 else [first + start, second + start]
        removed = np.concatenate([nodes.removed[:, at], np.array(further, dtype=np.intp)])
        for begin in range(0, removed.shape[1], _CHECKED):
            yield removed[:, begin : begin + _CHECKED]

    def branch(self, left: int, nodes: _Nodes) -> None:
        """Put the children: one more row removed, `left` - 1 to go."""
        block = nodes.inverse
        m = len(block)
        start = len(self.matrix) - m
        diagonals = _diagonals(nodes)
        for place in range(m - left + 1):
            if self.twins[start + place] and (place > 0 or not len(nodes.removed)):
                continue  # the row before, which is equal, has not been removed
            pivot = block[place, place]
            sound = np.abs(pivot) > _SLACK
            pivot = np.where(sound, pivot, 1.0)
            row = block[place, place + 1 :]
            # b b^T / B_ii multiplies what is wrong with B_ii by (b / B_ii)^2.
            growth = nodes.growth * np.maximum(1.0, (np.abs(row).max(axis=0) / pivot) ** 2)
            growth = np.where(sound, growth, np.inf)  # the others' inverses are formed anew
            above = nodes.above - (pivot < 0)
            # Where every row that goes must take an eigenvalue down, so many must be able to.
            slack = _SLACK / _GROWTH * growth
            able = np.count_nonzero(diagonals[place + 1 :] - row**2 / pivot < slack, axis=0)
            keep = ~sound | (above < left - 1) | ((above == left - 1) & (able >= left - 1))
            if keep.any():
                parents = nodes.only(keep)
                column, pivot = parents.inverse[place, place + 1 :], pivot[keep]
                inverse = parents.inverse[place + 1 :, place + 1 :] - column[:, None] * (column / pivot)
                last = np.full((1, len(parents)), start + place)
                removed = np.concatenate([parents.removed, last])
                self.put(left - 1, _Nodes(inverse, above[keep], growth[keep], removed))


def _diagonals(nodes: _Nodes) -> Matrix:
    """(m, c) diagonals of the inverses, lowered by what rounding can have added."""
    return np.asarray(np.einsum("iic->ic", nodes.inverse) - _SLACK)


def _pairs(nodes: _Nodes) -> Mask:
    """(m, m, c) the pairs of rows that take all eigenvalues, one or two, down: by determinants."""
    diagonal = _diagonals(nodes)
    dominant: Mask = diagonal[:, None] * diagonal[None] > nodes.inverse**2
    negative = diagonal < 0
    both = negative[:, None] & negative[None] if negative.any() else np.zeros(1, dtype=bool)
    hits: Mask = np.where(nodes.above == 1, ~dominant | both, dominant & both)
    return hits & np.triu(np.ones(hits.shape[:2], dtype=bool), 1)[:, :, None]


def _definite(nodes: _Nodes, left: int) -> Mask:
    """(c,) where every block of `left` rows is diagonally dominant, so that no eigenvalue goes down."""
    diagonal = _diagonals(nodes)
    weak = diagonal[:, None] * diagonal[None] > (left - 1) ** 2 * nodes.inverse**2
    m = len(diagonal)
    return np.asarray((diagonal > 0).all(axis=0) & (np.count_nonzero(weak, axis=(0, 1)) == m * (m - 1)))
