"""One sample: how long a call takes, and how much memory it needs on top of what is there.

The kernel keeps the largest resident size of a process and forgets it on request
(/proc/self/clear_refs). Where it refuses, a thread samples the resident size; such figures are marked.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")
_TICKS = 100  # per second, of /proc/stat
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """What one call cost.

    Attributes:
        wall: seconds.
        cpu: seconds of this process, all threads.
        others: cores that other processes used meanwhile.
        peak: bytes at the peak beyond those before the call.
        exact: whether the kernel kept the peak; else it was sampled and may be too low.
    """

    wall: float
    cpu: float
    others: float
    peak: float
    exact: bool


def sample(call: Callable[[], Any], *, trim: bool = True) -> Sample:
    """Run it once.

    Args:
        call: what to run.
        trim: give freed memory back first, so that the call does not hide its needs in what an earlier
            one left; it then pays for fresh pages, so times are better taken without.
    """
    gc.collect()
    if trim:
        _trim()
    exact = _forget_peak()
    before = _resident("VmRSS")
    with _Watch(enabled=not exact) as watch:
        busy, cpu, wall = _busy(), time.process_time(), time.perf_counter()
        result = call()
        wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, _busy() - busy
    peak = _resident("VmHWM") if exact else watch.largest
    del result
    return Sample(wall, cpu, max(busy - cpu, 0.0) / wall, max(peak - before, 0.0), exact)


def _forget_peak() -> bool:
    with suppress(OSError):
        (_SELF / "clear_refs").write_text("5")
        return True
    return False


def _resident(field: str) -> float:
    with suppress(OSError):
        for line in (_SELF / "status").read_text().splitlines():
            if line.startswith(field):
                return float(line.split()[1]) * 1024
    return 0.0


def _busy() -> float:
    """Seconds that all cores together have worked since the start of the machine."""
    with suppress(OSError):
        user, nice, system, _, _, irq, softirq = Path("/proc/stat").read_text().split()[1:8]
        return sum(map(int, (user, nice, system, irq, softirq))) / _TICKS
    return 0.0


def _trim() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Watch(threading.Thread):
    """Looks at the resident size every few milliseconds."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__(daemon=True)
        self.enabled, self.largest, self._stop_now = enabled, 0.0, threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.002):
            self.largest = max(self.largest, _resident("VmRSS"))

    def __enter__(self) -> _Watch:  # noqa: PYI034 (`Self` came with Python 3.11)
        if self.enabled:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        if self.enabled:
            self.join()
