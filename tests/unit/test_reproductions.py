"""Trials are kept as they end, and a run that was cut short goes on with the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fedrobust import InputError, __version__
from fedrobust.cli import main
from fedrobust.reproductions import CATALOG, Experiment
from fedrobust.trials import Trial, begun, grouped, summary, table


def counting(ran: list[tuple[int, int]], stop_at: int = 99) -> Experiment:
    def trial(setting: object, seed: int, _data: Path | None) -> dict[str, float]:
        x = setting["x"]  # type: ignore[index]
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.append((x, seed))
        return {"y": x + seed}

    return Experiment(
        "Counting",
        lambda quick: [{"x": x} for x in range(1 if quick else 3)],
        trial,
        lambda trials: table(["x", "y"], grouped(trials, lambda s: s["x"], "y").items()),
        lambda _trials, _data: Figure(),
        seeds=(2, 1),
    )


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    ran: list[tuple[int, int]] = []
    first = counting(ran, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        first.run(first.plan(), tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"setting": {"x"')  # as a crash leaves it
    again = counting(ran)
    trials = again.run(again.plan(), tmp_path)
    assert ran == [(x, seed) for x in range(3) for seed in range(2)]
    assert [trial.figures["y"] for trial in trials] == [0, 1, 1, 2, 2, 3]
    assert "| 2 | 2.5 ± 0.71 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert list(begun(tmp_path / "trials.jsonl", __version__).values()) == trials


@pytest.mark.parametrize(("version", "told"), [("0.0.9", "0.0.9"), (None, "of an unknown version")])
def test_figures_of_another_version_are_not_taken_for_new(
    tmp_path: Path, version: str | None, told: str
) -> None:
    experiment = counting([])
    experiment.run(experiment.plan(quick=True), tmp_path)
    assert f"1 trials by fedrobust {__version__}, 0 s in all." in (tmp_path / "README.md").read_text()
    path = tmp_path / "trials.jsonl"
    kept = json.loads(path.read_text())
    assert kept.pop("version") == __version__
    path.write_text(json.dumps(kept if version is None else {**kept, "version": version}) + "\n")
    assert [trial.version for trial in begun(path, version or "").values()] == [version or ""]
    again = counting([])
    with pytest.raises(
        InputError, match=rf"trials of fedrobust {told}, and this is .*: move the folder"
    ):
        again.run(again.plan(), tmp_path)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("data", [b"all work and no play\n", b'{"a": 1}', b"\xff\xfe\n", b"no end"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "trials.jsonl").write_bytes(data)
    experiment = counting([])
    with pytest.raises(InputError, match="does not hold trials"):
        experiment.run(experiment.plan(), tmp_path)
    assert (tmp_path / "trials.jsonl").read_bytes() == data


def test_summaries() -> None:
    assert str(summary([0.03, math.inf, math.nan])) == "0.03 (1 of 3 finite)"
    assert str(summary([1.0, 3.0, -math.inf])) == "2 ± 1.4 (2 of 3 finite)"
    assert str(summary([math.nan])) == "(0 of 1 finite)"
    assert str(summary([1.0, 1.0])) == "1 ± 0"
    assert str(summary([])) == ""
    trials = [Trial({"d": 1}, seed, {"e": float(seed)}, 0.0) for seed in range(3)]
    assert grouped(trials, lambda s: s["d"], "e")[1].mean == 1
    assert grouped(trials, lambda s: s["d"], "f") == {}


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out.count("\n") == len(CATALOG)
    assert main(["reproduce", "nothing"]) == 2
    assert "unknown experiment 'nothing'" in capsys.readouterr().err
