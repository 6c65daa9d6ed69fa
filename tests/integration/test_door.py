"""Whatever a client sends, it is answered with a status that says so, and the round goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_server.config import RunConfig

from fedrobust.training import Task

from .conftest import Served

D = 650  # softmax regression on digits: 64 x 10 weights and 10 biases
Requests = list[pb.SubmitRequest]


def header(session: bytes, number: int, vector: npt.NDArray[Any], **changes: Any) -> pb.SubmitRequest:
    fields: dict[str, Any] = {
        "session": session,
        "round": number,
        "encoding": pb.Encoding(dtype=changes.pop("dtype", pb.DTYPE_FLOAT32)),
        "length": len(vector),
        "digest": vectors.digest(vectors.pack(vector, pb.DTYPE_FLOAT32)),
        "examples": 10,
    }
    return pb.SubmitRequest(header=pb.SubmitHeader(**(fields | changes)))


def requests(session: bytes, number: int, vector: npt.NDArray[Any], **changes: Any) -> Requests:
    packed = vectors.pack(vector, pb.DTYPE_FLOAT32)
    parts = [pb.SubmitRequest(chunk=chunk) for chunk in vectors.chunks(packed)] if len(vector) else []
    return [header(session, number, vector, **changes), *parts]


def chunk(offset: int, data: bytes) -> pb.SubmitRequest:
    return pb.SubmitRequest(chunk=pb.Chunk(offset=offset, data=data))


def holding(value: float) -> npt.NDArray[np.float32]:
    vector = np.zeros(D, np.float32)
    vector[D // 2] = value
    return vector


GOOD = np.full(D, 0.5, np.float32)
BYTES = GOOD.tobytes()

# What is sent, from the session and the round; the status it earns; whether the turn is lost by it.
CASES: dict[str, tuple[Callable[[bytes, int], Requests], str, bool]] = {
    "nan": (lambda s, r: requests(s, r, holding(np.nan)), "NON_FINITE", True),
    "infinity": (lambda s, r: requests(s, r, holding(-np.inf)), "NON_FINITE", True),
    "short": (lambda s, r: requests(s, r, GOOD[:-1]), "WRONG_LENGTH", True),
    "long": (lambda s, r: requests(s, r, np.zeros(D + 1)), "WRONG_LENGTH", True),
    "empty": (lambda s, r: requests(s, r, GOOD[:0]), "WRONG_LENGTH", True),
    "huge claim": (lambda s, r: requests(s, r, GOOD, length=2**63), "WRONG_LENGTH", True),
    "no dtype": (lambda s, r: requests(s, r, GOOD, dtype=0), "WRONG_DTYPE", True),
    "unknown dtype": (lambda s, r: requests(s, r, GOOD, dtype=77), "WRONG_DTYPE", True),
    "digest": (lambda s, r: requests(s, r, GOOD, digest=b"?"), "WRONG_DIGEST", True),
    "overrun": (lambda s, r: [*requests(s, r, GOOD), chunk(len(BYTES), b"1234")], "WRONG_LENGTH", True),
    "gap": (lambda s, r: [header(s, r, GOOD), chunk(8, BYTES[8:])], "MALFORMED", True),
    "again": (
        lambda s, r: [header(s, r, GOOD), chunk(0, BYTES[:8]), chunk(0, BYTES)],
        "MALFORMED",
        True,
    ),
    "split value": (lambda s, r: [header(s, r, GOOD), chunk(0, BYTES[:7])], "MALFORMED", True),
    "empty chunk": (lambda s, r: [header(s, r, GOOD), chunk(0, b"")], "MALFORMED", True),
    "two headers": (lambda s, r: [header(s, r, GOOD), header(s, r, GOOD)], "MALFORMED", True),
    "truncated": (lambda s, r: [header(s, r, GOOD), chunk(0, BYTES[:400])], "TRUNCATED", False),
    "nothing": (lambda s, r: [header(s, r, GOOD)], "TRUNCATED", False),
    "no header": (lambda _s, _r: [chunk(0, BYTES)], "MALFORMED", False),
    "no message": (lambda _s, _r: [], "MALFORMED", False),
    "old round": (lambda s, _r: requests(s, 0, GOOD), "LATE", False),
    "future round": (lambda s, _r: requests(s, 2**64 - 1, GOOD), "WRONG_ROUND", False),
}


async def submit(stub: Any, messages: Requests) -> str:
    async def stream() -> AsyncIterator[pb.SubmitRequest]:
        for message in messages:
            yield message

    receipt = await stub.Submit(stream())
    assert receipt.reason or receipt.status == pb.STATUS_ACCEPTED
    return pb.Status.Name(receipt.status).removeprefix("STATUS_")


async def enrol(stub: Any, name: str) -> tuple[bytes, AsyncIterator[pb.Assignment]]:
    reply = await stub.Enrol(pb.EnrolRequest(client=name))
    return reply.session, aiter(stub.Rounds(pb.RoundsRequest(session=reply.session)))


def config(**changes: Any) -> RunConfig:
    task = Task(model="softmax", clients=changes.pop("clients", 2))
    defaults: dict[str, Any] = {"rule": "mean", "rounds": len(CASES), "deadline": 20.0, "quorum": 0.5}
    return RunConfig(task=task, **(defaults | changes))


def test_every_bad_submission_is_answered_and_recorded_and_costs_nobody_else(serve: Served) -> None:
    async def scenario() -> None:
        async with serve(config()) as (stub, federation):
            running = asyncio.create_task(federation.coordinator.run())
            good, good_rounds = await enrol(stub, "good")
            bad, bad_rounds = await enrol(stub, "bad")
            start = await download(stub, good, 1, good_rounds, bad_rounds)
            lost = 0
            for number, (name, (make, status, loses_turn)) in enumerate(CASES.items(), 1):
                if number > 1:
                    await anext(good_rounds)
                    await anext(bad_rounds)
                assert await submit(stub, make(bad, number)) == status, name
                after = "DUPLICATE" if loses_turn else "ACCEPTED"
                assert await submit(stub, requests(bad, number, -GOOD)) == after, name
                assert await submit(stub, requests(good, number, GOOD)) == "ACCEPTED", name
                lost += loses_turn
            model = await running
            # Where the bad client's turn is lost only the good one counts; else they cancel out.
            np.testing.assert_allclose(model, start + lost * GOOD, atol=1e-5)
            recorded = federation.coordinator._ledger.answers()
            refusals = {(a["round"], a["status"]): a["reason"] for a in recorded if a["client"] == "bad"}
            for number, (name, (_, status, _)) in enumerate(CASES.items(), 1):
                claimed = {"old round": 0, "future round": 2**62}.get(name, number)
                if name not in {"no header", "no message"}:  # these say nothing of who they are from
                    assert refusals[claimed, status], name
            assert all(row["outcome"] == "aggregated" for row in federation.coordinator._ledger.rounds())

    asyncio.run(scenario())


async def download(stub: Any, session: bytes, number: int, *offers: AsyncIterator[Any]) -> Any:
    for offer in offers:
        assert (await anext(offer)).round == number
    encoding = vectors.encoding()
    stream = stub.Model(pb.ModelRequest(session=session, round=number, encoding=encoding))
    return np.frombuffer(b"".join([chunk.data async for chunk in stream]), "<f4")


def test_twice_late_and_never(serve: Served) -> None:
    async def scenario() -> None:
        async with serve(config(rounds=2, deadline=1.5, clients=3)) as (stub, federation):
            running = asyncio.create_task(federation.coordinator.run())
            clients = {name: await enrol(stub, name) for name in ("eager", "slow", "silent")}
            for _, rounds in clients.values():
                await anext(rounds)
            eager, slow = clients["eager"][0], clients["slow"][0]
            assert await submit(stub, requests(eager, 1, GOOD)) == "ACCEPTED"
            assert await submit(stub, requests(eager, 1, -9 * GOOD)) == "DUPLICATE"
            assert await submit(stub, requests(clients["silent"][0], 1, holding(np.nan))) == "NON_FINITE"

            async def dawdle() -> AsyncIterator[pb.SubmitRequest]:
                head, *rest = requests(slow, 1, 100 * GOOD)
                yield head
                await anext(clients["eager"][1], None)  # the next round, or the end
                for part in rest:
                    yield part

            # One of three is below the quorum of 0.5, so the round is skipped at its deadline.
            receipt = await stub.Submit(dawdle())
            assert receipt.status == pb.STATUS_LATE
            await running
            first, second = federation.coordinator._ledger.rounds()
            assert (first["outcome"], second["outcome"]) == ("skipped", "skipped")
            assert "1 of 3 updates, 2 needed" in first["reason"]

    asyncio.run(scenario())


def test_calls_without_a_session_or_with_a_bad_name_are_denied(serve: Served) -> None:
    async def scenario() -> None:
        async with serve(config()) as (stub, _):
            for name in ("", "../../etc", "a" * 65, "x\n", "\x1b[31m"):
                with pytest.raises(grpc.aio.AioRpcError, match="name") as caught:
                    await stub.Enrol(pb.EnrolRequest(client=name))
                assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED  # for good
            with pytest.raises(grpc.aio.AioRpcError, match="unknown session"):
                await stub.Submit(iter(requests(b"guess", 1, GOOD)[:1]))
            with pytest.raises(grpc.aio.AioRpcError, match="unknown session"):
                await anext(aiter(stub.Rounds(pb.RoundsRequest(session=b"guess"))))
            with pytest.raises(grpc.aio.AioRpcError, match="unknown session"):
                await anext(aiter(stub.Model(pb.ModelRequest(session=b"guess", round=1))))

    asyncio.run(scenario())


def test_a_lost_connection_in_the_middle_of_an_upload_leaves_the_turn(serve: Served) -> None:
    async def scenario() -> None:
        async with serve(config(rounds=1)) as (stub, federation):
            running = asyncio.create_task(federation.coordinator.run())
            first, first_rounds = await enrol(stub, "first")
            second, second_rounds = await enrol(stub, "second")
            await anext(first_rounds)
            await anext(second_rounds)

            async def endless() -> AsyncIterator[pb.SubmitRequest]:
                yield header(first, 1, GOOD)
                yield chunk(0, BYTES[:400])
                await asyncio.sleep(60)

            call = stub.Submit(endless())
            await asyncio.sleep(0.5)
            call.cancel()
            await asyncio.sleep(0.5)
            assert await submit(stub, requests(first, 1, GOOD)) == "ACCEPTED"
            assert await submit(stub, requests(second, 1, GOOD)) == "ACCEPTED"
            await running
            statuses = [a["status"] for a in federation.coordinator._ledger.answers()]
            assert statuses == ["TRUNCATED", "ACCEPTED", "ACCEPTED"]

    asyncio.run(scenario())
