"""What a broken connection or a full disk costs: the rest of a transfer, no turn, no second update."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedrobust_clients.remote import run
from fedrobust_clients.runtime import Update
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_server import spool
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import Coordinator
from fedrobust_server.gateway import listen
from fedrobust_server.launch import federation
from fedrobust_server.runs import RunFolder

from fedrobust.training import Task

MIB = 1 << 20
OVERHEAD = 64 << 10
"""More than all that a client sends beside its update."""


@dataclass
class Proxy:
    """Passes bytes on between clients and a server, and cuts connections.

    Attributes:
        port: of the server.
        cut_after: bytes from a client, after which its connection is cut; once.
        sent: bytes that came from clients, by connection.
    """

    port: int
    cut_after: float = float("inf")
    sent: list[int] = field(default_factory=list)
    _open: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """The address to connect to."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections, whatever is still on its way."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        self._open += [writer, back]
        self.sent.append(0)
        await asyncio.gather(
            self._pass_on(reader, back, len(self.sent) - 1), self._pass_on(there, writer, None)
        )

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(64 << 10):
                writer.write(data)
                await writer.drain()
                if count is not None:
                    self.sent[count] += len(data)
                    if self.sent[count] > self.cut_after:
                        self.cut_after = float("inf")
                        self.cut()
        writer.close()


@dataclass
class Fixed:
    """A client that sends the same every round, when the time has come."""

    come: asyncio.Event

    async def update(self, round: int, model: Any) -> Update:  # noqa: A002, ARG002
        await self.come.wait()
        return Update(np.full(len(model), 0.5, np.float32), 10)


Around = Callable[[Coordinator, Proxy], None]


@pytest.fixture
def take_part(ray_cluster: None, tmp_path: Path) -> Callable[..., Awaitable[Any]]:
    """Run two clients through a proxy for one round; gives the proxy, receipts, answers and model."""

    async def taken(around: Around, *, hidden: int, cut_after: float = float("inf")) -> Any:
        task = Task(model=f"mlp({hidden})", clients=2)
        config = RunConfig(task=task, rule="mean", rounds=1, deadline=60.0)
        told: list[tuple[str, str]] = []
        with federation(
            config, RunFolder.create(tmp_path, config), data_dir=None, ray_address=None, watch=_ignore
        ) as ready:
            start = ready.coordinator._model.copy()
            door = await listen(ready.coordinator, "127.0.0.1:0")
            proxy = Proxy(door.port, cut_after)
            around(ready.coordinator, proxy)

            now, then = asyncio.Event(), asyncio.Event()
            now.set()

            def client(name: str, address: str, come: asyncio.Event) -> Awaitable[int]:
                def watch(_round: int, receipt: pb.Receipt) -> None:
                    told.append((name, pb.Status.Name(receipt.status)))
                    then.set()

                return run(address, name, lambda _task: Fixed(come), watch)

            async with proxy.listening() as address:
                running = asyncio.create_task(ready.coordinator.run())
                # The other, which is behind no proxy, keeps the round open until the first one is done.
                other = client("plain", f"127.0.0.1:{door.port}", then)
                counts = await asyncio.wait_for(
                    asyncio.gather(running, client("cut", address, now), other), 60
                )
            await door.stop(grace=0.5)
            assert counts[1:] == [1, 1]
            assert told == [("cut", "STATUS_ACCEPTED"), ("plain", "STATUS_ACCEPTED")]
            np.testing.assert_allclose(counts[0], start + 0.5, atol=1e-5)
            answers = ready.coordinator._ledger.answers()
            accepted = [a["client"] for a in answers if a["status"] == "ACCEPTED"]
            assert sorted(accepted) == ["cut", "plain"]
            return proxy, [a["status"] for a in answers], len(start) * 4

    return taken


def _ignore(_report: object) -> None:
    pass


def test_an_interrupted_upload_goes_on_at_the_last_byte_that_is_there(
    take_part: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def around(coordinator: Coordinator, _proxy: Proxy) -> None:
        progress = coordinator.progress

        async def listened(request: pb.ProgressRequest) -> pb.ProgressReply:
            reply = await progress(request)
            told.append(reply.received)
            return reply

        monkeypatch.setattr(coordinator, "progress", listened)

    proxy, statuses, total = asyncio.run(take_part(around, hidden=28_000, cut_after=4.5 * MIB))
    assert statuses.count("TRUNCATED") == 1
    there = max(told)
    assert there >= 2 * MIB  # of 4.5, less what was under way
    first, second = proxy.sent
    assert first > 4.5 * MIB
    assert total - there <= second < total - there + OVERHEAD


def test_a_client_whose_receipt_is_lost_sends_nothing_twice(
    take_part: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def around(coordinator: Coordinator, proxy: Proxy) -> None:
        submit = coordinator.submit

        async def unheard(requests: AsyncIterator[pb.SubmitRequest]) -> pb.Receipt:
            receipt = await submit(requests)
            calls.append(receipt.status)
            proxy.cut()
            return receipt

        monkeypatch.setattr(coordinator, "submit", unheard)

    proxy, statuses, total = asyncio.run(take_part(around, hidden=2_000))
    assert calls == [pb.STATUS_ACCEPTED] * 2  # one of each client: the progress says the rest
    assert statuses == ["ACCEPTED"] * 2
    assert sum(proxy.sent) < total + OVERHEAD


def test_a_full_disk_costs_no_turn_and_the_client_comes_back(
    take_part: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 3  # times

    def pwrite(file: int, data: memoryview, at: int) -> int:
        nonlocal full
        if len(data) > 100 and full:
            return os.pwrite(file, data[:100], at)  # what there was room for
        if full:
            full -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(file, data, at)

    class Full:
        """`os`, on a full disk."""

        def __getattr__(self, name: str) -> Any:
            return pwrite if name == "pwrite" else getattr(os, name)

    monkeypatch.setattr(spool, "os", Full())
    _, statuses, _ = asyncio.run(take_part(lambda _coordinator, _proxy: None, hidden=2_000))
    assert sorted(statuses) == ["ACCEPTED"] * 2 + ["UNAVAILABLE"] * 3


def test_a_ledger_without_room_costs_no_turn_and_the_client_comes_back(
    take_part: Callable[..., Any],
) -> None:
    def around(coordinator: Coordinator, _proxy: Proxy) -> None:
        database = coordinator._ledger._db
        answer, tries = coordinator._ledger.answer, 0

        def without_room(record: Any) -> None:
            nonlocal tries
            tries += 1
            (pages,) = database.execute("PRAGMA page_count").fetchone()
            most = pages if tries <= 3 else 1 << 30
            database.execute(f"PRAGMA max_page_count = {most}")
            if tries <= 3:  # nothing fits any more
                with database:
                    database.execute("CREATE TABLE IF NOT EXISTS ballast (data)")
                    database.execute("INSERT INTO ballast VALUES (zeroblob(1000000))")
            answer(record)

        coordinator._ledger.answer = without_room  # type: ignore[method-assign]

    _, statuses, _ = asyncio.run(take_part(around, hidden=2_000))
    assert statuses == ["ACCEPTED"] * 2
