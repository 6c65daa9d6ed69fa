"""Measure everything and write docs/benchmarks.md: `python -m benchmarks [--quick] [--only TEXT]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.page import page
from benchmarks.rounds import FEW, HOSTILE, KINDS, PLAIN, QUICK, SHAPES, Shape
from benchmarks.run import measure
from benchmarks.store import FOLDER, Store, machine, opened

PAGE = Path("docs/benchmarks.md")
THREADS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is lacking, then write the page."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    store = opened(about, quick=options.quick, folder=options.folder)
    if not options.report:
        _measure_all(store, options)
    target = options.folder / "quick.md" if options.quick else options.page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(store, about))
    print(f"{target} written from {store.path}")


def _measure_all(store: Store, options: argparse.Namespace) -> None:
    for shape in _shapes(options):
        measure(store, shape, _chosen(cases.cases(shape), options.only), options.repetitions)
    if not options.quick:
        _hostile(store, options)


def _hostile(store: Store, options: argparse.Namespace) -> None:
    for shape in [*HOSTILE, FEW]:
        chosen = _chosen(cases.hostile(shape), options.only)
        measure(store, shape, chosen, options.repetitions, [PLAIN, *KINDS])


def _chosen(found: Sequence[cases.Case], only: Sequence[str]) -> list[cases.Case]:
    """The floors are always there: without them a time says little."""
    return [c for c in found if not only or "floor/" in c.name or any(text in c.name for text in only)]


def _shapes(options: argparse.Namespace) -> list[Shape]:
    if options.shape:
        return [Shape(int(float(n)), int(float(d))) for n, d in (s.split("x") for s in options.shape)]
    return QUICK if options.quick else SHAPES


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, one repetition")
    parser.add_argument("--only", action="append", default=[], help="cases whose name holds this text")
    parser.add_argument("--shape", action="append", default=[], help="such as 100x1e6; default: all")
    parser.add_argument("--repetitions", type=int, help="default 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--report", action="store_true", help="only write the page, from what there is")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where samples are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    options.repetitions = options.repetitions or (1 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
