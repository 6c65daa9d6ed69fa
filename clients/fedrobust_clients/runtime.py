"""What a client does in a round, and the loop around it: the same over any transport."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import (
    Assignment,
    Chunk,
    Encoding,
    EnrolReply,
    EnrolRequest,
    ModelRequest,
    ProgressReply,
    ProgressRequest,
    Receipt,
    RoundsRequest,
    Status,
    SubmitHeader,
    SubmitRequest,
)

from fedrobust.training import Learner, Task

__all__ = ["Connection", "Honest", "Participation", "Runtime", "Update", "participate"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Update:
    """What a client sends.

    Attributes:
        vector: (d,) float32, its model minus the broadcast one.
        examples: how many examples it says it trained on.
    """

    vector: Floats
    examples: int


class Runtime(Protocol):
    """Anything that can work out a client's update: yours goes here."""

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        """The update of a round.

        Args:
            round: its number, from 1.
            model: (d,) float32, the broadcast model; read-only.
        """
        ...


class Connection(Protocol):
    """A way to a server. The coordinator itself is one, for clients in its own process."""

    async def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Join."""
        ...

    def rounds(self, request: RoundsRequest) -> AsyncIterator[Assignment]:
        """Wait for work."""
        ...

    def model(self, request: ModelRequest) -> AsyncIterator[Chunk]:
        """Download the model."""
        ...

    async def progress(self, request: ProgressRequest) -> ProgressReply:
        """What the server has of an update."""
        ...

    async def submit(self, requests: AsyncIterator[SubmitRequest]) -> Receipt:
        """Upload an update."""
        ...


@dataclass(frozen=True)
class Honest:
    """Trains as the task says, on its own data."""

    learner: Learner

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        """One round of local training."""
        return await asyncio.to_thread(self.train, round, model)

    def train(self, round: int, model: Floats) -> Update:  # noqa: A002
        """The same, for callers without an event loop."""
        delta = self.learner.update(round, torch.from_numpy(model.copy()))
        return Update(delta.numpy(), self.learner.examples)


class Participation:
    """One client's part in a federation, over as many connections as it takes.

    What it has worked out for a round is kept until the round is over: a connection that breaks costs
    the rest of a transfer, never a second training, and no update is submitted twice.
    """

    def __init__(
        self,
        client: str,
        prepare: Callable[[Task], Runtime],
        watch: Callable[[int, Receipt], None] = lambda _round, _receipt: None,
        *,
        token: bytes = b"",
        encoding: Encoding | None = None,
        imports: bool = False,
    ) -> None:
        """Be this client.

        Args:
            client: its name.
            prepare: makes the runtime for the server's task; called once for a run.
            watch: is told of every receipt, with its round.
            token: a signed enrolment token, where the server asks for one.
            encoding: how vectors travel; None leaves it to the server.
            imports: whether the server's task may name a model or dataset by import path.
        """
        self._client, self._prepare, self._watch = client, prepare, watch
        self._token, self._encoding, self._imports = token, encoding, imports
        self._run: tuple[str, str] | None = None
        self._runtime: Runtime | None = None
        self._model = _Download(0)
        self._work: _Work | None = None
        self.accepted = 0
        self.heard = time.monotonic()

    async def attend(self, connection: Connection) -> None:
        """Take part until the federation ends, or the connection does.

        Raises:
            InputError: the task does not fit this client, or names what may not be imported.
            Exception: whatever the connection raises when it breaks; attend again with a new one.
        """
        enrolled = await connection.enrol(EnrolRequest(client=self._client, token=self._token))
        self.heard = time.monotonic()
        run = enrolled.federation, enrolled.task
        if self._runtime is None or self._run != run:  # what was worked out for another is of no use
            self._runtime = self._prepare(Task.from_json(enrolled.task, imports=self._imports))
            self._run, self._work, self._model = run, None, _Download(0)
        encoding = self._encoding or enrolled.encoding
        if self._work is not None and not self._work.settled:  # its receipt was lost, perhaps
            progress = await self._progress(connection, enrolled.session, self._work)
            if progress.HasField("receipt"):
                self._settle(self._work, progress.receipt)
        size = sum(math.prod(tensor.shape) for tensor in enrolled.manifest.tensors)
        async for assignment in connection.rounds(RoundsRequest(session=enrolled.session)):
            self.heard = time.monotonic()
            number = assignment.round
            if self._work is None or self._work.round != number:
                model = await self._download(connection, enrolled.session, number, encoding)
                if len(model) != size:  # the round closed while we were on our way
                    continue
                update = await self._runtime.update(number, model)
                self._work, self._model = _Work.of(number, update, encoding), _Download(0)
            if not self._work.settled:
                until = time.monotonic() + assignment.seconds_left
                await self._submit(connection, enrolled.session, self._work, until)

    async def _download(
        self, connection: Connection, session: bytes, number: int, encoding: Encoding
    ) -> Floats:
        """The model of a round, or less if the round has been closed."""
        if self._model.round != number or self._model.encoding != encoding:
            self._model = _Download(number, encoding)
        data = self._model.data
        request = ModelRequest(session=session, round=number, encoding=encoding, offset=len(data))
        async for chunk in connection.model(request):
            data += vectors.expand(chunk.data, encoding.compression)
            self.heard = time.monotonic()
        model = vectors.unpack(data, encoding.dtype)
        model.flags.writeable = False
        return model

    async def _submit(self, connection: Connection, session: bytes, work: _Work, until: float) -> None:
        """Upload what the server lacks of an update; again, as long as it asks for that."""
        for pause in pauses():
            progress = await self._progress(connection, session, work)
            receipt = progress.receipt
            if not progress.HasField("receipt"):
                receipt = await connection.submit(work.requests(session, progress.received))
            self.heard = time.monotonic()
            if receipt.status not in _AGAIN or time.monotonic() + pause > until:
                break
            await asyncio.sleep(pause)
        self._settle(work, receipt)

    async def _progress(self, connection: Connection, session: bytes, work: _Work) -> ProgressReply:
        """What the server has of an update."""
        asked = ProgressRequest(session=session, round=work.round, digest=work.header.digest)
        return await connection.progress(asked)

    def _settle(self, work: _Work, receipt: Receipt) -> None:
        """Nothing is left to do for a round."""
        work.settled, work.data = True, memoryview(b"")
        self.accepted += receipt.status == Status.STATUS_ACCEPTED
        self._watch(work.round, receipt)


_AGAIN = {Status.STATUS_TRUNCATED, Status.STATUS_UNAVAILABLE}


def pauses(first: float = 0.25, longest: float = 20.0) -> Iterator[float]:
    """Seconds to wait before one attempt after the other: random, of a range that doubles.

    Random, so that a thousand clients do not come back to a server all at once.
    """
    for doubling in itertools.count():
        yield random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(doubling, 30))  # noqa: S311


@dataclass
class _Download:
    """A model as far as it has come."""

    round: int
    encoding: Encoding | None = None
    data: bytearray = field(default_factory=bytearray)


@dataclass
class _Work:
    """A round's update, ready to travel; settled once there is a receipt for it."""

    round: int
    header: SubmitHeader
    data: memoryview
    settled: bool = False

    @classmethod
    def of(cls, number: int, update: Update, encoding: Encoding) -> _Work:
        data = vectors.pack(update.vector, encoding.dtype)
        header = SubmitHeader(
            round=number,
            encoding=encoding,
            length=len(update.vector),
            digest=vectors.digest(data),
            examples=update.examples,
        )
        return cls(number, header, data)

    async def requests(self, session: bytes, start: int) -> AsyncIterator[SubmitRequest]:
        header = SubmitHeader(session=session, offset=start)
        header.MergeFrom(self.header)
        yield SubmitRequest(header=header)
        for chunk in vectors.chunks(self.data, self.header.encoding.compression, start):
            yield SubmitRequest(chunk=chunk)


async def participate(
    connection: Connection,
    client: str,
    prepare: Callable[[Task], Runtime],
    watch: Callable[[int, Receipt], None] = lambda _round, _receipt: None,
    *,
    imports: bool = False,
) -> int:
    """Take part over one connection; returns how many updates were accepted. As `Participation`."""
    part = Participation(client, prepare, watch, imports=imports)
    await part.attend(connection)
    return part.accepted
