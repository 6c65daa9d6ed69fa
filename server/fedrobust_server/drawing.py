"""How every figure looks, and how it leaves matplotlib: as a PNG file or as SVG inside a page.

Only matplotlib's object interface is used: no pyplot, hence no global state. Colours are Okabe and
Ito's, which the colour-blind can tell apart; markers and dashes say the same again.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, RULE, GREY = "#222222", "#E4E4E4", "#C8C8C8"
MALICIOUS_MARK, HONEST_MARK = "▲", "●"
WIDTH, DPI = 7.4, 150
"""Of every figure, in inches; and its pixels per inch."""


@dataclass(frozen=True)
class Style:
    """How a line is told from the others, three times over."""

    colour: str
    dashes: str
    marker: str


STYLES = [
    Style(BLUE, "-", "o"),
    Style(VERMILLION, "--", "^"),
    Style(GREEN, "-.", "s"),
    Style(PURPLE, ":", "D"),
    Style(ORANGE, "-", "v"),
    Style(SKY, "--", "P"),
]


def style(number: int) -> Style:
    """The number-th of many lines or markers, from 0; no two of the first 36 look alike.

    Each round of colours has its dashes and markers shifted.
    """
    turn, index = divmod(number, len(STYLES))
    shifted = STYLES[(index + turn) % len(STYLES)]
    return Style(STYLES[index].colour, shifted.dashes, shifted.marker)


def panel(title: str, rounds: Sequence[int], height: float = 3.9) -> tuple[Figure, Axes]:
    """An empty figure with one set of axes and the rounds along the bottom."""
    figure = Figure(
        figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.1), facecolor="white"
    )
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel("round", color=INK)
    axes.tick_params(colors=INK, labelsize=9.5, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if rounds:
        axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    return figure, axes


def finish(figure: Figure, keys: Sequence[Artist], columns: int = 2) -> Figure:
    """Add the legend, below the axes, where it hides nothing."""
    legend = figure.legend(
        handles=keys,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def line(
    axes: Axes, rounds: Sequence[float], values: Vector, style: Style, label: str, *, wide: bool = False
) -> Artist:
    """A line with some thirty markers, and one on each point that stands alone between gaps.

    A wide one is seen even where another one, drawn after it, coincides with it.
    """
    known = np.isfinite(values)
    before, after = np.roll(known, 1), np.roll(known, -1)
    before[:1] = after[-1:] = False
    every = np.arange(len(values)) % max(1, math.ceil(len(values) / 30)) == 0
    marked = np.flatnonzero(known & (every | ~(before | after)))
    (drawn,) = axes.plot(
        rounds,
        np.where(known, values, np.nan),
        color=style.colour,
        linestyle=style.dashes,
        linewidth=(1.8 if len(values) <= 200 else 1.0) * (2 if wide else 1),
        alpha=0.55 if wide else 1.0,
        marker=style.marker,
        markersize=9 if wide else 6,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=marked.tolist(),
        label=f" {label}" if label.startswith("_") else label,  # matplotlib hides labels with "_"
    )
    return drawn


def percent(axes: Axes, label: str) -> None:
    """The whole range from none to all, upwards."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel(label, color=INK)


def logarithmic(axes: Axes, label: str) -> None:
    """A logarithmic scale upwards for what has been drawn; plain numbers if it spans little."""
    axes.set_yscale("log")
    axes.set_ylabel(label, color=INK)
    low, high = axes.get_ylim()
    decades = math.log10(high) - math.log10(low)
    if decades < 2:
        axes.yaxis.set_major_locator(
            MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if decades < 1 else LogLocator(subs=(1, 2, 5))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def plain(text: str, length: int) -> str:
    """Text that a figure can draw whatever it is: printable ASCII, of bounded length."""
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element to stand in an HTML page.

    Without metadata, comments and namespaces; with ids that begin with the name, since several such
    elements share the page; the same for the same figure.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=DPI, metadata=nothing)
    text = re.sub(r"(?s)<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue())
    root = re.search(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', text)
    if root is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    text = text[root.end() :].replace("xlink:href=", "href=")
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', text))
    short = {identity: f"{name}-{index}" for index, identity in enumerate(used)}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", text)
    text = re.sub(r'(href="|url\()#([^")]+)', lambda m: f"{m[1]}#{short[m[2]]}", text)
    return f'<svg {root[1]} role="img" aria-label="{escape(description)}">{text.strip()}'
