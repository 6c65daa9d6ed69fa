"""Who takes part in the benchmark of simulated rounds: the floor, ours, Flower's engine, ByzFL's loop.

Each is a function that runs some rounds of a federation and tells how long each took, made to be called
in a process of its own (`alone`). They get the same data, in memory and normalised, the same network,
and those with a server the same rule. Flower's clients start from the same parameters and train on the
very batches that ours do, so that both come to the same model; ByzFL's draw their own.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import psutil
import torch
from fedrobust_clients.malicious import Threat
from fedrobust_clients.simulated import simulate
from fedrobust_laboratory import play as laboratory
from fedrobust_server.config import RunConfig
from fedrobust_server.launch import Federation, federation
from fedrobust_server.runs import RunFolder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks import peers
from fedrobust import kernels
from fedrobust.data import Dataset, load
from fedrobust.training import Learner, Shared, Task, evaluate

T = TypeVar("T")
WORKERS = 2
"""Processes that `fedrobust simulate` spreads its clients over."""
_RADIUS = 2.0
"""ByzFL's Clipping, of gradients."""
_SCALE = 2.0
"""Of its inner product manipulation."""
_BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes that the floor tries."""


@dataclass
class Times:
    """What rounds cost.

    Attributes:
        seconds: of each round but the first.
        parts: seconds of a round that went into what, the median.
        peak: bytes at the peak, of all processes together; 0 if nobody looked.
        model: (d,) float32, after the last round, to be compared.
    """

    seconds: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0
    model: Tensor | None = None


Contestant = Callable[[RunConfig, Path | None, int, bool], Times]
"""Takes a run, where datasets are, how many threads, and whether to look at the memory."""


def alone(contestant: Contestant, *arguments: Any) -> Times:  # noqa: ANN401 (as the contestant has them)
    """Call it in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(contestant, *arguments).result()


def wide_digits() -> Dataset:
    """The digits, with a margin that makes them as large as MNIST's."""
    digits = load("digits")
    widened = {name: pad(getattr(digits, name), (10, 10, 10, 10)) for name in ("train_x", "test_x")}
    return replace(digits, **widened)


# ---- the floor ------------------------------------------------------------------------------------


def floor(config: RunConfig, data_dir: Path | None, threads: int, watched: bool) -> Times:
    """One pass, forward and backward, over as many examples as a round's clients train on.

    In batches of the size that is fastest, each by all threads or each thread with its own, whichever is
    faster.
    """
    torch.set_num_threads(threads)
    task, dataset = config.task, load(config.task.dataset, data_dir)
    count = task.clients * task.steps * task.batch
    rows = torch.arange(count) % len(dataset.train_x)
    x, y = dataset.train_x[rows], dataset.train_y[rows]
    module = task.build_model(dataset)
    modules = [module, *(copy.deepcopy(module) for _ in range(threads - 1))]

    def gradients(bench: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            torch.autograd.grad(cross_entropy(bench(images), labels), list(bench.parameters()))

    def together(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        gradients(module, batches)

    def apart(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        parts = [batches[k::threads] for k in range(threads)]
        list(kernels.workers(threads).map(gradients, modules, parts))

    def pace(way: Callable[[Any], None], size: int) -> float:
        """Seconds an example, on a few of the batches."""
        some = min(count, max(4 * threads * size, count // 20))
        batches = list(zip(x[:some].split(size), y[:some].split(size), strict=True))
        return min(_seconds(partial(way, batches)) for _ in range(3)) / some

    sizes = [size for size in _BATCHES if size * threads <= count] or [count]
    ways = [(way, size) for way in ((together, apart) if threads > 1 else (together,)) for size in sizes]
    with _watch(watched) as peak:
        way, size = min(ways, key=lambda each: pace(*each))
        batches = list(zip(x.split(size), y.split(size), strict=True))
        seconds = [_seconds(partial(way, batches)) for _ in range(config.rounds - 1)]
    return Times(seconds, peak=max(peak))


# ---- ours -----------------------------------------------------------------------------------------


def play(config: RunConfig, data_dir: Path | None, threads: int, watched: bool) -> Times:
    """A federation in one process, as `fedrobust compare` runs them."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    dataset, training, work = load(config.task.dataset, data_dir), [0.0], [0.0]
    marks, sums = list[float](), list[tuple[float, float]]()
    with (
        _watch(watched) as peak,
        mock.patch.object(laboratory, "updates", _timed(laboratory.updates, training)),
        mock.patch.object(laboratory.Cast, "work", _timed(laboratory.Cast.work, work)),
    ):
        for played in laboratory.play(config, dataset):
            model = played.model
            marks.append(time.perf_counter())
            sums.append((sum(training), sum(work)))
    seconds = [b - a for a, b in pairwise(marks)]
    spent = torch.tensor(sums, dtype=torch.float64).diff(dim=0).median(dim=0).values.tolist()
    parts = {
        "training": spent[0],
        "attack": spent[1] - spent[0],
        "server": statistics.median(seconds) - spent[1],
    }
    return Times(seconds, parts, max(peak), model)


def simulated(config: RunConfig, data_dir: Path | None, threads: int, watched: bool) -> Times:
    """A federation on Ray, as `fedrobust simulate` runs it: with a ledger, and every model judged."""
    torch.set_num_threads(threads)
    marks: list[float] = []

    async def run(ready: Federation) -> None:
        threat = Threat(config.malicious, config.attack, config.rule, config.eps)
        clients = simulate(ready.coordinator, config.task, data_dir, threat, workers=WORKERS)
        await asyncio.gather(ready.coordinator.run(), clients)

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent,
        RunFolder.begun(Path(parent), config) as folder,
        _watch(watched) as peak,
        federation(
            config,
            folder,
            data_dir=data_dir,
            ray_address=None,
            watch=lambda _: marks.append(time.perf_counter()),
        ) as ready,
    ):
        asyncio.run(run(ready))
    dataset = load(config.task.dataset, data_dir)
    judge = partial(evaluate, config.task.build_model(dataset), dataset.test_x, dataset.test_y)
    seconds = [b - a for a, b in pairwise(marks)]
    return Times(seconds, {"judging, beside the next round": _seconds(judge)}, max(peak))


# ---- Flower's -------------------------------------------------------------------------------------


def flower(config: RunConfig, data_dir: Path | None, threads: int, watched: bool) -> Times:
    """Flower's simulation engine with FedTrimmedAvg, on Ray, a client on each core at a time."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    torch.set_num_threads(threads)
    task = config.task
    simulation = peers.flower("simulation")
    start, found = task.build_model(load(task.dataset, data_dir)), Times()
    app, client, server = map(peers.flower, ("app", "clientapp", "serverapp"))
    strategies = peers.flower("serverapp.strategy")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    strategy = strategies.FedTrimmedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=task.clients,
        min_available_nodes=task.clients,
        beta=config.eps,
    )
    marks: list[float] = []

    def mark(_: int, arrays: Any) -> None:  # noqa: ANN401 (Flower's are not typed here)
        marks.append(time.perf_counter())
        found.model = torch.cat([v.flatten() for v in arrays.to_torch_state_dict().values()])

    servers, clients = server.ServerApp(), client.ClientApp()

    @servers.main()
    def _serve(grid: Any, _context: Any) -> None:  # noqa: ANN401
        arrays = app.ArrayRecord(start.state_dict())
        strategy.start(grid, arrays, num_rounds=config.rounds, evaluate_fn=mark)

    clients.train()(partial(_flower_client, task, data_dir))
    with tempfile.TemporaryDirectory() as home, _watch(watched) as peak:
        os.environ["FLWR_HOME"] = home
        simulation.run_simulation(
            servers,
            clients,
            task.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"logging_level": "ERROR", "log_to_driver": False, "num_cpus": threads},
            },
        )
    found.seconds = [b - a for a, b in pairwise(marks[1:])]  # the first one is of the start
    found.peak = max(peak)
    return found


@cache
def _prepared(task: Task, data_dir: Path | None) -> tuple[Dataset, Shared]:
    """What a process of Flower's needs once."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dataset = load(task.dataset, data_dir)
    return dataset, Shared.of(task, dataset)


def _flower_client(task: Task, data_dir: Path | None, message: Any, context: Any) -> Any:  # noqa: ANN401
    """Local training, as one writes it for Flower."""
    app = peers.flower("app")
    dataset, shared = _prepared(task, data_dir)
    module, number = shared.module, int(message.content["config"]["server-round"])
    learner = Learner(task, dataset, int(context.node_config["partition-id"]), shared=shared)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=task.lr)
    for rows in learner.batches(number):
        optimiser.zero_grad()
        cross_entropy(module(dataset.train_x[rows]), dataset.train_y[rows]).backward()
        optimiser.step()
    content = {
        "arrays": app.ArrayRecord(module.state_dict()),
        "metrics": app.MetricRecord({"num-examples": learner.examples}),
    }
    return app.Message(app.RecordDict(content), reply_to=message)


# ---- ByzFL's --------------------------------------------------------------------------------------


def byzfl_run(task: Task, rounds: int) -> RunConfig:
    """A run of ours that does what `byzfl` does: to these honest clients come a fifth malicious ones."""
    f = task.clients // 5
    rule = f"clip({_RADIUS * task.lr!r}) | nnm | trimmed_mean"
    everybody = replace(task, clients=task.clients + f, outsiders=f)
    return RunConfig(
        task=everybody,
        rule=rule,
        eps=f / everybody.clients,
        rounds=rounds,
        malicious=f,
        attack=f"ipm({_SCALE!r})",
    )


def byzfl(config: RunConfig, data_dir: Path | None, threads: int, watched: bool) -> Times:
    """ByzFL's own clients, attack and server in the loop of its `benchmark/train.py`, step by step.

    That module imports torchvision, which the rest does not need; its loop is the one below. There
    images are turned from Pillow's form whenever they are drawn; here they are tensors already. It gets
    one thread where that is faster than all.
    """
    peers.byzfl()
    framework = importlib.import_module("byzfl.fed_framework")
    task, f, dataset = config.task, config.malicious, load(config.task.dataset, data_dir)
    examples = torch.utils.data.TensorDataset(dataset.train_x, dataset.train_y)
    parts = task.partition(dataset.train_y.numpy())[f:]
    common = {
        "model_name": "cnn_mnist",
        "device": "cpu",
        "optimizer_name": "SGD",
        "learning_rate": task.lr,
        "loss_name": "NLLLoss",
        "weight_decay": 0.0,
        "milestones": [],
        "learning_rate_decay": 1.0,
    }
    honest = [
        framework.Client(
            {
                **common,
                "LabelFlipping": False,
                "training_dataloader": torch.utils.data.DataLoader(
                    torch.utils.data.Subset(examples, part.tolist()), task.batch, shuffle=True
                ),
                "momentum": task.momentum,
                "nb_labels": dataset.classes,
                "store_per_client_metrics": False,
            }
        )
        for part in parts
    ]
    rule = {"name": "TrMean", "parameters": {"f": f}}
    before = [
        {"name": "Clipping", "parameters": {"c": _RADIUS}},
        {"name": "NNM", "parameters": {"f": f}},
    ]
    tests = torch.utils.data.TensorDataset(dataset.test_x, dataset.test_y)
    server = framework.Server(
        {
            **common,
            "test_loader": torch.utils.data.DataLoader(tests, 1024),
            "aggregator_info": rule,
            "pre_agg_list": before,
        }
    )
    parameters = {"tau": _SCALE, "f": f, "aggregator_info": rule, "pre_agg_list": before}
    rogue = framework.ByzantineClient(
        {"name": "InnerProductManipulation", "f": f, "parameters": parameters}
    )

    def broadcast() -> None:
        model = server.get_dict_parameters()
        for client in honest:
            client.set_model_state(model)

    def step() -> None:
        for client in honest:
            client.compute_gradients()
        gradients = [client.get_flat_gradients_with_momentum() for client in honest]
        server.update_model_with_gradients(gradients + rogue.apply_attack(gradients))
        broadcast()

    broadcast()
    with _watch(watched) as peak:
        step()
        tried = {}
        for count in {1, threads}:
            torch.set_num_threads(count)
            tried[count] = min(_seconds(step) for _ in range(2))
        torch.set_num_threads(min(tried, key=lambda count: tried[count]))
        seconds = [_seconds(step) for _ in range(config.rounds - 1)]
    return Times(seconds, peak=max(peak))


# ---- measuring ------------------------------------------------------------------------------------


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _timed(call: Callable[..., T], spent: list[float]) -> Callable[..., T]:
    """The same function, which also notes how long it took."""

    def timed(*arguments: Any, **options: Any) -> T:  # noqa: ANN401
        began = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - began)

    return timed


@contextmanager
def _watch(watched: bool) -> Iterator[list[float]]:
    """Bytes of this process and its descendants together, looked at twice a second.

    Memory that several share counts once, in equal parts.
    """
    found, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            total = 0.0
            for process in (own := psutil.Process(), *own.children(recursive=True)):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            found.append(total)
            ended.wait(0.5)

    thread = threading.Thread(target=look, daemon=True)
    if watched:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if watched:
            thread.join()
