"""The server under load: how fast updates come in, and how soon after the last the new model goes out.

    python -m benchmarks.ingest                              # 50 clients x 1e7 parameters
    python -m benchmarks.ingest --clients 20 --parameters 1e8
    python -m benchmarks.ingest --clients 200 --parameters 1e7

One process serves, as `fedrobust serve` does; another holds all clients, which send ready-made updates,
a few at a time. In the same run a bare gRPC server takes the same chunks and throws them away. The
weighted sum that the answer is compared with is one product of a vector and the matrix of the same
updates, in memory, by torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import torch
from fedrobust_clients.runtime import _Work
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import (
    EnrolRequest,
    ModelRequest,
    Receipt,
    RoundsRequest,
    Status,
    SubmitRequest,
)
from fedrobust_proto.v1.federation_pb2_grpc import (
    FederationServicer,
    FederationStub,
    add_FederationServicer_to_server,
)
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import Coordinator
from fedrobust_server.gateway import listen
from fedrobust_server.launch import start_ray
from fedrobust_server.metrics import Metrics
from fedrobust_server.runs import RunFolder
from fedrobust_server.shards import Shards

from fedrobust.optimisers import SGD
from fedrobust.training import Evaluation, Task

MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        clients: in a round.
        parameters: of the model, d.
        at_once: uploads at a time.
        rounds: how many.
        shards: of the server.
        rule: of the server.
        wire: dtype of the values.
        folder: where the server keeps its run.
    """

    clients: int
    parameters: int
    at_once: int
    rounds: int
    shards: int
    rule: str
    wire: str
    folder: Path


def serve(load: Load, line: Connection) -> None:
    """The server's process: the whole of it but for a task, whose place a vector takes."""
    config = RunConfig(
        run="load",
        task=Task(clients=load.clients),
        rule=load.rule,
        rounds=load.rounds,
        shards=load.shards,
        wire=load.wire,
        deadline=3600.0,
        checkpoint_every=10**6,
    )
    folder = RunFolder.create(load.folder, config)
    state = np.zeros((1, load.parameters), np.float32)
    shards = Shards(load.parameters, load.shards, SGD())

    async def run() -> None:
        coordinator = Coordinator(
            config,
            (("vector", (load.parameters,)),),
            shards,
            folder.ledger(),
            lambda _model: Evaluation(0.0, 0.0),
            folder=folder,
            state=state,
            standing=None,
            watch=lambda _report: None,
            metrics=Metrics(),
        )
        door = await listen(coordinator, "127.0.0.1:0")
        line.send(door.port)
        await coordinator.run()
        await door.stop(grace=1.0)

    with start_ray(None):
        shards.start(state)
        asyncio.run(run())
        shards.stop()


class Bare(FederationServicer):
    """Takes the chunks of an upload and throws them away."""

    async def Submit(self, request_iterator: AsyncIterator[SubmitRequest], _context: Any) -> Receipt:  # noqa: ANN401, N802
        """Count the bytes."""
        received = 0
        async for request in request_iterator:
            received += len(request.chunk.data)
        return Receipt(status=Status.STATUS_ACCEPTED)


def serve_bare(line: Connection) -> None:
    """The bare server's process."""

    async def run() -> None:
        server = grpc.aio.server()
        add_FederationServicer_to_server(Bare(), server)
        line.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await asyncio.to_thread(line.recv)
        await server.stop(0)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def process(target: Callable[..., None], *arguments: Any) -> AsyncIterator[tuple[Any, str]]:  # noqa: ANN401
    """A server in a process of its own; gives it and its address."""
    ours, theirs = multiprocessing.Pipe()
    started = multiprocessing.get_context("spawn").Process(target=target, args=(*arguments, theirs))
    started.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        yield started, f"127.0.0.1:{port}"
        if target is serve_bare:
            ours.send(None)
        await asyncio.to_thread(started.join, 60)
    finally:
        started.kill()


@dataclass
class Sent:
    """What one round showed: seconds."""

    upload: float = 0.0
    last_chunk: float = 0.0
    first_byte: float = 0.0


class Clients:
    """All clients, in this process; every one has a channel of its own."""

    def __init__(self, load: Load, address: str, updates: np.ndarray[Any, Any]) -> None:
        """Be `load.clients` clients who send these rows in turn."""
        self._load, self._updates = load, updates
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options) for _ in range(min(load.clients, 16))
        ]
        self._stubs = [
            FederationStub(self._channels[i % len(self._channels)]) for i in range(load.clients)
        ]
        self._encoding = vectors.encoding(load.wire)
        self._last_chunk = 0.0

    async def enrol(self) -> None:
        """All join; from now on the server offers rounds."""
        self._sessions, self._offers = [], []
        for i, stub in enumerate(self._stubs):
            reply = await stub.Enrol(EnrolRequest(client=f"client-{i:04d}"))
            self._sessions.append(reply.session)
            self._offers.append(aiter(stub.Rounds(RoundsRequest(session=reply.session))))

    async def round(self, number: int) -> Sent:
        """All upload, the last one alone, and one asks for the next model as soon as it may."""
        for offers in self._offers:
            _expect((await anext(offers)).round == number, "another round was offered")
        works = {i: self._work(number, i) for i in range(len(self._updates))}
        gate, sent = asyncio.Semaphore(self._load.at_once), Sent()

        async def upload(i: int) -> None:
            async with gate:
                requests = works[i % len(works)].requests(self._sessions[i], 0)
                receipt = await self._stubs[i].Submit(requests)
                _expect(receipt.status == Status.STATUS_ACCEPTED, receipt.reason)

        began = time.perf_counter()
        await asyncio.gather(*(upload(i) for i in range(self._load.clients - 1)))
        sent.upload = time.perf_counter() - began
        await asyncio.sleep(3.0)  # the others have trained longer; what is there has been folded in
        last = self._load.clients - 1
        if number == self._load.rounds:
            await upload(last)
            return sent
        waiting = asyncio.ensure_future(self._first_byte(number + 1))
        receipt = await self._stubs[last].Submit(self._timed(works[last % len(works)], last))
        _expect(receipt.status == Status.STATUS_ACCEPTED, receipt.reason)
        sent.last_chunk, sent.first_byte = self._last_chunk, await waiting
        return sent

    def _work(self, number: int, i: int) -> _Work:
        data = vectors.pack(self._updates[i], self._encoding.dtype)
        update = type("Update", (), {"vector": self._updates[i], "examples": 1})()
        work = _Work.of(number, update, self._encoding)
        work.data = data
        return work

    async def _timed(self, work: _Work, i: int) -> AsyncIterator[SubmitRequest]:
        async for request in work.requests(self._sessions[i], 0):
            self._last_chunk = time.perf_counter()
            yield request

    async def _first_byte(self, number: int) -> float:
        offer = await anext(self._offers[0])
        _expect(offer.round == number, "another round was offered")
        request = ModelRequest(session=self._sessions[0], round=number, encoding=self._encoding)
        self._offers[0] = _put_back(offer, self._offers[0])
        download = self._stubs[0].Model(request)
        await anext(aiter(download))
        came = time.perf_counter()
        download.cancel()
        return came

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


async def _put_back(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:  # noqa: ANN401
    yield first
    async for item in rest:
        yield item


async def bare(load: Load, updates: np.ndarray[Any, Any]) -> float:
    """Seconds that the bare server takes for a round's uploads but the last."""
    async with process(serve_bare) as (_, address):
        clients = Clients(load, address, updates)
        clients._sessions = [b"0" * 16] * load.clients  # noqa: SLF001 (the same messages)
        works = [clients._work(1, i) for i in range(len(updates))]  # noqa: SLF001
        gate = asyncio.Semaphore(load.at_once)

        async def upload(i: int) -> None:
            async with gate:
                await clients._stubs[i].Submit(works[i % len(works)].requests(b"0" * 16, 0))  # noqa: SLF001

        began = time.perf_counter()
        await asyncio.gather(*(upload(i) for i in range(load.clients - 1)))
        took = time.perf_counter() - began
        await clients.close()
        return took


def memory(started: Any) -> list[tuple[str, float, float]]:  # noqa: ANN401
    """Name, private and shared MiB of the server and its shards."""
    found = []
    server = psutil.Process(started.pid)
    for child in [server, *server.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = "server" if child == server else child.name()
            if name == "server" or "Shard" in " ".join(child.cmdline()):
                full = child.memory_full_info()
                found.append((name, full.uss / MIB, (full.rss - full.uss) / MIB))
    return found


def weighted_sum(load: Load, updates: np.ndarray[Any, Any]) -> float:
    """Seconds of one weighted sum of a round's updates in memory; nan where they have no room."""
    if load.clients * load.parameters * 4 > 0.4 * psutil.virtual_memory().available:
        return float("nan")
    rows = torch.from_numpy(np.resize(updates, (load.clients, load.parameters)))
    weights = torch.full((load.clients,), 1 / load.clients)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mv(rows.T, weights)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


async def run(load: Load) -> None:
    """Everything, and print it."""
    rng = np.random.default_rng(0)
    distinct = min(load.clients, max(2, int(2e8 / load.parameters)))
    updates = rng.standard_normal((distinct, load.parameters), dtype=np.float32)
    size = (load.clients - 1) * load.parameters * vectors.item_bytes(vectors.encoding(load.wire).dtype)
    floors = [await bare(load, updates) for _ in range(2)]
    async with process(serve, load) as (started, address):
        clients = Clients(load, address, updates)
        await clients.enrol()
        rounds = []
        for number in range(1, load.rounds + 1):
            rounds.append(await clients.round(number))
            if number == 1:
                held = memory(started)
        await clients.close()
    floors.append(await bare(load, updates))
    one = weighted_sum(load, updates)
    rate, floor = size / statistics.median(r.upload for r in rounds), size / statistics.median(floors)
    answers = [r.first_byte - r.last_chunk for r in rounds if r.first_byte]
    print(f"{load.clients} clients x {load.parameters:g} parameters, {load.at_once} uploads at a time,")
    print(f"{load.wire}, {load.rounds} rounds, {load.shards} shards, rule {load.rule}")
    print("uploads of each round, s    ", *(f"{r.upload:.2f}" for r in rounds))
    print("bare uploads, s             ", *(f"{f:.2f}" for f in floors))
    print(
        f"ingest                       {rate / 1e6:.0f} MB/s, bare {floor / 1e6:.0f}: {rate / floor:.2f}"
    )
    print("last chunk to first byte, ms", *(f"{1000 * a:.0f}" for a in answers))
    print(
        f"one weighted sum             {1000 * one:.0f} ms: {statistics.median(answers) / one:.2f} of it"
    )
    for name, private, shared in held:
        print(f"memory of {name:<18} {private:.0f} MiB private, {shared:.0f} MiB shared")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parameters", type=float, default=1e7)
    parser.add_argument("--at-once", type=int, default=2, help="uploads at a time [2]")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rule", default="filter")
    parser.add_argument("--wire", default="float32")
    parser.add_argument("--folder", type=Path, help="for the run [a temporary one]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, ignore_cleanup_errors=True) as folder:
        load = Load(
            given.clients,
            int(given.parameters),
            given.at_once,
            given.rounds,
            given.shards,
            given.rule,
            given.wire,
            Path(folder),
        )
        asyncio.run(run(load))


if __name__ == "__main__":
    main()
