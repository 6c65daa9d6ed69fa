"""The statistic that every rule looks at: the n x n inner products of the clients' updates.

Distances, centred inner products and spectra of any weighting, of the rows themselves or of rows
seen through a mixing, all follow from it without another look at the d coordinates.

The matrix is not always what is cheapest to look at. Where there are more rows than coordinates the
rows themselves say the same in d x d numbers, and where few products G v are wanted, or n and d are
both large, a product can be had in one pass over the rows. `Gram` chooses; rules ask for distances,
products and spectra and do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import eigh_tridiagonal

from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector, stretches

__all__ = ["Gram"]

Product = Callable[[Matrix], Matrix]
"""(n, k) V -> (n, k) G V."""

LARGEST_MATRIX = 20_000
"""More rows than this (a matrix of 3.2 GB), and it is not formed."""
_EXACT = 256
"""Up to this size a complete eigenproblem costs no more than a few eigenpairs."""
_LANCZOS_STEPS = 60
_RESIDUAL = 1e-2
_ROUNDED = 1e-12


@dataclass(frozen=True)
class Gram:
    """Inner products of n rows about the server's reference, and what is known of the rows.

    Attributes:
        compute: gives the (n, n) float64 matrix; called once, and only if a rule needs it.
        shares: (n,) mass of each row, sum 1.
        eps: mass that may be malicious, 0 <= eps < 1/2.
        seed: for rules that draw; the caller changes it from round to round.
        anchors: names of the a rows of the server's own that stand beside the others; they have no
            share and no weight.
        beside: gives the (n + a, a) float64 inner products of the rows, and after them the anchors, with
            the anchors; called once, and only if a rule needs it.
        count_signs: gives `kernels.sign_counts` of the rows mixed by a (k, n) matrix, or None; a pass
            over the coordinates. None where the caller cannot look at the rows again.
        ending: gives the statistic of the same rows, of so many of their last coordinates; another pass
            over those. None where the caller cannot look at the rows again.
        factor: (n, r) float64, r < n, any F with F F^T the matrix: the rows themselves, if they have
            fewer coordinates than there are rows. Then the matrix is formed only if asked for.
        multiply: products with the matrix without the matrix, each a pass over the rows; None where
            the matrix is at hand, or will be needed anyway.
        norms: (n,) squared norms of the rows where they are known without the matrix.
        precision: the error of an inner product, in units of the two rows' lengths.
        width: how many coordinates a row has, where that is known: there are no more eigenvalues.
    """

    compute: Callable[[], Matrix]
    shares: Vector
    eps: float
    seed: int = 0
    anchors: tuple[str, ...] = ()
    beside: Callable[[], Matrix] | None = None
    count_signs: Callable[[Matrix | None], Matrix] | None = None
    ending: Callable[[int], Gram] | None = None
    factor: Matrix | None = None
    multiply: Product | None = None
    norms: Vector | None = None
    precision: float = 1e-12
    width: int | None = None

    @cached_property
    def matrix(self) -> Matrix:
        """(n, n) float64, symmetric.

        Raises:
            InputError: there are so many rows that it would not fit into memory.
        """
        if self.n > LARGEST_MATRIX + 1:  # the reference may stand beside the rows
            raise InputError(
                f"the rule compares every pair of rows, and {self.n} of them are too many for that "
                f"(at most {LARGEST_MATRIX}); mean, filter, caf and geometric_median do without"
            )
        if self.factor is not None:
            return np.asarray(self.factor @ self.factor.T)
        return self.compute()

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.shares)

    @property
    def f(self) -> int:
        """The most rows that can be malicious: floor(eps n) when shares are uniform."""
        return most_malicious(self.shares, self.eps)

    @property
    def f_with_share(self) -> int:
        """The most rows that have a share and can be malicious: where rows count by their shares."""
        return most_malicious(self.shares[self.shares > 0], self.eps)

    def product(self, times: int) -> Product:
        """(n, k) V -> (n, k) G V, by the cheapest way to so many products of one vector each.

        This is where it is decided, for all rules, whether the matrix is formed.
        """
        if self.factor is not None:
            rows = self.factor
            return lambda vectors: np.asarray(rows @ (rows.T @ vectors))
        if self.multiply is None or not self._without_matrix(times):
            return lambda vectors: np.asarray(self.matrix @ vectors)
        multiply = self.multiply
        return lambda vectors: multiply(vectors.reshape(self.n, -1)).reshape(vectors.shape)

    def _without_matrix(self, times: int) -> bool:
        """Whether so many passes over the rows cost less than the matrix.

        Forming it takes about 3 + n / 20 times as long as reading the rows once, a product twice as long
        (measured: docs/benchmarks.md, kernels).
        """
        formed = "matrix" in vars(self)
        return not formed and (self.n > LARGEST_MATRIX or 2 * times < 3 + self.n / 20)

    @cached_property
    def squared_norms(self) -> Vector:
        """(n,) squared distances of the rows from the reference."""
        if self.norms is not None and "matrix" not in vars(self):
            return self.norms
        if self.factor is not None:
            return np.asarray(np.einsum("ij,ij->i", self.factor, self.factor))
        # Mixed rows may cancel out, and leave a rounding error below zero.
        return np.asarray(np.maximum(np.diag(self.matrix), 0.0))

    @cached_property
    def lengths(self) -> Vector:
        """(n,) distances of the rows from the reference."""
        return np.asarray(np.sqrt(self.squared_norms))

    def anchor(self, name: str) -> tuple[Vector, float]:
        """(n,) inner products of the rows with one of the server's own, and its squared norm.

        Raises:
            InputError: there is no such row, or it is not finite.
        """
        if name not in self.anchors or self.beside is None:
            raise InputError(
                f"the rule needs a row of the server's own: aggregate(..., anchors={{{name!r}: ...}})"
            )
        at = self.anchors.index(name)
        column = self._beside_anchors[:, at]
        if not np.isfinite(column).all():
            raise InputError(f"the server's own row {name!r} holds values that are not finite")
        return column[: self.n], float(column[self.n + at])

    @cached_property
    def _beside_anchors(self) -> Matrix:
        return np.empty((self.n, 0)) if self.beside is None else self.beside()

    @cached_property
    def signs(self) -> Matrix:
        """(n, 3) fractions of each row's coordinates that are positive, zero, negative."""
        if self.count_signs is None:
            raise InputError("the rule counts signs, and these rows cannot be looked at again")
        counts = self.count_signs(None)
        fractions: Matrix = counts / counts.sum(axis=1, keepdims=True)
        return fractions

    def last(self, count: int) -> Gram:
        """The same rows, as far as their last `count` coordinates tell.

        Raises:
            InputError: there are not so many, or the rows cannot be looked at again.
        """
        if self.ending is None:
            raise InputError("the rule looks at some coordinates only, and these rows are not at hand")
        if self.width is not None and count > self.width:
            raise InputError(
                f"the rule looks at the last {count} coordinates, and there are {self.width}"
            )
        return replace(self.ending(count), shares=self.shares, eps=self.eps, width=count)

    @cached_property
    def squared_distances(self) -> Matrix:
        """(n, n) squared distances between rows: zero diagonal, never negative."""
        norms = np.diag(self.matrix)
        distances: Matrix = norms[:, None] + norms[None, :]
        distances -= 2 * self.matrix
        np.maximum(distances, 0.0, out=distances)
        np.fill_diagonal(distances, 0.0)
        return distances

    @property
    def cosines(self) -> Matrix:
        """(n, n) cosines between rows, anew: 1 on the diagonal, otherwise 0 for a row of zeros."""
        lengths = self.lengths
        inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        cosines: Matrix = inverse[:, None] * self.matrix
        cosines *= inverse[None, :]
        np.clip(cosines, -1.0, 1.0, out=cosines)
        np.fill_diagonal(cosines, 1.0)
        return cosines

    def spectrum(self, weights: Vector) -> tuple[Vector, Matrix]:
        """Eigenvalues of the weighted covariance, largest first, and the rows' projections.

        All of them, the zeros of more rows than coordinates left out; only the largest where n and d are
        both too large for that.

        Args:
            weights: (n,) non-negative, sum 1.

        Returns:
            (k,) eigenvalues, and (m, k) values <v_j, x_i - mu>: row i the i-th of the m rows that carry
            weight, column j the j-th eigenvector.
        """
        if self.factor is None:
            if self.n > LARGEST_MATRIX:
                return self._lanczos(weights, None)
            values, vectors = np.linalg.eigh(self._weighted(weights))
            return _projections(values[::-1], vectors[:, ::-1], weights)
        centred = self._centred_rows(weights)
        values, vectors = np.linalg.eigh(centred.T @ (weights[weights > 0, None] * centred))
        return np.maximum(values[::-1], 0.0), centred @ vectors[:, ::-1]

    def leading(self, weights: Vector, near: Vector | None = None) -> tuple[Vector, Matrix]:
        """As `spectrum`, at least the first of the eigenvalues, as a rule to a relative 1e-4.

        Args:
            weights: (n,) non-negative, sum 1.
            near: (n,) projections of the rows on a direction that is thought to be near the first.
        """
        return self.spectrum(weights) if self.size(weights) <= _EXACT else self._lanczos(weights, near)

    def size(self, weights: Vector) -> int:
        """How many eigenvalues of the weighted covariance `eigenvalues` gives, at most."""
        size = min(int(np.count_nonzero(weights)), self.n if self.width is None else self.width)
        return size if self.factor is not None or self.n <= LARGEST_MATRIX else min(size, _LANCZOS_STEPS)

    def centred_norms(self, weights: Vector) -> Vector:
        """(n,) squared distances of all rows from the weighted mean."""
        toward = self.product(1)(weights)
        return np.asarray(np.maximum(self.squared_norms - 2 * toward + weights @ toward, 0.0))

    def rounding(self, weights: Vector, beside: int = 0) -> float:
        """An eigenvalue of the weighted covariance below this is as good as zero.

        Inner products are good to `precision` of the rows' lengths, and so is what is left of them when
        all rows are equal: no eigenvalue is wrong by more than this.

        Args:
            weights: (n,) non-negative, sum 1.
            beside: how many larger eigenvalues there are. As many rows may be what stretches those, and
                do not count: an entry is off in proportion to its own two rows.
        """
        terms = np.sort(weights * self.squared_norms)
        return self.precision * float(terms[: self.n - beside].sum())

    def eigenvalues(self, weights: Vector) -> Vector:
        """(k,) eigenvalues of the weighted covariance, largest first: `spectrum` without directions.

        Args:
            weights: (n,) non-negative; what they lack of the sum 1 is weight on the reference.
        """
        if not weights.any():
            return np.zeros(1)
        if self.factor is not None:
            centred = self._centred_rows(weights)
            covariance = centred.T @ (weights[weights > 0, None] * centred)
        elif self.n > LARGEST_MATRIX:
            return self._lanczos(weights, None)[0]
        else:
            covariance = self._weighted(weights)
        return np.asarray(np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0.0))

    @cached_property
    def raw_eigenvalues(self) -> Vector:
        """Those of the rows as they came, weighted by their shares."""
        return self.eigenvalues(self.shares)

    def _centred_rows(self, weights: Vector) -> Matrix:
        """(m, r) the rows that carry weight, about their weighted mean."""
        # Rows without weight are left out rather than multiplied by zero: one of norm 1e30 would
        # take the precision of all the others with it.
        support = np.flatnonzero(weights)
        rows = np.asarray(self.factor)[support]
        return np.asarray(rows - _inward(weights) * (weights[support] @ rows))

    def _weighted(self, weights: Vector) -> Matrix:
        """(m, m) sqrt(w_i w_j) <x_i - mu, x_j - mu> of the rows that carry weight."""
        support = np.flatnonzero(weights)
        part = self.matrix[np.ix_(support, support)] if len(support) < self.n else self.matrix
        kept = _inward(weights) * weights[support]
        toward = part @ kept
        root = np.sqrt(weights[support])
        centred = part - toward[:, None]
        centred -= (toward - kept @ toward)[None, :]
        centred *= root[:, None]
        centred *= root[None, :]
        return np.asarray(centred)

    def _lanczos(self, weights: Vector, near: Vector | None) -> tuple[Vector, Matrix]:
        """Leading eigenvalues and projections by Lanczos steps with full reorthogonalisation.

        Complete eigenvectors instead where the first does not settle and there is a matrix for them.
        """
        support = np.flatnonzero(weights)
        kept, root = _inward(weights) * weights[support], np.sqrt(weights[support])
        product = self.product(_LANCZOS_STEPS)

        def apply(vector: Vector) -> Vector:
            spread = np.zeros(self.n)
            spread[support] = root * vector - kept * (root @ vector)
            found = product(spread)[support]
            return np.asarray(root * (found - kept @ found))

        start = np.random.default_rng(self.seed).standard_normal(len(support))
        if near is not None and near[support].any():
            guess = root * near[support]
            # Some noise, for a guess that is an eigenvector would never lead to a larger one.
            start = guess / np.linalg.norm(guess) + 0.01 * start / np.linalg.norm(start)
        values, images, settled = lanczos(apply, start, min(_LANCZOS_STEPS, len(support)))
        if not settled and self.n <= LARGEST_MATRIX:
            return self.spectrum(weights)
        # With u a unit vector and lambda = u^T B u, v = X_c^T sqrt(w) u / sqrt(lambda) is one, too, and
        # these are the rows' projections on it, whether or not u is an eigenvector already.
        lengths = np.sqrt(np.where(values > 0, values, 1.0))
        return values, images / lengths[None, :] / root[:, None]

    def through(self, matrix: Matrix, shares: Vector, eps: float) -> Gram:
        """The Gram matrix of the mixed rows M X, with their own shares and malicious mass.

        Args:
            matrix: (k, n) mixing weights; what a row lacks of the sum 1 is weight on the reference.
            shares: (k,) mass of the mixed rows.
            eps: mass of the mixed rows that may be malicious.
        """
        count, ending = self.count_signs, self.ending
        multiply, factor, norms = self._multiply, self.factor, self.norms
        own = stretches(matrix)
        if norms is not None:
            norms = None if own is None else self.squared_norms * own**2
        mixed = None if factor is None else matrix @ factor

        def compute() -> Matrix:
            if own is not None:
                scaled = np.outer(own, own)
                scaled *= self.matrix
                return scaled
            seen = matrix @ self.matrix @ matrix.T
            seen = seen + seen.T
            seen /= 2  # rounding must not give a pair two distances
            return np.asarray(seen)

        def beside() -> Matrix:
            rows, own = np.split(self._beside_anchors, [self.n])
            return np.vstack([matrix @ rows, own])

        return Gram(
            compute=compute if mixed is None else lambda: np.asarray(mixed @ mixed.T),
            shares=shares,
            eps=eps,
            seed=self.seed,
            anchors=self.anchors,
            beside=beside,
            count_signs=None
            if count is None
            else lambda mixing: count(matrix if mixing is None else mixing @ matrix),
            ending=None if ending is None else lambda k: ending(k).through(matrix, shares, eps),
            factor=mixed if mixed is not None and mixed.shape[1] < len(shares) else None,
            multiply=None if multiply is None else lambda v: np.asarray(matrix @ multiply(matrix.T @ v)),
            norms=norms,
            precision=self.precision,
            width=self.width,
        )

    def assuming(self, eps: float) -> Gram:
        """The same rows with another mass that may be malicious."""
        return replace(
            self,
            compute=lambda: self.matrix,
            beside=lambda: self._beside_anchors,
            multiply=self._multiply,
            eps=eps,
        )

    @property
    def _multiply(self) -> Product | None:
        """Products in passes over the rows, for those who look at these rows otherwise.

        None where the matrix is at hand.
        """
        return None if "matrix" in vars(self) else self.multiply


def most_malicious(shares: Vector, eps: float) -> int:
    """The most rows of these (n,) shares that together have a mass of at most eps."""
    lightest = np.cumsum(np.sort(shares))
    return int(np.count_nonzero(lightest <= eps * (1 + 1e-9)))


def _inward(weights: Vector) -> float:
    """How far the rows are moved by their weighted sum mu for their covariance: to a mean, all the way.

    With weight r on the reference, the origin, the covariance is sum w_i x_i x_i^T - mu mu^T, which is
    sum w_i (x_i - a mu)(x_i - a mu)^T for a = 1 / (1 + sqrt(r)).
    """
    rest = 1.0 - float(weights.sum())
    return 1.0 / (1.0 + rest**0.5) if rest > _ROUNDED else 1.0


def lanczos(apply: Callable[[Vector], Vector], start: Vector, steps: int) -> tuple[Vector, Matrix, bool]:
    """Ritz values of a symmetric positive B, largest first, and (m, k) B u of their unit vectors u.

    Args:
        apply: the matrix times a vector.
        start: (m,) not zero.
        steps: the most products.

    Returns:
        Also whether the first value is settled: within a hundredth of an eigenvalue, as a rule much
        nearer. Stops as soon as it is.
    """
    basis, images = np.zeros((steps, len(start))), np.zeros((steps, len(start)))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    vector, settled, done = start / np.linalg.norm(start), False, 0
    values, coordinates = np.zeros(1), np.ones((1, 1))
    for step in range(steps):
        basis[step] = vector
        image = images[step] = apply(vector)
        diagonal[step] = vector @ image
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        beside[step] = np.linalg.norm(image)
        done = step + 1
        if done % 5 == 0 or done == steps or beside[step] <= 1e-12 * diagonal[:done].max():
            values, coordinates = eigh_tridiagonal(diagonal[:done], beside[: done - 1])
            # |residual| <= r bounds the error of the value by r, by r^2 / gap as a rule.
            settled = beside[step] * abs(coordinates[-1, -1]) <= _RESIDUAL * max(values[-1], 0.0)
            if settled or beside[step] <= 1e-12 * max(values[-1], 0.0):
                break
        vector = image / (beside[step] or 1.0)
    return np.maximum(values[::-1], 0.0), images[:done].T @ coordinates[:, ::-1], bool(settled)


def _projections(values: Vector, vectors: Matrix, weights: Vector) -> tuple[Vector, Matrix]:
    """Eigenvalues, and projections of the rows from unit eigenvectors u of their inner products.

    X_c^T sqrt(w) u = sqrt(lambda) v, hence <v, x_i - mu> = sqrt(lambda / w_i) u_i.
    """
    values = np.maximum(values, 0.0)
    return values, vectors * np.sqrt(values)[None, :] / np.sqrt(weights[weights > 0])[:, None]
