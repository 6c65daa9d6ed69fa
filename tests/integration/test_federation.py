"""A federation end to end: processes over gRPC and simulated clients come to the same model."""

from __future__ import annotations

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedrobust_server.config import RunConfig
from fedrobust_server.launch import _root
from safetensors.numpy import load_file

from fedrobust.cli import main
from fedrobust.data import load
from fedrobust.training import Task, evaluate, load_vector, manifest, split_vector, to_vector

from .processes import clients, in_process, played, process

CLIENTS, ROUNDS = 4, [1, 2, 3, 4]
RUN = [
    *("--clients", str(CLIENTS), "--malicious", "1", "--attack", "ipm", "--rounds", str(len(ROUNDS))),
    *("--model", "softmax", "--momentum", "0.5", "--eps", "0.25", "--checkpoint-every", "2"),
]


def over_grpc(folder: Path, *options: str) -> list[dict[str, Any]]:
    """A malicious and an honest client in processes of their own, and the others."""
    serve = ("serve", "--json", "--bind", "127.0.0.1:0", "--runs-dir", str(folder))
    with process(*serve, *RUN, *options) as server:
        assert server.stdout
        address = json.loads(server.stdout.readline())["listening"]
        alone = ("client", "--server", address, "--id")
        with (
            process(*alone, "0", "--attack", "ipm", "--malicious", "1") as rogue,
            process(*alone, "1") as honest,
            clients(address, range(2, CLIENTS)) as others,
        ):
            lines = [json.loads(line) for line in server.stdout]
            assert server.wait(30) == 0
            for client in (rogue, honest):
                output, _ = client.communicate(timeout=30)
                assert client.returncode == 0
                assert output.splitlines() == [f"round {r}: accepted" for r in ROUNDS]
            others.leave()
            assert others.told == [ROUNDS] * (CLIENTS - 2)
    return lines


def model(folder: Path, run: str, number: int = 4) -> dict[str, Any]:
    tensors: dict[str, Any] = load_file(folder / run / "checkpoints" / f"round-{number:06d}.safetensors")
    return tensors


def test_processes_and_simulation_end_at_the_same_model(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("--json", "--runs-dir", str(tmp_path), "--run", "simulated", "--workers", "1", *RUN)
    assert main(["simulate", *here]) == 0
    lines = {
        "simulated": [json.loads(line) for line in capsys.readouterr().out.splitlines()],
        "processes": over_grpc(tmp_path, "--run", "processes", "--shards", "2"),
    }
    for run, told in lines.items():
        *rounds, summary = told
        assert [line["round"] for line in rounds] == ROUNDS
        assert summary["updates_accepted"] == CLIENTS * len(ROUNDS)
        assert summary["malicious_weight"] < 0.02
        assert Path(summary["report"]).is_file()
        assert (tmp_path / run / "config.toml").is_file()
    for number in (2, 4):
        one, other = model(tmp_path, "simulated", number), model(tmp_path, "processes", number)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            np.testing.assert_allclose(tensor, other[name], rtol=1e-4, atol=1e-6)
    assert not np.allclose(model(tmp_path, "simulated", 2)["1.weight"], one["1.weight"])
    config = RunConfig.from_toml((tmp_path / "simulated" / "config.toml").read_text())
    names = manifest(config.task.build_model(load("digits")))
    alike = split_vector(played(config), names)  # and so does the laboratory's, in one process
    assert alike.keys() == one.keys()
    for name, tensor in alike.items():
        np.testing.assert_allclose(tensor, one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "optimiser",
    [
        "adam",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("sgd(momentum=0.9)", "adagrad", "yogi")),
    ],
)
def test_three_shards_end_where_one_process_does_and_another_seed_elsewhere(
    ray_cluster: None, tmp_path: Path, optimiser: str
) -> None:
    """With a sample of the clients and without malicious ones."""
    task = Task(model="softmax", clients=5)
    config = RunConfig(task=task, rounds=2, sample=0.6, optimiser=optimiser, shards=3)
    alike, other = played(config), played(replace(config, task=replace(task, seed=1)))
    np.testing.assert_allclose(in_process(tmp_path, config), alike, rtol=1e-4, atol=1e-5)
    assert not np.allclose(other, alike)


@pytest.mark.parametrize("rule", ["fltrust", pytest.param("nnm | monna", marks=pytest.mark.slow)])
def test_a_rule_may_look_at_the_servers_own_update(ray_cluster: None, tmp_path: Path, rule: str) -> None:
    task = Task(model="softmax", clients=5, momentum=0.5)
    config = RunConfig(task=task, rounds=3, rule=rule, root=64, shards=2)
    alike, other = played(config), played(replace(config, root=32))
    np.testing.assert_allclose(in_process(tmp_path, config), alike, rtol=1e-4, atol=1e-5)
    assert not np.allclose(other, alike)


def test_the_servers_own_updates_of_two_rounds_do_not_meet() -> None:
    """That of a round that was skipped at its deadline may still be at work when the next begins."""
    dataset = load("digits")
    config = RunConfig(task=Task(clients=5, steps=300), rule="fltrust", root=64)
    own = _root(config, dataset)
    assert own is not None
    model = to_vector(config.task.build_model(dataset)).numpy()
    alone = [own(number, model) for number in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(own, range(1, 5), [model] * 4))
    np.testing.assert_array_equal(together, alone)


def test_the_servers_own_update_stands_against_a_majority() -> None:
    task, dataset = Task(model="softmax", clients=5), load("digits")
    config = RunConfig(task=task, rounds=20, root=64, malicious=4, attack="ipm(2.0)")
    module, found = task.build_model(dataset), {}
    for rule in ("filter", "fltrust"):
        load_vector(module, played(replace(config, rule=rule)))
        found[rule] = evaluate(module, dataset.test_x, dataset.test_y).accuracy
    assert found["filter"] < 0.3
    assert found["fltrust"] > 0.8


def test_a_malformed_attack_costs_only_the_attackers(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("--json", "--runs-dir", str(tmp_path), "--run", "nan", "--workers", "1")
    assert main(["simulate", *here, *RUN, "--attack", "nan"]) == 0
    *rounds, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["refused"] for line in rounds] == [1] * len(ROUNDS)
    assert summary["updates_refused"] == summary["rounds_aggregated"] == len(ROUNDS)


def test_sever_leaves_the_attackers_out_and_the_others_learn(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("--json", "--runs-dir", str(tmp_path), "--run", "severed", "--workers", "1")
    plan = ("--clients", "10", "--malicious", "2", "--attack", "ipm", "--rounds", "10")
    rules = ("--model", "softmax", "--rule", "mean", "--schedule", "sever(every=2, times=2)")
    assert main(["simulate", *here, *plan, *rules]) == 0
    *rounds, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["accepted"] for line in rounds] == [10] * 2 + [9] * 2 + [8] * 6
    assert summary["malicious_weight"] == 0.0
    assert summary["accuracy"] > 0.8
    severed = tmp_path / "severed"
    config = RunConfig.from_toml((severed / "config.toml").read_text())
    dataset = load("digits")
    module = config.task.build_model(dataset)
    load_vector(module, played(replace(config, schedule="none")))
    assert evaluate(module, dataset.test_x, dataset.test_y).accuracy < 0.2
    assert main(["ledger", "show", str(severed), "--client", "client-0000"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"ban +sever .* look \d of 2, after round \d: spectral score \d", told)


def test_a_rule_that_looks_at_more_than_the_model_has_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", "softmax", "--rule", "last(651) | filter")
    assert main(["simulate", "--runs-dir", str(tmp_path), "--run", "r", *asked]) == 2
    assert "last(count=651): the model has only 650 parameters" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("kind", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow)],
)
def test_a_stopped_server_leaves_no_process_and_a_report(
    tmp_path: Path, kind: signal.Signals, code: int
) -> None:

    serve = ("serve", "--json", "--bind", "127.0.0.1:0", "--runs-dir", str(tmp_path))
    with process(*serve, "--run", "cut") as server:
        assert server.stdout
        assert "listening" in server.stdout.readline()
        server.send_signal(kind)
        assert server.wait(60) == code
    assert (tmp_path / "cut" / "report.html").is_file()
    deadline = time.monotonic() + 20
    while (left := session(server.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def session(leader: int) -> list[str]:
    """The command lines of the processes still alive in a session, found through /proc."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    alive.append((entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return alive
