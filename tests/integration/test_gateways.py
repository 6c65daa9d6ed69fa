"""Several gateways: the same model by whichever clients come, and no harm if one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from fedrobust_clients.credentials import Credentials, open_channel
from fedrobust_clients.remote import run as take_part
from fedrobust_clients.runtime import Floats, Update
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import Coordinator
from fedrobust_server.gateway import listen
from fedrobust_server.gateways import Gateways, further_gateways
from fedrobust_server.keys import Authority
from fedrobust_server.launch import Federation, federation
from fedrobust_server.limits import Limits
from fedrobust_server.outpost import Front, Token
from fedrobust_server.runs import RunFolder
from fedrobust_server.security import Security

from fedrobust import InputError
from fedrobust.training import Task

from .processes import process, until
from .test_door import BYTES, GOOD, chunk, enrol, header, requests, submit
from .test_federation import model

CLIENTS = 6
LOOPBACK = Front("127.0.0.1:0")


@dataclass(frozen=True)
class Drawn:
    """A client whose updates depend on the model, on itself and on the round."""

    seed: int
    delay: float = 0.0

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        await asyncio.sleep(self.delay)
        noise = np.random.default_rng([round, self.seed]).normal(size=len(model))
        return Update((noise - model).astype(np.float32), 1)


@dataclass(frozen=True)
class Doors:
    """A federation and the ports by which clients come to it, the coordinator's own first."""

    federation: Federation
    gateways: Gateways
    ports: Sequence[int]

    @property
    def coordinator(self) -> Coordinator:
        return self.federation.coordinator


@contextlib.asynccontextmanager
async def doors(
    folder: Path, count: int, front: Front = LOOPBACK, **changes: Any
) -> AsyncIterator[Doors]:
    """A federation with so many gateways, each on a port of its own."""
    task = Task(model="softmax", clients=changes.pop("clients", CLIENTS))
    defaults: dict[str, Any] = {"rounds": 3, "rule": "filter", "quorum": 1.0, "deadline": 30.0}
    config = RunConfig(task=task, gateways=count, **(defaults | changes))
    run = RunFolder.create(folder, config)
    security = Security.load(front.tls, front.proof, front.federation) if front.tls else None
    with federation(config, run, data_dir=None, ray_address=None, watch=lambda _: None) as ready:
        own = await listen(ready.coordinator, front.address, security)
        async with further_gateways(ready.coordinator, run, front, count - 1) as gateways:
            ports = [own.port, *(opened.port for opened in gateways.opened.values())]
            yield Doors(ready, gateways, ports)
        await own.stop(grace=0.5)


@contextlib.asynccontextmanager
async def stub(port: int, credentials: Credentials | None = None) -> AsyncIterator[FederationStub]:
    async with open_channel(f"127.0.0.1:{port}", credentials) as channel:
        yield FederationStub(channel)


def accepted(doors: Doors) -> list[tuple[int, str]]:
    answers = doors.coordinator._ledger.answers()
    return [(a["round"], a["client"]) for a in answers if a["status"] == "ACCEPTED"]


SLOW = [(1, 3), (2, 1), (2, 3), (3, 1)]


@pytest.fixture(scope="module")
def one_and_one(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Floats:
    return asyncio.run(trained(tmp_path_factory.mktemp("one"), 1, 1))


async def trained(folder: Path, count: int, shards: int) -> Floats:
    async with doors(folder, count, shards=shards) as there:
        running = asyncio.ensure_future(there.coordinator.run())
        clients = [
            take_part(
                f"127.0.0.1:{there.ports[i % count]}", f"c{i}", lambda _, i=i: Drawn(i), lambda *_: None
            )
            for i in range(CLIENTS)
        ]
        assert await asyncio.gather(*clients) == [3] * CLIENTS
        found = await running
        assert sorted(accepted(there)) == [(r, f"c{i}") for r in (1, 2, 3) for i in range(CLIENTS)]
        return found


@pytest.mark.parametrize(
    ("count", "shards"), [(3, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_the_number_of_gateways_and_shards_changes_only_last_digits(
    one_and_one: Floats, tmp_path: Path, count: int, shards: int
) -> None:
    found = asyncio.run(trained(tmp_path, count, shards))
    np.testing.assert_allclose(found, one_and_one, rtol=1e-4, atol=1e-6)


# ---- one place at a time ----------------------------------------------------------------------------


class Paused:
    """An upload that sends one part after the other, as it is told; None ends it."""

    def __init__(self, stub: Any, *parts: pb.SubmitRequest) -> None:
        self._parts: asyncio.Queue[pb.SubmitRequest | None] = asyncio.Queue()
        for part in parts:
            self._parts.put_nowait(part)
        self.call = stub.Submit(self._stream())

    async def _stream(self) -> AsyncIterator[pb.SubmitRequest]:
        while (part := await self._parts.get()) is not None:
            yield part

    async def end(self, *parts: pb.SubmitRequest) -> str:
        for part in (*parts, None):
            self._parts.put_nowait(part)
        return pb.Status.Name((await self.call).status).removeprefix("STATUS_")


async def eventually(stub: Any, messages: list[pb.SubmitRequest]) -> str:
    """Submit until the server has a place for it."""
    for _ in range(200):
        status = await submit(stub, messages)
        if status != "UNAVAILABLE":
            return status
        await asyncio.sleep(0.05)
    pytest.fail("the place is never free again")


async def progress(stub: Any, session: bytes, head: pb.SubmitRequest) -> int:
    asked = pb.ProgressRequest(session=session, round=head.header.round, digest=head.header.digest)
    reply: pb.ProgressReply = await stub.Progress(asked)
    return reply.received


def test_an_update_is_taken_in_by_one_connection_at_a_time(ray_cluster: None, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            doors(tmp_path, 2, clients=1, rounds=4, rule="mean") as there,
            stub(there.ports[0]) as own,
            stub(there.ports[1]) as further,
        ):
            running = asyncio.ensure_future(there.coordinator.run())
            here, _ = await enrol(own, "c")
            session, offers = await enrol(further, "c")
            start = there.coordinator._model.copy()
            half, rest = chunk(0, BYTES[:400]), chunk(400, BYTES[400:])

            assert (await anext(offers)).round == 1
            paused = Paused(further, header(session, 1, GOOD), half)
            await asyncio.sleep(0.3)
            assert await submit(own, requests(here, 1, GOOD)) == "UNAVAILABLE"
            assert await paused.end(rest) == "ACCEPTED"

            assert (await anext(offers)).round == 2
            paused = Paused(further, header(session, 2, GOOD), half)
            await asyncio.sleep(0.3)
            paused.call.cancel()
            assert await eventually(own, requests(here, 2, 2 * GOOD)) == "ACCEPTED"

            # Whole, but not closed, when a second one is let in: it might be written over by now.
            assert (await anext(offers)).round == 3
            paused = Paused(further, header(session, 3, GOOD), half, rest)
            await asyncio.sleep(0.3)
            other = (3 * GOOD).tobytes()
            later = Paused(further, header(session, 3, 3 * GOOD), chunk(0, other[:400]))
            await asyncio.sleep(0.3)
            assert await paused.end() == "TRUNCATED"
            assert await later.end(chunk(400, other[400:])) == "ACCEPTED"

            # What was interrupted goes on at its own gateway, and begins anew at another.
            assert (await anext(offers)).round == 4
            head = header(session, 4, GOOD)
            assert await submit(further, [head, half]) == "TRUNCATED"
            assert await progress(own, here, head) == 0
            assert await progress(further, session, head) == 400
            assert await submit(further, [header(session, 4, GOOD, offset=400), rest]) == "ACCEPTED"
            np.testing.assert_allclose(await running - start, 7 * GOOD, rtol=1e-5)

    asyncio.run(scenario())


def test_an_update_that_cannot_be_read_back_costs_no_turn_and_is_not_sent_again(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with (
            doors(tmp_path, 2, clients=1, rounds=1, rule="mean") as there,
            stub(there.ports[1]) as further,
        ):
            running = asyncio.ensure_future(there.coordinator.run())
            session, offers = await enrol(further, "c")
            assert (await anext(offers)).round == 1
            start = there.coordinator._model.copy()

            def broken(*_: Any) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            with monkeypatch.context() as disk:
                disk.setattr(there.coordinator._shards, "send", broken)
                assert await submit(further, requests(session, 1, GOOD)) == "UNAVAILABLE"
            assert not there.coordinator._round.places
            (answer,) = there.coordinator._ledger.answers()
            assert "cannot read updates: Input/output error" in answer["reason"]
            head = header(session, 1, GOOD, offset=len(BYTES))
            assert await progress(further, session, head) == len(BYTES)
            assert await submit(further, [head]) == "ACCEPTED"
            np.testing.assert_allclose(await running - start, GOOD, rtol=1e-5)

    asyncio.run(scenario())


# ---- nobody harms the others ------------------------------------------------------------------------


def test_a_malformed_client_at_one_gateway_harms_nobody_at_another(
    ray_cluster: None, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            doors(tmp_path, 3, clients=2, rounds=2, rule="mean", quorum=0.5) as there,
            stub(there.ports[1]) as rogue,
            stub(there.ports[2]) as stub_,
        ):
            running = asyncio.ensure_future(there.coordinator.run())
            bad, bad_offers = await enrol(rogue, "bad")
            good, offers = await enrol(stub_, "good")
            start = there.coordinator._model.copy()
            nan = np.full_like(GOOD, np.nan)
            for number, messages in enumerate([requests(bad, 1, nan), [header(bad, 2, GOOD[:-1])]], 1):
                await anext(bad_offers)
                await anext(offers)
                with socket.create_connection(("127.0.0.1", there.ports[1])) as noise:
                    noise.sendall(os.urandom(1 << 16))
                with pytest.raises(grpc.aio.AioRpcError, match="unknown session"):
                    await submit(rogue, requests(good, number, -GOOD))  # another's, from elsewhere
                assert await submit(rogue, messages) in {"NON_FINITE", "WRONG_LENGTH"}
                assert await submit(stub_, requests(good, number, GOOD)) == "ACCEPTED"
            np.testing.assert_allclose(await running - start, 2 * GOOD, rtol=1e-5)

    asyncio.run(scenario())


@pytest.mark.slow
def test_certificates_are_asked_for_at_every_gateway(ray_cluster: None, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "keys")
    authority.server(["127.0.0.1"])
    for name in ("alice", "bob"):
        authority.client(name)
    ca = authority.folder / "authority.pem"
    alice, bob = (Credentials.read(ca, authority.folder / "clients" / n) for n in ("alice", "bob"))

    async def scenario() -> None:
        front = Front("127.0.0.1:0", authority.folder / "server")
        async with doors(tmp_path, 2, front, clients=1, rounds=2, rule="mean") as there:
            running = asyncio.ensure_future(there.coordinator.run())
            async with stub(there.ports[1]) as clear, stub(there.ports[1], bob) as bobs:
                with pytest.raises(grpc.aio.AioRpcError):
                    await enrol(clear, "alice")
                with pytest.raises(grpc.aio.AioRpcError, match="is of bob"):
                    await enrol(bobs, "alice")
            authority.revoke("bob")
            async with stub(there.ports[1], bob) as bobs:
                with pytest.raises(grpc.aio.AioRpcError, match="revoked"):
                    await enrol(bobs, "bob")
            address = f"127.0.0.1:{there.ports[1]}"
            part = take_part(address, "alice", lambda _: Drawn(0), lambda *_: None, credentials=alice)
            assert await part == 2
            await running
            assert accepted(there) == [(1, "alice"), (2, "alice")]

    asyncio.run(scenario())


@pytest.mark.slow
def test_limits_are_kept_at_every_gateway(ray_cluster: None, tmp_path: Path) -> None:
    async def scenario() -> None:
        front = Front("127.0.0.1:0", limits=Limits(sessions=1))
        async with doors(tmp_path, 2, front) as there, stub(there.ports[1]) as further:
            await enrol(further, "a")
            with pytest.raises(grpc.aio.AioRpcError, match="the server has 1 sessions already"):
                await enrol(further, "b")

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_gateway_that_cannot_serve_says_why(ray_cluster: None, tmp_path: Path) -> None:
    async def refused(front: Front, token: Token) -> str:
        async with doors(tmp_path, 1) as there:
            gateways = Gateways(there.coordinator, front, token)
            with pytest.raises(InputError) as caught:
                await gateways.start("gateway-1")
            await gateways.stop(grace=0)
            return str(caught.value)

    token = Token(tmp_path / "elsewhere" / "gateways.token", "text")
    said = asyncio.run(refused(LOOPBACK, token))
    assert re.fullmatch(f"gateway-1 on .* cannot serve: .*{token.path.parent}, which must be on.*", said)
    for text in ("other", ""):
        token.path.parent.mkdir(exist_ok=True)
        token.path.write_text(text)
        with pytest.raises(InputError, match="must be on storage"):
            token.check()
    token.path.write_text("text")
    token.check()


# ---- and nothing is lost with a gateway -------------------------------------------------------------


async def killed(folder: Path, moments: Sequence[tuple[int, int]], rounds: int) -> None:
    """Train, and kill a gateway each time so many updates have been accepted in all."""
    told: list[tuple[int, str]] = []

    def watch(number: int, receipt: pb.Receipt, name: str) -> None:
        if receipt.status == pb.STATUS_ACCEPTED:
            told.append((number, name))

    async with doors(folder, 3, rounds=rounds, rule="mean") as there:
        running = asyncio.ensure_future(there.coordinator.run())
        parts = []
        for i in range(CLIENTS):  # each begins at a gateway of its own, and knows them all
            ports = [*there.ports[i % 3 :], *there.ports[: i % 3]]
            name = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
            told_of = lambda number, receipt, i=i: watch(number, receipt, f"c{i}")  # noqa: E731
            parts.append(take_part(name, f"c{i}", lambda _, i=i: Drawn(i, 0.02 * i), told_of))
        taking_part = asyncio.gather(*parts)
        for count, which in moments:
            await until(partial(reached, there, running, count))
            name = f"gateway-{which}"
            before = there.gateways.opened[name].process
            os.kill(before, signal.SIGKILL)
            assert set(told) <= set(accepted(there))
            await until(partial(started_anew, there, name, before))
        await asyncio.gather(taking_part, running)
        # Whoever is away when a round begins is not asked in it; everyone asked was waited for.
        ledger = there.coordinator._ledger
        assert [r["outcome"] for r in ledger.rounds()] == ["aggregated"] * rounds
        assert len(accepted(there)) == len(set(accepted(there)))
        assert len(told) == len(set(told))
        assert set(told) <= set(accepted(there))
        events = " ".join(event["what"] for event in ledger.events())
        assert f"gateway-{moments[0][1]} was lost" in events


def reached(doors: Doors, running: asyncio.Future[Any], count: int) -> bool:
    return running.done() or len(accepted(doors)) >= count


def started_anew(doors: Doors, name: str, before: int) -> bool:
    return doors.gateways.opened[name].process != before


def test_a_killed_gateway_costs_no_acknowledged_update(ray_cluster: None, tmp_path: Path) -> None:
    asyncio.run(killed(tmp_path, [(3, 1)], rounds=4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_gateways_killed_at_random_moments(ray_cluster: None, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moments = sorted((int(rng.integers(CLIENTS * 8)), int(rng.integers(1, 3))) for _ in range(4))
    asyncio.run(killed(tmp_path, moments, rounds=10))


@pytest.mark.slow
def test_a_gateway_killed_in_the_middle_of_an_upload_frees_its_place(
    ray_cluster: None, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            doors(tmp_path, 2, clients=1, rounds=1, rule="mean") as there,
            stub(there.ports[0]) as own,
            stub(there.ports[1]) as further,
        ):
            running = asyncio.ensure_future(there.coordinator.run())
            session, offers = await enrol(further, "c")
            assert (await anext(offers)).round == 1
            paused = Paused(further, header(session, 1, GOOD), chunk(0, BYTES[:400]))
            await asyncio.sleep(0.3)
            os.kill(there.gateways.opened["gateway-1"].process, signal.SIGKILL)
            here, offers = await enrol(own, "c")
            assert await eventually(own, requests(here, 1, GOOD)) == "ACCEPTED"
            with pytest.raises(grpc.aio.AioRpcError):
                await paused.call
            await running
            statuses = {a["status"] for a in there.coordinator._ledger.answers()}
            assert {"ACCEPTED", "TRUNCATED"} <= statuses
            assert there.coordinator.owner(session) is None

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_command_line_serves_processes_by_two_gateways(tmp_path: Path) -> None:
    place = ("--json", "--bind", "127.0.0.1:0", "--runs-dir", str(tmp_path), "--run", "two")
    plan = ("--clients", "3", "--rounds", "2", "--model", "softmax", "--gateways", "2")
    with process("serve", *place, *plan) as server, contextlib.ExitStack() as stack:
        assert server.stdout
        address = json.loads(server.stdout.readline())["listening"]
        clients = [
            stack.enter_context(process("client", "--server", address, "--id", str(i))) for i in range(3)
        ]
        for client in clients:
            output, _ = client.communicate(timeout=60)
            assert output.splitlines() == ["round 1: accepted", "round 2: accepted"]
        *_, summary = [json.loads(line) for line in server.stdout]
        assert summary["updates_accepted"] == 6
        assert server.wait(60) == 0
    assert not list((tmp_path / "two").glob("*.token"))
    assert model(tmp_path, "two", 2)
