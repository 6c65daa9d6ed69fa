"""Where bytes come in and go out: uploads into the round's spool, models to clients.

What is to be decided is the coordinator's. It is a reception itself; a gateway in another process is one
that asks it. So there is one way for an update to come in, and its bytes pass through one process only.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import (
    COMPRESSION_NONE,
    Assignment,
    Chunk,
    Compression,
    DType,
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

from fedrobust_server.intake import TAKEN_OVER, Forward, Upload, read_header, receive
from fedrobust_server.round import Fault
from fedrobust_server.spool import Floats, Spool

_SESSIONS = 4
"""Sessions of one client at a time; a further one ends the oldest."""


class DeniedError(Exception):
    """A call that cannot be answered at all: no such session, no such round."""


class BarredError(DeniedError):
    """A client that cannot join as whom it says it is, however often it asks."""


class LeavingError(Exception):
    """The server is going away, and will be back."""


@dataclass(frozen=True)
class Place:
    """Where an update that was admitted is to be stored.

    Attributes:
        client: whose it is.
        header: what it said was coming.
        slot: its place in the spool.
        spool: the path of the round's spool.
        slots: how many updates that has room for.
        ticket: grows with every admission; only a client's last one counts.
        gateway: who stores it; no other gateway may until this one has concluded.
        durable: whether to wait for the disk.
    """

    client: str
    header: SubmitHeader
    slot: int
    spool: Path
    slots: int
    ticket: int
    gateway: str
    durable: bool


@dataclass(frozen=True)
class Outcome:
    """What became of an upload.

    Attributes:
        fault: what is wrong with it; None if it is whole and good.
        norm: of what is there of the update, if anything is.
        received: bytes, uncompressed, that came this time.
    """

    fault: Fault | None
    norm: float | None = None
    received: int = 0


LOST = Outcome(Fault(Status.STATUS_TRUNCATED, "the connection was lost in the middle of the upload"))


class Reception(ABC):
    """Serves clients, by decisions that are made in subclasses. Its coroutines share an event loop."""

    def __init__(self, forward: Forward) -> None:
        """Begin with nothing.

        Args:
            forward: is told of every chunk.
        """
        self._forward = forward
        self._spool: Spool | None = None
        self._uploads: dict[str, Upload] = {}
        self._packed: dict[tuple[int, DType, Compression], asyncio.Future[memoryview | list[Chunk]]] = {}

    # ---- what is decided elsewhere ----------------------------------------------------------------

    @abstractmethod
    async def enrol(self, request: EnrolRequest, identity: str | None = None) -> EnrolReply:
        """Join; answers with a session.

        Args:
            request: who asks.
            identity: who that is for certain; None believes the request.

        Raises:
            BarredError: the name is not one that logs and files can carry, or another's.
        """

    @abstractmethod
    def owner(self, session: bytes) -> str | None:
        """The client that a session belongs to; None for no session of ours."""

    @abstractmethod
    def rounds(self, request: RoundsRequest) -> AsyncGenerator[Assignment, None]:
        """Offer work to a client, for as long as it listens.

        Raises:
            DeniedError: unknown session.
            LeavingError: the server stops before the run is over.
        """

    @abstractmethod
    async def start(self, request: ModelRequest) -> Floats | None:
        """The model that a round starts from; None if the round is not open (any more).

        Raises:
            DeniedError: unknown session.
        """

    @abstractmethod
    async def settled(self, request: ProgressRequest) -> Receipt | None:
        """The receipt of an update that counts already.

        Raises:
            DeniedError: unknown session.
        """

    @abstractmethod
    async def admit(self, header: SubmitHeader) -> Place | Receipt:
        """Where an update is to go, or the receipt that says why it is not wanted.

        Raises:
            DeniedError: unknown session.
            LeavingError: the server stops before the run is over.
        """

    @abstractmethod
    async def conclude(self, place: Place, outcome: Outcome) -> Receipt:
        """Judge and record what became of an update that was admitted."""

    @abstractmethod
    def sent(self, count: int) -> None:
        """So many bytes of a model went out."""

    # ---- what is done here ------------------------------------------------------------------------

    async def model(self, request: ModelRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the model that a round starts from; nothing if the round is not open (any more).

        Raises:
            DeniedError: unknown session, or an encoding that is not understood.
        """
        encoding, model = request.encoding, await self.start(request)
        if encoding.dtype not in vectors.DTYPES or (
            encoding.compression not in vectors.COMPRESSIONS.values()
        ):
            raise DeniedError(f"the encoding {encoding.dtype}, {encoding.compression} is not understood")
        if model is None:
            return
        key = request.round, encoding.dtype, encoding.compression
        if key not in self._packed:  # once for all clients of the round
            self._packed = {k: packed for k, packed in self._packed.items() if k[0] == request.round}
            work = asyncio.to_thread(_packed, model, encoding.dtype, encoding.compression)
            self._packed[key] = asyncio.ensure_future(work)
        packed, count = await asyncio.shield(self._packed[key]), 0
        ready = packed if isinstance(packed, list) else vectors.chunks(packed, start=request.offset)
        try:
            for chunk in ready:
                if chunk.offset >= request.offset:
                    count += len(chunk.data)
                    yield chunk
        finally:
            self.sent(count)

    async def progress(self, request: ProgressRequest) -> ProgressReply:
        """How much of an update is here; the connection that was sending it sends no more.

        Raises:
            DeniedError: unknown session.
        """
        receipt, client = await self.settled(request), self.owner(request.session)
        if receipt is not None:
            return ProgressReply(receipt=receipt)
        upload = self._uploads.get(client or "")
        if upload is None or (upload.header.round, upload.header.digest) != (
            request.round,
            request.digest,
        ):
            return ProgressReply()
        await upload.take_over()
        return ProgressReply(received=upload.received)

    async def submit(self, requests: AsyncIterator[SubmitRequest]) -> Receipt:
        """Take one update, chunk by chunk, and say what became of it.

        Raises:
            DeniedError: unknown session.
            LeavingError: the server stops before the run is over.
        """
        header = await read_header(requests)
        if header is None:
            return Receipt(status=Status.STATUS_MALFORMED, reason="the stream must begin with a header")
        place = await self.admit(header)
        if isinstance(place, Receipt):
            return place
        try:
            outcome = await self._store(place, requests)
        except BaseException:
            await self.conclude(place, LOST)
            raise
        return await self.conclude(place, outcome)

    async def _store(self, place: Place, requests: AsyncIterator[SubmitRequest]) -> Outcome:
        """Take in what follows the header of an update that was admitted."""
        try:
            upload = await self._upload(place)
        except OSError as error:
            reason = f"the server cannot store updates: {error.strerror}"
            return Outcome(Fault(Status.STATUS_UNAVAILABLE, reason))
        if isinstance(upload, Fault):
            return Outcome(upload)
        before = upload.received
        fault = await receive(requests, upload, self._forward)
        if fault is None and place.durable:
            await asyncio.to_thread(upload.spool.sync)
        return Outcome(fault, math.sqrt(upload.square), max(upload.received - before, 0))

    async def _upload(self, place: Place) -> Upload | Fault:
        """The upload that a header goes on with, or a new one in the place of whatever there was.

        If a later admission was faster, what it has stored must not be touched.
        """
        if self._spool is None or self._spool.path != place.spool:
            self.forget()
            self._spool = Spool.find(place.spool, place.slots, place.header.length)
        upload = self._uploads.get(place.client)
        if not await self.displace(place):  # the round may even be over, and the spool another one
            return TAKEN_OVER
        if upload is None or not upload.continues(place.header):
            if place.header.offset:
                return Fault(
                    Status.STATUS_TRUNCATED,
                    f"what is before byte {place.header.offset} is not here; ask for the progress",
                )
            upload = Upload(place.header, place.slot, self._spool, place.ticket)
            self._uploads[place.client] = upload
        return upload

    async def displace(self, place: Place) -> bool:
        """Let nothing of the client's be stored any more that was admitted before this.

        Returns:
            Whether nothing was admitted since.
        """
        upload = self._uploads.get(place.client)
        if upload is None:
            return True
        if upload.ticket > place.ticket:
            return False
        upload.ticket = place.ticket
        return await upload.take_over()

    def forget(self) -> None:
        """A round is over: stop its uploads, and let go of its spool."""
        for upload in self._uploads.values():
            upload.generation += 1
        self._uploads, self._spool = {}, None


def surplus(owners: Mapping[bytes, str], client: str) -> list[bytes]:
    """A client's sessions, among all in the order in which they began, that one more is to end."""
    return [key for key, owner in owners.items() if owner == client][: 1 - _SESSIONS]


def _packed(model: Floats, dtype: DType, compression: Compression) -> memoryview | list[Chunk]:
    """A model ready to travel: its bytes, or its compressed chunks."""
    data = vectors.pack(model, dtype)
    return data if compression == COMPRESSION_NONE else list(vectors.chunks(data, compression))
