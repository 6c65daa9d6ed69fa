"""Grids of attacks and rules: what is tried, what is measured, what is kept, what is shown."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedrobust_clients.malicious import Threat
from fedrobust_laboratory import page, runner
from fedrobust_laboratory.findings import arenas, ranked
from fedrobust_laboratory.grid import Grid, configuration, presets, read_grid
from fedrobust_laboratory.measure import measure
from fedrobust_laboratory.play import Cast, Played, play
from fedrobust_laboratory.runner import write_csv
from fedrobust_server.config import RunConfig

from fedrobust import InputError, __version__
from fedrobust.attacks import View
from fedrobust.attacks.rehearsal import Rehearsal
from fedrobust.data import load
from fedrobust.rules import parse_rule
from fedrobust.training import Learner, Shared, Task, client_name, to_vector, updates
from fedrobust.trials import Trial

# ---- what is tried ----------------------------------------------------------------------------------


def grid(**run: Any) -> Grid:
    return Grid.from_dict({"run": run})


def test_a_grid_is_every_combination_of_its_lists() -> None:
    tried = {"rule": ["mean", "filter"], "attack": ["none", "ipm"], "seed": [3, 4]}
    settings = list(grid(**tried, rounds=7).settings())
    assert len(settings) == 8
    found = {(s["rule"], s["attack"], s["seed"]) for s in settings}
    assert found == set(itertools.product(*tried.values()))
    assert {s["rounds"] for s in settings} == {7}


@pytest.mark.parametrize(
    ("eps", "clients", "expected"), [(0.2, 10, 2), (0.3, 20, 6), (0.29, 100, 29), (0.1, 10, 1)]
)
def test_so_many_are_malicious_as_the_rule_assumes(eps: float, clients: int, expected: int) -> None:
    (setting,) = grid(eps=eps, clients=clients, attack="ipm").settings()
    assert setting["malicious"] == configuration(setting).malicious == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"eps": 0.2, "clients": 4}, "eps 0.2 of 4 clients is no attacker: raise eps or clients, or"),
        ({"malicious": 0}, "attack 'ipm' has no attacker: raise malicious, or leave the attack out"),
    ],
)
def test_an_attack_without_an_attacker_is_told(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(grid(**values, attack=["none", "ipm"]).settings())
    assert len(list(grid(**values, attack="none").settings())) == 1


def test_nobody_is_malicious_without_an_attack() -> None:
    (setting,) = grid(eps=0.2, clients=10, malicious=3, attack="none").settings()
    config = configuration(setting)
    assert (setting["attack"], config.malicious, config.eps) == ("none", 0, 0.2)
    (given,) = grid(eps=0.2, clients=10, malicious=3, attack="ipm").settings()
    assert configuration(given).malicious == 3


def test_outsiders_are_the_malicious_ones() -> None:
    values = {"run": {"attack": ["none", "ipm"], "clients": 10}, "insiders": False}
    assert [s["outsiders"] for s in Grid.from_dict(values).settings()] == [0, 2]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"run": {"rules": "mean"}}, "unknown key of a run 'rules'"),
        ({"runs": {}}, "unknown key of a grid 'runs'"),
        ({"run": {"rule": []}}, "tries nothing for rule"),
        ({"run": {"shards": 2}}, "unknown key of a run 'shards'"),
        ({"run": 3}, "run of a grid must be a table, or several, got 3"),
        ({"run": []}, "the grid has no run"),
        ({"evaluations": "5"}, "evaluations of a grid must be int, got '5'"),
        ({"published": [{"rule": "mean"}]}, "must hold tables with an accuracy"),
        ({"published": [{"accuracy": 1, "spread": "0.4"}]}, "must hold tables with an accuracy"),
        ({"published": [{"accuracy": 1, "ruel": "mean"}]}, "unknown key of a published run 'ruel'"),
        ({"run": {"outsiders": 3}}, "unknown key of a run 'outsiders'"),
        ({"certify": "plan(attack='pgd(0.5)')"}, "certify of a grid certifies"),
    ],
)
def test_a_grid_that_cannot_be_is_told(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Grid.from_dict(values)


def test_a_bad_value_is_told_before_anything_runs() -> None:
    with pytest.raises(InputError, match="no_such"):
        list(grid(rule=["mean", "no_such"]).settings())
    with pytest.raises(InputError, match="eps must be"):
        list(grid(eps="much", attack="ipm").settings())
    with pytest.raises(InputError, match="unknown preset"):
        read_grid("no_such")
    with pytest.raises(InputError, match="cannot read the grid"):
        read_grid("no/such.toml")


def test_broken_toml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[run\n")
    with pytest.raises(InputError, match="not valid TOML"):
        read_grid(str(path))


@pytest.mark.parametrize(
    ("values", "stays"),
    [
        ({"split": ["similarity(0.0)"], "seed": [7], "rule": ["krum"]}, True),
        ({"rounds": [20]}, False),
        ({"model": ["mlp"]}, False),
        ({"clients": [11]}, False),  # which one of the tables only has
        ({"quarantine": ["watch"]}, False),
    ],
)
def test_published_figures_stay_with_their_set_up(values: dict[str, list[Any]], stays: bool) -> None:
    assert bool(read_grid("byzfl").given(values).published) is stays


def test_the_worst_of_some_attacks_does_not_stand_beside_what_was_published_of_all() -> None:
    given = read_grid("byzfl").given({"attack": ["optimal_ipm"]})
    assert not given.published
    asked = Grid("x", tables=[{"attack": ["none", "ipm"]}], published=[{"attack": "ipm", "accuracy": 1}])
    assert asked.given({"attack": ["ipm"]}).published == asked.published


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_be_run(name: str) -> None:
    found = read_grid(name)
    settings = list(found.settings())
    assert settings
    tried = {json.dumps(value) for s in settings for value in s.values()}
    for entry in found.published:
        values = {k: v for k, v in entry.items() if k not in ("accuracy", "spread")}
        assert {json.dumps(value) for value in values.values()} <= tried, entry


# ---- a federation that is played --------------------------------------------------------------------


def run(**changes: Any) -> RunConfig:
    task = Task(**{"model": "softmax", "clients": 6, "seed": 1, **changes.pop("task", {})})
    return RunConfig(**{"task": task, "rounds": 3, "eps": 0.34, **changes})


def played(config: RunConfig) -> list[Played]:
    return list(play(config, load("digits")))


def test_the_mean_of_honest_clients_is_federated_averaging() -> None:
    config = run(rule="mean", optimiser="sgd(0.5, momentum=0.9)")
    dataset, task = load("digits"), config.task
    shared = Shared.of(task, dataset)
    learners = [Learner(task, dataset, i, shared=shared) for i in range(task.clients)]
    model = to_vector(shared.module)
    velocity = torch.zeros_like(model)
    for number, found in enumerate(played(config), start=1):
        velocity = 0.9 * velocity + updates(learners, number, model).mean(dim=0)
        model = model + 0.5 * velocity
        assert found.round == number
        torch.testing.assert_close(found.model, model, rtol=1e-5, atol=1e-6)


def test_malicious_clients_come_first_and_see_what_the_others_send() -> None:
    (first, *_) = played(run(rule="mean", attack="ipm(2)", malicious=2))
    assert first.clients == tuple(map(client_name, range(6)))
    torch.testing.assert_close(first.rows[0], -2 * first.rows[2:].mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.rows[0], first.rows[1])


def test_updates_that_are_not_finite_are_refused() -> None:
    for found in played(run(attack="nan", malicious=2)):
        assert found.clients == tuple(map(client_name, range(2, 6)))
        assert len(found.rows) == 4
        assert not found.reason
        assert torch.isfinite(found.model).all()


def test_too_few_for_the_rule_or_the_quorum_leave_the_model_where_it_is() -> None:
    for config, reason in (
        (run(rule="bulyan"), "bulyan"),
        (run(attack="nan", malicious=2, quorum=0.9), "4 of 6 updates, 6 needed"),
    ):
        first, *_, last = played(config)
        assert (first.result, last.round) == (None, 3)
        assert reason in last.reason
        with pytest.raises(InputError, match=f"no round could be aggregated: .*{reason}"):
            measure(config, load("digits"), 1)
        torch.testing.assert_close(first.model, last.model, rtol=0, atol=0)


def test_a_sample_of_the_clients_is_asked() -> None:
    asked = [found.clients for found in played(run(sample=0.5, rule="mean"))]
    assert {len(clients) for clients in asked} == {3}
    assert len(set(asked)) > 1


def test_a_schedule_leaves_clients_out() -> None:
    changes = {"attack": "ipm(5)", "malicious": 2, "rule": "mean", "rounds": 4}
    first, *_, last = played(run(schedule="sever(every=1, times=2)", **changes))
    assert len(first.clients) == 6
    assert set(last.clients) == set(map(client_name, range(2, 6)))


def test_the_coalition_goes_on_as_before_when_somebody_is_left_out() -> None:
    """With momentum, what honest clients send depends on every round before."""
    changes = {"attack": "alie", "malicious": 2, "rule": "mean", "rounds": 4}
    config = run(schedule="sever(every=1, times=1)", task={"momentum": 0.9}, **changes)
    dataset = load("digits")
    coalition = Threat(2, "alie", "mean", config.eps).coalition(config.task, dataset)
    model, present = to_vector(Shared.of(config.task, dataset).module), set[str]()
    for found in play(config, dataset):
        expected = dict(zip(map(client_name, range(2)), coalition.rows(found.round, model), strict=True))
        for client, row in zip(found.clients, found.rows, strict=True):
            if client in expected:
                torch.testing.assert_close(row, expected[client], rtol=1e-4, atol=1e-6)
        model, present = found.model, set(found.clients)
    assert client_name(1) in present
    assert len(present) == 5  # an honest one has gone


def test_more_clients_than_names_have_digits_for() -> None:
    """Beyond 9999 the names do not sort as the numbers do."""
    names = sorted(map(client_name, (7, 999, 1000, 9999, 10_000, 10_500)))
    task, dataset = Task(model="softmax", clients=2, batch=1), load("digits")
    shared = Shared.of(task, dataset)
    honest = {i: Learner(task, dataset, 1, shared=shared) for i in (10_000, 10_500)}

    class Marked:
        def rows(self, _number: int, model: torch.Tensor, _: object) -> torch.Tensor:
            return torch.arange(10_001.0)[:, None].expand(-1, len(model))

    model = to_vector(shared.module)
    cast = Cast(honest, Marked(), always=False)  # type: ignore[arg-type]
    rows = dict(zip(names, cast.work(1, names, model), strict=True))
    for index in (7, 999, 1000, 9999):
        assert bool((rows[client_name(index)] == index).all())
    torch.testing.assert_close(rows[client_name(10_000)], rows[client_name(10_500)])


def test_every_seed_and_round_has_draws_of_its_own() -> None:
    draws = {Task(seed=seed).draws(number) for seed in range(20) for number in range(1, 20)}
    assert len(draws) == 20 * 19


@pytest.mark.parametrize("seed", [1, 2])
def test_attackers_know_what_the_rule_draws(seed: int) -> None:
    """Rehearsed and real buckets are the same, or the search would not find its own best scale."""
    config = run(rule="bucketing(2) | median", attack="optimal_ipm", eps=0.17, task={"seed": seed})
    (first, *_) = played(replace(config, malicious=1))
    assert first.result is not None
    honest = first.rows[1:]
    view = View.of(honest, honest[:1], rule=parse_rule(config.rule), eps=config.eps)
    stage = Rehearsal.of(replace(view, seed=config.task.draws(1)))
    scale = -float(first.rows[0] @ honest.mean(dim=0) / honest.mean(dim=0).square().sum())
    rehearsed = stage.error(-scale * stage.mean)
    real = float((first.result.value[0] - honest.mean(dim=0)).norm())
    assert rehearsed == pytest.approx(real, rel=1e-3)


# ---- what is measured -------------------------------------------------------------------------------


def test_figures_of_an_attacked_mean() -> None:
    figures = measure(run(rule="mean", attack="ipm", malicious=2, rounds=8), load("digits"), 2)
    assert figures["malicious_weight"] == pytest.approx(1 / 3)
    assert figures["honest_lost"] == figures["rounds_skipped"] == 0
    assert figures["displacement"] > 0.1
    assert [number for number, _ in figures["curve"]] == [4, 5, 6, 7, 8]
    assert figures["accuracy"] == figures["curve"][-1][1]
    assert figures["accuracy_last"] == pytest.approx(np.mean([a for _, a in figures["curve"]]))
    assert 0 <= figures["worst_class"] <= figures["accuracy"]
    assert "success" not in figures


def test_a_certificate_is_no_less_than_the_displacement() -> None:
    figures = measure(run(rule="filter", attack="ipm", malicious=2, rounds=4), load("digits"), 1)
    assert figures["malicious_weight"] < 1e-6
    assert figures["displacement"] <= figures["certificate"] < np.inf


def test_honest_clients_that_are_shut_out_are_lost() -> None:
    config = run(rule="mean", schedule="sever(every=1, times=2, eps=0.4)", rounds=4)
    names = {client_name(i) for i in range(6)}
    found = played(config)
    shut = [0, *(len(names & ended.excluded) for ended in found[:-1])]
    assert max(shut) > 0
    expected = np.mean([count / 6 for count in shut])
    assert measure(config, load("digits"), 1)["honest_lost"] == pytest.approx(expected)


def test_where_honest_clients_do_not_differ_there_is_no_unit() -> None:
    config = RunConfig(task=Task(model="softmax", clients=2), rule="mean", rounds=1, malicious=1)
    figures = measure(config, load("digits"), 1)
    assert "displacement" not in figures
    assert figures["malicious_weight"] == 0.5


def test_the_success_of_a_backdoor_is_measured() -> None:
    attacked = measure(run(rule="mean", attack="backdoor", malicious=2, rounds=8), load("digits"), 1)
    assert attacked["success"] > 0.9
    flipped = measure(run(rule="mean", attack="label_flip", malicious=2, rounds=1), load("digits"), 1)
    assert "success" not in flipped  # it aims at no class


# ---- what is shown ----------------------------------------------------------------------------------


def test_a_run_is_measured_though_in_some_rounds_all_who_are_asked_are_malicious() -> None:
    config = RunConfig(
        task=Task(clients=6, model="softmax"), rounds=12, rule="mean", sample=0.3, malicious=3
    )
    asked = [set(played.clients) for played in play(config, load("digits"))]
    assert any(names <= {client_name(i) for i in range(3)} for names in asked)
    figures = measure(config, load("digits"), 1)
    assert all(math.isfinite(figures[name]) for name in ("honest_lost", "displacement"))


def test_the_same_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(planned: Sequence[Trial], *_: object) -> Iterator[Trial]:
        return (replace(trial, figures={"accuracy_last": 0.5}) for trial in planned)

    monkeypatch.setattr(runner, "_in_parallel", at_once)
    monkeypatch.setattr(runner, "start_ray", lambda _: contextlib.nullcontext())
    done = runner.compare(grid(attack="none", malicious=[1, 2, 3]), tmp_path)
    assert len(done) == len((tmp_path / runner.TRIALS).read_text().splitlines()) == 1


def test_what_was_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"mean": "cannot read m.safetensors", "filter": ""}

    def at_once(planned: Sequence[Trial], *_: object) -> Iterator[Trial]:
        for one in planned:
            reason = reasons[one.setting["rule"]]
            figures = {"refused": reason} if reason else {"accuracy_last": 0.5}
            yield replace(one, figures=figures, version=__version__)

    monkeypatch.setattr(runner, "_in_parallel", at_once)
    monkeypatch.setattr(runner, "start_ray", lambda _: contextlib.nullcontext())
    tried = grid(rule=["mean", "filter"])
    first, second = runner.compare(tried, tmp_path)
    assert (first.figures, second.figures) == ({"refused": reasons["mean"]}, {"accuracy_last": 0.5})
    reasons |= {"mean": "", "filter": "asked twice"}
    again = runner.compare(tried, tmp_path)
    assert [one.figures for one in again] == [{"accuracy_last": 0.5}] * 2
    reasons["mean"] = "no such model"
    with pytest.raises(InputError, match="no run of the grid can be; the first: no such model"):
        runner.compare(grid(rule="mean"), tmp_path / "other")


def test_runs_of_another_version_or_judged_more_seldom_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "start_ray", lambda _: contextlib.nullcontext())

    def at_once(planned: Sequence[Trial], *_: object) -> Iterator[Trial]:
        return (replace(one, figures={"accuracy_last": 0.5}, version="0.0.9") for one in planned)

    monkeypatch.setattr(runner, "_in_parallel", at_once)
    seldom, often = (replace(grid(attack="none"), evaluations=count) for count in (10, 50))
    (kept,) = runner.compare(seldom, tmp_path)
    (asked,) = often.settings()
    assert json.dumps([{**kept.setting, "seed": kept.seed}]) != json.dumps([asked])
    with pytest.raises(InputError, match=r"trials of fedrobust 0\.0\.9, and this is"):
        runner.compare(seldom, tmp_path)


def trial(rule: str, attack: str, seed: int = 0, **figures: Any) -> Trial:
    (setting,) = grid(rule=rule, attack=attack, seed=seed, **figures.pop("run", {})).settings()
    del setting["seed"]
    return Trial(setting, seed, figures, 0.5)


def test_the_worst_attack_is_the_one_with_the_lowest_mean() -> None:
    trials = [
        trial("mean", "none", 0, accuracy_last=0.9),
        trial("mean", "none", 1, accuracy_last=0.8),
        trial("mean", "ipm", 0, accuracy_last=0.2),
        trial("mean", "ipm", 1, accuracy_last=0.4),
        trial("filter", "none", 0, accuracy_last=0.7),
        trial("filter", "ipm", 0, refused="why not"),
    ]
    (arena,) = arenas(trials)
    worst = arena.worst()
    assert (worst["mean"][0], str(worst["mean"][1])) == ("ipm", "30 ± 14")
    assert worst["filter"][0] == "none"
    assert ranked([arena]) == ["filter", "mean"]
    assert arena.percent()["filter"]["ipm"].count == 0
    table = next(table for table in page.tables(trials, grid()) if table.title == "Accuracy")
    assert list(table.header) == ["rule", "none", "ipm", "worst"]
    assert [row[-1] for row in table.rows] == ["70.0", "30.0 ± 14.1"]


def test_a_rule_is_ranked_by_the_arenas_that_try_it() -> None:
    found = arenas(
        [
            trial("mean", "none", accuracy_last=0.3),
            trial("filter", "none", accuracy_last=0.9),
            trial("filter", "none", accuracy_last=0.7, run={"split": "dirichlet(0.1)"}),
        ]
    )
    assert len(found) == 2
    assert ranked(found) == ["filter", "mean"]
    more = trial("median", "none", accuracy_last=0.5)
    assert ranked([*arenas([more]), *found]) == ["filter", "median", "mean"]


def test_runs_that_differ_in_more_are_kept_apart() -> None:
    trials = [
        trial("mean", "none", accuracy_last=0.9, run={"split": split, "eps": eps})
        for split in ("iid", "dirichlet(0.1)")
        for eps in (0.1, 0.2)
    ]
    assert [arena.label for arena in arenas(trials)] == [
        "iid, eps 0.1",
        "iid, eps 0.2",
        "dirichlet(0.1), eps 0.1",
        "dirichlet(0.1), eps 0.2",
    ]


def test_runs_with_other_numbers_of_attackers_are_kept_apart() -> None:
    trials = [trial("mean", "none", accuracy_last=0.9)]
    for malicious, accuracy in ((1, 0.8), (2, 0.1)):
        trials.append(trial("mean", "ipm", accuracy_last=accuracy, run={"malicious": malicious}))
    found = arenas(trials)
    assert [arena.label for arena in found] == ["malicious 1", "malicious 2"]
    assert [str(arena.percent()["mean"]["ipm"]) for arena in found] == ["80", "10"]
    assert all(str(arena.percent()["mean"]["none"]) == "90" for arena in found)


def test_a_report_shows_what_was_published(tmp_path: Path) -> None:
    published = [
        {"rule": "nnm | filter", "attack": "none", "accuracy": 91.0, "spread": 0.5},
        {"rule": "nnm | filter", "accuracy": 48.0},
    ]
    asked = Grid("A <title>", published=published)
    trials = [
        trial("nnm | filter", "ipm", accuracy_last=0.5, success=0.25, malicious_weight=0.1),
        trial("nnm | filter", "none", accuracy_last=0.75),
        trial("mean", "ipm", refused="too few"),
    ]
    (tmp_path / "plots").mkdir()
    stale, own = tmp_path / "plots" / "arena-7.png", tmp_path / "plots" / "own.png"
    stale.touch(), own.touch()
    path = page.write(trials, asked, tmp_path, "fedrobust compare 'x | y'")
    assert (stale.exists(), own.exists()) == (False, True)
    html, text = path.read_text(), (tmp_path / "tables.md").read_text()
    assert "A &lt;title&gt;" in html
    assert "<svg" in html
    assert "| nnm \\| filter, none | 91.0 ± 0.5 | 75.0 | 1 |" in text
    assert "| nnm \\| filter, worst: ipm | 48.0 | 50.0 | 1 |" in text
    assert "| `mean` | too few | 1 |" in text
    assert "| `nnm \\| filter` | **50.0** ipm |" in text
    for name in ("worst", "arena-1"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_published_figures_may_be_of_the_best_evaluation() -> None:
    """Which is that of the mean over the seeds; each seed's own best would be higher."""
    curves = [[[10, 0.5], [20, 0.9], [30, 0.6]], [[10, 0.8], [20, 0.3], [30, 0.5]]]
    trials = [
        trial("mean", "none", seed, curve=curve, accuracy_last=0.1, accuracy=curve[-1][1])
        for seed, curve in enumerate(curves)
    ]
    shown = {"best": "65.0 ± 21.2", "accuracy": "55.0 ± 7.1", "accuracy_last": "10.0 ± 0.0"}
    for compared, ours in shown.items():
        asked = Grid("A title", published=[{"rule": "mean", "accuracy": 70.0}], compared=compared)
        (table,) = [t for t in page.tables(trials, asked) if t.title == "Beside the published figures"]
        assert table.rows == [["mean, worst: none", "70.0", ours, "2"]]
    with pytest.raises(InputError, match="unknown figure to compare 'first'"):
        Grid.from_dict({"compared": "first"})


def test_no_two_arenas_of_a_figure_look_alike() -> None:
    trials = [
        trial("mean", "none", accuracy_last=0.5, run={"clients": clients}) for clients in range(10, 26)
    ]
    figure = page.worst_figure(arenas(trials))
    looks = {
        (bars.lines[0].get_color(), bars.lines[0].get_marker()) for bars in figure.axes[0].containers
    }
    assert len(looks) == 16


def test_a_report_is_written_where_no_run_of_an_arena_could_be(tmp_path: Path) -> None:
    trials = [
        trial(rule, "ipm", refused="too few", run={"clients": clients})
        for clients in (6, 16)
        for rule in ("bulyan", "mda")
    ]
    trials.append(trial("bulyan", "ipm", 1, accuracy_last=0.5, run={"clients": 16}))
    path = page.write(trials, Grid("A title"), tmp_path, "fedrobust compare")
    assert "<svg" in path.read_text()
    assert "too few" in (tmp_path / "tables.md").read_text()


def test_a_mean_over_some_of_the_runs_says_so() -> None:
    """Or a certificate beside a displacement that is over all of them would look violated."""
    bounds = {"filter": (0.5, math.inf), "smea": (math.inf, math.inf), "caf": (0.5, 1.5)}
    trials = [
        trial(rule, "ipm", seed, accuracy_last=0.5, displacement=1.0, certificate=bound)
        for rule, found in bounds.items()
        for seed, bound in enumerate(found)
    ]
    (table,) = (t for t in page.tables(trials, Grid("A title")) if t.title == "Beside the accuracy")
    column = [name.startswith("certificate") for name in table.header].index(True)
    cells = {row[0].strip("`"): row[column] for row in table.rows}
    assert cells == {"filter": "0.5 (1 of 2 finite)", "smea": "\N{INFINITY}", "caf": "1"}


def test_every_run_is_a_row(tmp_path: Path) -> None:
    trials = [
        trial("mean", "none", 3, accuracy=0.9, curve=[(1, 0.9)]),
        trial("mean", "ipm", 4, refused="no"),
    ]
    write_csv(trials, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rule"], row["attack"], row["seed"], row["accuracy"]) for row in rows] == [
        ("mean", "none", "3", "0.9"),
        ("mean", "ipm", "4", ""),
    ]
    assert rows[1]["refused"] == "no"
    assert "curve" not in rows[0]
