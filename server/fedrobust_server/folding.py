"""When updates are folded into the Gram matrix.

A pass over the rows that are there takes hardly longer for several new ones than for one, so they go
together; when nothing more comes for a while, those that wait go; and one that comes alone is followed
as it comes, so that little of it is left when a round ends with it.
"""

from __future__ import annotations

import asyncio
import math

from fedrobust_server.shards import BATCH, Shards
from fedrobust_server.spool import Floats

_LULL = 0.3
"""Seconds without another update after which those that wait are folded in, and an upload is alone."""
_STRIDE = 1 << 19
"""A part of an update, in coordinates, that is worth a pass before the rest has come."""


class Folding:
    """Sees the updates of a federation come in, and has shards fold them in. Needs an event loop."""

    def __init__(self, shards: Shards) -> None:
        """Begin with nothing that waits."""
        self._shards = shards
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._latest, self._when = 0, -math.inf  # ticket of the upload that was stored from last
        self._crowded = -math.inf  # when another one was, before it
        self._followed = 0, 0  # ticket, and how far

    def stored(self, slot: int, ticket: int, start: int, values: Floats) -> None:
        """Some of an update is in the spool; arguments as of `intake.Forward`."""
        now = asyncio.get_running_loop().time()
        if ticket != self._latest:
            self._crowded = self._when
        self._latest, self._when = ticket, now
        stop, before = start + len(values), self._followed[1] if self._followed[0] == ticket else 0
        enough = stop - before >= _STRIDE or stop == self._shards.size
        if enough and not self._waiting and now - self._crowded > _LULL:
            self._followed = ticket, stop
            self._shards.follow(slot, ticket, before, stop)

    def whole(self, slot: int, ticket: int) -> None:
        """An update is whole, and counts."""
        self._shards.complete(slot, ticket)
        self._waiting += 1
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting == BATCH:
            self._fold()
        else:
            self._timer = asyncio.get_running_loop().call_later(_LULL, self._fold)

    def _fold(self) -> None:
        self._waiting = 0
        self._shards.fold()
