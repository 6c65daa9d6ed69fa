"""A client through what a server may do: silence, going away, being another one when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fedrobust_clients import remote
from fedrobust_clients.runtime import Floats, Participation, Update
from fedrobust_clients.simulated import Simulated, _Broadcast, _Desk
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_server.limits import Limits
from ray.exceptions import RayTaskError

from fedrobust.errors import InputError
from fedrobust.training import Task

from .processes import until
from .recorder import door


class Plus:
    """A runtime whose update says which run it was made for, and from which model."""

    def __init__(self, task: Task) -> None:
        self.seed = task.seed

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002, ARG002
        return Update(model + np.float32(self.seed), 1)


def test_a_connection_that_ends_after_long_silence_is_taken_up_again() -> None:
    """As at the server's own limit for their age, in rounds that are longer than a client's patience."""

    async def scenario() -> None:
        async with door(limits=Limits(age=4.0, age_grace=0.5)) as (recorder, listening):
            address = f"127.0.0.1:{listening.port}"
            part = asyncio.ensure_future(
                remote.run(address, "a", Plus, lambda _round, _receipt: None, patience=3.0)
            )
            await until(lambda: len(recorder.enrolled) == 2 or part.done())
            assert not part.done()
            part.cancel()

    asyncio.run(scenario())


def test_a_server_that_stays_away_is_given_up() -> None:
    async def scenario() -> None:
        async with door() as (recorder, listening):
            address = f"127.0.0.1:{listening.port}"
            part = asyncio.ensure_future(
                remote.run(address, "a", Plus, lambda _round, _receipt: None, patience=0.5)
            )
            await until(lambda: recorder.listening == 1)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            await asyncio.wait_for(part, 30)

    asyncio.run(scenario())


@dataclass
class Run:
    """A federation of one client and one round, without a wire; its server may be lost at the upload."""

    seed: int
    model_: Floats
    lost: bool = False
    sent: list[Any] = field(default_factory=list)

    async def enrol(self, _request: pb.EnrolRequest) -> pb.EnrolReply:
        shape = pb.Manifest(tensors=[pb.TensorSpec(name="w", shape=[len(self.model_)])])
        return pb.EnrolReply(
            federation=f"run-{self.seed}",
            task=Task(seed=self.seed).to_json(),
            encoding=vectors.encoding(),
            manifest=shape,
        )

    async def rounds(self, _request: pb.RoundsRequest) -> AsyncIterator[pb.Assignment]:
        yield pb.Assignment(round=1, seconds_left=60)

    async def model(self, _request: pb.ModelRequest) -> AsyncIterator[pb.Chunk]:
        for chunk in vectors.chunks(vectors.pack(self.model_, pb.DTYPE_FLOAT32)):
            yield chunk

    async def progress(self, _request: pb.ProgressRequest) -> pb.ProgressReply:
        return pb.ProgressReply()

    async def submit(self, requests: AsyncIterator[pb.SubmitRequest]) -> pb.Receipt:
        if self.lost:
            raise ConnectionError
        self.sent += [
            np.frombuffer(r.chunk.data, "<f4").tolist() async for r in requests if r.chunk.data
        ]
        return pb.Receipt(status=pb.STATUS_ACCEPTED)


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_worked_out_for_one_run_is_not_sent_to_another(lost: bool) -> None:
    async def scenario() -> None:
        part = Participation("a", Plus)
        first, second = Run(1, np.ones(4, "f4"), lost), Run(2, np.full(4, 9, "f4"))
        if lost:
            with pytest.raises(ConnectionError):
                await part.attend(first)
        else:
            await part.attend(first)
        await part.attend(second)
        assert second.sent == [[11.0] * 4]

    asyncio.run(scenario())


def test_what_a_crew_refuses_is_told_as_it_is() -> None:
    """Ray wraps what a worker process raises in an error of its own, with all of the traceback."""

    class Updates:
        async def remote(self, *_arguments: object) -> list[Update]:
            raise RayTaskError("updates", "Traceback ...", InputError("no such class"))

    async def scenario() -> None:
        desk = _Desk(SimpleNamespace(updates=Updates()), _Broadcast(1, reference=object()))
        with pytest.raises(InputError, match=r"^no such class$"):
            await Simulated(desk, 0).update(1, np.zeros(2, np.float32))

    asyncio.run(scenario())
