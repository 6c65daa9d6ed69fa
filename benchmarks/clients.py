"""Hold many clients at once, slow ones among them: `python -m benchmarks.clients --clients 1000`.

A server process, and clients in a few processes, each client with a connection of its own. A tenth of
them are slow: half of those dribble their update for longer than a round lasts, the other half never
answer. Every update that was acknowledged to a client is looked up in the server's ledger by its digest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import grpc.aio
import numpy as np
import psutil
from fedrobust_clients.credentials import open_channel
from fedrobust_clients.remote import GrpcConnection
from fedrobust_clients.runtime import Floats, Participation, Update, pauses
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import Receipt, Status, SubmitRequest

PAGE = Path("docs/server.md")
TITLE = "## Clients held"
# Channels of one process would share a connection, and its limit of concurrent calls.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
_DRIBBLED = 64
"""Bytes a slow client sends at a time, a few times a second."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        clients: how many.
        slow: how many of them are slow.
        rounds: how many.
        deadline: seconds.
        model: as in `fedrobust serve --model`.
        processes: that the clients live in.
    """

    clients: int = 1000
    slow: int = 100
    rounds: int = 5
    deadline: float = 15.0
    model: str = "mlp(200)"
    processes: int = 4


@dataclass
class Held:
    """What came of it.

    Attributes:
        held: clients that were there at once, by round.
        lasted: seconds from open to close, by round.
        accepted: updates in the ledger.
        acknowledged: updates that clients were told of.
        lost: acknowledged updates that the ledger lacks, or that were given no weight.
        resident: the server's memory, bytes: before clients came, and at most.
        connections: that the server had at most.
        enrolled: seconds that it took all clients to be there.
    """

    held: list[int] = field(default_factory=list)
    lasted: list[float] = field(default_factory=list)
    accepted: int = 0
    acknowledged: int = 0
    lost: int = 0
    resident: tuple[int, int] = (0, 0)
    connections: int = 0
    enrolled: float = 0.0


# ---- clients --------------------------------------------------------------------------------------


@dataclass
class _Member:
    """A client that sends noise, or takes for ever over it."""

    name: str
    silent: bool
    digests: dict[int, str] = field(default_factory=dict)

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        if self.silent:
            await asyncio.Event().wait()
        rng = np.random.default_rng(abs(hash((self.name, round))))
        vector = rng.normal(0, 0.01, len(model)).astype(np.float32)
        data = await asyncio.to_thread(vectors.pack, vector, vectors.encoding().dtype)
        self.digests[round] = vectors.digest(data).hex()
        return Update(vector, 10)

    def told(self, number: int, receipt: Receipt) -> None:
        status = Status.Name(receipt.status).removeprefix("STATUS_")
        line = {"client": self.name, "round": number, "status": status, "digest": self.digests[number]}
        print(json.dumps(line), flush=True)


class _Dribble(GrpcConnection):
    """Uploads a little at a time."""

    async def submit(self, requests: AsyncIterator[SubmitRequest]) -> Receipt:
        return await super().submit(_dribbled(requests))


async def _dribbled(requests: AsyncIterator[SubmitRequest]) -> AsyncIterator[SubmitRequest]:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            yield request
            continue
        for at in range(0, len(request.chunk.data), _DRIBBLED):
            piece = SubmitRequest()
            piece.chunk.offset = request.chunk.offset + at
            piece.chunk.data = request.chunk.data[at : at + _DRIBBLED]
            yield piece
            await asyncio.sleep(0.3)


async def _take_part(address: str, number: int, slow: int) -> None:
    member = _Member(f"client-{number:05d}", silent=number < slow and number % 2 == 0)
    part = Participation(member.name, lambda _task: member, member.told)
    connect = _Dribble if number < slow and number % 2 else GrpcConnection
    for pause in pauses():
        async with open_channel(address, None, _OPTIONS) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await part.attend(connect(channel, 60.0))
                return
        await asyncio.sleep(pause)


async def _crowd(address: str, numbers: Sequence[int], slow: int) -> None:
    await asyncio.gather(*(_take_part(address, number, slow) for number in numbers))


# ---- the server -----------------------------------------------------------------------------------


def hold(setting: Setting, folder: Path) -> Held:
    """Run a federation with these clients, and look at what it left in a folder."""
    found = Held()
    command = [sys.executable, "-m", "fedrobust.cli", "serve", "--json", "--bind", "127.0.0.1:0"]
    command += ["--runs-dir", str(folder), "--run", "held", "--clients", str(setting.clients)]
    command += ["--rounds", str(setting.rounds), "--deadline", str(setting.deadline)]
    command += ["--model", setting.model, "--checkpoint-every", "1000000", "--rule", "filter"]
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as server:
        output = cast("IO[str]", server.stdout)
        address = json.loads(output.readline())["listening"]
        reading = threading.Thread(target=output.read)  # a full pipe would stop the server
        reading.start()
        watched = psutil.Process(server.pid)
        before, began = watched.memory_info().rss, time.time()
        found.resident = before, before
        with _crowds(address, setting, folder) as crowds:
            while server.poll() is None:
                with contextlib.suppress(psutil.Error):
                    found.resident = before, max(found.resident[1], watched.memory_info().rss)
                    found.connections = max(found.connections, _connections(watched, address))
                time.sleep(0.5)
            reading.join()
            if server.returncode:
                raise RuntimeError(f"the server ended with {server.returncode}")
            for crowd in crowds:  # silent clients would stay
                with contextlib.suppress(subprocess.TimeoutExpired):
                    crowd.wait(5)
    _examine(found, folder, began)
    return found


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def _crowds(address: str, setting: Setting, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """All clients, in their processes; what they are told goes to files."""
    with contextlib.ExitStack() as stack:
        crowds = []
        for i in range(setting.processes):
            command = [sys.executable, "-m", "benchmarks.clients", "--crowd", address]
            command += ["--clients", str(setting.clients), "--slow", str(setting.slow)]
            command += ["--processes", str(setting.processes), "--which", str(i)]
            told = stack.enter_context((folder / f"told-{i}.jsonl").open("w"))
            crowd = subprocess.Popen(command, stdout=told, text=True)
            crowds.append(stack.enter_context(_ended(crowd)))
        yield crowds


def _connections(server: psutil.Process, address: str) -> int:
    port = int(address.rpartition(":")[2])
    return sum(
        c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED
        for c in server.net_connections(kind="tcp")
    )


def _examine(found: Held, folder: Path, began: float) -> None:
    with contextlib.closing(sqlite3.connect(folder / "held" / "ledger.sqlite")) as database:
        rounds = database.execute(
            "SELECT selected, opened, collected FROM rounds ORDER BY round"
        ).fetchall()
        answers = database.execute(
            "SELECT round, client, digest FROM answers WHERE status = 'ACCEPTED' AND weight NOT NULL"
        ).fetchall()
    found.held = [len(json.loads(selected)) for selected, _, _ in rounds]
    found.lasted = [collected - opened for _, opened, collected in rounds]
    found.enrolled = rounds[0][1] - began
    found.accepted = len(answers)
    told = [
        json.loads(line)
        for file in sorted(folder.glob("told-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    acknowledged = {(t["round"], t["client"], t["digest"]) for t in told if t["status"] == "ACCEPTED"}
    found.acknowledged = len(acknowledged)
    found.lost = len(acknowledged - set(answers))


# ---- the page -------------------------------------------------------------------------------------


_SECTION = """\
{title}

`python -m benchmarks.clients --clients {clients}` runs a server process and {clients} clients over
loopback on {cores} cores; {processes} processes hold the clients, each with a connection of its own. The
model is `{model}`. Of the slow clients half dribble their update for longer than a round lasts, and half
never answer, so that every round must be closed by its deadline. Every update that a client was told to
be accepted is looked up in the ledger by its digest, and must have been given a weight.

| what | figure |
| --- | ---: |
{table}

A client takes one file descriptor of the server, which raises its soft limit to the hard one, or to
65536, as it starts (Ray does). Where `ulimit -Hn` is below the number of clients, raise that.
"""


def section(setting: Setting, found: Held) -> str:
    """What was found, as a section of a page."""
    rows: list[tuple[str, Any]] = [
        ("clients held at once, in every round", min(found.held)),
        ("of which slow", setting.slow),
        ("connections of the server, at most", found.connections),
        ("seconds until all were there, their processes' start included", f"{found.enrolled:.1f}"),
        ("rounds", len(found.lasted)),
        ("deadline, seconds", f"{setting.deadline:g}"),
        (
            "from open to close, seconds",
            f"{min(found.lasted):.2f} to {max(found.lasted):.2f}",
        ),
        ("updates accepted", found.accepted),
        ("updates acknowledged to their clients", found.acknowledged),
        ("acknowledged updates lost", found.lost),
        ("server's memory before they came, MB", found.resident[0] // 10**6),
        ("server's memory at most, MB", found.resident[1] // 10**6),
    ]
    table = "\n".join(f"| {what} | {figure} |" for what, figure in rows)
    return _SECTION.format(title=TITLE, table=table, cores=psutil.cpu_count(), **vars(setting))


def write(page: Path, text: str) -> None:
    """Put a section in the place of the one with the same title, or at the end of the page."""
    before = page.read_text() if page.exists() else "# The server, measured\n"
    head, _, rest = before.partition(f"{TITLE}\n")
    following = rest.find("\n## ")
    tail = "" if following < 0 else rest[following:]
    page.write_text(head.rstrip("\n") + "\n\n" + text + tail)


def main(arguments: Sequence[str] | None = None) -> None:
    """Hold clients, print what was found, and write it to the page."""
    default = Setting()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--slow", type=int, help="how many of them are slow [a tenth]")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--deadline", type=float, default=default.deadline, help="of a round, seconds")
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--processes", type=int, default=default.processes, help="that hold clients")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--crowd", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--which", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    slow = options.clients // 10 if options.slow is None else options.slow
    if options.crowd:
        numbers = range(options.which, options.clients, options.processes)
        asyncio.run(_crowd(options.crowd, numbers, slow))
        return
    setting = Setting(
        *(options.clients, slow, options.rounds, options.deadline, options.model, options.processes)
    )
    with tempfile.TemporaryDirectory() as folder:
        text = section(setting, hold(setting, Path(folder)))
    print(text)
    write(options.page, text)


if __name__ == "__main__":
    main()
