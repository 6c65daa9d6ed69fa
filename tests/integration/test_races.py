"""What may happen between two steps of the server: the coordinator, with a shard in this process."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_server import coordinator as coordination
from fedrobust_server import lifeline
from fedrobust_server.audit import decide
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import Coordinator, Root
from fedrobust_server.gateways import _Link
from fedrobust_server.ledger import Ledger
from fedrobust_server.metrics import Metrics
from fedrobust_server.outpost import Outpost
from fedrobust_server.quarantine import Ban, Release
from fedrobust_server.reception import LeavingError, Reception
from fedrobust_server.round import KEEPS_TURN, Phase
from fedrobust_server.runs import RunFolder
from fedrobust_server.shards import Shard
from fedrobust_server.spool import Spool, identity
from ray.exceptions import OutOfDiskError

from fedrobust import InputError, aggregate
from fedrobust.optimisers import parse_optimiser
from fedrobust.training import Evaluation, Task

from .processes import until
from .test_door import Requests, chunk, header

D = 60
EVALUATION = Evaluation(0.5, 0.5)
Vector = npt.NDArray[np.float32]


@dataclass
class Rows:
    shard: Shard
    slots: list[int]
    anchors: Any

    def sum(self, part: Any) -> Any:
        return self.shard.sum(part, self.slots, D, self.anchors)

    def map(self, part: Any) -> Any:
        return self.shard.map(part, self.slots)


class Here:
    """`Shards` as the coordinator uses them, without Ray."""

    size = D

    def start(self, state: Any) -> None:
        self.shard = Shard(0, state, parse_optimiser("sgd"), 1)

    def open(self, spool: Spool) -> None:
        self.shard.open(spool.slots, str(spool.path.resolve()))

    def write(self, slot: int, start: int, values: Any) -> None:
        """It reads the spool."""

    def send(self, spool: Spool, slot: int) -> None:
        """It reads the spool."""

    def follow(self, slot: int, ticket: int, _start: int, stop: int) -> None:
        self.shard.follow(slot, ticket, stop)

    def complete(self, slot: int, ticket: int = 0) -> None:
        self.shard.complete(slot, ticket)

    def fold(self) -> None:
        self.shard.fold()

    def backlog(self) -> int:
        return 0

    def replay(self, _spool: Spool, slots: list[int]) -> None:
        for slot in slots:
            self.complete(slot)
        self.fold()

    def gram(self, slots: list[int]) -> Any:
        half = self.shard.gram(slots)
        return (half + half.T) / 2

    def rows(self, slots: list[int], anchors: Any) -> Rows:
        return Rows(self.shard, slots, anchors)

    def step(self, state: Spool) -> Any:
        self.shard.step(str(state.path.resolve()), identity(state.file))
        return state.map()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without Ray; and shards, which flush subnormal numbers, do so in this test only."""

    async def watch() -> None:
        await asyncio.Event().wait()

    opened, ledger = list[Ledger](), RunFolder.ledger

    def open_ledger(folder: RunFolder) -> Ledger:
        opened.append(ledger(folder))
        return opened[-1]

    monkeypatch.setattr(lifeline, "watch", watch)
    monkeypatch.setattr(RunFolder, "ledger", open_ledger)
    yield
    torch.set_flush_denormal(False)
    for one in opened:
        one.close()


def coordinator(
    folder: RunFolder,
    config: RunConfig,
    evaluate: Callable[[Any], Evaluation] = lambda _: EVALUATION,
    root: Root | None = None,
) -> Coordinator:
    """Of a new run, or of one that goes on."""
    state, shards, ledger = np.zeros((1, D), np.float32), Here(), folder.ledger()
    standing = ledger.standing(KEEPS_TURN)
    if standing is not None and not standing.closed:
        folder.check_spool(standing, D)
    shards.start(state)
    return Coordinator(
        config,
        (("w", (D,)),),
        shards,  # type: ignore[arg-type]
        ledger,
        evaluate,
        root,
        folder=folder,
        state=state,
        standing=standing,
        watch=lambda _report: None,
        metrics=Metrics(),
    )


def run_of(tmp_path: Path, clients: int, **changes: Any) -> tuple[RunFolder, RunConfig]:
    config = RunConfig(task=Task(clients=clients, model="softmax"), **changes)
    return RunFolder.create(tmp_path, config), config


def update(session: bytes, number: int, vector: Vector, parts: int = 3) -> Requests:
    data = vector.tobytes()
    each = len(data) // parts
    chunks = [chunk(at, data[at : at + each]) for at in range(0, len(data), each)]
    return [header(session, number, vector), *chunks]


async def stream(
    messages: Requests, gate: asyncio.Event | None = None, shut: int = 0
) -> AsyncIterator[pb.SubmitRequest]:
    """These messages; those after so many when the gate is open."""
    for at, message in enumerate(messages):
        if gate is not None and at == shut:
            await gate.wait()
        yield message
    if gate is not None:
        await gate.wait()


async def enter(where: Reception, name: str, heard: list[asyncio.Task[None]]) -> bytes:
    """Join, and listen for as long as it lasts."""
    session = (await where.enrol(pb.EnrolRequest(client=name))).session

    async def listen() -> None:
        async for _ in where.rounds(pb.RoundsRequest(session=session)):
            pass

    heard.append(asyncio.ensure_future(listen()))
    await asyncio.sleep(0)
    return session


async def leave(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def honest(name: str) -> Vector:
    return np.random.default_rng(list(name.encode())).normal(size=D).astype(np.float32)


def test_a_cancelled_admission_leaves_no_upload_behind_that_goes_on(tmp_path: Path) -> None:
    """Else a client could overwrite an update that counts, from another gateway."""
    folder, config = run_of(tmp_path, 3, rounds=1, rule="mean", gateways=2)

    class Remote:
        def __init__(self, method: Any) -> None:
            self.remote = lambda *about: asyncio.ensure_future(method(*about))

    class Actor:
        def __init__(self, outpost: Outpost) -> None:
            self.questions, self.answer = Remote(outpost.questions), Remote(outpost.answer)

    async def scenario() -> None:
        server, outpost, heard = coordinator(folder, config), Outpost(), list[asyncio.Task[None]]()
        talk = asyncio.ensure_future(_Link("gateway-1", Actor(outpost), server, None).talk())  # type: ignore[arg-type]
        running = asyncio.ensure_future(server.run())
        sessions = {name: await enter(server, name, heard) for name in ("a", "b", "evil")}
        there = (await outpost.enrol(pb.EnrolRequest(client="evil"))).session
        await until(server._round.begun.is_set)
        bad, gate = np.full(D, 1e6, np.float32), asyncio.Event()
        first = asyncio.ensure_future(outpost.submit(stream(update(there, 1, bad), gate, 2)))
        await until(lambda: bool(outpost._uploads) and outpost._uploads["evil"].received > 0)
        second = asyncio.ensure_future(outpost.submit(stream(update(there, 1, bad))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await leave(second)
        assert second.cancelled()
        assert not server._round.places
        for name, session in sessions.items():
            if name != "b":
                receipt = await server.submit(stream(update(session, 1, honest(name))))
                assert receipt.status == pb.STATUS_ACCEPTED
        gate.set()
        assert (await first).status != pb.STATUS_ACCEPTED
        row = server._round.spool.read(server._round.slots["evil"], 0, D)  # type: ignore[union-attr]
        assert np.array_equal(row, honest("evil"))
        await server.submit(stream(update(sessions["b"], 1, honest("b"))))
        mean = np.mean([honest(name) for name in sessions], axis=0)
        np.testing.assert_allclose(await running, mean, atol=1e-6)
        await leave(talk, *heard)

    asyncio.run(scenario())


def cut_off(folder: RunFolder, config: RunConfig, updates: dict[str, Vector]) -> None:
    """Leave a round open, with these updates, and one client missing."""

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        sessions = {name: await enter(server, name, heard) for name in [*updates, "missing"]}
        for name, vector in updates.items():
            receipt = await server.submit(stream(update(sessions[name], 1, vector)))
            assert receipt.status == pb.STATUS_ACCEPTED
        await leave(running, *heard)
        server._ledger.close()

    asyncio.run(scenario())


def test_a_resumed_server_works_its_own_update_out_again(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 7, rounds=1, rule="fltrust", root=9, deadline=1.0)
    updates = {f"h{i}": honest(f"h{i}") for i in range(6)}
    cut_off(folder, config, updates)
    asked = []

    def root(number: int, model: Vector) -> Vector:
        asked.append((number, model.copy()))
        return honest("root")

    async def scenario() -> None:
        moved = await coordinator(folder, config, root=root).run()
        anchors = {"root": honest("root")}
        expected = aggregate(list(updates.values()), "fltrust", anchors=anchors).value
        np.testing.assert_allclose(moved, expected, atol=1e-6)
        assert np.abs(expected).max() > 0.1
        (number, model), *others = asked
        assert (number, model.any(), others) == (1, False, [])

    asyncio.run(scenario())


def test_a_client_that_comes_and_goes_while_shards_read_updates_again_closes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the rule would look at a Gram matrix of zeros, and see nothing."""
    folder, config = run_of(tmp_path, 8, rounds=1, rule="filter", deadline=1.0)
    updates = {f"h{i}": honest(f"h{i}") for i in range(6)}
    cut_off(folder, config, {**updates, "evil": np.full(D, 1e6, np.float32)})
    replay = Here.replay

    def slowly(self: Here, spool: Spool, slots: list[int]) -> None:
        time.sleep(0.3)
        replay(self, spool, slots)

    monkeypatch.setattr(Here, "replay", slowly)

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        await enter(server, "missing", heard)
        await asyncio.sleep(0.1)
        await leave(*heard)
        assert np.abs(await running).max() < 3

    asyncio.run(scenario())


def test_an_update_that_ends_while_the_server_stops_may_come_again(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 2, rounds=1, rule="mean", deadline=60.0)

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        sessions = {name: await enter(server, name, heard) for name in "ab"}
        await server.submit(stream(update(sessions["a"], 1, honest("a"))))
        gate = asyncio.Event()
        slow = asyncio.ensure_future(
            server.submit(stream(update(sessions["b"], 1, honest("b")), gate, 99))
        )
        await until(lambda: bool(server._uploads) and "b" in server._uploads)
        server.drain()
        gate.set()
        with pytest.raises(LeavingError):
            await slow
        await running
        await leave(*heard)
        server._ledger.close()

    asyncio.run(scenario())
    standing = folder.ledger().standing(KEEPS_TURN)
    assert standing is not None
    assert (set(standing.accepted), standing.failed, standing.closed) == ({"a"}, frozenset(), False)


async def first_round(folder: RunFolder, config: RunConfig) -> None:
    """One round of one client; the server is killed before the next begins."""
    server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
    running = asyncio.ensure_future(server.run())
    session = await enter(server, "a", heard)
    await until(server._round.begun.is_set)
    await asyncio.gather(server.submit(stream(update(session, 1, honest("a")))), leave(*heard))
    await until(lambda: bool(server._ledger.rounds()[0]["closed"]))
    await leave(running)
    server._ledger.close()


def test_who_comes_early_to_a_resumed_server_waits_for_the_right_round(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 1, rounds=2, rule="mean", deadline=60.0)

    def slowly(_model: Any) -> Evaluation:
        time.sleep(0.3)
        return EVALUATION

    async def then() -> None:
        server, heard = coordinator(folder, config, slowly), list[asyncio.Task[None]]()
        assert server._standing is not None
        assert server._standing.closed
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        early = server.submit(stream(update(session, 2, honest("b"))))
        assert (await asyncio.wait_for(early, 10)).status == pb.STATUS_ACCEPTED
        await running
        await leave(*heard)

    asyncio.run(first_round(folder, config))
    asyncio.run(then())


def test_a_fault_at_a_deadline_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = run_of(tmp_path, 2, deadline=0.2, quorum=1.0)

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it tells of it as well

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(server._ledger, "judge_clients", full)
        running = asyncio.ensure_future(server.run())
        for name in "ab":
            await enter(server, name, heard)
        with pytest.raises(sqlite3.OperationalError):
            await asyncio.wait_for(running, 10)
        await leave(*heard)

    asyncio.run(scenario())


def test_an_event_that_cannot_be_recorded_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = coordinator(*run_of(tmp_path, 2))

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(server._ledger, "event", full)
    server.note("gateway-1 was lost")
    assert "gateway-1 was lost" in caplog.text
    assert "disk is full" in caplog.text


def test_rounds_wait_for_models_to_be_judged(tmp_path: Path) -> None:
    """Else models would pile up, and checkpoints come after the crash that they are for."""
    folder, config = run_of(tmp_path, 1, rounds=6, rule="mean", checkpoint_every=2)
    judged, ahead = list[int](), list[int]()

    def evaluate(_model: Any) -> Evaluation:
        time.sleep(0.05)
        judged.append(1)
        return EVALUATION

    async def scenario() -> None:
        server, heard = coordinator(folder, config, evaluate=evaluate), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        for number in range(1, 7):
            await until(lambda n=number: server._round.number == n)  # type: ignore[misc]
            await server.submit(stream(update(session, number, honest("a"))))
            ahead.append(number - len(judged))
        await running
        await leave(*heard)

    asyncio.run(scenario())
    assert max(ahead) <= 3
    assert len(judged) == 6
    assert len(list((folder.path / "checkpoints").iterdir())) == 3


def test_what_is_decided_while_the_server_is_down_holds_from_the_next_round(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 1, rounds=2, rule="mean")
    asyncio.run(first_round(folder, config))
    decide(folder.path, "a", Ban(), "sends poison")
    server = coordinator(folder, config)
    assert server._state.excluded == {"a"}
    assert [row["applied"] for row in server._ledger._db.execute("SELECT applied FROM overrides")] == [2]


def test_who_is_released_while_the_federation_waits_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "_HEED", 0.02)
    folder, config = run_of(tmp_path, 1, rounds=2, rule="mean")
    asyncio.run(first_round(folder, config))
    decide(folder.path, "a", Ban(), "sends poison")

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        await asyncio.sleep(0.2)
        assert (server._state.phase, server._state.round) == (Phase.WAITING, 1)
        decide(folder.path, "a", Release(), "it does not")
        await until(lambda: server._state.phase is Phase.COLLECTING)
        await server.submit(stream(update(session, 2, honest("a"))))
        await running
        await leave(*heard)

    asyncio.run(scenario())


def test_what_cannot_be_an_update_stays_evidence_when_the_server_is_killed(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 3, rounds=1, rule="mean")

    async def scenario() -> None:
        for killed in (True, False):
            server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
            running = asyncio.ensure_future(server.run())
            sessions = {name: await enter(server, name, heard) for name in "abc"}
            await until(server._round.begun.is_set)
            if killed:
                bad = update(sessions["c"], 1, np.full(D, np.nan, np.float32))
                assert (await server.submit(stream(bad))).status == pb.STATUS_NON_FINITE
                await leave(running, *heard)
                server._ledger.close()
        for name in "ab":
            await server.submit(stream(update(sessions[name], 1, honest(name))))
        await running
        await leave(*heard)
        assert server._ledger.suspects().clients["c"].suspicion > 0

    asyncio.run(scenario())


def test_a_model_that_a_killed_server_did_not_come_to_is_kept_and_judged(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, 1, rounds=3, rule="mean", checkpoint_every=1)
    gate, there = threading.Event(), tmp_path / "copy"

    def slowly(_model: Any) -> Evaluation:
        gate.wait(60)
        return EVALUATION

    async def first() -> None:
        server, heard = coordinator(folder, config, slowly), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        await until(server._round.begun.is_set)
        await server.submit(stream(update(session, 1, honest("a"))))
        await until(lambda: server._round.number == 2 and server._round.begun.is_set())
        shutil.copytree(folder.path, there)  # what is there if it is killed now
        gate.set()
        await leave(running, *heard)

    async def then() -> None:
        server, heard = coordinator(RunFolder(there), config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        for number in (2, 3):
            await until(lambda n=number: server._round.number == n)  # type: ignore[misc]
            await server.submit(stream(update(session, number, honest("a"))))
        await running
        await leave(*heard)
        assert [row["accuracy"] for row in server._ledger.rounds()] == [0.5, 0.5, 0.5]

    asyncio.run(first())
    for begun in there.glob("checkpoints/*"):  # as if it had been killed a moment before
        begun.unlink()
    asyncio.run(then())
    assert len(list(there.glob("checkpoints/*.safetensors"))) == 3


@pytest.mark.parametrize("lasting", [False, True])
def test_what_could_not_be_passed_on_to_a_shard_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """To one that cannot see the spool; Ray's memory may be full for a moment, or for long."""
    calls = itertools.count(1)

    def full() -> None:
        if next(calls) == 2 or lasting:
            raise OutOfDiskError("no room")

    def opened(self: Here, spool: Spool) -> None:
        self.shard.open(spool.slots, None)

    def write(self: Here, slot: int, start: int, values: Any) -> None:
        full()
        self.shard.write(slot, start, values)

    def send(self: Here, spool: Spool, slot: int) -> None:
        if lasting:
            full()
        self.shard.write(slot, 0, spool.read(slot, 0, D))

    for method in (write, send):
        monkeypatch.setattr(Here, method.__name__, method)
    monkeypatch.setattr(Here, "open", opened)
    monkeypatch.setattr(Here, "follow", lambda *_: None)
    folder, config = run_of(tmp_path, 1, rounds=1, rule="mean")

    async def scenario() -> None:
        server, heard = coordinator(folder, config), list[asyncio.Task[None]]()
        running = asyncio.ensure_future(server.run())
        session = await enter(server, "a", heard)
        receipt = await server.submit(stream(update(session, 1, honest("a"))))
        if lasting:
            assert receipt.status == pb.STATUS_UNAVAILABLE
            assert "no room" in receipt.reason
            assert not server._round.places
            await leave(running)
        else:
            assert receipt.status == pb.STATUS_ACCEPTED
            np.testing.assert_allclose(await running, honest("a"), atol=1e-6)
        await leave(*heard)

    asyncio.run(scenario())


def test_a_run_has_one_server_at_a_time(tmp_path: Path) -> None:
    folder, _ = run_of(tmp_path, 2)
    with folder.held(), pytest.raises(InputError, match="another server is at the run"), folder.held():
        pass
    with folder.held():
        pass


def test_a_run_that_is_refused_is_not_removed_under_another_server(tmp_path: Path) -> None:
    config = RunConfig(task=Task(clients=2, model="softmax"))
    folders = list[RunFolder]()

    def refused() -> None:
        with RunFolder.begun(tmp_path, config) as folder:
            folders.append(folder)
            others.enter_context(folder.held())
            raise InputError("too late")

    with ExitStack() as others:
        with pytest.raises(InputError, match="too late"):
            refused()
        assert folders[0].path.is_dir()


def test_storage_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    folder, _ = run_of(tmp_path, 2)
    with folder.held():
        assert "cannot be locked (No locks available)" in caplog.text
