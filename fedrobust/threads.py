"""How many threads numpy's linear algebra takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

_SMALL = 512


class _OneThread:
    """Limits numpy and scipy to one thread as long as anybody is inside.

    The number is one setting of the whole process, so concurrent uses are counted: the first one in sets
    it, the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._pools: Any = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._pools = self._pools or ThreadpoolController()
            if self._inside == 0:
                self._limit = self._pools.limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


ONE_THREAD = _OneThread()
"""To be entered around work in which numpy is to start no threads of its own."""


@contextmanager
def few_threads(n: int) -> Iterator[None]:
    """One thread for linear algebra on n x n matrices, where n is small.

    Not for its own speed: threads that were woken up look for more work at full load for some ten
    milliseconds, and the next pass over the coordinates would share the processor with them.
    """
    if n > _SMALL:
        yield
        return
    with ONE_THREAD:
        yield
