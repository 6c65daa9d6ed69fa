"""docs/benchmarks.md, written from the samples and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks import cases
from benchmarks.rounds import EXACT, FEW, HOSTILE, KINDS, PLAIN, SHAPES, Shape
from benchmarks.store import Key, Store
from benchmarks.targets import (
    HOSTILE_RATIO,
    OVER_FLOOR,
    PART,
    ROW_FLOATS,
    SPARE,
    TARGETS,
    UNAIDED,
    Target,
)
from fedrobust import kernels

HOW = """# Benchmarks

Written by `python -m benchmarks` (`make bench`); do not edit by hand.

    make bench                                    # everything; hours, on a machine with 24 GB
    python -m benchmarks --quick                  # two small shapes, no hostile values
    python -m benchmarks --only filter --only caf # cases whose name holds one of these
    python -m benchmarks --report                 # only the page, from the samples that there are

A run that is stopped goes on where it was: samples are kept in `build/benchmarks`, one file for each
state of the code, the libraries and the machine. Within one process every repetition runs every case
once, in an order that rotates, and a case of less than 50 ms is repeated five times as often. Times are
medians; ratios are ratios of medians of the same run. An asterisk marks a single run without warm-up: a
case that takes more than ten seconds is not repeated.
Extra memory is the largest resident size during a call less that before it{sampled}.

Rows are standard Gaussian float32; a fifth of them, shifted by 0.05, count as malicious. ByzFL gets
torch tensors, Flower numpy arrays in ten layers; both sides have the same f, steps and radius, but for
the filter, whose peer is ByzFL's CAF, for clipping, also about a centre, where no radius is named
(ByzFL's is 100, ours is read off the rows), and for Krum, where ByzFL sums over one neighbour more
(docs/peers.md).
Reading Flower's serialised arrays is part of its strategies and is timed; writing them is not.
"""


BUSY = 0.2
"""The fraction of samples that other processes may disturb before the page says so."""


@dataclass(frozen=True)
class Cells:
    """A table, row by row."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.body]
        return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def page(store: Store, about: Mapping[str, str]) -> str:
    """The whole page."""
    exact = all(s.exact for taken in store.samples.values() for s in taken.values())
    sampled = (
        "" if exact else ", sampled every 2 ms, since this kernel does not keep it: it may be too low"
    )
    parts = [
        HOW.format(sampled=sampled),
        _about(store, about),
        "## Targets\n",
        _targets(store),
        _beyond_part(store, int(about.get("threads", 1))),
        "## Where a peer is faster\n",
        _faster(store),
        "## Kernels\n",
        _kernels(store),
        "## Rules: milliseconds\n",
        _rules(store),
        "## Rules: extra memory in MB\n",
        _memory(store),
        "## Hostile values\n",
        _hostile(store),
    ]
    return "\n".join(parts).rstrip() + "\n"


def ratio(store: Store, target: Target) -> float | None:
    """What a target comes to, or None if a case is missing."""
    over = [store.seconds((str(target.shape), PLAIN, name)) for name in target.over]
    under = [store.seconds((str(target.shape), PLAIN, name)) for name in target.under]
    known = [t for t in [*over, *under] if t]
    if len(known) < len(over) + len(under):
        return None
    return sum(known[: len(over)]) / sum(known[len(over) :])


def _about(store: Store, about: Mapping[str, str]) -> str:
    loads = [s.others for taken in store.samples.values() for s in taken.values()]
    busy = sum(load > 0.15 for load in loads) / len(loads) if loads else 0.0
    lines = [f"{key}: {value}" for key, value in about.items()]
    load = (
        f"other processes: used {median(loads):.2f} cores at the median of {len(loads)} samples, over "
        f"0.15 in {busy:.0%} of them; ratios suffer less from that than times, and neither is free of it"
        if loads
        else "no samples"
    )
    warning = (
        "\n**The machine was not quiet.** Kernels that work tile by tile wait for every thread at\n"
        "every tile, so they lose more to other processes than one large call does.\n"
        "Neither times nor ratios count.\n"
        if busy > BUSY
        else ""
    )
    return "\n".join(f"- {line}" for line in [*lines, load]) + "\n" + warning


def _targets(store: Store) -> str:
    lines = [(t.what, str(t.shape), _limit(t), _measured(store, t), _verdict(store, t)) for t in TARGETS]
    lines += [_summary(store, shape) for shape in dict.fromkeys(t.shape for t in OVER_FLOOR)]
    lines += [_memory_target(store), _part_target(store), _unaided(store)]
    lines += [*(_hostile_target(store, s) for s in [*HOSTILE, FEW])]
    table = Cells(["target", "n x d", "limit", "measured", ""], lines)
    missed = [
        (f"`{t.over[0].split('/')[1]}`", str(t.shape), f"{r:.2f}")
        for t in OVER_FLOOR
        if (r := ratio(store, t)) and not t.met(r)
    ]
    if not missed:
        return f"{table}\n"
    return (
        f"{table}\n\nRules beyond 1.3 times the product and the weighted sum:\n\n"
        f"{Cells(['rule', 'n x d', 'ratio'], missed)}\n"
    )


def _limit(target: Target) -> str:
    return f"{'>=' if target.at_least else '<='} {target.limit:g}"


def _measured(store: Store, target: Target) -> str:
    value = ratio(store, target)
    if value is not None:
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    keys = [(str(target.shape), PLAIN, name) for name in [*target.over, *target.under]]
    return next((store.skipped[key] for key in keys if key in store.skipped), "not run")


def _verdict(store: Store, target: Target) -> str:
    value = ratio(store, target)
    return "" if value is None else _yes(target.met(value))


def _yes(met: bool) -> str:
    return "met" if met else "**not met**"


def _summary(store: Store, shape: Shape) -> tuple[str, ...]:
    found = [(r, t) for t in OVER_FLOOR if t.shape == shape and (r := ratio(store, t))]
    what = "every weighting rule over product and weighted sum"
    if not found:
        return (what, str(shape), "<= 1.3", "not run", "")
    met = sum(t.met(r) for r, t in found)
    worst, rule = max((r, t.over[0].split("/")[1]) for r, t in found)
    return (
        what,
        str(shape),
        "<= 1.3",
        f"{met} of {len(found)}; worst {worst:.2f}, `{rule}`",
        _yes(met == len(found)),
    )


def _memory_target(store: Store) -> tuple[str, ...]:
    found = [
        (peak - ROW_FLOATS * 4 * shape.d, rule, str(shape))
        for shape in SHAPES
        for rule in cases.weightings()
        if (peak := store.peak((str(shape), PLAIN, f"ours/{rule}"))) is not None
    ]
    what = "extra memory of every weighting rule beyond 2 d floats"
    if not found:
        return (what, "all", f"<= {SPARE / 1e6:.0f} MB", "not run", "")
    most, rule, where = max(found)
    return (
        what,
        "all",
        f"<= {SPARE / 1e6:.0f} MB",
        f"{max(most, 0) / 1e6:.0f} MB, `{rule}` at {where}",
        _yes(most <= SPARE),
    )


def _parts(store: Store, shape: Shape) -> list[tuple[float, str]]:
    """The extra memory of every rule as a part of the rows, most first."""
    peaks = {rule: store.peak((str(shape), PLAIN, f"ours/{rule}")) for rule in cases.rules()}
    return sorted(((p / shape.bytes, rule) for rule, p in peaks.items() if p is not None), reverse=True)


def _part_target(store: Store) -> tuple[str, ...]:
    what, limit = "extra memory of every rule over its rows", f"<= {PART:.0%}"
    found = [(part, rule, str(shape)) for shape in SHAPES for part, rule in _parts(store, shape)]
    if not found:
        return (what, "all", limit, "not run", "")
    met = sum(part <= PART for part, _, _ in found)
    most, rule, where = max(found)
    measured = f"{met} of {len(found)}; most {most:.0%}, `{rule}` at {where}"
    return (what, "all", limit, measured, _yes(met == len(found)))


def _beyond_part(store: Store, threads: int) -> str:
    """Which rules take more than their part of the rows, and what that is made of."""
    lines = []
    for shape in SHAPES:
        tile = 4 * shape.n * min(kernels.copied_width(shape.n), shape.d)
        sizes = (ROW_FLOATS * 4 * shape.d, threads * tile, 8 * shape.n**2)
        shares = (f"{size / 1e6:.1f} MB, {size / shape.bytes:.0%}" for size in sizes)
        beyond = [f"`{rule}` {part:.0%}" for part, rule in _parts(store, shape) if part > PART]
        if beyond:
            lines.append((str(shape), f"{shape.bytes / 1e6:.0f} MB", *shares, ", ".join(beyond)))
    if not lines:
        return ""
    head = ["n x d", "the rows", "two rows", "a copied tile a thread", "an n x n matrix", "rules"]
    return f"""Rules whose extra memory is more than {PART:.0%} of the rows, beside what it is made of.
The value is a row, and a large part of few rows; tiles have one width whatever d is, and are a large
part of short rows; a rule may hold several n x n matrices in float64, a large part of many rows:

{Cells(head, lines)}
"""


def _unaided(store: Store) -> tuple[str, ...]:
    case, shape, most = UNAIDED
    peak = store.peak((str(shape), PLAIN, case))
    measured = "not run" if peak is None else f"{peak / 1e6:.0f} MB"
    met = "" if peak is None else _yes(peak < most)
    what = f"`{case.split('/')[1]}` runs, extra memory"
    return (what, str(shape), f"< {most / 1e6:.0f} MB", measured, met)


def hostile_ratios(store: Store, shape: Shape, rule: str) -> dict[str, float]:
    """Time on each kind of hostile rows over that on Gaussian rows."""
    plain = store.seconds((str(shape), PLAIN, f"ours/{rule}"))
    slow = {kind: store.seconds((str(shape), kind, f"ours/{rule}")) for kind in KINDS}
    return {kind: seconds / plain for kind, seconds in slow.items() if seconds and plain}


def _hostile_target(store: Store, shape: Shape) -> tuple[str, ...]:
    found = [
        (r, rule, kind)
        for rule in cases.rules()
        for kind, r in hostile_ratios(store, shape, rule).items()
    ]
    which = "every rule" if shape != FEW else " and ".join(f"`{rule}`" for rule in EXACT)
    what, limit = f"{which} on hostile over Gaussian values", f"<= {HOSTILE_RATIO:g}"
    if not found:
        return (what, str(shape), limit, "not run", "")
    worst, rule, kind = max(found)
    met = sum(r <= HOSTILE_RATIO for r, _, _ in found)
    return (
        what,
        str(shape),
        limit,
        f"{met} of {len(found)}; worst {worst:.2f}, `{rule}` on {kind}",
        _yes(met == len(found)),
    )


def _faster(store: Store) -> str:
    """Every case in which a peer's call takes less time than ours: where a reader may want the peer."""
    lines = []
    for shape in SHAPES:
        for _, _, name in [key for key in store.samples if key[:2] == (str(shape), PLAIN)]:
            group, rule = name.split("/")
            mine, bare, theirs = (
                store.seconds((str(shape), PLAIN, f"{side}/{rule}"))
                for side in ("ours", f"ours {cases.BARE}", group)
            )
            ours = [seconds for seconds in (mine, bare) if seconds]
            if group in cases.PEERS and theirs and ours and theirs < max(ours):
                than = "ours" if theirs < min(ours) else "ours with certificate"
                times = (f"{s * 1e3:.1f}" if s else "-" for s in (theirs, mine, bare))
                lines.append((f"`{rule}`", str(shape), group, *times, than))
    held = sum(name.split("/")[0] in cases.PEERS for _, kind, name in store.samples if kind == PLAIN)
    if not lines:
        return f"In none of {held} cases.\n" if held else "Not run.\n"
    head = ["rule", "n x d", "peer", "its ms", "our ms", f"ours {cases.BARE}", "faster than"]
    return f"""{len(lines)} of the {held} cases of peers. No peer makes a certificate, which takes the
products of all pairs of rows: both our times stand beside theirs.

{Cells(head, sorted(lines))}
"""


def _kernels(store: Store) -> str:
    intro = (
        "What each kernel must move and compute, over what the same run reached at best: bytes a\n"
        "second in a pass that reads, flops a second in the product of two large square matrices.\n"
        "A fraction near 1 in either column means that the kernel is at that limit.\n"
    )
    lines = [
        line
        for shape in SHAPES
        if store.seconds((str(shape), PLAIN, f"floor/{cases.READ}"))
        for line in _kernel_lines(store, shape)
    ]
    head = [
        "n x d",
        "kernel",
        "bytes",
        "flops",
        "ms",
        "GB/s",
        "of the reading rate",
        "GFLOP/s",
        "of the product's rate",
    ]
    return f"{intro}\n{Cells(head, lines)}\n" if lines else "Not run.\n"


def work(shape: Shape) -> dict[str, tuple[str, float, str, float]]:
    """By case: the bytes that must be moved, as formula and number, and the flops likewise."""
    n, d, log = shape.n, shape.d, math.log2(shape.n)
    formula, gram = _products(shape, bfloat16=False)
    lowered = _products(shape, bfloat16=kernels.lowers(kernels.Block(torch.empty(1, 1))))
    return {
        f"floor/{cases.READ}": ("4nd", 4 * n * d, "nd", n * d),
        f"floor/{cases.WEIGHTED_SUM}": ("4nd + 4d", 4 * n * d + 4 * d, "2nd", 2 * n * d),
        f"floor/{cases.PRODUCT}": ("4nd", 4 * n * d, "2n^2 d", 2 * n * n * d),
        f"kernel/{cases.NORMS}": ("4nd", 4 * n * d, "2nd", 2 * n * d),
        f"kernel/{cases.GRAM}": ("4nd", 4 * n * d, formula, gram),
        f"kernel/{cases.GRAM_BFLOAT16}": ("4nd", 4 * n * d, *lowered),
        f"kernel/{cases.PRODUCTS}": ("4nd", 4 * n * d, "4nd", 4 * n * d),
        f"kernel/{cases.GRAM_REFERENCE}": (
            "4nd + 4d",
            4 * n * d + 4 * d,
            f"{formula} + nd",
            gram + n * d,
        ),
        f"kernel/{cases.MIX}": ("4nd + 4d", 4 * n * d + 4 * d, "2nd", 2 * n * d),
        f"kernel/{cases.SORT}": (
            "4nd + 4d",
            4 * n * d + 4 * d,
            "nd log2 n (comparisons)",
            n * d * log,
        ),
    }


def _products(shape: Shape, *, bfloat16: bool) -> tuple[str, float]:
    """The flops of the products of rows that a Gram pass forms, as formula and number."""
    n, d = shape.n, shape.d
    pairs = kernels.multiplied(n, bfloat16=bfloat16)
    half = 2 * pairs == n * (n + 1)
    return "n(n + 1)d" if half else f"{2 * pairs / n**2:g}n^2 d", 2 * pairs * d


def _kernel_lines(store: Store, shape: Shape) -> Iterable[Sequence[str]]:
    read = store.seconds((str(shape), PLAIN, f"floor/{cases.READ}"))
    square = store.seconds((str(shape), PLAIN, f"floor/{cases.SQUARE}"))
    for name, (by, size, formula, flops) in work(shape).items():
        seconds = store.seconds((str(shape), PLAIN, name))
        if not (seconds and read and square):
            continue
        rate, speed = size / seconds, flops / seconds
        yield (
            str(shape),
            name,
            f"{by} = {size:.2g}",
            f"{formula} = {flops:.2g}",
            f"{seconds * 1e3:.1f}",
            f"{rate / 1e9:.1f}",
            f"{rate * read / shape.bytes:.2f}",
            f"{speed / 1e9:.0f}",
            f"{speed * square / (2 * cases.EDGE**3):.2f}",
        )


def _names(store: Store, kind: str = PLAIN) -> list[str]:
    keys: Iterable[Key] = [*store.samples, *store.skipped]
    return list(dict.fromkeys(name for _, rows, name in keys if rows == kind))


def _shapes(store: Store) -> list[str]:
    return list(dict.fromkeys(shape for shape, kind, _ in store.samples if kind == PLAIN))


def _table(store: Store, number: Mapping[Key, str]) -> str:
    hostile = {str(shape) for shape in HOSTILE}
    shapes = [shape for shape in _shapes(store) if shape not in hostile]
    notes: dict[str, str] = {}
    body = []
    for name in sorted(_names(store), key=lambda name: (name.split("/")[1], name.split("/")[0])):
        line = [f"{name.split('/')[1]} ({name.split('/')[0]})"]
        for shape in shapes:
            key = (shape, PLAIN, name)
            reason = store.skipped.get(key)
            if reason:
                line.append(f"[{notes.setdefault(reason, str(len(notes) + 1))}]")
            else:
                line.append(number.get(key, "-"))
        body.append(line)
    legend = "\n".join(f"- [{mark}] {reason}" for reason, mark in notes.items())
    return f"{Cells(['', *shapes], body)}\n\n{legend}\n" if body else "Not run.\n"


def _rules(store: Store) -> str:
    times = {
        key: f"{seconds * 1e3:.1f}{'*' if len(store.samples[key]) == 1 else ''}"
        for key in list(store.samples)
        if (seconds := store.seconds(key))
    }
    return _table(store, times)


def _memory(store: Store) -> str:
    peaks = {
        key: f"{peak / 1e6:.0f}" for key in list(store.samples) if (peak := store.peak(key)) is not None
    }
    return _table(store, peaks)


def _hostile(store: Store) -> str:
    legend = "\n".join(f"- {kind}: {what}" for kind, what in KINDS.items())
    parts = [f"Times over those on Gaussian rows of the same size.\n\n{legend}\n"]
    for shape in [*HOSTILE, FEW]:
        body = [
            [f"`{rule}`", *(f"{found[kind]:.2f}" if kind in found else "-" for kind in KINDS)]
            for rule in cases.rules()
            if (found := hostile_ratios(store, shape, rule))
        ]
        if body:
            parts.append(f"{Cells([f'n x d = {shape}', *KINDS], body)}\n")
        reasons = (
            (rule, store.skipped.get((str(shape), PLAIN, f"ours/{rule}"))) for rule in cases.rules()
        )
        left_out = [f"- not here: `{rule}` {reason}" for rule, reason in reasons if reason]
        parts += ["\n".join([*left_out, ""])] if left_out else []
    return "\n".join(parts) if len(parts) > 1 else f"{parts[0]}\nNot run.\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
