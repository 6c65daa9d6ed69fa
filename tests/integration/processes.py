"""What tests of whole federations share: servers and clients, none of which outlives its test."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fedrobust_clients import remote
from fedrobust_clients.malicious import Threat
from fedrobust_clients.runtime import Honest, Runtime
from fedrobust_clients.simulated import simulate
from fedrobust_laboratory.play import play
from fedrobust_proto.v1.federation_pb2 import STATUS_ACCEPTED, Receipt
from fedrobust_server.config import RunConfig
from fedrobust_server.launch import federation
from fedrobust_server.runs import RunFolder
from fedrobust_server.spool import Floats
from torch import Tensor

from fedrobust.data import load
from fedrobust.training import Learner, Task, client_name

COMMAND = [sys.executable, "-m", "fedrobust.cli"]


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A `fedrobust` process in a session of its own, which does not outlive the test."""
    # Where the tests run in the background, Ctrl-C is ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    with started:
        try:
            yield started
        finally:
            started.kill()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for a minute at most."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not come to that")


@contextlib.contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that goes on while the test waits for something else."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    """End what still runs in this loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Clients:
    """Clients that take part in a federation meanwhile.

    Attributes:
        told: of each client, the rounds in which its update was accepted, in the order of the receipts.
        leave: waits until all have come to the end of the federation; raises what stopped one of them.
    """

    told: list[list[int]]
    leave: Callable[[], object] = field(repr=False)


@contextlib.contextmanager
def clients(address: str, ids: range, patience: float = 60.0) -> Iterator[Clients]:
    """Honest clients of a server over gRPC, in a thread: processes would take seconds each to start."""
    told: list[list[int]] = [[] for _ in ids]
    dataset = load(Task().dataset)

    async def attend(index: int, accepted: list[int]) -> None:
        def prepare(task: Task) -> Runtime:
            return Honest(Learner(task, dataset, index))

        def watch(number: int, receipt: Receipt) -> None:
            if receipt.status == STATUS_ACCEPTED:
                accepted.append(number)

        await remote.run(address, client_name(index), prepare, watch, patience)

    async def attend_all() -> None:
        await asyncio.gather(*map(attend, ids, told))

    with loop_in_a_thread() as loop:
        attending = asyncio.run_coroutine_threadsafe(attend_all(), loop)
        yield Clients(told, lambda: attending.result(60))


def in_process(folder: Path, config: RunConfig, workers: int = 1) -> Floats:
    """The model at the end of a run whose server is in this process, and its clients are simulated."""
    run = RunFolder.create(folder, config)
    with federation(config, run, data_dir=None, ray_address=None, watch=lambda _report: None) as ready:

        async def go() -> Floats:
            attending = simulate(ready.coordinator, config.task, None, Threat(), workers=workers)
            return (await asyncio.gather(ready.coordinator.run(), attending))[0]

        return asyncio.run(go())


def played(config: RunConfig) -> Tensor:
    """The model at the end of the laboratory's form of a run, which is in one process."""
    *_, last = play(config, load(config.task.dataset))
    return last.model


def wait_for(condition: Callable[[], bool], server: subprocess.Popen[str]) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it does not come to that within two minutes, or the server has ended before.
    """
    deadline = time.monotonic() + 120
    while not condition():
        assert server.poll() is None, f"the server has ended with {server.returncode} before"
        assert time.monotonic() < deadline, "the server runs, and it does not come to that"
        time.sleep(0.005)
