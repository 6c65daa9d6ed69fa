"""Whatever is sent to a live server, it stays up, keeps its memory, and honest clients do not notice.

The server is a process of its own. Beside honest clients, two hostile ones send it scripts: up to three
uploads of one client at the same time, over two connections, valid, mutated or made of random bytes,
cancelled, cut off or taken over, and other calls in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest
import zstandard
from fedrobust_clients.remote import run
from fedrobust_clients.runtime import Update
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.gateway import SERVICE
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .processes import loop_in_a_thread, process

D = 650  # softmax regression on digits
HONEST, HOSTILE = 3, 2
RUN = [
    *("--clients", str(HONEST + HOSTILE), "--rounds", "1000000", "--model", "softmax", "--rule", "mean"),
    *("--deadline", "5", "--quorum", "0.1", "--checkpoint-every", "1000000", "--run", "fuzzed"),
]
GROWTH = 96 << 20
"""Bytes by which the server may grow: some messages of 4 MiB a connection, and what they unpack to."""

# ---- what is sent ---------------------------------------------------------------------------------

_EDGES = [0, 1, 3, 4, 400, D * 2, D * 4 - 4, D * 4, D * 4 + 4, 2**31, 2**32, 2**63, 2**64 - 1]
_press = zstandard.ZstdCompressor(level=1).compress
BOMBS = [
    _press(bytes(4 << 20)),  # as long as a chunk may be
    _press(bytes((4 << 20) + 4)),
    _press(bytes(256 << 20)),
    b"(\xb5/\xfd\xe0" + (1 << 62).to_bytes(8, "little"),  # a frame that promises exabytes
    zstandard.ZstdCompressor(write_content_size=False).compress(bytes(256 << 20)),
    _press(bytes(64)) * 2,  # two frames
    _press(bytes(64))[:-1],
    b"P*M\x18\x00\x01\x00\x00" + bytes(256),  # a frame to be skipped
    _press(b""),
    b"",
]
METHODS = [
    *(f"/{SERVICE}/{name}" for name in ("Enrol", "Rounds", "Model", "Progress", "Submit", "Nothing")),
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]

numbers = st.sampled_from(_EDGES) | st.integers(0, 2**64 - 1)
dtypes = st.sampled_from([*vectors.DTYPES] * 4 + [0, 77])
compressions = st.sampled_from([pb.COMPRESSION_NONE] * 3 + [pb.COMPRESSION_ZSTD] * 2 + [5])
seldom = st.integers(0, 9).map(lambda n: n == 0)


def mostly(usual: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual value nine times in ten."""
    return seldom.flatmap(lambda rare: other if rare else st.just(usual))


@dataclass(frozen=True)
class Head:
    """How an upload's header differs from that of a good one, which has None everywhere."""

    dtype: Any
    compression: Any
    session: bytes | None
    round: int | None
    length: int | None
    digest: bytes | None
    offset: int | None
    of: int
    """Which of the script's updates it announces."""


heads = st.builds(
    Head,
    dtype=dtypes,
    compression=compressions,
    session=mostly(None, st.binary(max_size=20)),
    round=mostly(None, numbers),
    length=mostly(None, numbers),
    digest=mostly(None, st.binary(max_size=40)),
    offset=mostly(None, numbers),
    of=mostly(0, st.just(1)),
)


@dataclass(frozen=True)
class Part:
    """One message of an upload: the next of the update's bytes, or something instead."""

    size: int
    what: str
    number: int
    data: bytes


parts = st.builds(
    Part,
    size=st.sampled_from([4, 8, 400, 1300, D * 4, D * 4]),
    what=mostly(
        "next",
        st.sampled_from(["offset", "data", "bomb", "again", "raw", "flip", "header", "large", "nan"]),
    ),
    number=numbers,
    data=st.binary(max_size=64),
)


@dataclass(frozen=True)
class Lane:
    """One upload: its header, its messages, and how it ends."""

    head: Head
    parts: list[Part]
    end: str
    channel: int


lanes = st.builds(
    Lane,
    head=heads,
    parts=st.lists(parts, min_size=1, max_size=5),
    end=st.sampled_from(["done", "done", "rest", "rest", "rest", "cancel"]),
    channel=st.integers(0, 1),
)


@dataclass(frozen=True)
class Call:
    """Any call, with random bytes or a mutated message."""

    method: str
    messages: list[bytes]
    known: bool
    """Whether the caller's session is put in front of the first message."""
    patience: float


# A session in front and random fields behind is a good request, as often as not.
calls = st.builds(
    Call,
    method=st.sampled_from(METHODS),
    messages=st.lists(
        st.binary(max_size=40)
        | st.builds(
            lambda r, o, d: pb.ModelRequest(
                round=r, offset=o, encoding=pb.Encoding(dtype=d)
            ).SerializeToString(),
            *(numbers, numbers, dtypes),
        )
        | st.builds(
            lambda name: pb.EnrolRequest(client=name).SerializeToString(),
            st.text(max_size=70) | st.sampled_from(["hostile-0", "a" * 65, "../x", "stranger"]),
        ),
        max_size=3,
    ),
    known=st.booleans(),
    patience=st.sampled_from([0.001, 0.02]),
)

# What happens next: a lane's next message, a call, a question for the progress, or nothing for a moment.
moves = st.integers(0, 2) | st.integers(0, 2) | calls | st.sampled_from(["progress", "pause", "settle"])
scripts = st.tuples(st.lists(lanes, min_size=1, max_size=3), st.lists(moves, max_size=14))
Script = tuple[list[Lane], list[Any]]

# ---- who sends it ---------------------------------------------------------------------------------

_SPENT = {pb.STATUS_ACCEPTED, pb.STATUS_DUPLICATE, pb.STATUS_NON_FINITE, pb.STATUS_MALFORMED} | {
    *(pb.STATUS_WRONG_LENGTH, pb.STATUS_WRONG_DTYPE, pb.STATUS_WRONG_DIGEST)
}
"""Receipts after which a client has no turn in the round any more."""


class Trainer:
    """An honest client: its updates follow from its number and the round, and it remembers models."""

    def __init__(self, number: int, battle: Battle) -> None:
        self._number, self._battle = number, battle

    async def update(self, round: int, model: Any) -> Update:  # noqa: A002
        vector = np.random.default_rng((self._number, round)).normal(0, 0.1, D).astype(np.float32)
        self._battle.models[round] = model.copy()
        self._battle.declare(vectors.pack(vector, pb.DTYPE_FLOAT32), pb.DTYPE_FLOAT32)
        return Update(vector, 10)


@dataclass
class Battle:
    """Everybody at a server: honest clients at work, hostile ones that play scripts.

    Attributes:
        models: as honest clients were sent them, by round.
        declared: by digest, what an update with it may hold.
        receipts: of honest clients, by status.
        outcomes: of hostile calls, by status.
        scripts: so many have been played.
        messages: so many have been sent in them.
    """

    address: str
    models: dict[int, Any] = field(default_factory=dict)
    declared: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    receipts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    scripts: int = 0
    messages: int = 0

    async def begin(self) -> None:
        """Everybody joins."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self.address, options) for _ in range(HOSTILE)]
        self._turn = asyncio.Condition()
        self._offered, self._spent = [0] * HOSTILE, [0] * HOSTILE
        self._sessions = [b""] * HOSTILE
        self._tasks = [asyncio.create_task(self._listen(i)) for i in range(HOSTILE)]
        for i in range(HONEST):
            work = run(self.address, f"honest-{i}", lambda _, i=i: Trainer(i, self), self._told)
            self._tasks.append(asyncio.create_task(work))

    async def end(self) -> None:
        """Everybody leaves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def declare(self, data: memoryview, dtype: Any) -> bytes:
        """Remember what an update may be accepted as; returns its digest."""
        digest = vectors.digest(data)
        self.declared[digest.hex()].append(vectors.unpack(bytes(data), dtype))
        return digest

    def _told(self, _round: int, receipt: pb.Receipt) -> None:
        self.receipts[pb.Status.Name(receipt.status)] += 1

    async def _listen(self, i: int) -> None:
        """Be a client of the federation that is asked in every round."""
        stub = FederationStub(self._channels[i])
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                reply = await stub.Enrol(pb.EnrolRequest(client=f"hostile-{i}"), wait_for_ready=True)
                self._sessions[i] = reply.session
                async for offer in stub.Rounds(pb.RoundsRequest(session=reply.session)):
                    async with self._turn:
                        self._offered[i] = offer.round
                        self._turn.notify_all()
            await asyncio.sleep(0.01)

    async def _whose_turn(self) -> int:
        """A hostile client that has its turn in the round still, if there is one before long."""

        def open_turns() -> list[int]:
            return [i for i in range(HOSTILE) if self._offered[i] > self._spent[i]]

        async with self._turn:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._turn.wait_for(open_turns), 1.0)
        return (open_turns() or [0])[0]

    async def healthy(self) -> bool:
        """Whether the server says that it is."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        reply = await HealthStub(self._channels[0]).Check(request, timeout=10)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def play(self, script: Script) -> None:
        """Play a script to its end."""
        self.scripts += 1
        plans, moves = script
        who = await self._whose_turn()
        number = self._offered[who]
        rng = np.random.default_rng(self.scripts)
        updates = [rng.normal(0, 0.1, D).astype(np.float32) for _ in range(2)]
        updates[1][rng.integers(D)] = np.nan if self.scripts % 2 else 0.0
        going = [_Going(self, plan, who, number, updates[plan.head.of]) for plan in plans]
        for move in moves:
            match move:
                case int(lane):
                    await going[lane % len(going)].advance()
                case "pause":
                    await asyncio.sleep(0.005)
                case "settle":
                    await going[0].end()
                case "progress":
                    request = pb.ProgressRequest(
                        session=self._sessions[who], round=number, digest=going[0].header.digest
                    )
                    await self._call(f"/{SERVICE}/Progress", [request.SerializeToString()], who, 5.0)
                case Call(method, messages, known, patience):
                    session = pb.RoundsRequest(session=self._sessions[who]).SerializeToString()
                    first = [session + b"".join(messages[:1]), *messages[1:]] if known else messages
                    await self._call(method, first, who, patience)
        for lane in going:
            await lane.end()

    def method(self, channel: int, method: str) -> Any:
        """A method that takes and gives bytes."""
        return self._channels[channel].stream_stream(method)

    async def _call(self, method: str, messages: list[bytes], channel: int, patience: float) -> None:
        call = self.method(channel, method)(timeout=10)
        await self.sent(call, messages)
        await self.finished(call, patience)

    async def sent(self, call: Any, messages: list[bytes], *, whole: bool = True) -> None:
        """Send messages, unless the server has ended the call."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for message in messages:
                if not call.done():  # gRPC forgets the answer if one writes on
                    self.messages += 1
                    await call.write(message)
            if whole and not call.done():
                await call.done_writing()

    async def finished(self, call: Any, patience: float = 10.0) -> bytes:
        """The first answer to a call that ends, or is cancelled after a while."""
        answer = b""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.TimeoutError, asyncio.CancelledError):
            while (read := await asyncio.wait_for(call.read(), patience)) is not grpc.aio.EOF:
                answer = answer or read
        call.cancel()
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.INTERNAL:  # never the server's: this gRPC wrote on after the end
            assert details == "Internal error from Core", details
            self.outcomes["ended while being written to"] += 1
        else:
            self.outcomes[code.name] += 1
        return answer

    def spend(self, who: int, number: int, receipt: bytes) -> None:
        """A client's turn may be over."""
        status = pb.Receipt.FromString(receipt).status
        self.outcomes[pb.Status.Name(status)] += 1
        if status in _SPENT:
            self._spent[who] = max(self._spent[who], number)


class _Going:
    """An upload of a script, as far as it has got."""

    def __init__(self, battle: Battle, plan: Lane, who: int, number: int, vector: Any) -> None:
        self._battle, self._plan, self._who, self._number = battle, plan, who, number
        head = plan.head
        self._known = head.dtype in vectors.DTYPES
        dtype = head.dtype if self._known else pb.DTYPE_FLOAT32
        self._data = bytes(vectors.pack(vector, dtype))
        declared = battle.declare(memoryview(self._data), dtype)
        self.header = pb.SubmitHeader(
            session=battle._sessions[who] if head.session is None else head.session,
            round=number if head.round is None else head.round,
            encoding=pb.Encoding(dtype=head.dtype, compression=head.compression),
            length=D if head.length is None else head.length,
            digest=declared if head.digest is None else head.digest,
            offset=head.offset or 0,
        )
        self._at, self._parts = self.header.offset, list(plan.parts)
        self._call: Any = None
        self._ended = False

    async def advance(self) -> None:
        """Send the header, or the next message."""
        if self._ended:
            return
        if self._call is None:
            self._call = self._battle.method(self._plan.channel, f"/{SERVICE}/Submit")(timeout=20)
            message = pb.SubmitRequest(header=self.header).SerializeToString()
        else:
            if not self._parts:
                return
            message = self._message(self._parts.pop(0))
        await self._battle.sent(self._call, [message], whole=False)

    def _message(self, part: Part) -> bytes:
        offset, data = self._at, self._data[self._at :][: part.size]
        match part.what:
            case "offset":
                offset = part.number
            case "data":
                data = part.data
            case "bomb":
                return self._chunk(offset, BOMBS[part.number % len(BOMBS)], packed=True)
            case "again":
                offset = max(offset - part.size, 0)
            case "raw":
                return part.data
            case "header":
                return pb.SubmitRequest(header=self.header).SerializeToString()
            case "large":
                data = bytes(part.number % (9 << 20))
            case "nan":
                data = b"\xff" * len(data)
        message = self._chunk(offset, data)
        self._at += len(data)
        if part.what == "flip" and message:
            at = part.number % len(message)
            message = message[:at] + bytes([message[at] ^ (1 << part.number % 8)]) + message[at + 1 :]
        return message

    def _chunk(self, offset: int, data: bytes, *, packed: bool = False) -> bytes:
        if self.header.encoding.compression == pb.COMPRESSION_ZSTD and not packed:
            data = _press(data)
        return pb.SubmitRequest(chunk=pb.Chunk(offset=offset, data=data)).SerializeToString()

    async def end(self) -> None:
        """End as planned: send all the rest, or nothing more, or hang up."""
        if self._ended:
            return
        while self._call is None or (self._plan.end == "done" and self._parts):
            await self.advance()
        self._ended = True
        if self._plan.end == "cancel":
            self._call.cancel()
        rest = self._data[self._at :]
        wanted = [self._chunk(self._at, rest)] if self._plan.end == "rest" and rest else []
        await self._battle.sent(self._call, wanted)
        receipt = await self._battle.finished(self._call)
        self._battle.spend(self._who, self._number, receipt)


# ---- what must hold -------------------------------------------------------------------------------


def fuzz(folder: Path, examples: int, *, derandomize: bool) -> dict[str, Any]:
    """Play so many scripts against a server, check what must hold, and tell what happened."""
    log = folder / "log.jsonl"
    serve = ("serve", "--json", "--bind", "127.0.0.1:0", "--runs-dir", str(folder), "--log", str(log))
    with process(*serve, *RUN) as server, loop_in_a_thread() as loop:

        def wait(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(60)

        assert server.stdout
        battle = Battle(json.loads(server.stdout.readline())["listening"])
        reading = threading.Thread(
            target=server.stdout.read, daemon=True
        )  # a full pipe would stop the server
        reading.start()
        wait(battle.begin())
        resident = [psutil.Process(server.pid).memory_info().rss]

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=derandomize,
            report_multiple_bugs=False,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(scripts)
        def play(script: Script) -> None:
            wait(battle.play(script))
            if battle.scripts % 20 == 0:
                assert wait(battle.healthy())
                resident.append(psutil.Process(server.pid).memory_info().rss)

        play()
        assert wait(battle.healthy())
        assert server.poll() is None
        wait(battle.end())
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        reading.join(60)
    problems = [line for line in log.read_text().splitlines() if json.loads(line)["level"] != "warning"]
    assert not problems, problems[:3]
    warm = resident[len(resident) // 4]
    assert max(resident) - warm < GROWTH, [size >> 20 for size in resident]
    assert set(battle.receipts) == {"STATUS_ACCEPTED"}
    return {
        "inputs": battle.scripts,
        "messages": battle.messages,
        "rounds": check_rounds(folder / "fuzzed" / "ledger.sqlite", battle),
        "honest_updates_accepted": battle.receipts["STATUS_ACCEPTED"],
        "server_mb_after_a_quarter": warm >> 20,
        "server_mb_most": max(resident) >> 20,
        "outcomes": dict(battle.outcomes.most_common()),
    }


def check_rounds(ledger: Path, battle: Battle) -> int:
    """Every model is the one before, moved by the mean of updates as they were declared; how many."""
    with contextlib.closing(sqlite3.connect(ledger)) as database:
        rounds = database.execute("SELECT round, outcome FROM rounds WHERE closed NOT NULL").fetchall()
        answers = database.execute(
            "SELECT round, client, digest FROM answers WHERE status = 'ACCEPTED'"
        ).fetchall()
    updates: dict[int, list[str]] = defaultdict(list)
    clients: dict[int, list[str]] = defaultdict(list)
    for number, client, digest in answers:
        updates[number].append(digest)
        clients[number].append(client)
    checked = 0
    for number, outcome in rounds:
        assert outcome == "aggregated"
        assert len(set(clients[number])) == len(clients[number])
        if number + 1 not in battle.models:
            continue
        assert {f"honest-{i}" for i in range(HONEST)} <= set(clients[number])
        moved = battle.models[number + 1] - battle.models[number]
        choices = itertools.product(*(battle.declared[digest] for digest in updates[number]))
        assert any(np.allclose(moved, np.mean(rows, axis=0), atol=1e-4) for rows in choices), number
        checked += 1
    assert checked
    return checked


# Clients in the other thread use `random`, which hypothesis takes for the strategies' doing.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_scripts_of_hostile_clients(tmp_path: Path) -> None:
    told = fuzz(tmp_path, 300, derandomize=True)
    print(json.dumps(told))  # noqa: T201 (the documentation states the count)
    assert told["inputs"] >= 300


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_many_scripts_of_hostile_clients(tmp_path: Path) -> None:
    told = fuzz(tmp_path, int(os.environ.get("FEDROBUST_FUZZ_EXAMPLES", "20000")), derandomize=False)
    print(json.dumps(told))  # noqa: T201
