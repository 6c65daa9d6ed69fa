"""The laboratory on a real Ray, and the claim of the first page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from fedrobust_laboratory.grid import configuration, read_grid
from fedrobust_laboratory.measure import measure
from fedrobust_server import lifeline

from fedrobust.cli import main
from fedrobust.data import load
from fedrobust.errors import InputError

from .processes import COMMAND

GRID = [
    *("compare", "--model", "softmax", "--clients", "6", "--rounds", "4", "--rule", "mean", "filter"),
    *("bulyan", "--attack", "none", "ipm", "--seed", "0", "1"),
]


@pytest.mark.parametrize(
    "attacks",
    [("none", "ipm"), pytest.param(("none", "alie", "ipm", "sign_flip"), marks=pytest.mark.slow)],
)
def test_the_filter_stays_within_two_points_of_the_attack_free_mean(attacks: tuple[str, ...]) -> None:
    """Attacks break the mean, and the filter hardly notices them."""
    found: dict[tuple[str, str], list[float]] = {}
    for setting in read_grid("digits").settings():
        if setting["rule"] in ("mean", "filter") and setting["attack"] in attacks:
            key = setting["rule"], setting["attack"]
            figures = measure(configuration(setting), load("digits"), 1)
            found.setdefault(key, []).append(figures["accuracy"])
    calm = np.mean(found["mean", "none"])
    assert calm > 0.95
    assert min(np.mean(found["filter", attack]) for attack in attacks) >= calm - 0.02
    assert min(np.mean(found["mean", attack]) for attack in attacks) <= calm - 0.20


def test_a_grid_that_was_killed_goes_on_where_it_was(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grid"
    trials = folder / "trials.jsonl"
    command = [*COMMAND, *GRID, "--to", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (trials.exists() and trials.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no run ends"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    early = trials.read_text()
    with trials.open("a") as file:
        file.write('{"setting": {"rule": "me')  # what a crash in the middle of a line leaves
    assert main([*GRID, "--to", str(folder), "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 12
    kept = trials.read_text()
    assert kept.startswith(early)
    lines = [json.loads(line) for line in kept.splitlines()]
    assert len({json.dumps([line["setting"], line["seed"]]) for line in lines}) == 12
    assert len(lines) <= 14  # what was refused is tried again
    refused = [t for t in told if "refused" in t["figures"]]
    assert {t["setting"]["rule"] for t in refused} == {"bulyan"}
    assert len((folder / "runs.csv").read_text().splitlines()) == 13
    assert (folder / "report.html").is_file()

    def worst(rule: str) -> float:
        return min(t["figures"]["accuracy"] for t in told if t["setting"]["rule"] == rule)

    assert worst("mean") < 0.5 < worst("filter")


def test_what_a_grid_cannot_be_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["compare", "no_such"], "unknown preset 'no_such'"),
        (["compare", "--rule", "no_such"], "no_such"),
        (["compare", "--eps", "0.7"], "eps must be in [0, 0.5), got 0.7"),
        (["compare", "digits", "--gpu-share", "nan"], "gpu_share must be 0 or 0.0001 .. 1, got nan"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_share_of_no_gpu_is_told(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GRID, "--gpu-share", "0.5", "--to", str(tmp_path)]) == 2
    assert "Ray knows of no GPU: train on processors" in capsys.readouterr().err


def test_without_a_grid_the_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 0
    assert "digits" in capsys.readouterr().out


def test_work_that_ray_loses_is_told_in_one_line(ray_cluster: None) -> None:
    def bad() -> None:
        raise InputError("no such thing")

    die, refuse = ray.remote(max_retries=0)(lambda: os._exit(1)), ray.remote(bad)
    lost = r"a run was lost: WorkerCrashedError.*begin again"
    with pytest.raises(ConnectionError, match=lost), lifeline.told("a run"):
        ray.get(die.remote())
    with pytest.raises(InputError, match=r"^no such thing$"), lifeline.told("a run"):
        ray.get(refuse.remote())
