"""The benchmark's own machinery, on shapes that take no time; no test asks how fast anything is."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import certification, contestants, page, simulations, statistics, superlink, targets
from benchmarks.cases import PEERS, Case, cases, hostile, ours
from benchmarks.measure import Sample, sample
from benchmarks.peers import flat, installed
from benchmarks.rounds import EXACT, FEW, HOSTILE, KINDS, PLAIN, SHAPES, Shape, make
from benchmarks.run import OFTEN, SHORT, measure
from benchmarks.store import Store
from fedrobust import InputError, kernels

SMALL = Shape(10, 2000)


def quiet(_: str) -> None:
    pass


def test_a_sample_sees_the_memory_that_a_call_takes() -> None:
    found = sample(lambda: torch.ones(10_000_000))
    assert found.wall > 0
    assert 35e6 < found.peak < 80e6


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[str] = []
    ran = [Case(name, lambda _, name=name: calls.append(name)) for name in ("a/x", "a/y")]
    path = tmp_path / "samples.jsonl"
    measure(Store(path), SMALL, ran[:1], 1, report=quiet)
    with path.open("a") as file:
        file.write('{"shape": "cut of')
    path.write_text(path.read_text().rsplit("\n", 1)[0] + "\n")
    measure(Store(path), SMALL, ran, 1, report=quiet)
    often = 1 + OFTEN  # a first run, and a short case's repetitions
    assert calls == ["a/x"] * often + ["a/y"] * often
    store = Store(path)
    assert {key[2]: len(taken) for key, taken in store.samples.items()} == {"a/x": often, "a/y": often}


def test_short_cases_meet_each_kind_of_rows_in_turn_and_often(tmp_path: Path) -> None:
    calls: list[tuple[str, bool]] = []
    ran = [
        Case("a/x", lambda X: calls.append(("x", bool(X.abs().max() > 1e20)))),
        Case("a/y", lambda X: (calls.append(("y", bool(X.abs().max() > 1e20))), time.sleep(SHORT))),
    ]
    measure(Store(tmp_path / "samples.jsonl"), SMALL, ran, 1, [PLAIN, "1e30"], report=quiet)
    assert calls[:4] == [("x", False), ("x", True), ("y", False), ("y", True)]
    assert {call: calls.count(call) for call in calls[:4]} == {
        call: 2 if call[0] == "y" else 1 + OFTEN for call in calls[:4]
    }


def test_what_needs_too_much_memory_or_refuses_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    greedy = Case("byzfl/nnm | mean", lambda X: X, memory=1e15)
    refusing = next(case for case in ours(Shape(60, 50)) if case.name == "ours/smea")
    measure(store, SMALL, [greedy], 1, report=quiet)
    measure(store, Shape(60, 50), [refusing], 1, report=quiet)
    assert "1000000 GB" in store.skipped[str(SMALL), PLAIN, greedy.name]
    assert "sets of rows" in store.skipped[str(Shape(60, 50)), PLAIN, refusing.name]


def test_every_target_names_cases_that_exist() -> None:
    names = {case.name for case in cases(Shape(10, 10**6))}
    for target in [*targets.TARGETS, *targets.OVER_FLOOR]:
        for name in [*target.over, *target.under]:
            assert name in names or name.split("/")[0] in PEERS, name
        assert target.shape in SHAPES


def test_every_function_of_the_peers_that_we_have_is_beside_ours() -> None:
    shape = Shape(15, 200)
    there = {case.name: case for case in cases(shape)}
    theirs = {"byzfl": ["clip | mean", "nnm | median"], "flwr": ["bulyan", "krum"]}
    for package, rules in theirs.items():
        for rule in rules if installed(package) else []:
            X, case = make(shape), there[f"{package.replace('flwr', 'flower')}/{rule}"]
            assert len(flat(case.call(case.prepare(X)))) == shape.d
            assert torch.equal(X, make(shape))
    assert {n.split("/")[1] for n in there if n.startswith(("byzfl", "flower"))} <= {
        n.split("/")[1] for n in there if n.startswith("ours/")
    }


@pytest.mark.parametrize("kind", [PLAIN, *KINDS])
def test_hostile_rows_are_finite_and_a_fifth(kind: str) -> None:
    X = make(Shape(20, 50), kind)
    assert torch.isfinite(X).all()
    torch.testing.assert_close(X[4:], make(Shape(20, 50))[4:])


def test_the_page_shows_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    target = targets.TARGETS[0]
    for name, seconds in [(target.over[0], 1.0), (target.under[0], 2.0)]:
        for repetition in range(2):
            store.add(
                (str(target.shape), PLAIN, name), repetition, Sample(seconds, 1, 0, 1e6, exact=True)
            )
    rule = str(HOSTILE[0]), PLAIN, "ours/filter"
    store.add(rule, 0, Sample(1.0, 1, 0, 0, exact=True))
    store.add((rule[0], "1e30", rule[2]), 0, Sample(3.0, 1, 0, 0, exact=True))
    text = page.page(store, {"processor": "one"})
    assert page.ratio(store, target) == 0.5
    assert "| 0.50 | met |" in text
    assert "worst 3.00, `filter` on 1e30 | **not met**" in text
    assert "| not run |" in text


def test_the_page_says_where_a_peer_is_faster(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    assert "## Where a peer is faster\n\nNot run." in page.page(store, {})
    times = {
        "byzfl/mean": 0.1,
        "ours/mean": 0.3,
        "ours without certificate/mean": 0.2,
        "flower/mean": 0.25,
        "byzfl/median": 0.5,
        "ours/median": 0.4,
        "byzfl/krum": 0.6,
        "ours/krum": 0.7,
        "flower/trimmed_mean": 0.1,
    }

    def take(names: list[str]) -> str:
        for name in names:
            taken = Sample(times[name], 1, 0, 0, exact=True)
            store.add((str(SHAPES[0]), PLAIN, name), 0, taken)
        text = page.page(store, {})
        return text.partition("## Where a peer is faster")[2].partition("## Kernels")[0]

    assert "In none of 1 cases" in take(["byzfl/median", "ours/median"])
    said = take(list(times))
    assert "3 of the 5 cases" in said
    assert "| `mean` | 20 x 1e5 | byzfl | 100.0 | 300.0 | 200.0 | ours |" in said
    assert "| `mean` | 20 x 1e5 | flower | 250.0 | 300.0 | 200.0 | ours with certificate |" in said
    assert "| `krum` | 20 x 1e5 | byzfl | 600.0 | 700.0 | - | ours |" in said
    assert "median" not in said


def test_every_rule_meets_hostile_values_somewhere() -> None:
    ran = set()
    for shape in [*HOSTILE, FEW]:
        for case in hostile(shape):
            with suppress(InputError):
                if case.name.split("/")[1] in EXACT:
                    case.call(make(Shape(shape.n, 50)))
                ran.add(case.name)
    assert ran == {case.name for case in ours(FEW, bare=False)}
    assert {case.name for case in hostile(FEW)} == {"ours/mda", "ours/smea"}


def test_the_page_says_which_rules_are_not_timed_on_hostile_values(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    for shape, kind, seconds in [(FEW, PLAIN, 1.0), (FEW, "1e30", 1.25)]:
        store.add((str(shape), kind, "ours/mda"), 0, Sample(seconds, 1, 0, 0, exact=True))
    store.skip((str(HOSTILE[0]), PLAIN, "ours/mda"), "refuses: mda: too many")
    text = page.page(store, {})
    hostile_part = text.partition("## Hostile values")[2]
    assert "- not here: `mda` refuses: mda: too many" in hostile_part
    assert "| `mda` | - | 1.25 | - | - |" in hostile_part
    assert (
        "| `mda` and `smea` on hostile over Gaussian values | 20 x 1e5 | <= 1.5 | 1 of 1; worst" in text
    )


def test_the_page_says_which_rules_take_more_than_a_tenth_of_the_rows(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    short, many = Shape(20, 10**5), Shape(1000, 10**5)
    for shape, rule, peak in [(short, "filter", 1e6), (short, "mean", 0.5e6), (many, "krum", 3e7)]:
        store.add((str(shape), PLAIN, f"ours/{rule}"), 0, Sample(1.0, 1, 0, peak, exact=True))
    about = {"threads": "2"}
    text = page.page(store, about)
    assert "| 2 of 3; most 12%, `filter` at 20 x 1e5 | **not met** |" in text
    assert "| 20 x 1e5 | 8 MB | 0.8 MB, 10% | 5.2 MB, 66% | 0.0 MB, 0% | `filter` 12% |" in text
    assert "| 1000 x 1e5 | 400 MB" not in text
    store.add((str(many), PLAIN, "ours/flame"), 0, Sample(1.0, 1, 0, 6e7, exact=True))
    text = page.page(store, about)
    assert "| 1000 x 1e5 | 400 MB | 0.8 MB, 0% | 16.4 MB, 4% | 8.0 MB, 2% | `flame` 15% |" in text


@pytest.mark.parametrize(
    ("halved_from", "n", "pairs", "formula"),
    [
        (math.inf, 100, 10_000, "2n^2 d"),
        (math.inf, 1000, 625_000, "1.25n^2 d"),
        (32, 20, 400, "2n^2 d"),
        (32, 100, 5050, "n(n + 1)d"),
        (32, 1000, 500_500, "n(n + 1)d"),
    ],
)
def test_what_a_gram_pass_does_not_multiply_is_not_counted(
    halved_from: float, n: int, pairs: int, formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_HALVED_FROM", halved_from)
    shape = Shape(n, 1000)
    assert page.work(shape)["kernel/gram"][2:] == (formula, 2 * pairs * 1000)
    assert page.work(shape)["floor/X @ X.T"][3] == 2 * n * n * 1000
    if n < halved_from or not kernels.lowers(kernels.Block(torch.empty(1, 1))):
        assert page.work(shape)["kernel/gram, bfloat16"][3] == 2 * pairs * 1000


def test_the_superlink_is_compared_round_by_round() -> None:
    ours = superlink.Times(down=[1.0, 2.0, 1.0], up=[1.0, 1.0, 2.0])
    theirs = superlink.Times([3.0, 2.0, 2.0], [4.0, 6.0, 6.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    up, up_on, down, down_from = superlink.report(1_000_000, ours, theirs).splitlines()
    assert up.endswith("ours 4 MB/s, Flower's 1 MB/s: 4.0 times (3.0 to 6.0)")
    assert up_on.endswith(": 6.0 times (4.0 to 8.0)")
    assert down.endswith("ours 4 MB/s, Flower's 2 MB/s: 2.0 times (1.0 to 3.0)")
    assert down_from.endswith(": 3.0 times (1.5 to 4.0)")


def test_the_superlink_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "installed", lambda _: None)
    with pytest.raises(SystemExit, match=r"Flower is not installed; .*pip install '\.\[bench\]'"):
        superlink.main([])


def test_estimators_are_timed_beside_plain_ones(capsys: pytest.CaptureFixture[str]) -> None:
    statistics.main(["--quick", "--repetitions", "1", "--only", "mean/"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + sum(case.name.startswith("mean/") for case in statistics.CASES)
    assert all(line.count("|") == 7 for line in lines)


def test_simulated_rounds_are_told_as_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = simulations.settings(3, quick=True)["dense"]
    found = {
        "floor": contestants.Times([0.1, 0.1]),
        "play": contestants.Times([0.2, 0.1, 0.3], {"training": 0.15}, 5e6, torch.zeros(3)),
        "simulate": contestants.Times([0.4, 0.4]),
        "Flower": contestants.Times([6.0, 6.0], model=torch.ones(3)),
    }
    text = simulations.report(setting, found)
    assert "play     200 ms a round (100 to 300); training 150; 5 MB at the peak" in text
    assert "play is 2.00 times the floor, at most 3 are asked: met" in text
    assert "simulate is 4.00 times the floor, at most 3 are asked: not met" in text
    assert "play is 30.00 times as fast as Flower, at least 20 are asked: met" in text
    assert "differ by at most 1.0e+00" in text
    del found["Flower"]
    monkeypatch.setattr(simulations, "installed", lambda _: None)
    assert "Flower is not installed; the peers come with" in simulations.report(setting, found)


@pytest.mark.parametrize(
    ("setting", "watched"), [("many", True), pytest.param("dense", False, marks=pytest.mark.slow)]
)
def test_simulated_rounds_are_run_beside_each_other(
    capsys: pytest.CaptureFixture[str], setting: str, watched: bool
) -> None:
    options = ["--quick", "--only", setting, "--contestants", "floor", "play", "--threads", "1"]
    simulations.main(options)
    about, _, *lines = capsys.readouterr().out.splitlines()
    assert about.startswith("1 x 2 rounds, 1 threads")
    assert [line.split()[0] for line in lines if line[0] == " "] == ["floor", "play", "play"]
    assert all(("MB at the peak" in line) == watched for line in lines[:2])


def test_the_run_beside_byzfl_has_its_honest_clients() -> None:
    config = simulations.settings(3, quick=False)["byzfl"].config
    assert (config.task.clients, config.malicious, config.task.outsiders) == (60, 10, 10)
    assert config.eps * config.task.clients == pytest.approx(config.malicious)


def test_certifying_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    certification.main(["--quick"])
    torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()
    for name in ("floor, 50 at a time", "ours", "ours, rounded noise", "ours, bfloat16", "Cohen's loop"):
        (row,) = [row for row in rows if row.startswith(f"| {name} |")]
        assert float(row.split("|")[2].replace(",", "")) > 0
