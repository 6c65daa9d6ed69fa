"""A grid's report: tables in Markdown, heat maps, and a page with both that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fedrobust_server
import numpy as np
from fedrobust_server import drawing
from fedrobust_server.panels import embedded
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedrobust.trials import Summary, Trial, summary
from fedrobust.trials import table as markdown
from fedrobust_laboratory.findings import REFUSED, Arena, arenas, ranked
from fedrobust_laboratory.grid import COMPARED, Grid
from fedrobust_laboratory.radii import FINER, radii_panels

_SHOWN = (
    ("malicious_weight", "weight of malicious clients", 100.0, "%"),
    ("displacement", "displacement", 1.0, ""),
    ("certificate", "certificate", 1.0, ""),
    ("rounds_exceeded", "rounds with the verdict bound exceeded", 100.0, "%"),
)

_NONE = "\N{EN DASH}"
"""Where there is no figure."""


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: above it.
        caption: what it shows.
        header: the columns' names.
        rows: the first cell of each names it.
    """

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return f"## {self.title}\n\n{self.caption}\n\n{markdown(self.header, self.rows)}"


def write(trials: Sequence[Trial], grid: Grid, folder: Path, command: str) -> Path:
    """Write `report.html`, `tables.md` and `plots/*.png`.

    Args:
        trials: the grid's runs.
        grid: that was run.
        folder: to write into.
        command: that runs it again.

    Returns:
        The page.
    """
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for earlier in [*(folder / "plots").glob("arena-*.png"), folder / "plots" / "certified.png"]:
        earlier.unlink(missing_ok=True)  # of a grid that had more
    fields, shown = arenas(trials), tables(trials, grid)
    pictures = []
    for number, arena in enumerate(fields, start=1):
        figure = heat_map(arena)
        (folder / "plots" / f"arena-{number}.png").write_bytes(drawing.to_png(figure))
        what = f"Accuracy of each rule under each attack: {arena.label or grid.title}"
        pictures.append({"label": arena.label, "svg": embedded(figure, f"arena{number}", what)})
    certified = {arena.label: _curves(arena) for arena in fields if arena.certified()}
    if certified:
        figure = radii_panels(certified)
        (folder / "plots" / "certified.png").write_bytes(drawing.to_png(figure))
        what = "Certified accuracy against radius, for each rule and attack"
        pictures.append({"label": "certified accuracy", "svg": embedded(figure, "certified", what)})
    figure = worst_figure(fields)
    (folder / "plots" / "worst.png").write_bytes(drawing.to_png(figure))
    worst = embedded(figure, "worst", "Accuracy of each rule under its worst attack")
    seconds = sum(trial.seconds for trial in trials)
    close = f"{len(trials)} runs, {seconds:.0f} s of one core in all; made by `{command}`."
    parts = [f"# {grid.title}", close, *map(str, shown)]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    places = [Path(__file__).parent, Path(fedrobust_server.__file__).parent]
    pages = Environment(
        loader=FileSystemLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("laboratory.html.j2").render(
        title=grid.title,
        command=command,
        runs=len(trials),
        seconds=round(seconds),
        tables=shown,
        pictures=pictures,
        worst=worst,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def tables(trials: Sequence[Trial], grid: Grid) -> list[Table]:
    """All tables of a report, those without any row left out."""
    fields = arenas(trials)
    rules = ranked(fields)
    found = [worst_cases(fields, rules)]
    for arena in fields:
        found.append(_accuracy(arena))
        found.append(_cells(arena, "success", "Success of attacks with an aim", _SUCCESS))
        found.append(_cells(arena, "worst_class", "Accuracy on the worst class", _WORST_CLASS))
        found.append(_cells(arena, "honest_lost", "Honest clients that hardly count", _LOST))
    found += [_beside(arena) for arena in fields] + [_certified(arena) for arena in fields]
    found += [_published(trials, grid), _refused(trials)]
    return [table for table in found if table.rows]


def _curves(arena: Arena) -> dict[str, tuple[drawing.Vector, drawing.Vector]]:
    found = arena.certified()
    return {f"{rule}, {attack}": (c.radii, c.accuracy) for (rule, attack), c in found.items()}


_ACCURACY = (
    "Test accuracy in percent over the last five rounds: mean and standard deviation over the seeds."
)
_SUCCESS = "Percent of the attack's images that the last model gives the label that the attack wants."

_CERTIFIED = (
    "Percent of the test images that the smoothed last model gets right with at least such an l2 "
    "radius, in pixels; mean over the seeds."
)
_WORST_CLASS = "Percent of the test examples of the class on which the last model does worst."
_LOST = (
    "Percent of the honest clients with less than half an equal share of the weight, or shut out by the "
    "schedule or quarantine; mean over the rounds. A rule that gives no weights has no row."
)


def worst_cases(fields: Sequence[Arena], rules: Sequence[str]) -> Table:
    """For each rule and arena the accuracy that the worst attack leaves, best rule first."""
    worst = [arena.worst() for arena in fields]
    best = [max((w[1].mean for w in found.values()), default=np.nan) for found in worst]
    rows = []
    for rule in rules:
        cells = []
        for found, top in zip(worst, best, strict=True):
            attack, cell = found.get(rule, ("", None))
            text = _figure(cell) if cell else _NONE
            cells.append(f"**{text}** {attack}" if cell and cell.mean == top else f"{text} {attack}")
        rows.append([f"`{rule}`", *cells])
    header = ["rule", *(arena.label or "accuracy" for arena in fields)]
    caption = f"{_ACCURACY} Of the worst attack for each rule, which is named. Bold: the best rule."
    return Table("The worst case of each rule", caption, header, rows)


def _accuracy(arena: Arena) -> Table:
    """Of each rule under each attack, the worst case last."""
    caption = f"{_ACCURACY} The last column is the lowest of the others."
    cells, worst = _cells(arena, "accuracy_last", "Accuracy", caption), arena.worst()
    rules = [rule for rule in ranked([arena]) if rule in worst]
    rows = [[*row, _figure(worst[rule][1])] for rule, row in zip(rules, cells.rows, strict=True)]
    return replace(cells, header=[*cells.header, "worst"], rows=rows)


def _cells(arena: Arena, figure: str, title: str, caption: str) -> Table:
    cells = arena.percent(figure)
    attacks = [a for a in arena.attacks if any(cells[rule][a].count for rule in arena.rules)]
    rows = [
        [f"`{rule}`", *(_figure(cells[rule][attack]) for attack in attacks)]
        for rule in ranked([arena])
        if any(cells[rule][attack].count for attack in attacks)
    ]
    return Table(_titled(title, arena), caption, ["rule", *attacks], rows)


def _beside(arena: Arena) -> Table:
    shown = [(arena.attacked(name), scale) for name, _, scale, _ in _SHOWN]
    header = ["rule", *(title + (f" ({unit})" if unit else "") for _, title, _, unit in _SHOWN)]
    rows = [
        [
            f"`{rule}`",
            *(_mean(scale * value for value in by[rule]) for by, scale in shown),
        ]
        for rule in ranked([arena])
    ]
    caption = (
        "Means over all attacked runs. Displacement: how far the aggregate is from the mean of the "
        "honest clients that took part, in root mean square distances of their updates from it; "
        "certificate: the bound on that if they spread no more than those kept, and with "
        "how many runs it is finite where that is not all of them."
    )
    attacked = any(trial.setting["malicious"] for trial in arena.trials)
    return Table(_titled("Beside the accuracy", arena), caption, header, rows if attacked else [])


def _mean(values: Iterable[float]) -> str:
    """Of the finite ones, and how many those are where that is not all."""
    found = summary(values)
    if not found.count:
        return "\N{INFINITY}" if found.lost else _NONE
    return f"{found.mean:.3g}{found.share}"


def _certified(arena: Arena) -> Table:
    found = arena.certified()
    radii = next(
        (c.radii[::FINER] for c in found.values()), np.zeros(0)
    )  # one plan, so the same for all
    rows = []
    for (rule, attack), certified in found.items():
        values = 100 * certified.accuracy[::FINER]
        radius = certified.average_radius
        spread = f" ± {radius.spread:.3f}" if radius.count > 1 else ""
        cells = [f"{radius.mean:.3f}{spread}", *(f"{value:.1f}" for value in values)]
        rows.append([f"`{rule}`, {attack}", *cells])
    header = ["rule, attack", "average radius", *(f"{r:g}" for r in radii)]
    return Table(_titled("Certified accuracy", arena), _CERTIFIED, header, rows)


def _published(trials: Sequence[Trial], grid: Grid) -> Table:
    rows = []
    for entry in grid.published:
        keys = {key: value for key, value in entry.items() if key not in ("accuracy", "spread")}
        matching = arenas([trial for trial in trials if _matches(trial, keys)])
        worst = [arena.worst(grid.compared).get(rule) for arena in matching for rule in arena.rules]
        found = [cell for cell in worst if cell is not None]
        if found:
            attack, ours = min(found, key=lambda cell: cell[1].mean)
            spread = f" ± {entry['spread']:.1f}" if "spread" in entry else ""
            name = ", ".join(map(str, keys.values()))
            told = name if "attack" in keys else f"{name}, worst: {attack}"
            rows.append([told, f"{entry['accuracy']:.1f}{spread}", _figure(ours), str(ours.count)])
    header = ["set-up", "published", "here", "runs"]
    caption = f"Accuracy in percent, {COMPARED[grid.compared]}."
    return Table("Beside the published figures", caption, header, rows)


def _matches(trial: Trial, keys: Mapping[str, Any]) -> bool:
    return all({**trial.setting, "seed": trial.seed}.get(key) == value for key, value in keys.items())


def _refused(trials: Sequence[Trial]) -> Table:
    reasons: dict[tuple[str, str], int] = {}
    for trial in trials:
        if REFUSED in trial.figures:
            key = trial.setting["rule"], str(trial.figures[REFUSED])
            reasons[key] = reasons.get(key, 0) + 1
    rows = [[f"`{rule}`", reason, str(count)] for (rule, reason), count in reasons.items()]
    return Table("Runs that could not be", "And why.", ["rule", "reason", "runs"], rows)


def _titled(title: str, arena: Arena) -> str:
    return f"{title}: {arena.label}" if arena.label else title


def _figure(cell: Summary) -> str:
    if not cell.count:
        return _NONE
    return f"{cell.mean:.1f}" + (f" ± {cell.spread:.1f}" if cell.count > 1 else "") + cell.share


def worst_figure(fields: Sequence[Arena]) -> Figure:
    """Accuracy that its worst attack leaves each rule, with the spread over seeds; the best on top."""
    rules = ranked(fields)
    figure = Figure(
        figsize=(drawing.WIDTH, 1.9 + 0.3 * len(rules) + 0.2 * len(fields)),
        layout=ConstrainedLayoutEngine(w_pad=0.1),
        facecolor="white",
    )
    axes = figure.add_subplot()
    keys = []
    for number, arena in enumerate(fields):
        style = drawing.style(number)
        found = [(place, arena.worst().get(rule)) for place, rule in enumerate(rules)]
        known = [(place, cell[1]) for place, cell in found if cell is not None]
        points, *_ = axes.errorbar(
            [cell.mean for _, cell in known],
            [place for place, _ in known],
            xerr=[cell.spread for _, cell in known],
            fmt=style.marker,
            color=style.colour,
            alpha=0.85,
            capsize=3,
        )
        points.set_label(drawing.plain(arena.label or "all runs", 60))
        keys.append(points)
    axes.set_yticks(range(len(rules)), [drawing.plain(rule, 44) for rule in rules])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(rules) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("test accuracy in percent under the worst attack", color=drawing.INK)
    axes.tick_params(labelsize=9, colors=drawing.INK)
    axes.grid(color=drawing.RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing.finish(figure, keys)


def heat_map(arena: Arena) -> Figure:
    """Accuracy of each rule under each attack, and the worst case last; the best rule on top."""
    rules, cells, worst = ranked([arena]), arena.percent(), arena.worst()
    columns = [*arena.attacks, "worst"]
    values = np.array(
        [
            [
                *(cells[rule][a].mean for a in arena.attacks),
                worst[rule][1].mean if rule in worst else np.nan,
            ]
            for rule in rules
        ]
    )
    figure = Figure(
        figsize=(max(drawing.WIDTH, 2.6 + 0.62 * len(columns)), 1.6 + 0.29 * len(rules)),
        layout=ConstrainedLayoutEngine(w_pad=0.1),
        facecolor="white",
    )
    axes = figure.add_subplot()
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 100.0)  # none where all refused
    axes.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axes.set_facecolor(drawing.GREY)
    axes.axvline(len(arena.attacks) - 0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if not value > (low + high) / 2 else drawing.INK
        text = f"{value:.1f}" if np.isfinite(value) else _NONE
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(
        range(len(columns)), [drawing.plain(c, 24) for c in columns], rotation=40, ha="right"
    )
    axes.set_yticks(range(len(rules)), [drawing.plain(rule, 44) for rule in rules])
    axes.tick_params(length=0, labelsize=9, colors=drawing.INK)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        drawing.plain(f"Test accuracy in percent {'(' + arena.label + ')' if arena.label else ''}", 90),
        loc="left",
        fontsize=11,
        fontweight="bold",
        color=drawing.INK,
        pad=10,
    )
    return figure
