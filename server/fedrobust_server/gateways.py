"""The coordinator's side of further gateways: starts them, answers them, and starts them anew.

Only small messages pass here, in batches. Updates go from a gateway into the round's spool, and the
model comes to it from Ray's object store, once a round for all its clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from fedrobust_proto.v1.federation_pb2 import ModelRequest
from ray.exceptions import RayError

from fedrobust import InputError
from fedrobust_server.coordinator import Coordinator
from fedrobust_server.outpost import Front, Opened, Outpost, Question, Reply, Token
from fedrobust_server.reception import DeniedError, LeavingError
from fedrobust_server.runs import RunFolder
from fedrobust_server.spool import Floats

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
"""Seconds before a gateway that died is started anew."""
_PATIENCE = 10.0
"""Seconds for a gateway to do what it is told; it needs two to stop."""


@dataclass
class _Models:
    """The model of a round in Ray's object store, put there when a gateway first asks for it."""

    number: int = 0
    reference: asyncio.Future[Any] | None = None

    async def of(self, number: int, model: Floats) -> Any:  # noqa: ANN401 (Ray's references are untyped)
        if self.reference is None or self.number != number:
            work = asyncio.to_thread(ray.put, model)
            self.number, self.reference = number, asyncio.ensure_future(work)
        return await asyncio.shield(self.reference)


@dataclass
class _Link:
    """The talk with one gateway, for as long as its process lives."""

    name: str
    actor: Any
    coordinator: Coordinator
    models: _Models
    work: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)

    async def talk(self) -> None:
        """Answer questions.

        Raises:
            RayError: the gateway is gone.
        """
        calls: Mapping[str, Callable[..., Awaitable[Any]]] = {
            "enrol": partial(self.coordinator.enrol, gateway=self.name),
            "start": self._start,
            "settled": self.coordinator.settled,
            "admit": partial(self.coordinator.admit, gateway=self.name),
            "conclude": self.coordinator.conclude,
        }
        while True:
            for question in await self.actor.questions.remote():
                match question.what:
                    case "sent":
                        self.coordinator.sent(*question.about)
                    case "leave":
                        if question.number in self.work:
                            self.work[question.number].cancel()
                    case "rounds":
                        self._begin(question, self._offer(question))
                    case what:
                        self._begin(question, self._call(question, calls[what]))

    async def end(self) -> None:
        """Forget a gateway that is gone: its clients have left, and nobody stores their updates."""
        for task in tuple(self.work.values()):
            task.cancel()
        await self.coordinator.gone(self.name)

    def _begin(self, question: Question, work: Any) -> None:  # noqa: ANN401 (a coroutine)
        task = self.work[question.number] = asyncio.ensure_future(self._kept(question, work))
        task.add_done_callback(lambda _: self.work.pop(question.number, None))

    async def _kept(self, question: Question, work: Awaitable[None]) -> None:
        """Tell the gateway why there is no answer."""
        try:
            await work
        except (DeniedError, LeavingError) as error:
            self._say(Reply(question.number, error=error))
        except Exception:
            log.exception("a gateway's question broke the coordinator's code")
            self._say(Reply(question.number, error=RuntimeError("the coordinator failed")))

    async def _call(self, question: Question, call: Callable[..., Awaitable[Any]]) -> None:
        self._say(Reply(question.number, await call(*question.about)))

    async def _offer(self, question: Question) -> None:
        async with contextlib.aclosing(self.coordinator.rounds(*question.about)) as offers:
            async for offer in offers:
                self._say(Reply(question.number, offer, last=False))
        self._say(Reply(question.number))

    async def _start(self, request: ModelRequest) -> Any:  # noqa: ANN401 (Ray's references are untyped)
        model = await self.coordinator.start(request)
        return None if model is None else await self.models.of(request.round, model)

    def _say(self, reply: Reply) -> None:
        """Reply, together with whatever else is said in this turn of the event loop."""
        if not self.replies:
            asyncio.get_running_loop().call_soon(self._send)
        self.replies.append(reply)

    def _send(self) -> None:
        replies, self.replies = self.replies, []
        self.actor.answer.remote(replies)


class Gateways:
    """All further gateways of a run.

    Attributes:
        opened: where each of them is, by its name.
    """

    def __init__(self, coordinator: Coordinator, front: Front, token: Token) -> None:
        """Start none yet."""
        self.opened: dict[str, Opened] = {}
        self._coordinator, self._front, self._token = coordinator, front, token
        self._models = _Models()
        self._actors: dict[str, Any] = {}

    async def start(self, name: str) -> _Link:
        """Start one, on the node that has the fewest.

        Raises:
            InputError: it cannot serve; says why.
            RayError: it died.
        """
        remote: Any = ray.remote(num_cpus=0.001, scheduling_strategy="SPREAD")(Outpost)
        self._actors[name] = actor = remote.remote()
        self.opened[name] = opened = await actor.open.remote(self._front, self._token)
        if opened.complaint:
            ray.kill(actor)
            raise InputError(f"{name} on {opened.node} cannot serve: {opened.complaint}")
        return _Link(name, actor, self._coordinator, self._models)

    async def keep(self, link: _Link) -> None:
        """Answer one, and start it anew whenever it has died."""
        while True:
            try:
                await link.talk()
            except RayError as error:
                self._coordinator.note(f"{link.name} was lost: {type(error).__name__}")
            except Exception:  # our own fault; it must not be left without answers
                log.exception("the talk with a gateway broke")
            finally:
                ray.kill(link.actor)  # if it lives, it must not store what others are let in for
                await link.end()
            link = await self._anew(link.name)

    async def drain(self) -> None:
        """Tell health checks that no new clients should be sent to them."""
        await self._each("drain")

    async def stop(self, grace: float) -> None:
        """End all calls after `grace` seconds, and the gateways."""
        await self._each("stop", grace)
        for actor in self._actors.values():
            ray.kill(actor)

    async def _anew(self, name: str) -> _Link:
        for doubling in itertools.count():
            await asyncio.sleep(min(_FIRST_PAUSE * 2.0 ** min(doubling, 30), _LONGEST_PAUSE))
            try:
                link = await self.start(name)
            except (RayError, InputError) as error:
                log.warning("%s cannot be started anew: %s", name, error)
            else:
                self._coordinator.note(f"{name} was started anew")
                return link
        raise AssertionError("unreachable")

    async def _each(self, method: str, *arguments: float) -> None:
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors.values()]
        called = asyncio.gather(*calls, return_exceptions=True)
        try:
            async with asyncio.timeout(_PATIENCE):
                told = await called
        except TimeoutError:  # when Ray is gone, calls neither return nor fail
            log.warning("not every gateway answers when told to %s", method)
            return
        for error in told:
            if isinstance(error, BaseException) and not isinstance(error, RayError):
                raise error


@contextlib.asynccontextmanager
async def further_gateways(
    coordinator: Coordinator, folder: RunFolder, front: Front, count: int
) -> AsyncIterator[Gateways]:
    """Serve a run's clients by so many further gateways, on as many nodes as there are.

    Args:
        coordinator: decides.
        folder: of the run; the gateways must see it.
        front: what they show to clients.
        count: how many; the coordinator's own is not among them.

    Raises:
        InputError: one cannot serve; says why.
    """
    token = Token(folder.path.resolve() / "gateways.token", secrets.token_hex(16))
    token.path.write_text(token.text)
    gateways, keepers = Gateways(coordinator, front, token), list[asyncio.Task[None]]()
    try:
        starting = [gateways.start(f"gateway-{number}") for number in range(1, count + 1)]
        for link in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(link, BaseException):
                raise link
            keepers.append(asyncio.ensure_future(gateways.keep(link)))
        yield gateways
    finally:
        await gateways.stop(grace=2.0)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        token.path.unlink(missing_ok=True)
