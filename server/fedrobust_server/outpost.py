"""A further gateway, in a process of its own: bytes stop here, what is to be decided is asked.

It does not know where the coordinator is. Questions wait until the coordinator's process, which has
started this one, fetches them, and it brings the answers; so they go where Ray's calls go, by its
authentication, and clients see nothing of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import platform
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fedrobust_proto.v1.federation_pb2 import (
    Assignment,
    EnrolReply,
    EnrolRequest,
    ModelRequest,
    ProgressRequest,
    Receipt,
    RoundsRequest,
    SubmitHeader,
)

from fedrobust import InputError
from fedrobust_server.gateway import Listening, listen
from fedrobust_server.limits import Limits
from fedrobust_server.reception import LOST, Outcome, Place, Reception, surplus
from fedrobust_server.security import Security
from fedrobust_server.spool import Floats


@dataclass(frozen=True)
class Front:
    """What every gateway of a run shows to its clients.

    Attributes:
        address: "host:port"; gateways on one machine share the port.
        tls: the server's folder, the same on all nodes; None sends everything in the clear.
        proof: how clients show who they are.
        federation: the run's name.
        exposed: listen beyond loopback without TLS.
        limits: on what callers may take of each gateway.
    """

    address: str
    tls: Path | None = None
    proof: str = "certificate"
    federation: str = ""
    exposed: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Token:
    """A file by which a gateway can tell that it sees the run's folder."""

    path: Path
    text: str

    def check(self) -> None:
        """Look for it.

        Raises:
            InputError: it is not there, or another one is.
        """
        try:
            same = self.path.read_text() == self.text
        except OSError:
            same = False
        if not same:
            raise InputError(
                f"it does not see the run's folder {self.path.parent}, which must be on storage that "
                "all nodes with gateways share, under the same path"
            )


@dataclass(frozen=True)
class Opened:
    """A gateway listens, or it says why it cannot.

    Attributes:
        node: name of its machine.
        process: its id there.
        port: where it listens.
        complaint: why it does not.
    """

    node: str
    process: int
    port: int = 0
    complaint: str = ""


@dataclass(frozen=True)
class Question:
    """Something that the coordinator is to do.

    Attributes:
        number: replies carry it.
        what: a method of the coordinator, or "leave": its answers are not awaited any more.
        about: its arguments.
    """

    number: int
    what: str
    about: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the coordinator says to a question: one, or several and then one that is the last."""

    number: int
    value: Any = None
    error: Exception | None = None
    last: bool = True


class Outpost(Reception):
    """The gateway's process; a Ray actor."""

    def __init__(self) -> None:
        """Ask nothing yet."""
        super().__init__(lambda _slot, _ticket, _start, _values: None)  # shards read the spool
        torch.set_num_threads(1)
        self._numbers = itertools.count()
        self._asked: list[Question] = []
        self._any = asyncio.Event()
        self._replies: dict[int, asyncio.Queue[Reply]] = {}
        self._owners: dict[bytes, str] = {}
        self._listening: Listening | None = None

    # ---- what the coordinator's process calls -----------------------------------------------------

    async def open(self, front: Front, token: Token) -> Opened:
        """Begin to serve clients."""
        opened = Opened(platform.node(), os.getpid())
        try:
            token.check()
            security = None
            if front.tls is not None:
                security = Security.load(front.tls, front.proof, front.federation)
            self._listening = await listen(
                self, front.address, security, front.limits, exposed=front.exposed, shared=True
            )
        except InputError as error:  # told in words: as an exception it would carry a traceback
            return Opened(opened.node, opened.process, complaint=str(error))
        return Opened(opened.node, opened.process, self._listening.port)

    async def questions(self) -> list[Question]:
        """What has been asked; waits until something has."""
        await self._any.wait()
        self._any.clear()
        asked, self._asked = self._asked, []
        return asked

    async def answer(self, replies: list[Reply]) -> None:
        """Pass replies on to those who wait for them."""
        for reply in replies:
            if reply.number in self._replies:
                self._replies[reply.number].put_nowait(reply)

    async def drain(self) -> None:
        """Tell health checks that no new clients should be sent here."""
        if self._listening is not None:
            await self._listening.drain()

    async def stop(self, grace: float) -> None:
        """End all calls after `grace` seconds."""
        if self._listening is not None:
            await self._listening.stop(grace)

    # ---- what is asked ----------------------------------------------------------------------------

    async def enrol(self, request: EnrolRequest, identity: str | None = None) -> EnrolReply:
        """Join; remembers whose the session is."""
        reply: EnrolReply = await self._ask("enrol", request, identity)
        for key in surplus(self._owners, request.client):
            del self._owners[key]
        self._owners[reply.session] = request.client
        return reply

    def owner(self, session: bytes) -> str | None:
        """Whose a session is that was opened here; the coordinator knows whether it is over."""
        return self._owners.get(session)

    async def rounds(self, request: RoundsRequest) -> AsyncGenerator[Assignment, None]:
        """Offer work to a client, for as long as it listens."""
        with self._asking("rounds", request) as replies:
            while not (reply := _said(await replies.get())).last:
                yield reply.value

    async def start(self, request: ModelRequest) -> Floats | None:
        """The model that a round starts from, which comes once and by Ray's object store."""
        reference = await self._ask("start", request)
        model: Floats | None = None if reference is None else await reference
        return model

    async def settled(self, request: ProgressRequest) -> Receipt | None:
        """The receipt of an update that counts already."""
        receipt: Receipt | None = await self._ask("settled", request)
        return receipt

    async def admit(self, header: SubmitHeader) -> Place | Receipt:
        """Where an update is to go, or the receipt that says why it is not wanted."""
        asked: asyncio.Future[Place | Receipt] = asyncio.ensure_future(self._ask("admit", header))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:  # the place must not stay taken: the client may be elsewhere
            place = await asked
            if isinstance(place, Place):
                await self.displace(place)  # what it was admitted in the place of may still be stored
                await self.conclude(place, LOST)
            raise

    async def conclude(self, place: Place, outcome: Outcome) -> Receipt:
        """Have an upload judged and recorded."""
        receipt: Receipt = await self._ask("conclude", place, outcome)
        return receipt

    def sent(self, count: int) -> None:
        """So many bytes of a model went out."""
        self._put("sent", count)

    async def _ask(self, what: str, *about: Any) -> Any:  # noqa: ANN401 (what that method returns)
        with self._asking(what, *about) as replies:
            return _said(await replies.get()).value

    @contextlib.contextmanager
    def _asking(self, what: str, *about: Any) -> Iterator[asyncio.Queue[Reply]]:  # noqa: ANN401
        number = self._put(what, *about)
        replies = self._replies[number] = asyncio.Queue()
        try:
            yield replies
        finally:
            del self._replies[number]
            if what == "rounds":  # all others end by themselves, and must
                self._asked.append(Question(number, "leave"))
                self._any.set()

    def _put(self, what: str, *about: Any) -> int:  # noqa: ANN401
        question = Question(next(self._numbers), what, about)
        self._asked.append(question)
        self._any.set()
        return question.number


def _said(reply: Reply) -> Reply:
    if reply.error is not None:
        raise reply.error
    return reply
