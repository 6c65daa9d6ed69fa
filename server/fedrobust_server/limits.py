"""Bounds on what callers may take of the server, known clients and strangers alike."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from fedrobust.text import Textual
from fedrobust_server.refusals import ExhaustedError, RefusedError, StalledError

T = TypeVar("T")

_INT32 = 2**31 - 1


@dataclass(frozen=True, repr=False)
class Limits(Textual):
    """What callers may take.

    Attributes:
        message_bytes: of one message; a chunk of an update may have 4 MiB.
        metadata_bytes: of a call's headers.
        connections: open at a time, of all callers.
        streams: concurrent calls on one connection; further ones wait at the caller.
        calls: concurrent calls of all callers together.
        arriving_per_address: concurrent calls from one address that have not said yet whose they are;
            all clients behind one address share them, each for a moment a call.
        strangers: concurrent calls of health checks and reflection, which ask for no session.
        sessions: of all clients together; of each client, the coordinator keeps the newest few.
        calls_per_client: concurrent calls with a client's sessions.
        uploads_per_client: concurrent uploads of one client. Each holds at most one message and the
            transport's window of some MiB, so this bounds a client's bytes in flight as well.
        uploads: concurrent uploads of all clients together.
        message_timeout: seconds within which a message that is due must have come, or an answer have
            been taken; clients send chunks of 1 MiB.
        bytes_per_second: what an upload must keep up on average, not counting the first
            `message_timeout` seconds of waiting, nor the time in which the server is busy with it.
        handshake_timeout: seconds that a connection may take to set up TLS and HTTP/2.
        idle: seconds after which a connection without calls is closed.
        age: seconds after which a connection is asked to come back anew.
        age_grace: seconds that its calls may then take to end.
        keepalive: seconds of silence after which a peer is asked whether it is still there.
        keepalive_timeout: seconds that it has to answer.
        ping_interval: seconds that a peer must leave between its own such questions, or else it is
            disconnected.
    """

    name = "limits"

    message_bytes: int = (4 << 20) + (64 << 10)
    metadata_bytes: int = 16 << 10
    connections: int = 4096
    streams: int = 128
    calls: int = 16384
    arriving_per_address: int = 2048
    strangers: int = 64
    sessions: int = 16384
    calls_per_client: int = 8
    uploads_per_client: int = 2
    uploads: int = 4096
    message_timeout: float = 30.0
    bytes_per_second: float = 16 << 10
    handshake_timeout: float = 10.0
    idle: float = 600.0
    age: float = 43200.0
    age_grace: float = 600.0
    keepalive: float = 60.0
    keepalive_timeout: float = 20.0
    ping_interval: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            value = getattr(self, field.name)
            most = _INT32 if isinstance(field.default, int) else _INT32 // 1000  # gRPC's milliseconds
            self.require(
                0 < value <= most, f"{field.name} must be above 0 and at most {most}, got {value}"
            )

    def options(self, *, shared: bool = False) -> list[tuple[str, int]]:
        """Those limits that gRPC itself keeps, as options of its server.

        Args:
            shared: other servers may listen on the same port, and each gets some of the clients.
        """
        milliseconds = {
            "grpc.server_handshake_timeout_ms": self.handshake_timeout,
            "grpc.max_connection_idle_ms": self.idle,
            "grpc.max_connection_age_ms": self.age,
            "grpc.max_connection_age_grace_ms": self.age_grace,
            "grpc.keepalive_time_ms": self.keepalive,
            "grpc.keepalive_timeout_ms": self.keepalive_timeout,
            "grpc.http2.min_ping_interval_without_data_ms": self.ping_interval,
        }
        return [
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.http2.max_ping_strikes", 2),
            # Compressed messages are refused: what they would grow to is not for the caller to decide.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            # Otherwise the second one is to be told that the port is taken.
            ("grpc.so_reuseport", int(shared)),
            *((name, int(seconds * 1000)) for name, seconds in milliseconds.items()),
        ]


class Slots:
    """Counts what goes on at the moment, in all and by holder."""

    def __init__(self, what: str, total: int, each: int) -> None:
        """Allow so many.

        Args:
            what: is counted, in the plural, for the message.
            total: at most so many at a time.
            each: of which at most so many of one holder.
        """
        self._what, self._total, self._each = what, total, each
        self._held: Counter[str] = Counter()
        self._count = 0

    def take(self, holder: str) -> Callable[[], None]:
        """Take a slot; returns what gives it back, to be called once.

        Raises:
            ExhaustedError: all of the holder's slots, or all there are, are taken.
        """
        if self._held[holder] >= self._each:
            raise ExhaustedError(
                f"{holder} has {self._each} {self._what} already; end one, then try again"
            )
        if self._count >= self._total:
            raise ExhaustedError(f"the server has {self._total} {self._what} already; try again later")
        self._held[holder] += 1
        self._count += 1

        def release() -> None:
            self._count -= 1
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]

        return release


async def prompt(
    messages: AsyncIterator[tuple[T, int]], limits: Limits, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[T, None]:
    """Pass a caller's stream on for as long as it keeps coming.

    Only time spent waiting for the caller counts, so that a busy server blames nobody for it.

    Args:
        messages: and their sizes on the wire, which protobuf would have to encode them to tell.
        limits: `message_timeout` and `bytes_per_second`.
        clock: in seconds.

    Raises:
        StalledError: a message took too long, or they come too slowly on the whole.
    """
    waited, received = -limits.message_timeout, 0
    while True:
        begun = clock()
        weighed = await due(messages, limits.message_timeout)
        if weighed is None:
            return
        message, size = weighed
        waited += clock() - begun
        received += size
        if waited > 0 and received < waited * limits.bytes_per_second:
            raise StalledError(
                f"the upload is too slow: it must keep up {limits.bytes_per_second:.0f} bytes a second"
            )
        yield message


async def due(messages: AsyncIterator[T], seconds: float) -> T | None:
    """The next message of a stream, which is to come now; None at the stream's end.

    Raises:
        StalledError: it has not come within `seconds`.
    """
    try:
        # Not `wait_for`, which before Python 3.12 forgets that a call was cancelled as its message came.
        async with asyncio.timeout(seconds):
            return await anext(messages, None)
    except TimeoutError:
        raise StalledError(f"no message came for {seconds:g} seconds") from None


class Cut(Generic[T]):
    """Passes a stream on and ends it at the first refusal, which is kept for later.

    Who reads it sees a truncated stream, and can put its things away.

    Attributes:
        refused: why it ended early, if it did.
    """

    def __init__(self, messages: AsyncIterator[T]) -> None:
        """Read from this stream."""
        self._messages = messages
        self.refused: RefusedError | None = None

    def __aiter__(self) -> Cut[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await anext(self._messages)
        except RefusedError as error:
            self.refused = error
            raise StopAsyncIteration from None
