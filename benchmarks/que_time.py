"""How the time of quantum-entropy scores grows with n and d: `python -m benchmarks.que_time`.

Exact scores need all eigenvectors of the smaller side, sketched ones a fixed number of passes over
the points. Each line doubles n or d; the ratio is that of its time to the time of the line before: 2 is
linear, 8 cubic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from fedrobust.kernels import Matrix
from fedrobust.statistics import QUEDetector

FIXED = 1024
SIZES = (512, 1024, 2048, 4096)
QUICK = (256, 512, 1024)


def planted(n: int, d: int) -> Matrix:
    """Points of which a fifth lie along four coordinates."""
    points = np.random.default_rng(0).normal(size=(n, d))
    outliers = np.arange(n // 5)
    points[outliers, outliers % 4] += 6 * (1 - 2 * (outliers % 8 < 4))
    return points


def seconds(points: Matrix, method: str, repetitions: int) -> float:
    """CPU seconds of one thread to fit and score, the fastest of several: others are on the machine."""
    taken = []
    for _ in range(repetitions):
        began = time.process_time()
        QUEDetector(method=method, random_state=0).fit(points).score_samples(points)
        taken.append(time.process_time() - began)
    return min(taken)


def error(points: Matrix) -> float:
    """The root of the mean squared relative difference of sketched scores from exact ones."""
    exact, sketched = (
        QUEDetector(method=m, random_state=0).fit(points).score_samples(points)
        for m in ("exact", "sketched")
    )
    return float(np.sqrt(np.mean((sketched / exact - 1) ** 2)))


def series(shapes: Sequence[tuple[int, int]], repetitions: int) -> None:
    """Print a line a shape."""
    print(f"{'n':>6} {'d':>6} {'exact':>9} {'ratio':>6} {'sketched':>9} {'ratio':>6} {'error':>7}  auto")
    before = None
    for n, d in shapes:
        points = planted(n, d)
        now = [seconds(points, method, repetitions) for method in ("exact", "sketched")]
        ratios = [f"{a / b:.2f}" for a, b in zip(now, before, strict=True)] if before else ["", ""]
        cells = [f"{t:>8.3f}s {r:>6}" for t, r in zip(now, ratios, strict=True)]
        print(
            f"{n:>6} {d:>6} {' '.join(cells)} {error(points):>7.3f}  {QUEDetector().fit(points).method_}"
        )
        before = now


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the three series."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.que_time", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, once each")
    options = parser.parse_args(arguments)
    sizes, repetitions = (QUICK, 1) if options.quick else (SIZES, 3)
    with threadpool_limits(1):
        for title, shapes in (
            (f"more points, d = {FIXED}", [(n, FIXED) for n in sizes]),
            (f"more features, n = {FIXED}", [(FIXED, d) for d in sizes]),
            ("both, so that linear is 4", [(size, size) for size in sizes[:3]]),
        ):
            print(f"\n{title}; CPU seconds of one thread")
            series(shapes, repetitions)


if __name__ == "__main__":
    main()
