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
SHORT, OFTEN = 0.05, 5
"""One whose first run takes less, in seconds, is repeated so many times as often: its time varies."""
SHARE = 0.85
"""How much of the memory that is free a case may ask for."""

Report = Callable[[str], None]


def measure(
    store: Store,
    shape: Shape,
    cases: Sequence[Case],
    repetitions: int,
    kinds: Sequence[str] = (PLAIN,),
    report: Report = print,
) -> None:
    """Fill the store with what it lacks: a first run of each case, then the repetitions.

    A case meets one kind of rows after the other, so that they can be compared as well.
    """
    every = [(case, kind, (str(shape), kind, case.name)) for case in cases for kind in kinds]
    for case, _, key in every:
        if case.reason:
            _skip(store, key, case.reason)
    pending = [one for one in every if _lacks(store, one[2], repetitions)]
    rows = {kind: make(shape, kind) for kind in dict.fromkeys(kind for _, kind, _ in pending)}
    rounds = OFTEN * repetitions + 1
    for repetition in range(rounds):
        start = repetition * len(pending) // rounds
        for case, kind, key in [*pending[start:], *pending[:start]]:
            if repetition <= _wanted(store, key, repetitions):
                _once(store, key, case, rows[kind], repetition, report)


def _once(store: Store, key: Key, case: Case, X: Tensor, repetition: int, report: Report) -> None:
    taken = store.samples[key]
    if key in store.skipped or repetition in taken:
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
    done = len(store.samples.get(key, {})) > _wanted(store, key, repetitions)
    return key not in store.skipped and not done


def _wanted(store: Store, key: Key, repetitions: int) -> int:
    """How often a case is repeated after its first run."""
    first = store.samples.get(key, {}).get(0)
    if first is None:
        return repetitions
    if first.wall > SLOW:
        return 0
    return OFTEN * repetitions if first.wall < SHORT else repetitions


def _skip(store: Store, key: Key, reason: str) -> None:
    if key not in store.skipped:
        store.skip(key, reason)


def available() -> float:
    """Bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return float("inf")
