"""Flower's own robust strategies and ours under the same attacks, in one run of Flower's engine.

    python -m benchmarks.flower

Twenty clients train a small network on the digits, four of them malicious. The malicious ones know what
the honest ones send. Each strategy starts from the same model, sees the same batches, and is told the
same: that four of twenty may be malicious. A cell is the test accuracy of the last model, or that the
run ended with an error. The last column is what `aggregate_train` takes, without an attack.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import NEEDS, flower, installed
from fedrobust.attacks import View, parse_attack
from fedrobust.data import load
from fedrobust.training import Learner, Shared, Task, evaluate

ATTACKS: dict[str, str] = {
    "none": "",
    "sign_flip": "sign_flip",
    "ipm": "ipm",
    "alie": "alie",
    "min_max": "min_max",
    "counts": "ipm(1.0)",
    "nan": "nan",
    "keys": "",
}
"""What the malicious clients send, by column: an attack of ours; with "counts" they claim 10^12 examples
besides, with "keys" an honest reply holds an array too many."""
_CLAIMED = 10**12


@dataclass(frozen=True)
class Setting:
    """Who takes part.

    Attributes:
        task: what clients train.
        malicious: how many of them lie, the first ones.
        rounds: of each run.
    """

    task: Task
    malicious: int
    rounds: int


Timed = tuple[Any, list[float]]
"""A strategy, and the seconds of each of its aggregations."""


def strategies(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Makes each contestant anew, by its row's name."""
    n, f = setting.task.clients, setting.malicious
    sizes = {"fraction_evaluate": 0.0, "min_train_nodes": n, "min_available_nodes": n}
    theirs = flower("serverapp.strategy")
    ours = import_module("fedrobust.integrations.flower").RobustStrategy
    eps = f / n
    return {
        "FedAvg": lambda: theirs.FedAvg(**sizes),
        "FedMedian": lambda: theirs.FedMedian(**sizes),
        "FedTrimmedAvg": lambda: theirs.FedTrimmedAvg(beta=eps, **sizes),
        "Krum": lambda: theirs.Krum(num_malicious_nodes=f, **sizes),
        "MultiKrum": lambda: theirs.MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f, **sizes),
        "Bulyan": lambda: theirs.Bulyan(num_malicious_nodes=f, **sizes),
        'RobustStrategy("filter")': lambda: ours("filter", theirs.FedAvg(**sizes), eps=eps),
        'RobustStrategy("nnm | filter")': lambda: ours("nnm | filter", theirs.FedAvg(**sizes), eps=eps),
        'RobustStrategy("nnm | trimmed_mean")': lambda: ours(
            "nnm | trimmed_mean", theirs.FedAvg(**sizes), eps=eps
        ),
    }


# ---- clients ----------------------------------------------------------------------------------------


@cache
def _prepared(task: Task) -> tuple[Any, Shared]:
    """What a process of Flower's needs once."""
    torch.set_num_threads(1)
    dataset = load(task.dataset)
    return dataset, Shared.of(task, dataset)


@lru_cache(maxsize=4)
def _updates(task: Task, number: int, model: bytes) -> Tensor:
    """(n, d) what all clients would honestly send."""
    dataset, shared = _prepared(task)
    start = torch.frombuffer(bytearray(model), dtype=torch.float32)
    learners = (Learner(task, dataset, i, shared=shared) for i in range(task.clients))
    return torch.stack([learner.update(number, start) for learner in learners])


def _train(setting: Setting, message: Any, context: Any) -> Any:  # noqa: ANN401 (Flower's)
    """One client: the first ones attack as the server's configuration says, for this benchmark alone."""
    app, task = flower("app"), setting.task
    client = int(context.node_config["partition-id"])
    config = message.content["config"]
    number, attack = int(config["server-round"]), str(config["attack"])
    before = {key: array.numpy() for key, array in message.content["arrays"].items()}
    model = torch.cat([torch.from_numpy(v.astype(np.float32)).flatten() for v in before.values()])
    dataset, shared = _prepared(task)
    lies = client < setting.malicious and attack != "none"
    if lies and ATTACKS[attack]:
        everybody = _updates(task, number, model.numpy().tobytes())
        view = View.of(everybody[setting.malicious :], everybody[: setting.malicious])
        rng = np.random.default_rng(number)
        update = parse_attack(ATTACKS[attack])(view, rng)[client]
    else:
        update = Learner(task, dataset, client, shared=shared).update(number, model)
    parts = (model + update).split([v.size for v in before.values()])
    arrays = {
        key: app.Array(part.numpy().reshape(value.shape).copy())
        for (key, value), part in zip(before.items(), parts, strict=True)
    }
    if lies and attack == "keys":
        arrays["more"] = app.Array(np.zeros(1, np.float32))
    examples = _CLAIMED if lies and attack == "counts" else len(shared.parts[client])
    content = {
        "arrays": app.ArrayRecord(arrays),
        "metrics": app.MetricRecord({"num-examples": examples}),
    }
    return app.Message(app.RecordDict(content), reply_to=message)


# ---- the server -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """What came of one strategy under one attack.

    Attributes:
        accuracy: of the last model; None if the run ended before.
        ended: the error that ended it, or nothing.
        seconds: of each aggregation.
    """

    accuracy: float | None
    ended: str
    seconds: Sequence[float]


def _play(setting: Setting, grid: Any, strategy: Any, attack: str) -> Cell:  # noqa: ANN401 (Flower's)
    """One federation."""
    app, task = flower("app"), setting.task
    dataset = load(task.dataset)
    module = task.build_model(dataset)
    start = app.ArrayRecord(module.state_dict())
    seconds: list[float] = []
    aggregate = strategy.aggregate_train

    def timed(*arguments: Any) -> Any:  # noqa: ANN401
        began = time.perf_counter()
        found = aggregate(*arguments)
        seconds.append(time.perf_counter() - began)
        return found

    strategy.aggregate_train = timed
    try:
        result = strategy.start(
            grid,
            start,
            num_rounds=setting.rounds,
            train_config=app.ConfigRecord({"attack": attack}),
        )
    except Exception as error:  # noqa: BLE001 (that it ends the run is the finding)
        return Cell(None, type(error).__name__, seconds)
    last = result.arrays or start  # there are none if no round came to anything
    arrays = {key: array.numpy() for key, array in last.items()}
    module.load_state_dict({k: torch.from_numpy(v.astype(np.float32)) for k, v in arrays.items()})
    return Cell(evaluate(module, dataset.test_x, dataset.test_y).accuracy, "", seconds)


def run(
    setting: Setting,
    names: Sequence[str],
    attacks: Sequence[str],
    watch: Callable[[str, Mapping[str, Cell]], None],
) -> dict[str, dict[str, Cell]]:
    """All federations, one after another, in one run of Flower's engine."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    servers, clients = flower("serverapp").ServerApp(), flower("clientapp").ClientApp()
    found: dict[str, dict[str, Cell]] = {}

    @servers.main()
    def _serve(grid: Any, _context: Any) -> None:  # noqa: ANN401
        torch.set_num_threads(1)
        made = strategies(setting)
        logging.getLogger("flwr").addFilter(lambda record: record.levelno >= logging.ERROR)
        for name in names:
            make = made[name]
            found[name] = {attack: _play(setting, grid, make(), attack) for attack in attacks}
            watch(name, found[name])

    clients.train()(partial(_train, setting))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ["FLWR_HOME"] = home
        flower("simulation").run_simulation(
            servers,
            clients,
            setting.task.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"logging_level": "ERROR", "log_to_driver": False},
            },
        )
    return found


def row(name: str, cells: Mapping[str, Cell]) -> str:
    """A row of the table."""
    shown = [
        f"ends: {c.ended}" if c.accuracy is None else f"{100 * c.accuracy:.1f}" for c in cells.values()
    ]
    seconds = next(iter(cells.values())).seconds
    took = f"{1e3 * statistics.median(seconds):.0f} ms" if seconds else "-"
    escaped = name.replace("|", r"\|")
    return f"| `{escaped}` | {' | '.join(shown)} | {took} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it, and print the table row by row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower", description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--malicious", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="mlp(64)")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--only", nargs="+", help="these rows [all]")
    given = parser.parse_args(arguments)
    version = installed("flwr")
    if version is None:
        raise SystemExit(f"Flower is not installed; {NEEDS}")
    task = Task(model=given.model, clients=given.clients, steps=10, lr=0.1)
    setting = Setting(task, given.malicious, given.rounds)
    names = given.only or list(strategies(setting))
    print(f"flwr {version}, {given.clients} clients, {given.malicious} of them malicious, ", end="")
    print(f"{given.rounds} rounds, {task.model}\n")
    print(f"| strategy | {' | '.join(given.attacks)} | aggregation |")
    print(f"| --- {'| ---: ' * (len(given.attacks) + 1)}|", flush=True)
    run(setting, names, given.attacks, lambda name, cells: print(row(name, cells), flush=True))


if __name__ == "__main__":
    # By the module's own name, under which Flower's workers find what they are sent.
    import_module("benchmarks.flower").main()
