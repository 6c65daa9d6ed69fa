"""However a client's connections cross each other, what counts is one update, as it was declared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_server.coordinator import Coordinator
from fedrobust_server.intake import Upload, receive
from fedrobust_server.spool import Spool

from .conftest import Served
from .test_door import BYTES, GOOD, Requests, chunk, config, enrol, header, requests, submit

ROUNDS = 12


async def stream(messages: Requests, before: Callable[[], Any] | None = None) -> AsyncIterator[Any]:
    """These messages, after what has to happen first."""
    if before is not None:
        await before()
    for message in messages:
        yield message


def rivals(session: bytes, number: int) -> tuple[Requests, Requests]:
    """Two updates of one client, in many chunks."""
    streams = []
    for value in (1.0, -3.0):
        vector = value * GOOD
        data = vector.tobytes()
        parts = [chunk(at, data[at : at + 260]) for at in range(0, len(data), 260)]
        streams.append([header(session, number, vector), *parts])
    return streams[0], streams[1]


async def side_by_side(coordinator: Coordinator, session: bytes, number: int) -> list[pb.Receipt]:
    """Both updates at once, in the place of one that was cut off."""
    one, other = rivals(session, number)
    await coordinator.submit(stream(one[:2]))
    return list(await asyncio.gather(coordinator.submit(stream(one)), coordinator.submit(stream(other))))


async def behind(coordinator: Coordinator, session: bytes, number: int) -> list[pb.Receipt]:
    """The second update while the digest of the first one, which is whole, is worked out."""
    one, other = rivals(session, number)
    whole = asyncio.Event()

    async def first() -> AsyncIterator[Any]:
        for message in one:
            yield message
        whole.set()

    return list(
        await asyncio.gather(coordinator.submit(first()), coordinator.submit(stream(other, whole.wait)))
    )


@pytest.mark.parametrize("interleave", [side_by_side, behind])
def test_of_two_updates_at_once_one_counts_and_as_it_was_declared(
    serve: Served, interleave: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with serve(config(clients=1, rounds=ROUNDS)) as (stub, federation):
            coordinator = federation.coordinator
            start = coordinator._model.copy()
            running = asyncio.create_task(coordinator.run())
            session, offers = await enrol(stub, "two-faced")
            for number in range(1, ROUNDS + 1):
                await anext(offers)
                await interleave(coordinator, session, number)
                if number not in accepted(coordinator):  # neither: each has taken over from the other
                    await coordinator.submit(stream(requests(session, number, GOOD)))
            model = await running
            values = {vectors.digest(memoryview((v * GOOD).tobytes())).hex(): v for v in (1.0, -3.0)}
            declared = sum(values[digest] for digest in accepted(coordinator).values())
            np.testing.assert_allclose(model, start + declared * GOOD, atol=1e-4)

    asyncio.run(scenario())


def accepted(coordinator: Coordinator) -> dict[int, str]:
    """The digest of the accepted update of every round."""
    answers = [a for a in coordinator._ledger.answers() if a["status"] == "ACCEPTED"]
    digests = {a["round"]: a["digest"] for a in answers}
    assert len(digests) == len(answers)
    return digests


@pytest.mark.parametrize("more", [True, False])
def test_a_chunk_at_work_when_its_connection_dies_is_stored_passed_on_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, more: bool
) -> None:
    """Else the next connection would be told of bytes that still change under it."""
    go_on, take = threading.Event(), Upload.take

    def slowly(self: Upload, part: pb.Chunk) -> Any:
        go_on.wait(10)
        return take(self, part)

    async def scenario() -> None:
        monkeypatch.setattr(Upload, "take", slowly)
        upload = Upload(header(b"", 1, GOOD).header, 0, Spool.open(tmp_path / "spool", 1, len(GOOD)))
        passed_on: list[int] = []
        parts = rivals(b"", 1)[0][1 : 3 if more else 2]

        async def until_cut() -> AsyncIterator[pb.SubmitRequest]:
            for part in parts:
                yield part
            await asyncio.sleep(60)

        work = receive(until_cut(), upload, lambda *stored: passed_on.append(stored[2]))
        receiving = asyncio.create_task(work)
        await asyncio.sleep(0.1)
        receiving.cancel()
        taking_over = asyncio.create_task(upload.take_over())
        await asyncio.sleep(0.1)
        assert not taking_over.done()
        go_on.set()
        assert await taking_over
        assert (upload.received, passed_on) == (260, [0])
        with pytest.raises(asyncio.CancelledError):
            await receiving
        upload.spool.remove()

    asyncio.run(scenario())


def test_an_upload_for_no_round_is_answered_before_the_first_one(serve: Served) -> None:
    async def scenario() -> None:
        async with serve(config(rounds=1)) as (stub, federation):
            running = asyncio.create_task(federation.coordinator.run())
            session, _ = await enrol(stub, "early")
            assert await asyncio.wait_for(submit(stub, requests(session, 0, GOOD)), 10) == "LATE"
            running.cancel()

    asyncio.run(scenario())


def test_going_on_where_nothing_is_costs_no_turn(serve: Served) -> None:
    """The server may have been told to begin anew by an older connection, after it told the progress."""

    async def scenario() -> None:
        async with serve(config(clients=1, rounds=1)) as (stub, federation):
            running = asyncio.create_task(federation.coordinator.run())
            session, offers = await enrol(stub, "hopeful")
            await anext(offers)
            rest = [header(session, 1, GOOD, offset=400), chunk(400, BYTES[400:])]
            assert await submit(stub, rest) == "TRUNCATED"
            assert await submit(stub, requests(session, 1, GOOD)) == "ACCEPTED"
            await running

    asyncio.run(scenario())
