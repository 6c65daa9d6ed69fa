"""The only code that touches all d coordinates: torch, tile by tile, on any device.

A `Block` is a run of coordinates of all n rows. Blocks are independent: partial Gram matrices add up,
reduced coordinates stand side by side, so the same functions serve one process and a sharded server.

Memory beyond the rows is one tile a thread plus the result. Products accumulate in the rows' own
precision inside a tile only; tiles add up in float64, which bounds the error of inner products of
float32 rows whatever d is: `FLOAT32`, `ARRIVING` and `MULTIPLIED`.

Passes run on threads of their own (`torch.get_num_threads()` of them), each with a stretch of the
coordinates: there subnormal numbers can be flushed to zero, which a client could otherwise send to
slow every product down a hundredfold, without changing the arithmetic of the rest of the process.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.errors import InputError
from fedrobust.threads import ONE_THREAD

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]
Reducer = Callable[[Tensor], Tensor]
"""(k, c) tile -> (c,): what becomes of one coordinate of k rows, whatever the others are."""

T = TypeVar("T")

FLOAT32, ARRIVING, MULTIPLIED, BFLOAT16, FLOAT64 = 1e-5, 1e-4, 2e-4, 1e-4, 1e-12
"""The errors of inner products, in units of the rows' lengths: of `gram` and squared norms; of `cross`,
and so of matrices that grow as rows arrive; of `products`; of `gram` in bfloat16, for 1e5 coordinates
and more whose digits are of all kinds; of any in float64.
Those of float32 are for constant rows, where every rounding of a long sum goes the same way: the worst
that searches found was 6e-6, 6e-5 and 1.2e-4. Ordinary rows are a tenth to a hundredth of that off."""

# Products are bound by the packing of their operands, so their tiles are wide; unless the tile is a
# copy, which should still be in the cache when it is multiplied. A row is multiplied by the others in
# one long sum, so that its tiles are cut, and looked over several at a time: threads that are done with
# a short product wait for each other's Python.
_WIDE = 1 << 15
_LONG_SUM = 1 << 14
_CUT_FROM = 1 << 18
# Products of few rows are long sums, too, and are cut into pieces, as squared norms are.
_FEW, _PIECE = 16, 1 << 10
# Half of a Gram matrix is enough. numpy's library works out half, torch's all of it, twice as fast where
# there is AVX-512. With AVX2 alone half takes 0.8 of the time for 50 rows, and 0.6 for 1000.
_HALVED_FROM = 32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else math.inf
_COPIED_ELEMENTS = 1 << 20
_COUNTED_ELEMENTS = 1 << 21
# Sorting works on transposed copies that fit the second-level cache beside their source.
_SORTED_ELEMENTS = 1 << 18
# What is not worth a thread.
_SMALL_ELEMENTS = 1 << 16
# Squared norms beyond this may overflow float32 products, below its inverse they may underflow.
_SAFE_SQUARE = 2.0**100
# Rows whose norm is beyond this, or below its inverse, are brought near 1 before they are multiplied.
_SAFE_NORM = 2.0**50


@dataclass(frozen=True)
class Block:
    """A run of coordinates of every row.

    Attributes:
        rows: (n, c) tensor, or n tensors of shape (c,); any floating dtype, one device.
        reference: (c,), the point that rows are measured from; None is the origin.
        anchors: (c,) each, rows of the server's own that stand beside the others.
    """

    rows: Tensor | Sequence[Tensor]
    reference: Tensor | None = None
    anchors: tuple[Tensor, ...] = ()

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Number of coordinates, c."""
        return int(self.rows[0].shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype."""
        return self.rows[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows[0].device

    @property
    def copies(self) -> bool:
        """Whether a tile is a copy rather than a view of the rows."""
        plain = self._table is not None and self.dtype in (torch.float32, torch.float64)
        return not plain or self.reference is not None

    @property
    def _table(self) -> Tensor | None:
        """The rows as one tensor, where they are one or can be without copying them."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return self.rows[0][None] if self.n == 1 else None

    def select(self, keep: Sequence[int]) -> Block:
        """The same coordinates of some rows, without copying them."""
        return replace(self, rows=[self.rows[i] for i in keep])

    def ending(self, width: int) -> Block:
        """The last so many of the coordinates, without copying them."""
        start = self.width - width
        rows = self.rows[:, start:] if isinstance(self.rows, Tensor) else [r[start:] for r in self.rows]
        reference = None if self.reference is None else self.reference[start:]
        return Block(rows, reference, tuple(anchor[start:] for anchor in self.anchors))

    def tile(self, columns: slice, room: Tensor | None = None) -> Tensor:
        """(n, width) float32 or float64: those columns, from the reference; a view if it can be.

        Args:
            columns: which ones.
            room: flat memory that a copy is made in, as `room` gives it; None is memory of its own.
        """
        into = None
        if room is not None:
            into = room[: self.n * (columns.stop - columns.start)].view(self.n, -1)
        table = self._table
        if table is not None:
            part = table[:, columns]
        else:
            part = torch.stack([row[columns] for row in self.rows], out=into)
        part = part if part.dtype == torch.float64 else part.float()
        if self.reference is None:
            return part
        return torch.sub(part, self.reference[columns].to(part), out=into)

    def room(self, width: int) -> Tensor | None:
        """Memory for one tile after the other, where tiles are copies of the rows' own dtype.

        A large block of memory is asked of the system anew each time, and it comes page by page.
        """
        if not self.copies or self.dtype not in (torch.float32, torch.float64):
            return None
        return torch.empty(self.n * width, dtype=self.dtype, device=self.device)


def squared_norms(block: Block) -> Vector:
    """(n,) squared distances of the rows from the reference; not finite for a row that is not.

    A row whose float32 square overflows or underflows is measured again in float64, so only NaN and
    infinity themselves, and what float64 cannot square, give a result that is not finite.
    """

    def measure(part: Tensor) -> Tensor:
        squares = _squares(part)
        wild = _wild(squares)
        if len(wild):
            rows = part.index_select(0, wild).double()
            squares[wild] = torch.linalg.vector_norm(rows, dim=1).square()
        return squares

    return _total((block,), measure, _in_pieces(block))


def gram(block: Block, *, bfloat16: bool = False) -> Matrix:
    """(n, n) float64 inner products of the rows about the reference.

    A row of any finite size leaves the other rows' entries as they are, and so does one that is not
    finite: its own entry on the diagonal is then not finite.

    Args:
        block: the rows.
        bfloat16: multiply rows of less than float64 in bfloat16, accumulating in float32, where torch
            has a product for that (`lowers`, docs/rules.md); it changes nothing elsewhere. Errors of
            3e-5 instead of 2e-7 of |x_i||x_j| for 1e5 coordinates, more for fewer. Safe where the rows'
            common part is no longer than they differ.
    """
    bfloat16 = bfloat16 and lowers(block)

    def multiply(part: Tensor) -> Tensor:
        found = _lower(part, halved=not bfloat16)
        wild = _wild(found.diagonal())
        return _mended(found.double(), part, wild) if len(wild) else found

    with _bfloat16() if bfloat16 else nullcontext(), ONE_THREAD:
        total = _total((block,), multiply, _in_pieces(block))
    for i in range(1, block.n):  # in place, for another matrix is not small
        total[:i, i] = total[i, :i]
    return total


def cross(block: Block, fresh: Block) -> Matrix:
    """(n, m) float64 inner products of n rows with m others, about the reference that they share.

    What `gram` needs of rows that have just arrived, beside their own Gram matrix. Rows of any finite
    size leave the other entries as they are.
    """

    def multiply(part: Tensor, new: Tensor) -> Tensor:
        pieces = list(
            zip(torch.split(part, _LONG_SUM, dim=1), torch.split(new, _LONG_SUM, dim=1), strict=True)
        )
        found = torch.stack([_against(*piece) for piece in pieces]).double().sum(dim=0)
        if not len(_wild(_squares(new))) and bool(found.isfinite().all()):
            return found
        return torch.stack([carefully(*piece) for piece in pieces]).sum(dim=0)

    def carefully(part: Tensor, new: Tensor) -> Tensor:
        found = _against(part, new).double()
        wild = _wild(_squares(new))
        if len(wild):
            wild, near, back = _near_one(new, wild)
            found[:, wild] = _against(part, near).double() * back.T
        sound = torch.isfinite(new).all(dim=1)  # the others' products are of no use
        finite = torch.isfinite(found[:, sound]).all(dim=1)
        if not finite.all():  # rows that came earlier are wild
            exact = torch.nonzero(~finite).flatten()
            found[exact] = part.index_select(0, exact).double() @ new.double().T
        return found

    width = max(_LONG_SUM, _CUT_FROM // fresh.n)
    if block.copies or fresh.copies:
        width = min(_LONG_SUM, _width(block), _width(fresh))
    return _total((block, fresh), multiply, width)


def beside_anchors(block: Block) -> Matrix:
    """(n + a, a) float64 inner products of the rows, and after them the anchors, with the anchors.

    Raises:
        InputError: there are no anchors.
    """
    if not block.anchors:
        raise InputError("the rule looks at a row of the server's own, and these blocks hold no anchors")
    anchors = Block(block.anchors, block.reference)
    return np.vstack([cross(block, anchors), gram(anchors)])


def products(block: Block, vectors: Matrix, norms: Vector) -> Matrix:
    """(n, k) float64: G V for k vectors, in one pass over the rows, without G.

    Args:
        block: finite rows.
        vectors: V, (n, k).
        norms: (n,) the rows' norms over all blocks. Rows of extreme norm are brought near norm 1, so
            that they neither overflow nor underflow.
    """
    sizes = np.exp2(_exponents(norms))[:, None]
    scaled = vectors * sizes
    largest = np.abs(scaled).max(axis=0)
    largest[largest == 0] = 1.0
    weights = torch.from_numpy(scaled / largest).to(block.device)
    used = np.flatnonzero(vectors.any(axis=1))
    row = int(used[0]) if vectors.shape[1] == len(used) == 1 else None  # X^T e_i is there already
    extreme = torch.from_numpy(np.flatnonzero(sizes != 1)).to(block.device)
    shrink = torch.from_numpy(1 / sizes).to(block.device)[extreme]

    def multiply(part: Tensor) -> Tensor:
        columns = weights.to(part)
        if not len(extreme):
            along = _mixed(part, columns.T) if row is None else part[row : row + 1] * columns[row]
            return _against(part, along).double()
        near = part.index_select(0, extreme).double() * shrink  # a factor of 1e-60 is no float32
        near = near.to(part.dtype)
        tame = columns.index_fill(0, extreme, 0.0)
        along = _mixed(part, tame.T) + columns[extreme].T @ near
        found = _against(part, along).double()
        found[extreme] = _against(near, along).double()
        return found

    return np.asarray(_total((block,), multiply) * sizes * largest)


def sign_counts(block: Block, matrix: Matrix | None) -> Matrix:
    """(k, 3) how many coordinates of each of the mixed rows W X are positive, zero, negative.

    Args:
        block: finite rows; a coordinate's sign is that of its difference from the reference.
        matrix: (k, n) mixing weights W, None for the rows themselves.
    """
    # A row at another length has the same signs: no product is needed to count them.
    rows = None
    if matrix is not None and ((matrix > 0).sum(axis=1) == 1).all() and (matrix >= 0).all():
        rows = matrix.argmax(axis=1)
        matrix = None
    own = rows is None or np.array_equal(rows, np.arange(block.n))

    def count(part: Tensor) -> Tensor:
        if matrix is not None:
            part = torch.from_numpy(matrix).to(part) @ part
        elif not own:
            part = part[rows]
        signs = torch.sign(part)  # sums of so few of them are exact
        surplus = signs.sum(dim=1).double()
        some = torch.linalg.vector_norm(signs, dim=1).double().square().round()
        return torch.stack([(some + surplus) / 2, part.shape[1] - some, (some - surplus) / 2], dim=1)

    counted = block.n if matrix is None else len(matrix)
    width = min(_WIDE, max(512, _COUNTED_ELEMENTS // counted))
    return _total((block,), count, width)


def mix_and_reduce(
    block: Block, matrix: Matrix | None, reducer: Reducer | None, *, huge: bool = False
) -> Tensor:
    """Mix the rows, then reduce every coordinate: reduce(W X), shape (c,).

    Args:
        block: finite rows.
        matrix: (k, n) mixing weights W, None for the identity. What a row of W lacks of the sum 1
            is weight on the reference.
        reducer: k values of a coordinate, measured from the reference, to one; None where k = 1
            and there is nothing to reduce.
        huge: whether numbers may be near the largest of float32: what of its sums is not finite is then
            worked out again in float64.

    Returns:
        (c,) float64 of float64 rows, float32 of others.
    """
    if matrix is not None:
        used = np.flatnonzero(matrix.any(axis=0))
        if 0 < 2 * len(used) <= block.n:  # few rows: reading only those beats reading all of them
            block, matrix = block.select(list(used)), matrix[:, used]
    own = None if matrix is None else stretches(matrix)
    mixing = matrix if own is None else own[:, None]
    weights = None if mixing is None else torch.from_numpy(mixing).to(block.device)
    dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
    result = torch.empty(block.width, dtype=dtype, device=block.device)

    def reduced(part: Tensor) -> Tensor:
        if weights is not None:
            part = _mixed(part, weights.to(part)) if own is None else part * weights.to(part)
        return part[0] if reducer is None else reducer(part)

    def work(columns: slice) -> None:
        part = block.tile(columns)
        value = reduced(part)
        if huge and part.dtype == torch.float32 and not math.isfinite(float(value.sum())):
            # Weights rounded to float32 may sum to more than 1, and its largest numbers to infinity.
            value = reduced(part.double()).to(part)
        if block.reference is not None:
            value = value + block.reference[columns].to(value)
        result[columns] = value

    width = min(4096, max(512, _SORTED_ELEMENTS // block.n))
    width = _width(block) if reducer is None else width

    def stretch(columns: slice) -> None:
        for tile in _tiles(columns, width):
            work(tile)

    _stretches(block, stretch)
    return result


def stretches(matrix: Matrix) -> Vector | None:
    """(n,) lengths that a mixing brings rows to, each times its own; None if it does more than that."""
    own = matrix.diagonal().copy()
    square = matrix.shape == (len(own), len(own))
    return own if square and np.count_nonzero(matrix) == np.count_nonzero(own) else None


def bands(n: int) -> int:
    """In how many bands of rows `gram` multiplies n of them, each by the rows up to its end.

    A matrix product does not know that half of it is enough; bands of fewer rows would be slower for it.
    """
    return min(4, max(1, n // 100))


def multiplied(n: int, *, bfloat16: bool = False) -> float:
    """How many of the n^2 pairs of n rows on a CPU `gram` multiplies.

    Args:
        n: the rows.
        bfloat16: whether that is how it multiplies them.
    """
    if n >= _HALVED_FROM and not bfloat16:
        return n * (n + 1) / 2
    return n * n * (1 + 1 / bands(n)) / 2


def _lower(part: Tensor, *, halved: bool) -> Tensor:
    """(n, n) inner products of a tile's rows, on the diagonal and below it.

    Args:
        part: the tile.
        halved: whether numpy may do it, which knows nothing of bfloat16.
    """
    if halved and len(part) >= _HALVED_FROM and part.device.type == "cpu" and part.stride(1) == 1:
        rows = part.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what is wild is worked out again
            return torch.from_numpy(rows @ rows.T)
    n, count = len(part), bands(len(part))
    if count == 1:
        return _inner(part, part)
    edges = [n * i // count for i in range(count + 1)]
    found = part.new_zeros(n, n)
    for start, stop in itertools.pairwise(edges):
        found[start:stop, :stop] = _inner(part[start:stop], part[:stop])
    return found


def _inner(some: Tensor, others: Tensor) -> Tensor:
    """(k, n) inner products of a tile's rows; float64 where they are summed in pieces."""
    if len(others) >= _FEW:
        return some @ others.T
    count = some.shape[1] // _PIECE
    whole = count * _PIECE
    left, right = (t[:, :whole].view(len(t), count, _PIECE).transpose(0, 1) for t in (some, others))
    rest = some[:, whole:] @ others[:, whole:].T
    return torch.bmm(left, right.transpose(1, 2)).double().sum(dim=0) + rest


def _against(part: Tensor, new: Tensor) -> Tensor:
    # With one row this reads the tile at the speed of memory; the general product does not.
    return torch.mv(part, new[0])[:, None] if len(new) == 1 else part @ new.T


def _mixed(part: Tensor, weights: Tensor) -> Tensor:
    return torch.mv(part.T, weights[0])[None, :] if len(weights) == 1 else weights @ part


def _squares(part: Tensor) -> Tensor:
    """(n,) float64 squared norms of a tile's rows."""
    whole = part.shape[1] // _PIECE * _PIECE
    pieces = part[:, :whole].view(len(part), whole // _PIECE, _PIECE)
    found: Tensor = torch.linalg.vector_norm(pieces, dim=2).double().square().sum(dim=1)
    if whole < part.shape[1]:
        found += torch.linalg.vector_norm(part[:, whole:], dim=1).double().square()
    return found


def _wild(squares: Tensor) -> Tensor:
    """Which rows of these squared norms may have over- or underflowed."""
    safe = (squares > 1 / _SAFE_SQUARE) & (squares < _SAFE_SQUARE)
    return torch.nonzero(~safe).flatten()


def _mended(found: Tensor, part: Tensor, wild: Tensor) -> Tensor:
    """Inner products of a tile's rows, those of the wild ones by way of rows brought near 1."""
    tame = torch.ones(len(part), dtype=torch.bool, device=part.device).index_fill(0, wild, value=False)
    ordinary = torch.nonzero(tame).flatten()
    wild, rows, back = _near_one(part, wild)
    among = _inner(rows, rows).double() * back * back.T
    found[wild[:, None], wild] = among
    if len(ordinary):
        # With an ordinary row most are still within range, and that product stands.
        lengths, others = among.diagonal().sqrt(), found.diagonal()[ordinary].sqrt()
        far = (lengths * others.max() > 2.0**120) | (lengths * others.min() < 2.0**-100)
        if far.any():
            if not far.all():
                wild, rows, back = wild[far], rows[far], back[far]
            beside = (rows @ part.T)[:, ordinary].double() * back
            found[wild[:, None], ordinary] = beside
            found[ordinary[:, None], wild] = beside.T
    return found


def _near_one(part: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the chosen rows are not zero, those rows over powers of two, and (k, 1) the powers.

    Their largest values are then near 1.
    """
    rows = part.index_select(0, chosen)  # five times as fast as brackets are
    if not rows.shape[1]:  # a tensor without values
        chosen, rows = chosen[:0], rows[:0]
        return chosen, rows, rows.new_ones(0, 1, dtype=torch.float64)
    largest = rows.abs().amax(dim=1, keepdim=True).double()
    # As far as it goes without a power, or its inverse, that is subnormal.
    least = float(torch.finfo(part.dtype).tiny)
    some = ~(largest <= 0).flatten()
    if not some.all():
        chosen, rows, largest = chosen[some], rows[some], largest[some]
    finite = torch.where(torch.isfinite(largest), largest, 1.0).clamp(least, 1 / least)
    back = torch.exp2(torch.floor(torch.log2(finite)))
    return chosen, rows.mul_((1 / back).to(part.dtype)), back


def _exponents(norms: Vector) -> Vector:
    """Powers of two that bring rows of extreme norm near norm 1; 0 for ordinary rows."""
    extreme = (norms > _SAFE_NORM) | ((norms < 1 / _SAFE_NORM) & (norms > 0))
    return np.where(extreme, np.round(np.log2(np.where(extreme, norms, 1.0))), 0.0)


def _width(block: Block) -> int:
    return copied_width(block.n) if block.copies else _WIDE


def copied_width(n: int) -> int:
    """How many coordinates a tile of n rows has where it is a copy of them."""
    return min(_WIDE, max(2048, _COPIED_ELEMENTS // n))


def _in_pieces(block: Block) -> int:
    """The width of tiles whose sums are cut into pieces if they are of few rows."""
    return _COPIED_ELEMENTS // block.n if block.n < _FEW else _width(block)


def _tiles(stretch: slice, width: int) -> Iterator[slice]:
    for start in range(stretch.start, max(stretch.stop, 1), width):  # one at least, be it empty
        yield slice(start, min(start + width, stretch.stop))


def _total(blocks: tuple[Block, ...], part: Callable[..., Tensor], width: int | None = None) -> Matrix:
    """The float64 sum over all tiles, of a width, of what `part` makes of that tile of each block."""
    wide = width or min(map(_width, blocks))

    def total(stretch: slice) -> Tensor:
        first, *others = _tiles(stretch, wide)
        rooms = [block.room(first.stop - first.start) for block in blocks]

        def work(columns: slice) -> Tensor:
            tiles = (b.tile(columns, room) for b, room in zip(blocks, rooms, strict=True))
            return part(*tiles)

        found = work(first).double()
        for columns in others:
            found += work(columns)
        return found

    found, *others = _stretches(blocks[0], total)
    for other in others:
        found += other
    return np.asarray(found.cpu().numpy())


def _stretches(block: Block, work: Callable[[slice], T]) -> list[T]:
    """What is made of each stretch of the coordinates, in their order, each on a thread."""
    threads = torch.get_num_threads()
    if block.device.type != "cpu" or block.n * block.width <= _SMALL_ELEMENTS:
        return [work(slice(0, block.width))]
    # Edges at whole cache lines: no two threads write to the same one.
    edges = [*(block.width * i // threads // 64 * 64 for i in range(threads)), block.width]
    stretches = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    return list(workers(threads).map(work, stretches))


@lru_cache(maxsize=1)
def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that flush subnormal numbers to zero and do not start further threads."""

    def prepare() -> None:
        torch.get_num_threads()  # torch sets a thread's number up at first use; ours comes after that
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        ready.wait()

    ready = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "fedrobust", prepare)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # what new threads start with is one number a process
    return pool


os.register_at_fork(after_in_child=workers.cache_clear)


_PRECISION = threading.Lock()


@contextmanager
def _bfloat16() -> Iterator[None]:
    """float32 products by the processor's bfloat16 units; a setting of the whole process."""
    with _PRECISION:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def lowers(block: Block) -> bool:
    """Whether `gram` of these rows in bfloat16 is another than without: float64 is left as it is."""
    return block.dtype != torch.float64 and _units(block.device)


@lru_cache
def _units(device: torch.device) -> bool:
    """Whether torch multiplies float32 in fewer digits there when it may; seen from a product."""
    rows = torch.full((64, 256), 1 + 2.0**-12, device=device)
    with _bfloat16():
        return bool((rows @ rows.T)[0, 0] == rows.shape[1])  # in float32 half a thousandth more
