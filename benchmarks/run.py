"""Interleaved measurement: each repetition runs every case once, and the order rotates.

So load from elsewhere, heat and clock changes meet all cases alike, and ratios survive them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.cases import REFUSALS, Case
from benchmarks.measure import sample
from benchmarks.rounds import PLAIN, Shape, make
from benchmarks.store import Key, Store

SLOW = 10.0
"""A case whose first run takes longer, in seconds, is not repeated."""
SHARE = 0.85
"""How much of the memory that is free a case may ask for."""

Report = Callable[[str], None]


def measure(
    store: Store,
    shape: Shape,
    cases: Sequence[Case],
    repetitions: int,
    kind: str = PLAIN,
    report: Report = print,
) -> None:
    """Fill the store with what it lacks: a first run of each case, then the repetitions."""
    for case in cases:
        if case.reason:
            _skip(store, (str(shape), kind, case.name), case.reason)
    pending = [case for case in cases if _lacks(store, (str(shape), kind, case.name), repetitions)]
    if not pending:
        return
    X = make(shape, kind)
    for repetition in range(repetitions + 1):
        start = repetition * len(pending) // (repetitions + 1)
        for case in [*pending[start:], *pending[:start]]:
            _once(store, (str(shape), kind, case.name), case, X, repetition, report)


def _once(store: Store, key: Key, case: Case, X: Tensor, repetition: int, report: Report) -> None:
    taken = store.samples[key]
    if key in store.skipped or repetition in taken:
        return
    if repetition and 0 in taken and taken[0].wall > SLOW:
        return
    # Only what the page does not know yet needs room; the rows are there already.
    if case.memory > SHARE * available():
        _skip(store, key, f"asks for {case.memory / 1e9:.0f} GB more than the rows")
        return
    prepared = case.prepare(X)
    try:
        found = sample(lambda: case.call(prepared), trim=repetition == 0)
    except REFUSALS as refusal:
        _skip(store, key, f"refuses: {refusal}")
        return
    store.add(key, repetition, found)
    report(f"{key[0]:>12}  {key[1]:14} {repetition}  {found.wall * 1e3:10.1f} ms  {case.name}")


def _lacks(store: Store, key: Key, repetitions: int) -> bool:
    taken = store.samples.get(key, {})
    done = len(taken) > repetitions or (0 in taken and taken[0].wall > SLOW)
    return key not in store.skipped and not done


def _skip(store: Store, key: Key, reason: str) -> None:
    if key not in store.skipped:
        store.skip(key, reason)


def available() -> float:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return float("inf")
