"""Certified accuracy against radius: the table and the figure of certification logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from fedrobust_server import drawing
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedrobust.smoothing import Log, certified_accuracy, envelope
from fedrobust.trials import table

Floats = npt.NDArray[np.float64]
STEP = 0.25
"""Between the radii of a table."""
BEST = "best at each radius"
FINER = 5
"""So many radii of a grid's curves make a step."""
_HALF = 34
"""So many characters of a name fit half of a legend's width."""


def radii_of(logs: Sequence[Log], step: float = STEP) -> Floats:
    """The radii of a table: 0, and on in equal steps to the largest that is certified."""
    last = max(float(log.radius.max(initial=0.0)) for log in logs)
    return np.linspace(0.0, step * (count := math.floor(last / step)), count + 1)


def radii_table(logs: Mapping[str, Log], step: float = STEP) -> str:
    """Markdown: each log's certified accuracy in percent by radius, its average radius, abstentions.

    Several logs have a last row, the best of them at each radius.
    """
    radii = radii_of(list(logs.values()), step)
    rows = [
        [
            name,
            *_percent(certified_accuracy(log, radii)),
            f"{log.average_radius:.3f}",
            f"{100 * log.abstained:.1f}",
            len(log),
        ]
        for name, log in logs.items()
    ]
    if len(logs) > 1:
        rows.append([BEST, *_percent(envelope(list(logs.values()), radii)), "", "", ""])
    header = ["certified accuracy, %, at radius", *(f"{r:g}" for r in radii)]
    return table([*header, "average radius", "abstained, %", "images"], rows)


def _percent(values: Floats) -> list[str]:
    return [f"{100 * value:.2f}".rstrip("0").rstrip(".") for value in values]


def radii_figure(logs: Mapping[str, Log], attacked: Sequence[Log] = ()) -> Figure:
    """Certified accuracy against radius, a line a log.

    Args:
        logs: by the name to show.
        attacked: logs of attacks on the first one's model, one for each eps: what is withstood is drawn
            as a dotted line in its colour.
    """
    columns = 2 if max(map(len, logs)) <= _HALF else 1
    lines = -(-(len(logs) + bool(attacked)) // columns)
    figure = Figure(
        figsize=(drawing.WIDTH, 3.6 + 0.22 * lines),
        layout=ConstrainedLayoutEngine(w_pad=0.1),
        facecolor="white",
    )
    axes = figure.add_subplot()
    keys = [
        _curve(axes, name, log, drawing.style(number)) for number, (name, log) in enumerate(logs.items())
    ]
    if attacked:
        found = sorted((float(log.radius.max()), float(log.correct.mean())) for log in attacked)
        first = drawing.STYLES[0]
        (dots,) = axes.plot(*zip(*found, strict=True), ":", color=first.colour, marker=first.marker)
        dots.set_label(drawing.plain(f"{next(iter(logs))}, under attack", 60))
        keys.append(dots)
    _dress(axes)
    drawing.percent(axes, "certified accuracy")
    return drawing.finish(figure, keys, columns)


def radii_panels(panels: Mapping[str, Mapping[str, tuple[Floats, Floats]]]) -> Figure:
    """Certified accuracy against radius, a panel for each set-up, the same line for the same name.

    Args:
        panels: by title, then by name: radii and certified accuracy.
    """
    figure = Figure(
        figsize=(max(drawing.WIDTH, 3.1 * len(panels)), 4.0),
        layout=ConstrainedLayoutEngine(w_pad=0.1),
        facecolor="white",
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    found = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    keys: dict[str, Artist] = {}
    for axes, (title, lines) in zip(found, panels.items(), strict=True):
        for name, (radii, accuracy) in lines.items():
            style = drawing.style(names.index(name))
            keys[name] = drawing.line(axes, radii.tolist(), accuracy, style, drawing.plain(name, 60))
        axes.set_title(drawing.plain(title, 34), loc="left", fontsize=9, color=drawing.INK)
        _dress(axes)
    drawing.percent(found[0], "certified accuracy")
    return drawing.finish(figure, list(keys.values()))


def _dress(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("l2 radius", color=drawing.INK)
    axes.tick_params(labelsize=9, colors=drawing.INK)
    axes.grid(color=drawing.RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Axes, name: str, log: Log, style: drawing.Style) -> Artist:
    """Steps at the radii at which certified accuracy falls."""
    radii = np.unique(np.append(log.radius[log.correct], 0.0))
    radii = np.append(radii, radii[-1] * (1 + 1e-9))
    (line,) = axes.step(
        radii,
        certified_accuracy(log, radii),
        where="pre",
        color=style.colour,
        linestyle=style.dashes,
        linewidth=1.8,
    )
    line.set_label(drawing.plain(name, 60))
    return line
