"""Takes one update off the wire: checks what can be seen of it, and stores it as it comes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from blake3 import blake3
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import Chunk, DType, Status, SubmitHeader, SubmitRequest

from fedrobust_server.round import Fault
from fedrobust_server.spool import Floats, Spool

T = TypeVar("T")

Forward = Callable[[int, int, int, Floats], None]
"""Is told of values that have been stored: the slot, the ticket of the admission that they came by, the
first coordinate, and the values."""

TAKEN_OVER = Fault(Status.STATUS_TRUNCATED, "another connection has taken this upload over")

# Decompressing, hashing and storing leave the event loop to the other clients. Subnormal numbers, which
# slow arithmetic down a hundredfold, are taken for zero.
_WORKERS = ThreadPoolExecutor(2, "intake", torch.set_flush_denormal, (True,))


class RefusedError(Exception):
    """An upload cannot go on; the fault says why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(status, reason)


@dataclass
class Upload:
    """One client's update of a round, as far as it has come.

    Attributes:
        header: what the client said was coming.
        slot: its place in the spool.
        spool: where its values go.
        ticket: of the last admission to this place.
        received: bytes that are there, uncompressed.
        square: the squared norm of the values that are there.
        generation: which of the client's connections is sending; a later one takes over.
        at_work: the chunk that is being stored.
    """

    header: SubmitHeader
    slot: int
    spool: Spool
    ticket: int = 0
    received: int = 0
    square: float = 0.0
    generation: int = 0
    at_work: asyncio.Future[tuple[int, Floats]] | None = None
    _digest: Any = field(default_factory=blake3)

    @property
    def total(self) -> int:
        """Bytes of the whole update, uncompressed."""
        return self.header.length * vectors.item_bytes(self.header.encoding.dtype)

    @property
    def fault(self) -> Fault | None:
        """What is wrong with the update, which is complete, if anything is."""
        if self._digest.digest() != self.header.digest:
            return Fault(
                Status.STATUS_WRONG_DIGEST, "the bytes do not have the digest that the header gave"
            )
        if not math.isfinite(self.square):
            return Fault(Status.STATUS_NON_FINITE, "the update holds values that are not finite")
        return None

    def continues(self, header: SubmitHeader) -> bool:
        """Whether a header announces the rest of this update."""
        own = self.header
        same = header.digest == own.digest and header.encoding == own.encoding
        return same and header.offset == self.received

    async def take_over(self) -> bool:
        """Let no earlier connection store any more, and wait until what it was storing is there.

        Returns:
            Whether no later connection has come in the meantime.
        """
        self.generation += 1
        mine = self.generation
        if self.at_work is not None:
            await asyncio.wait([self.at_work])
        return self.generation == mine

    def store(self, chunk: Chunk, forward: Forward) -> asyncio.Future[tuple[int, Floats]]:
        """Begin to `take` a chunk in a thread, and to forward it then, as `receive`."""
        ticket = self.ticket  # whoever takes over while this is stored has another one

        def pass_on(stored: asyncio.Future[tuple[int, Floats]]) -> None:
            if stored.exception() is None:
                forward(self.slot, ticket, *stored.result())

        self.at_work = asyncio.get_running_loop().run_in_executor(_WORKERS, self.take, chunk)
        # Whoever takes over waits for this, and is woken only after it has been passed on.
        self.at_work.add_done_callback(pass_on)
        return self.at_work

    def take(self, chunk: Chunk) -> tuple[int, Floats]:
        """Store the next chunk; returns where its values start, and the values.

        Raises:
            RefusedError: a gap, bytes that cannot be read, or too many of them.
            OSError: it could not be stored; the upload is as before.
        """
        encoding = self.header.encoding
        if chunk.offset != self.received:
            raise RefusedError(
                Status.STATUS_MALFORMED,
                f"expected a chunk at byte {self.received}, in order and without gaps",
            )
        try:
            data = vectors.expand(chunk.data, encoding.compression)
        except ValueError as error:
            raise RefusedError(Status.STATUS_MALFORMED, str(error)) from None
        item = vectors.item_bytes(encoding.dtype)
        if not data or len(data) % item:
            raise RefusedError(
                Status.STATUS_MALFORMED,
                f"a chunk must hold whole values of {item} bytes, got {len(data)} bytes",
            )
        if self.received + len(data) > self.total:
            raise RefusedError(
                Status.STATUS_WRONG_LENGTH, f"more than the {self.total} bytes that the header declared"
            )
        values, start = vectors.unpack(data, encoding.dtype), self.received // item
        self.spool.write(self.slot, start, values)
        self._digest.update(data)
        self.square += _squared_norm(values)
        self.received += len(data)
        return start, values


async def read_header(requests: AsyncIterator[SubmitRequest]) -> SubmitHeader | None:
    """The header that a stream must begin with; None if it does not."""
    async for request in requests:
        return request.header if request.WhichOneof("part") == "header" else None
    return None


def unfit(header: SubmitHeader, size: int) -> Fault | None:
    """What is wrong with what a client says is coming, for a model of `size` coordinates."""
    encoding = header.encoding
    if encoding.dtype not in vectors.DTYPES:
        known = ", ".join(DType.Name(dtype) for dtype in vectors.DTYPES)
        return Fault(
            Status.STATUS_WRONG_DTYPE, f"dtype {encoding.dtype} is not understood, only {known}"
        )
    if encoding.compression not in vectors.COMPRESSIONS.values():
        return Fault(Status.STATUS_MALFORMED, f"compression {encoding.compression} is not understood")
    if header.length != size:
        return Fault(
            Status.STATUS_WRONG_LENGTH, f"the update has {header.length} coordinates, the model {size}"
        )
    return None


async def receive(
    requests: AsyncIterator[SubmitRequest],
    upload: Upload,
    forward: Forward,
) -> Fault | None:
    """Take in what follows the header, until it ends or a later connection takes over.

    Args:
        requests: chunks.
        upload: continues where it stands.
        forward: is told of every chunk, in order.

    Returns:
        What is wrong with the update, if anything is.
    """
    loop, generation = asyncio.get_running_loop(), upload.generation
    at_work: asyncio.Future[tuple[int, Floats]] | None = None
    try:
        async for request in requests:
            if at_work is not None:  # the next chunk came in while this one was stored
                await _done(at_work)
            if upload.generation != generation:
                return TAKEN_OVER
            if request.WhichOneof("part") != "chunk":
                return Fault(Status.STATUS_MALFORMED, "only chunks may follow the header")
            at_work = upload.store(request.chunk, forward)
        if at_work is not None:
            await _done(at_work)
    except RefusedError as error:
        return error.fault
    except OSError as error:
        return Fault(Status.STATUS_UNAVAILABLE, f"the server cannot store updates: {error.strerror}")
    finally:
        if at_work is not None:
            await asyncio.wait([at_work])
    if upload.received < upload.total:
        return Fault(
            Status.STATUS_TRUNCATED,
            f"the stream ended after {upload.received} of {upload.total} bytes; send the rest",
        )
    return await loop.run_in_executor(_WORKERS, lambda: upload.fault)


async def _done(work: asyncio.Future[T]) -> T:
    """What came of work in a thread, which goes on to its end if the one who waits is cancelled."""
    await asyncio.wait([work])
    return work.result()


def _squared_norm(values: Floats) -> float:
    """Not finite if, and only if, some value is not. einsum, because BLAS would start threads."""
    with np.errstate(all="ignore"):
        square = float(np.einsum("i,i->", values, values))
        if not math.isfinite(square):  # perhaps it is no float32, and the values are
            exact = values.astype(np.float64)
            square = float(np.einsum("i,i->", exact, exact))
    return square
