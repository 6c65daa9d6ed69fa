"""The model and the round's updates, spread by coordinate over processes on Ray.

Shard k owns one slice of the model, of the optimiser's state and of every update (n x d_k), which it
maps from the round's spool where it can see that file, and is sent otherwise. As updates become whole,
it works out their inner products with those that are there already, while other clients still train; at
the deadline only the n x n rule and one weighted sum remain. No process holds n x d.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from fedrobust import kernels
from fedrobust.kernels import Block, Matrix, Vector
from fedrobust.optimisers import Optimiser
from fedrobust_server import lifeline
from fedrobust_server.spool import Floats, Identity, Spool, identity

# Coordinates sent at a time to shards that cannot see the spool.
_PIECE = 1 << 20
BATCH = 8
"""Updates that share a pass over those that are there: it takes hardly longer than for one."""
# What a shard asks of Ray: nearly nothing, so that it finds its place beside all else.
_CPU = 0.001

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ahead:
    """What is known of an update that is still coming in.

    Attributes:
        ticket: of the admission that it comes by; a later one may write over it.
        width: how many coordinates of the slice are in.
        inner: (w + 1,) float64 inner products of that part with the whole rows, and with itself.
    """

    ticket: int
    width: int
    inner: Vector


class Shard:
    """One slice of everything. Plain Python, so that it can be tested without Ray."""

    def __init__(self, first: int, state: Floats, optimiser: Optimiser, threads: int) -> None:
        """Hold the coordinates from `first` on; `threads` is what torch may use here."""
        # Subnormal numbers in an update would slow products down a hundredfold. Flushing them only
        # works when asked for before the first parallel region, hence here.
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads)
        self._first = first
        self._size = state.shape[1]
        self._state, self._optimiser = torch.from_numpy(state.copy()), optimiser
        self._lock = threading.Lock()
        self._rows = torch.empty(0, self._size)
        self._inner: Matrix = np.empty((0, 0))
        self._whole: list[int] = []
        self._fresh: deque[tuple[int, int]] = deque()
        self._ahead: Ahead | None = None
        self._result: Tensor | None = None

    def ready(self) -> None:
        """Answers when the shard has come to life."""

    def sees(self, path: str, file: Identity) -> bool:
        """Whether this process can see that very file there."""
        return identity(Path(path)) == file

    def open(self, slots: int, path: str | None) -> None:
        """Begin a round with room for so many updates; they are in that spool, or will be sent."""
        with self._lock:
            if path is None:
                self._rows = torch.empty(slots, self._size)
            else:
                total = Path(path).stat().st_size // 4
                mapped = np.memmap(path, "<f4", "r+", shape=(slots, total // slots))
                self._rows = torch.from_numpy(mapped)[:, self._first : self._first + self._size]
            self._inner = np.zeros((slots, slots))
            self._whole, self._fresh, self._ahead, self._result = [], deque(), None, None

    def write(self, slot: int, start: int, values: Floats) -> None:
        """Take some coordinates of an update, counted from the start of this slice."""
        self._rows[slot, start : start + len(values)] = torch.from_numpy(values.copy())

    def follow(self, slot: int, ticket: int, stop: int) -> None:
        """Look at the part of an update that is there, up to a coordinate of the model.

        If no other one becomes whole before it, that much has been done when it does.
        """
        with self._lock:
            self._ahead = self._followed(slot, ticket, min(stop - self._first, self._size))

    def complete(self, slot: int, ticket: int) -> None:
        """The update in a slot is whole; `fold` will see it."""
        self._fresh.append((slot, ticket))

    def fold(self) -> None:
        """Work out the inner products of the updates that have become whole.

        While this goes on, others arrive; all of those share the next pass over the rows.
        """
        with self._lock:
            fresh = [self._fresh.popleft() for _ in range(len(self._fresh))]
            if not fresh:
                return
            slots = [slot for slot, _ in fresh]
            ((slot, ticket), *others), ahead = fresh, self._ahead
            if not others and ahead is not None and ahead.ticket == ticket:
                *found, square = self._followed(slot, ticket, self._size).inner
                self._inner[self._whole, slot] = self._inner[slot, self._whole] = found
                self._inner[slot, slot] = square
            else:
                self._fold(slots)
            self._whole, self._ahead = sorted([*self._whole, *slots]), None

    def _fold(self, slots: list[int]) -> None:
        """The inner products of some rows among themselves, and with those that are whole."""
        new = self._block(slots)
        self._inner[np.ix_(slots, slots)] = kernels.gram(new)
        for run in _runs(self._whole):
            found = kernels.cross(Block(self._rows[run]), new)
            self._inner[run, slots], self._inner[slots, run] = found, found.T

    def _followed(self, slot: int, ticket: int, width: int) -> Ahead:
        """So many coordinates of an update, by those that have been looked at and the rest."""
        ahead = self._ahead
        if ahead is None or ahead.ticket != ticket:
            ahead = Ahead(ticket, 0, np.zeros(len(self._whole) + 1))
        if width <= ahead.width:
            return ahead
        part = self._rows[:, ahead.width : width]
        new = Block(part[slot : slot + 1])
        crossed = [kernels.cross(Block(part[run]), new)[:, 0] for run in _runs(self._whole)]
        return Ahead(ticket, width, ahead.inner + np.concatenate([*crossed, kernels.gram(new)[0]]))

    def gram(self, slots: Sequence[int]) -> Matrix:
        """This slice's part of the inner products of some whole updates."""
        self.fold()
        return self._inner[np.ix_(slots, slots)]

    def sum(
        self,
        part: Callable[[Block], Matrix],
        slots: Sequence[int],
        width: int,
        anchors: Sequence[Floats] = (),
    ) -> Matrix:
        """What `part` makes of the last `width` coordinates of this slice of these updates.

        `anchors` are rows of the server's own, cut to this slice.
        """
        own = tuple(torch.from_numpy(anchor.copy()) for anchor in anchors)
        return part(replace(self._block(slots), anchors=own).ending(width))

    def map(self, part: Callable[[Block], Tensor], slots: Sequence[int]) -> None:
        """Keep what `part` makes of these updates: this slice of the aggregate."""
        self._result = part(self._block(slots))

    def step(self, path: str, file: Identity) -> list[Floats]:
        """Move the model by the aggregate.

        Returns:
            This slice of what the next round starts from: of the model and of the optimiser's memory.
            Nothing if this process can see the file that it belongs in, and wrote it there.
        """
        if self._result is None:
            raise RuntimeError("there is no aggregate to step by")
        self._optimiser.step(self._state, self._result)
        slices = list(self._state.numpy())
        if not self.sees(path, file):
            return slices
        state = Spool.find(Path(path), len(slices), Path(path).stat().st_size // (4 * len(slices)))
        for slot, values in enumerate(slices):
            state.write(slot, self._first, values)
        state.close()
        return []

    def _block(self, slots: Sequence[int]) -> Block:
        """The updates in these slots, without a copy where they lie side by side."""
        first = slots[0]
        if list(slots) == list(range(first, first + len(slots))):
            return Block(self._rows[first : first + len(slots)])
        return Block([self._rows[slot] for slot in slots])


def _runs(slots: Sequence[int]) -> Iterator[slice]:
    """Sorted slots as runs of neighbours."""
    for _, run in itertools.groupby(enumerate(slots), lambda item: item[1] - item[0]):
        members = [slot for _, slot in run]
        yield slice(members[0], members[-1] + 1)


@dataclass(frozen=True)
class ShardRows:
    """Some of the round's updates as the `Rows` that rules work on; blocks on remote calls.

    Attributes:
        actors: the shards.
        bounds: which coordinates each of them has.
        slots: of the updates.
        anchors: (d,) each, rows of the server's own beside them.
        start: the first coordinate that is looked at.
    """

    actors: Sequence[Any]
    bounds: Sequence[tuple[int, int]]
    slots: Sequence[int]
    anchors: Sequence[Floats] = ()
    start: int = 0

    def sum(self, part: Callable[[Block], Matrix]) -> Matrix:
        """The sum over all shards, each at work at the same time."""
        looking = [
            actor.sum.remote(
                part,
                self.slots,
                min(stop - self.start, stop - first),
                [anchor[first:stop] for anchor in self.anchors],
            )
            for actor, (first, stop) in zip(self.actors, self.bounds, strict=True)
            if stop > self.start
        ]
        parts: list[Matrix] = lifeline.get(looking)
        total: Matrix = np.add.reduce(parts)
        return total

    def map(self, part: Callable[[Block], Tensor]) -> None:
        """Leave each shard its slice of the aggregate, whatever is looked at."""
        lifeline.get([actor.map.remote(part, self.slots) for actor in self.actors])

    def ending(self, count: int) -> ShardRows:
        """The last `count` coordinates of the same updates."""
        return replace(self, start=self.bounds[-1][1] - count)


class Shards:
    """All shards of a run, and which coordinates each of them owns.

    Every call but `write` and `complete` blocks, and raises `ray.exceptions.RayError` when a shard is
    lost; `start` then brings them all back. When all of Ray is lost, it is a `ConnectionError`.
    """

    def __init__(self, size: int, count: int, optimiser: Optimiser, *, patience: float = 120.0) -> None:
        """Plan so many shards, with an equal slice of `size` coordinates each; `start` starts them.

        Args:
            size: d, coordinates of the model.
            count: of shards.
            optimiser: moves the model by each round's aggregate.
            patience: seconds for the cluster to make room for the shards.
        """
        count = min(count, size)
        self.size = size
        edges = np.linspace(0, size, count + 1).astype(int).tolist()
        self._bounds = list(itertools.pairwise(edges))
        self._optimiser, self._patience = optimiser, patience
        self._actors: list[Any] = []
        self._group: PlacementGroup | None = None
        self._blind: list[tuple[Any, int, int]] = []
        self._seeing: list[tuple[Any, int, int]] = []
        self._arriving: list[Any] = []
        self._folding: list[Any] = []

    def start(self, state: Floats) -> None:
        """Start one Ray actor a shard, on as many nodes as there are; ends those that there were.

        Args:
            state: (1 + kept, d), the model and the optimiser's memory.

        Raises:
            ConnectionError: the cluster is gone, or has no room.
            RayError: a shard was lost again.
        """
        lifeline.check()
        self.stop()
        self._group = placement_group([{"CPU": _CPU}] * len(self._bounds), strategy="SPREAD")
        options = {
            "num_cpus": _CPU,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group),
        }
        ray_remote: Any = ray.remote  # its types do not know of concurrency groups
        remote = ray_remote(concurrency_groups={"arrivals": 1})(Shard)
        threads = max(1, torch.get_num_threads() // len(self._bounds))
        self._actors = [
            remote.options(**options).remote(a, state[:, a:b], self._optimiser, threads)
            for a, b in self._bounds
        ]
        self._wait([actor.ready.remote() for actor in self._actors])  # a round's time must not go by

    def _wait(self, starting: list[Any]) -> None:
        """Wait until all shards have come to life, as long as that may take."""
        deadline = time.monotonic() + self._patience
        pause = min(4 * lifeline.PAUSE, self._patience)  # on a busy machine it takes a while anyway
        while ray.wait(starting, num_returns=len(starting), timeout=pause)[1]:
            lifeline.check()
            what = f"the Ray cluster to start {len(starting)} shards of {_CPU} CPU"
            cpus = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"waited {self._patience:g} s for {what} in vain; it has {cpus:g} CPUs in all"
                )
            log.warning("waiting for %s; it has %g CPUs in all", what, cpus)
        lifeline.get(starting)

    def stop(self) -> None:
        """End all shards."""
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        self._actors, self._group = [], None
        self._blind, self._seeing, self._arriving, self._folding = [], [], [], []

    def open(self, spool: Spool) -> None:
        """Begin a round whose updates are, or will be, in this spool."""
        path, self._arriving, self._folding = str(spool.path.resolve()), [], []
        file = identity(spool.file)
        seen = lifeline.get([actor.sees.remote(path, file) for actor in self._actors])
        placed = list(zip(self._actors, self._bounds, seen, strict=True))
        self._blind = [(actor, *bounds) for actor, bounds, sees in placed if not sees]
        self._seeing = [(actor, *bounds) for actor, bounds, sees in placed if sees]
        lifeline.get(
            [actor.open.remote(spool.slots, path if sees else None) for actor, _, sees in placed]
        )

    def write(self, slot: int, start: int, values: Floats) -> None:
        """Pass coordinates on to those shards that cannot see the spool."""
        stop = start + len(values)
        for actor, low, high in self._blind:
            a, b = max(start, low), min(stop, high)
            if a < b:
                arrivals = actor.write.options(concurrency_group="arrivals")
                arrived = arrivals.remote(slot, a - low, values[a - start : b - start])
                self._arriving.append(arrived)

    def send(self, spool: Spool, slot: int) -> None:
        """Pass a whole update on to those shards that cannot see the spool."""
        for start in range(0, self.size if self._blind else 0, _PIECE):
            self.write(slot, start, spool.read(slot, start, min(start + _PIECE, self.size)))

    def follow(self, slot: int, ticket: int, start: int, stop: int) -> None:
        """Fold in some coordinates of an update that is still coming in, by its admission's ticket."""
        for actor, low, high in self._seeing:
            if low < stop and start < high:
                actor.follow.remote(slot, ticket, stop)

    def complete(self, slot: int, ticket: int = 0) -> None:
        """The update in a slot is whole, and can be folded in.

        Args:
            slot: its place.
            ticket: of its admission, if it may have been followed.
        """
        for actor in self._actors:
            # In a group of its own it need not wait for the fold that is going on.
            arrived = actor.complete.options(concurrency_group="arrivals").remote(slot, ticket)
            self._arriving.append(arrived)

    def fold(self) -> None:
        """Fold in what has become whole, while others arrive."""
        self._folding += [actor.fold.remote() for actor in self._actors]

    def backlog(self) -> int:
        """How many whole updates are not everywhere in the Gram matrix yet."""
        going_on = list(self._folding)
        if not going_on:
            return 0
        left = ray.wait(going_on, num_returns=len(going_on), timeout=0)[1]
        return -(-len(left) // max(len(self._actors), 1))

    def replay(self, spool: Spool, slots: Sequence[int]) -> None:
        """Give shards that have just begun a round the updates that are in its spool already."""
        for number, slot in enumerate(slots, start=1):
            self.send(spool, slot)
            self._arrived()  # so that what is on its way does not fill Ray's memory
            self.complete(slot)
            if number % BATCH == 0 or number == len(slots):
                self.fold()

    def gram(self, slots: Sequence[int]) -> Matrix:
        """(n, n) float64 inner products of the whole updates in these slots."""
        self._arrived()
        parts: list[Matrix] = lifeline.get([actor.gram.remote(slots) for actor in self._actors])
        total: Matrix = np.add.reduce(parts)
        return (total + total.T) / 2

    def rows(self, slots: Sequence[int], anchors: Sequence[Floats] = ()) -> ShardRows:
        """The whole updates in these slots, and rows of the server's own, (d,) each."""
        self._arrived()
        return ShardRows(self._actors, self._bounds, slots, anchors)

    def step(self, state: Spool) -> Floats:
        """Move the model by the aggregate that `rows(...).map` left.

        Args:
            state: has 1 + kept slots, where the model and the optimiser's memory are put.

        Returns:
            (1 + kept, d): what is in `state`.
        """
        path, file = str(state.path.resolve()), identity(state.file)
        found = lifeline.get([actor.step.remote(path, file) for actor in self._actors])
        for (first, _), slices in zip(self._bounds, found, strict=True):
            for slot, values in enumerate(slices):
                state.write(slot, first, values)
        return state.map()

    def _arrived(self) -> None:
        """Wait until what was sent is there; what was not taken would be missing in silence."""
        lifeline.get(list(self._arriving))
