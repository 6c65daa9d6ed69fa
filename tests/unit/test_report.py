from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from fedrobust_server import drawing, plots
from fedrobust_server.aftermath import ClosedRound, RoundReport
from fedrobust_server.config import RunConfig
from fedrobust_server.ledger import Answer, Ledger
from fedrobust_server.panels import panels
from fedrobust_server.plots import Grid
from fedrobust_server.report import write_comparison, write_report
from fedrobust_server.terminal import terminal
from matplotlib.figure import Figure

from fedrobust import InputError
from fedrobust.training import Evaluation, Task, client_name

HOSTILE = "<script>alert('1')</script>$\\frac{$\u202e\n\x07é"
REASON = '<img src="//evil.example/x" onerror=alert(2)> & so on'
FIGURES = ["accuracy", "weights", "scores", "eigenvalues", "certificate"]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart; complains where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.cells = "", list[list[str]]()
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def card(self, label: str) -> str:
        return self.text.split(label, 1)[1].strip()


def check(path: Path) -> Page:
    """What holds for every page."""
    text, page = path.read_text(encoding="utf-8"), Page(path)
    assert path.stat().st_size < 1_000_000
    assert re.search(r"https?:|xmlns|<script|javascript:", text) is None
    assert page.count("script") == page.count("metadata") == 0
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.values("src") == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for href in page.values("href"):
        if href.startswith("#"):
            assert href[1:] in ids
        elif not href.startswith("data:image/png;base64,"):
            assert "//" not in href
            assert (path.parent / unquote(href)).is_file()
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert set(" ".join(page.values("aria-labelledby")).split()) <= set(ids)
    for name, attrs in page.tags:
        assert name != "svg" or (attrs["role"] == "img" and attrs["aria-label"])
    return page


def start(folder: Path, *, clients: int = 6, malicious: int = 0, rounds: int = 3) -> Ledger:
    folder.mkdir(parents=True)
    config = RunConfig(
        run="run", task=Task(clients=clients), malicious=malicious, attack="ipm", rounds=rounds
    )
    (folder / "config.toml").write_text(config.to_toml())
    return Ledger(folder / "ledger.sqlite")


def certified(number: int, accuracy: float = 0.5, spread: float = 1.0) -> dict[str, Any]:
    return {
        "outcome": "aggregated",
        "reason": "",
        "verdict": "outliers removed",
        "accuracy": accuracy,
        "loss": 1.0,
        "top_eigenvalue": 30.0 / number,
        "variation": 0.25,
        "spread": spread,
        "honest_spread": 6.0,
        "bound": 4.0,
        "bound_kept": 1.25,
    }


UNWEIGHTED = {"outcome": "aggregated", "verdict": "not judged", "accuracy": 0.5, "loss": 1.0}
SKIPPED = {"outcome": "skipped", "reason": "1 of 6 updates, 3 needed", "accuracy": 0.4, "loss": 1.0}


def play(
    ledger: Ledger,
    number: int,
    clients: Sequence[str],
    figures: Mapping[str, Any],
    weights: Mapping[str, float] | None = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """A round in which all clients are accepted."""
    ledger.open_round(number, clients)
    for client in clients:
        ledger.answer(Answer(number, client, "ACCEPTED", ""))
    ledger.close_round(number, figures, weights or {}, scores or {})


def eventful(folder: Path) -> Path:
    """Twelve clients, three of them malicious and weightless from round 3 on; all sorts of trouble."""
    names = [*(client_name(index) for index in range(11)), HOSTILE]
    ledger = start(folder, clients=12, malicious=3, rounds=12)
    for number in range(1, 11):
        ledger.open_round(number, names)
        taken = [name for name in names if (name, number) not in {(names[5], 4), (names[1], 6)}]
        if number == 6:
            ledger.answer(Answer(6, names[1], "NON_FINITE", "not finite"))
        for name in taken:
            ledger.answer(Answer(number, name, "ACCEPTED", ""))
        if number == 8:
            ledger.close_round(number, SKIPPED, {}, {})
            continue
        good = [name for name in taken if number < 3 or name not in names[:3]]
        weights = {name: (name in good) / len(good) for name in taken}
        scores = {name: 50.0 if name in names[:3] else 1.0 for name in taken} | {names[4]: 0.0}
        figures = certified(number, 0.9 - 0.5 / number)
        if number == 7:
            figures |= {"variation": 1.0, "bound": None, "bound_kept": None}
        ledger.close_round(number, figures, weights, scores)
    for _ in range(2):
        ledger.answer(Answer(2**62, HOSTILE, "WRONG_ROUND", REASON))
    ledger.open_round(11, names)
    ledger.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = eventful(tmp_path_factory.mktemp("runs") / "eventful")
    assert write_report(folder) == folder / "report.html"
    return folder


def test_page(run: Path) -> None:
    page = check(run / "report.html")
    assert page.count("svg") == page.count("figcaption") == page.count("figure") == len(FIGURES)
    assert page.text.count("Look for:") == len(FIGURES)
    for name in FIGURES:
        image = (run / "plots" / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) < 300_000
    assert page.card("Final accuracy").startswith("85.0%")
    assert page.card("Malicious clients' final weight").startswith("0.0%")
    assert page.card("Rounds aggregated").startswith("91 skipped; 10 of 12")
    assert page.card("Updates accepted").startswith("1183 refused")
    assert page.card("Last verdict").startswith("outliers removed")
    assert page.card("Last certificate").startswith("1.25if the honest clients spread as those kept; 4 ")


def test_tables(run: Path) -> None:
    cells = check(run / "report.html").cells
    assert ["1", "aggregated", "outliers removed", "12", "0", "40.0%", "25.0%"] in cells
    assert ["6", "aggregated", "outliers removed", "11", "1", "81.7%", "0.0%"] in cells
    assert ["8", "skipped: 1 of 6 updates, 3 needed", "none", "12", "0", "40.0%", "none"] in cells
    assert ["11", "open", "none", "0", "0", "none", "none"] in cells
    assert ["client-0001 ▲ malicious", "non finite", "1", "6", "not finite"] in cells
    assert [HOSTILE, "wrong round", "2", str(2**62), REASON] in cells


def test_hostile_text_is_escaped(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(&#39;1&#39;)" in text
    assert "&lt;img src=" in text
    assert "<img" not in text


def test_comparison(run: Path, tmp_path: Path) -> None:
    ledger = start(tmp_path / "other run")
    play(ledger, 1, ["a", "b"], UNWEIGHTED)
    ledger.close()
    start(tmp_path / "new").close()
    path = tmp_path / "pages" / "all.html"
    labelled = [
        ("attack + filter", run),
        (f"_{HOSTILE}", tmp_path / "other run"),
        ("new", tmp_path / "new"),
    ]
    assert write_comparison(labelled, path, "Three <runs>") == path
    page = check(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Three <runs>" in page.text
    assert page.count("svg") == 1
    rows = page.cells[1:]
    assert rows[0] == [
        "attack + filter", "filter", "ipm", "3 of 12", "85.0%", "0.0%", "1.25 (4)"
    ]  # fmt: skip
    assert rows[1] == [f"_{HOSTILE}", "filter", "none", "0 of 6", "50.0%", "none", "none"]
    assert rows[2] == ["new", "filter", "none", "0 of 6", "none", "none", "none"]
    assert "../other%20run/report.html" in page.values("href")  # which did not exist before


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs to compare"):
        write_comparison([], tmp_path / "x.html", "x")
    with pytest.raises(InputError, match=r"not the folder of a run: it has no config\.toml"):
        write_report(tmp_path)
    (tmp_path / "config.toml").write_text(RunConfig().to_toml())
    with pytest.raises(InputError, match=r"it has no ledger\.sqlite"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("opened", [False, True])
def test_no_finished_round(tmp_path: Path, opened: bool) -> None:
    ledger = start(tmp_path / "run", malicious=1)
    if opened:
        ledger.open_round(1, ["a"])
    (tmp_path / "run/plots").mkdir()
    (tmp_path / "run/plots/weights.png").touch()  # left by something else
    page = check(write_report(tmp_path / "run"))  # while the run holds its ledger
    ledger.close()
    assert page.text.count("no round has finished yet") == len(FIGURES)
    assert ("No round has begun" in page.text) is not opened
    assert "Nothing was refused" in page.text
    assert page.card("Malicious clients' final weight").startswith("none")
    assert list((tmp_path / "run/plots").iterdir()) == []


def test_coordinate_wise_rule(tmp_path: Path) -> None:
    ledger = start(tmp_path / "run", malicious=2)
    for number in (1, 2):
        play(ledger, number, ["client-0000", "client-0001", "c"], UNWEIGHTED)
    ledger.close()
    page = check(write_report(tmp_path / "run"))
    assert page.count("svg") == 1
    assert "gives the clients no weights" in page.text
    assert page.card("Last certificate").startswith("none")
    assert page.card("Malicious clients' final weight").startswith("none")


def test_many_rounds_and_refusals_are_cut_short(tmp_path: Path) -> None:
    ledger = start(tmp_path / "run", rounds=60)
    ledger._db.executemany(
        "INSERT INTO rounds (round, opened, closed, selected, outcome)"
        " VALUES (?, 0, 3600, '[]', 'skipped')",
        [(number,) for number in range(1, 61)],
    )
    ledger._db.executemany(
        "INSERT INTO answers (round, client, at, status, reason) VALUES (?, ?, 0, 'LATE', ?)",
        [(number % 60, f"c{number}", "x" * 10_000) for number in range(150)],
    )
    ledger._db.commit()
    ledger.close()
    page = check(write_report(tmp_path / "run"))
    assert "20 rounds not shown" in page.text
    assert "50 more kinds" in page.text
    assert "all rounds were skipped" in page.text
    assert "Begun 1970-01-01 00:00 UTC; took 1:00:00." in page.text


def rounds_with(**columns: Sequence[float | None]) -> list[dict[str, Any]]:
    names = ["accuracy", "top_eigenvalue", "variation", "spread", "bound", "bound_kept"]
    count = len(next(iter(columns.values())))
    return [
        {"round": index + 1, "outcome": "aggregated"}
        | {name: columns[name][index] if name in columns else None for name in names}
        for index in range(count)
    ]


def grid_of(weight: Any, score: Any = None, malicious: int = 0, refused: Any = None) -> Grid:
    weight = np.array(weight, np.float64)
    clients, rounds = weight.shape
    return Grid(
        tuple(client_name(index) for index in range(clients)),
        malicious,
        tuple(range(1, rounds + 1)),
        weight,
        weight if score is None else np.array(score, np.float64),
        np.zeros(weight.shape, bool) if refused is None else np.array(refused),
    )


def drawn(figure: Figure | None) -> str:
    assert figure is not None
    return drawing.to_svg(figure, "name", "a <description>")


def test_svg_is_the_same_each_time() -> None:
    rounds = rounds_with(accuracy=[0.1, 0.5, None, 0.6])
    first, second = (drawn(plots.accuracy(rounds)) for _ in range(2))
    assert first == second
    assert 'aria-label="a &lt;description&gt;"' in first


def test_lone_client_and_round() -> None:
    rounds = rounds_with(
        accuracy=[0.1], top_eigenvalue=[0.0], variation=[0.2], spread=[0.0], bound=[0.0]
    )
    found = panels(rounds, grid_of([[1.0]], [[0.0]]))
    assert [panel.figure is None for panel in found] == [False, False, True, True, True]
    assert [panel.missing[:40] for panel in found[2:]] == [
        "Not drawn. All scores are zero: nothing ",
        "Not drawn. All updates were the same.",
        "Not drawn. The bound is zero or infinite",
    ]
    drawn(found[0].figure)
    drawn(found[1].figure)


def test_extreme_figures() -> None:
    rounds = rounds_with(
        top_eigenvalue=[1e300, 1e-300, None, 1.0],
        spread=[1e150, 0.0, None, 1.0],
        variation=[1.0, 0.2, None, 0.2],
        bound=[None, 1e300, None, 0.5],
        bound_kept=[None, 1e-300, None, 0.5],
    )
    assert [plots.unbounded(row) for row in rounds] == [True, False, False, False]
    drawn(plots.eigenvalues(rounds))
    drawn(plots.certificate(rounds))
    score = [[math.inf, 1e300, 1.0, math.nan], [1.0, 0.0, math.nan, math.nan]]
    drawn(plots.scores(grid_of(score, score, malicious=1)))


def test_lines_show_points_between_gaps() -> None:
    values = np.full(1000, np.nan)
    values[[7, 503]] = 1.0, 2.0
    figure, axes = drawing.panel("title", range(1000))
    drawing.line(axes, range(1000), values, drawing.STYLES[0], "label")
    assert axes.lines[0].get_markevery() == [7, 503]
    assert isinstance(figure, Figure)


def colours(figure: Figure) -> Any:
    return figure.axes[0].images[0].get_array()


def test_heat_map_tells_zero_refused_and_absent_apart() -> None:
    nan = math.nan
    grid = grid_of([[0.0, nan, nan], [1.0, 1.0, 1.0]], refused=[[False, True, False], [True] * 3])
    zero, refused, absent = colours(plots.weights(grid))[0, :, :3].tolist()
    assert refused == [255, 255, 255]
    assert absent == [200, 200, 200]
    assert zero == [68, 1, 84]  # the dark end of viridis
    assert len({tuple(cell) for cell in colours(plots.weights(grid))[1].tolist()}) == 1


def test_heat_map_marks_the_malicious() -> None:
    axes = plots.weights(grid_of(np.full((5, 2), 0.2), malicious=2)).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["client-0000 ▲", "client-0001 ▲", "client-0002", "client-0003", "client-0004"]
    assert [text.get_text() for text in axes.texts] == ["▲ 2 malicious", "● 3 honest"]
    unmarked = plots.weights(grid_of(np.full((5, 2), 0.2))).axes[0]
    assert not unmarked.texts
    assert not any("▲" in label.get_text() for label in unmarked.get_yticklabels())


def test_heat_map_of_many_rounds_shows_means() -> None:
    weight = np.full((2, 801), np.nan)
    weight[0, :3], weight[1] = [0.5, 1.0, 0.0], 1.0
    refused = np.zeros(weight.shape, bool)
    refused[0, [0, 800]] = True
    means, marked = plots._binned(grid_of(weight, refused=refused), 3)
    assert means.shape == (2, 267)
    assert means[0, 0] == 0.5
    assert np.isnan(means[0, 1:]).all()
    assert np.flatnonzero(marked[0]).tolist() == [266]


def test_large_figures_stay_small() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((5, 2000)).tolist()
    names = ["top_eigenvalue", "variation", "spread", "bound", "bound_kept"]
    rounds = rounds_with(accuracy=rng.random(2000).tolist(), **dict(zip(names, noise, strict=True)))
    grid = grid_of(rng.random((300, 2000)), malicious=60, refused=rng.random((300, 2000)) < 0.1)
    found = panels(rounds, grid)
    assert sum(len(drawn(panel.figure)) for panel in found) < 900_000


@pytest.mark.slow
def test_largest_page(tmp_path: Path) -> None:
    ledger = start(tmp_path / "run", clients=300, malicious=60, rounds=2000)
    names = [client_name(index) for index in range(300)]
    columns = list(certified(1))
    rng = np.random.default_rng(0)
    with ledger._db:
        ledger._db.executemany(
            f"INSERT INTO rounds (round, opened, closed, selected, {', '.join(columns)})"  # noqa: S608
            f" VALUES (?, 0, 1, ?{', ?' * len(columns)})",
            [
                (number, json.dumps(names), *certified(number, rng.random(), rng.random()).values())
                for number in range(1, 2001)
            ],
        )
        ledger._db.executemany(
            "INSERT INTO answers (round, client, at, status, reason, weight, score)"
            " VALUES (?, ?, 0, 'ACCEPTED', '', ?, ?)",
            [(number, name, rng.random(), rng.random()) for number in range(1, 2001) for name in names],
        )
    ledger.close()
    check(write_report(tmp_path / "run"))


def test_a_model_that_diverges_leaves_json_lines_that_are_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    closed = ClosedRound(1, "aggregated", "", 3, 0, frozenset(), {}, None, {}, {}, 1.0, None)
    with terminal(RunConfig(run="first"), as_json=True) as display:
        display.show(RoundReport(closed, Evaluation(0.1, math.nan)))
        display.summary({"run": "first", "loss": math.inf})
    told = [
        json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()
    ]
    assert [line["loss"] for line in told] == [None, None]
