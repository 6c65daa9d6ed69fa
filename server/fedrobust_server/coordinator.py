"""Runs a federation: turns calls into events of the round machine, and performs its actions.

One coordinator serves every transport. Remote clients reach it through the gateway, simulated ones
call it directly, with the same messages; so what is simulated is what runs.

Nothing that was acknowledged is lost. An update is in the round's spool and in the ledger before its
receipt is sent; a round's updates stay until the state that they led to has been saved; and when shards
are lost, they start anew from the state before the round, and read its updates again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import (
    Assignment,
    EnrolReply,
    EnrolRequest,
    ModelRequest,
    ProgressRequest,
    Receipt,
    RoundsRequest,
    Status,
    SubmitHeader,
    TensorSpec,
)
from fedrobust_proto.v1.federation_pb2 import Manifest as ManifestMessage
from ray.exceptions import RayError

from fedrobust import Aggregated, InputError, Verdict
from fedrobust.training import Evaluation, Manifest
from fedrobust_server import lifeline
from fedrobust_server import round as machine
from fedrobust_server.aftermath import Aftermath, ClosedRound, RoundReport
from fedrobust_server.combination import Combination
from fedrobust_server.config import RunConfig
from fedrobust_server.folding import Folding
from fedrobust_server.intake import TAKEN_OVER, unfit
from fedrobust_server.ledger import Answer, Ledger, Standing
from fedrobust_server.metrics import Metrics
from fedrobust_server.quarantine import MALFORMED
from fedrobust_server.reception import (
    LOST,
    BarredError,
    DeniedError,
    LeavingError,
    Outcome,
    Place,
    Reception,
    surplus,
)
from fedrobust_server.record import by_client
from fedrobust_server.round import Fault, Phase
from fedrobust_server.runs import RunFolder
from fedrobust_server.shards import Shards
from fedrobust_server.spool import Floats, Spool

T = TypeVar("T")
Root = Callable[[int, Floats], Floats]
"""(round, (d,) model) -> (d,), the server's own update of that round."""

log = logging.getLogger(__name__)

_ATTEMPTS = 4
"""How often a round is worked out before losing shards ends the run."""
_HEED = 2.0
"""Seconds between looks for what operators decide, while the federation waits for clients."""
_LEAVING = "the server stops; come back later"


@dataclass
class _Session:
    """One connection's identity and what it is offered."""

    client: str
    gateway: str
    offers: asyncio.Queue[Assignment | None] = field(default_factory=asyncio.Queue)


@dataclass
class _Round:
    """What the machine does not know of the current round.

    Attributes:
        number: of the round.
        slots: place of each client asked in the spool.
        spool: where updates go, from `begun` on.
        begun: set when updates can be taken.
        norms: of the accepted updates.
        digests: of the accepted updates.
        refused: how many submissions did not count.
        malformed: clients that sent what cannot be an update.
        spread: how far updates stand out, where the schedule looks at that after this round.
        places: of the updates that are being taken in, the latest of each client.
        unsent: tickets of updates of which something could not be passed on to the shards.
        root: the server's own update, while the clients' come in; None where the rule looks at none.
        opened: on the loop's clock.
        closes_at: on the loop's clock.
    """

    number: int = 0
    slots: Mapping[str, int] = field(default_factory=dict)
    spool: Spool | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    norms: dict[str, float] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    refused: int = 0
    malformed: set[str] = field(default_factory=set)
    spread: Mapping[str, float] = field(default_factory=dict)
    root: asyncio.Future[Floats] | None = None
    opened: float = 0.0
    places: dict[str, Place] = field(default_factory=dict)
    unsent: set[int] = field(default_factory=set)
    closes_at: float = 0.0

    @classmethod
    def of(cls, standing: Standing) -> _Round:
        """The round that the ledger ends with."""
        slots = {client: i for i, client in enumerate(standing.selected)}
        current = cls(standing.round, slots)
        current.norms = {client: norm for client, (_, norm) in standing.accepted.items()}
        current.digests = {c: bytes.fromhex(digest) for c, (digest, _) in standing.accepted.items()}
        current.malformed = set(standing.failed)
        return current


class Coordinator(Reception):
    """A federation in progress. Its coroutines are called from one event loop."""

    def __init__(  # noqa: PLR0913 (the parts of a server)
        self,
        config: RunConfig,
        manifest: Manifest,
        shards: Shards,
        ledger: Ledger,
        evaluate: Callable[[Floats], Evaluation],
        root: Root | None = None,
        *,
        folder: RunFolder,
        state: Floats,
        standing: Standing | None,
        watch: Callable[[RoundReport], None],
        metrics: Metrics,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run.
            manifest: names and shapes of the model's tensors.
            shards: hold the model; started from `state`.
            ledger: takes the record.
            evaluate: judges a model; called in a thread.
            root: trains an update of the server's own; called in a thread. None: it has no data.
            folder: of the run.
            state: (1 + kept, d), the model and the optimiser's memory that the run begins with, or goes
                on from.
            standing: where it goes on; None begins it.
            watch: is told of every finished round.
            metrics: are kept up to date.
        """
        super().__init__(self._stored)
        self._folding = Folding(shards)
        task = config.task
        plan = machine.Plan(config.rounds, config.needed, config.sample, config.quorum, task.seed)
        self._metrics, self._combination = metrics, Combination.of(config)
        metrics.backlog.set_function(shards.backlog)
        self._aftermath = Aftermath(
            config, manifest, ledger, folder, evaluate, watch, metrics, self._spawn
        )
        if standing is None or standing.closed:  # of an open round the choice stands
            self._aftermath.heed(standing.round + 1 if standing else 1)
        self._state = machine.State(plan, excluded=self._aftermath.excluded)
        self._standing, self._round = standing, _Round()
        # Actions are held until the shards are as they were.
        self._held, self._ready = list[machine.Action](), asyncio.Event()
        if standing is not None:  # before any client can join
            self._round = _Round.of(standing)
            self._state, actions = machine.step(self._state, _resumed(standing))
            self._held += actions
        self._config, self._shards, self._ledger, self._folder = config, shards, ledger, folder
        self._root = root
        self._encoding = vectors.encoding(config.wire, config.compression)
        self._manifest = ManifestMessage(
            tensors=[TensorSpec(name=name, shape=shape) for name, shape in manifest]
        )
        self._learnt = state
        self._sessions: dict[bytes, _Session] = {}
        self._tickets = 0
        self._listening: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Future[None] | None = None

    @property
    def _model(self) -> Floats:
        model: Floats = self._learnt[0]
        return model

    async def run(self) -> Floats:
        """Wait for clients, run all rounds, and return the final model.

        Raises:
            ConnectionError: Ray is gone, or shards were lost again and again.
            Exception: whatever else broke a round that is not the clients' fault.
        """
        self._finished = asyncio.get_running_loop().create_future()
        self._spawn(lifeline.watch())
        if self._standing is not None:
            await self._resume(self._standing)
        self._ready.set()
        self._perform(self._held)
        self._spawn(self._heed())
        if self._state.phase is Phase.DONE:
            self._finish()
        try:
            await self._finished
            await self._aftermath.over()
        finally:
            self._ready.set()
            self._round.begun.set()
            for session in self._sessions.values():
                session.offers.put_nowait(None)
            for task in self._tasks:
                task.cancel()
        return self._model

    def drain(self) -> None:
        """Begin no further round; `run` returns when the current one is finished, or safely stored."""
        self._happened(machine.Draining())

    # ---- what clients call ------------------------------------------------------------------------

    async def enrol(
        self, request: EnrolRequest, identity: str | None = None, gateway: str = ""
    ) -> EnrolReply:
        """Join; answers with a session.

        Args:
            request: who asks.
            identity: who that is for certain; None believes the request.
            gateway: where; "" is this process.

        Raises:
            BarredError: the name is not one that logs and files can carry, or another's.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", request.client):
            raise BarredError(
                "a client's name must be up to 64 letters, digits, '.', '_' or '-', got "
                f"{request.client[:64]!r}"
            )
        if identity is not None and request.client != identity:
            raise BarredError(f"you are {identity!r} and cannot join as {request.client!r}")
        session = secrets.token_bytes(16)
        owners = {key: other.client for key, other in self._sessions.items()}
        for key in surplus(owners, request.client):
            self._end(key)
        self._sessions[session] = _Session(request.client, gateway)
        return EnrolReply(
            session=session,
            federation=self._config.run,
            manifest=self._manifest,
            task=self._config.task.to_json(),
            encoding=self._encoding,
        )

    def owner(self, session: bytes) -> str | None:
        """The client that a session belongs to; None for no session of ours."""
        found = self._sessions.get(session)
        return None if found is None else found.client

    async def rounds(self, request: RoundsRequest) -> AsyncGenerator[Assignment, None]:
        """Offer work to a client, for as long as it listens.

        Raises:
            DeniedError: unknown session.
            LeavingError: the server stops before the run is over.
        """
        session = self._session(request.session)
        self._listening[session.client] += 1
        self._metrics.connected.set(len(+self._listening))
        self._happened(machine.Joined(session.client))
        try:
            while self._state.phase is not Phase.DONE:
                offer = await session.offers.get()
                if offer is None:
                    break
                yield offer
        finally:
            self._listening[session.client] -= 1
            self._metrics.connected.set(len(+self._listening))
            if not self._listening[session.client]:  # it has not come back in the meantime
                self._happened(machine.Left(session.client))
        if self._state.draining or self._state.phase is not Phase.DONE:
            raise LeavingError(_LEAVING)

    async def start(self, request: ModelRequest) -> Floats | None:
        """The model that a round starts from; None if the round is not open (any more).

        Raises:
            DeniedError: unknown session.
        """
        self._session(request.session)
        collecting = self._state.phase is Phase.COLLECTING
        return self._model if collecting and request.round == self._state.round else None

    async def settled(self, request: ProgressRequest) -> Receipt | None:
        """The receipt of an update that counts already.

        Raises:
            DeniedError: unknown session.
        """
        client = self._session(request.session).client
        return self._first_receipt(client, request.round, request.digest)

    async def admit(self, header: SubmitHeader, gateway: str = "") -> Place | Receipt:
        """Where an update is to go, or the receipt that says why it is not wanted.

        Args:
            header: of the update.
            gateway: who is to store it; "" is this process.

        Raises:
            DeniedError: unknown session.
            LeavingError: the server stops before the run is over.
        """
        client = self._session(header.session).client
        receipt = self._first_receipt(client, header.round, header.digest)
        if receipt is not None:
            return receipt
        if machine.turn_fault(self._state, client, header.round) is None:
            await self._ready.wait()  # until then this is still the round before a resumed one
            await self._round.begun.wait()
        current = self._round
        if self._state.draining:
            raise LeavingError(_LEAVING)
        fault = machine.turn_fault(self._state, client, header.round)
        fault = fault or unfit(header, self._shards.size)
        storing = current.places.get(client)
        if fault is None and storing is not None and storing.gateway != gateway:
            reason = f"another gateway is taking in an update of {client}; try again when it has ended"
            fault = Fault(Status.STATUS_UNAVAILABLE, reason)
        if fault is not None:
            return self._answered(client, header, fault)
        if current.spool is None:
            raise RuntimeError(f"round {current.number} has begun without a spool")
        self._tickets += 1
        place = Place(
            client=client,
            header=header,
            slot=current.slots[client],
            spool=current.spool.path,
            slots=current.spool.slots,
            ticket=self._tickets,
            gateway=gateway,
            durable=self._config.durability == "machine",
        )
        current.places[client] = place
        self._metrics.uploads.set(len(current.places))
        return place

    async def conclude(self, place: Place, outcome: Outcome) -> Receipt:
        """Judge and record what became of an update that was admitted."""
        self._metrics.received.inc(outcome.received)
        current, client, fault = self._round, place.client, outcome.fault
        late = place.header.round != current.number
        unsent = place.gateway or place.ticket in current.unsent
        if unsent and fault is None and not late and current.spool is not None:
            # Shards that cannot see the spool are passed on what comes in here, chunk by chunk. Another
            # process need not know them: its updates are read from the spool, which we share.
            try:
                await asyncio.to_thread(self._shards.send, current.spool, place.slot)
            except (OSError, RayError) as error:  # the place must not stay taken; the update is in it
                reason = getattr(error, "strerror", None) or str(error)
                fault = Fault(
                    Status.STATUS_UNAVAILABLE, f"the server cannot read updates: {reason}; try again"
                )
        storing = current.places.get(client)
        if storing is not None and storing.ticket == place.ticket:
            del current.places[client]
            self._metrics.uploads.set(len(current.places))
        else:  # whoever was admitted since may be writing over it
            fault = fault or TAKEN_OVER
        if fault is None and not late and self._state.draining and self._state.phase is Phase.DONE:
            raise LeavingError(_LEAVING)  # the round is still open; it may send the update again
        return self._answered(client, place.header, fault, place, outcome.norm)

    def sent(self, count: int) -> None:
        """So many bytes of a model went out."""
        self._metrics.sent.inc(count)

    async def gone(self, gateway: str) -> None:
        """A gateway has died: its sessions are over, and nobody stores what it was storing."""
        for place in tuple(self._round.places.values()):
            if place.gateway == gateway:
                await self.conclude(place, LOST)
        for key in [key for key, session in self._sessions.items() if session.gateway == gateway]:
            self._end(key)

    def note(self, what: str) -> None:
        """Something happened that an operator should know of."""
        log.warning(what, extra={"round": self._round.number})
        try:
            self._ledger.event(self._round.number, what)
        except sqlite3.OperationalError as error:  # the disk is full: it stands in the log alone
            log.error("an event cannot be recorded: %s", error)  # noqa: TRY400

    # ---- events and actions -----------------------------------------------------------------------

    def _end(self, key: bytes) -> None:
        self._sessions.pop(key).offers.put_nowait(None)

    def _session(self, key: bytes) -> _Session:
        try:
            return self._sessions[key]
        except KeyError:
            raise DeniedError("unknown session; enrol first") from None

    def _first_receipt(self, client: str, number: int, digest: bytes) -> Receipt | None:
        """The receipt of an update that counts, which may have been lost on its way."""
        if number == self._round.number and self._round.digests.get(client) == digest:
            return Receipt(status=Status.STATUS_ACCEPTED)
        return None

    def _answered(
        self,
        client: str,
        header: SubmitHeader,
        fault: Fault | None,
        place: Place | None = None,
        norm: float | None = None,
    ) -> Receipt:
        """Let the machine decide on a finished upload, record the answer, and phrase it."""
        event = machine.Submitted(client, header.round, fault)
        state, (answer, *rest) = machine.step(self._state, event)
        fault = answer.fault if isinstance(answer, machine.Refuse) else None
        status = Status.STATUS_ACCEPTED if fault is None else fault.status
        record = Answer(
            round=min(header.round, 2**62),
            client=client,
            status=Status.Name(status).removeprefix("STATUS_"),
            reason="" if fault is None else fault.reason,
            digest=header.digest.hex()[:64],
            norm=norm if norm is not None and math.isfinite(norm) else None,
            examples=min(header.examples, 2**62),
        )
        try:
            self._ledger.answer(record)
        except sqlite3.OperationalError as error:  # the disk is full: nothing has happened
            log.error("an answer to %s cannot be recorded: %s", client, error)  # noqa: TRY400
            reason = f"the server cannot record updates: {error}"
            return Receipt(status=Status.STATUS_UNAVAILABLE, reason=reason)
        self._state = state
        self._metrics.answered(record.status)
        if record.status in MALFORMED:
            self._round.malformed.add(client)
        if fault is None and place is not None and norm is not None:
            self._round.norms[client], self._round.digests[client] = norm, header.digest
            if self._combination.weighs:
                self._folding.whole(place.slot, place.ticket)
        else:
            self._round.refused += 1
        self._perform(rest)
        return Receipt(status=status, reason=record.reason)

    def _stored(self, slot: int, ticket: int, start: int, values: Floats) -> None:
        """Some of an update is in the spool."""
        try:
            self._shards.write(slot, start, values)
        except RayError:  # it has no room just now: the update is sent as a whole in the end
            self._round.unsent.add(ticket)
        if self._combination.weighs:
            self._folding.stored(slot, ticket, start, values)

    def _happened(self, event: machine.Event) -> None:
        waited = self._state.phase is Phase.WAITING
        self._state, actions = machine.step(self._state, event)
        if self._state.round and self._state.phase is Phase.WAITING and not waited:
            log.warning(
                "too few clients are there to go on",
                extra={"round": self._state.round, "here": len(self._state.present)},
            )
        self._metrics.phase(self._state.phase)
        self._perform(actions)

    def _perform(self, actions: Sequence[machine.Action]) -> None:
        if not self._ready.is_set():
            self._held += actions
            return
        try:
            for action in actions:
                self._act(action)
        except Exception as error:
            self._broken(error)
            raise

    def _act(self, action: machine.Action) -> None:
        match action:
            case machine.Open(number, clients):
                self._round = _Round(number, {client: i for i, client in enumerate(clients)})
                self._round.opened = asyncio.get_running_loop().time()
                self._metrics.opened(number, len(clients))
                log.info("a round begins", extra={"round": number, "asked": len(clients)})
                self._spawn(self._begin(self._round))
                for client in clients:
                    self._offer(number, client)
            case machine.Offer(number, client):
                self._offer(number, client)
            case machine.Aggregate(number, clients):
                self._spawn(self._aggregate(number, clients))
            case machine.Skip(_, reason):
                self._settle("skipped", reason)
            case machine.Finish():
                self._finish()

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    def _count_down(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        self._round.closes_at = loop.time() + self._config.deadline
        loop.call_at(self._round.closes_at, lambda: self._happened(machine.DeadlinePassed(number)))

    async def _begin(self, current: _Round) -> None:
        """Make room for a round's updates, once the round before cannot be lost any more."""
        await self._aftermath.room()
        current.spool = self._folder.spool(current.number, len(current.slots), self._shards.size)
        await self._enduring(partial(self._shards.open, current.spool))
        self._ledger.open_round(current.number, list(current.slots))
        self._train(current)
        current.begun.set()
        self._count_down(current.number)

    async def _resume(self, standing: Standing) -> None:
        """Go on where the ledger ends."""
        current, number = self._round, standing.round
        self._ledger.event(number, f"resumed with {len(current.norms)} updates")
        if not standing.closed:
            current.spool = self._folder.spool(number, len(current.slots), self._shards.size)
            await self._enduring(self._restore)
            self._train(current)
            current.begun.set()
            if not standing.judged:
                self._aftermath.catch_up(number - 1, self._model)
        else:
            await self._aftermath.keep(number, self._model)
        self._count_down(number)

    async def _heed(self) -> None:
        """Do what operators decide while too few clients are there, when no round's end does it."""
        while True:
            await asyncio.sleep(_HEED)
            if self._state.phase is not Phase.WAITING:
                continue
            try:
                changed = self._aftermath.heed(self._state.round + 1)
            except sqlite3.OperationalError as error:  # the disk is full: it is left for later
                log.error("decisions cannot be recorded: %s", error)  # noqa: TRY400
            else:
                if changed:
                    self._happened(machine.Excluded(self._aftermath.excluded))

    def _train(self, current: _Round) -> None:
        """Begin the server's own update of a round, if the rule looks at it."""
        if self._root is not None and self._combination.anchors:
            loop = asyncio.get_running_loop()
            current.root = loop.run_in_executor(None, self._root, current.number, self._model)

    def _offer(self, number: int, name: str) -> None:
        left = self._config.deadline
        if self._round.begun.is_set():
            left = max(self._round.closes_at - asyncio.get_running_loop().time(), 0.0)
        for session in self._sessions.values():
            if session.client == name:
                session.offers.put_nowait(Assignment(round=number, seconds_left=left))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error:
            self._broken(error)

    def _broken(self, error: BaseException) -> None:
        """A fault of the server's: stop the run rather than hang."""
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)

    # ---- the end of a round -----------------------------------------------------------------------

    async def _aggregate(self, number: int, clients: tuple[str, ...]) -> None:
        """Combine a closed round's updates and move the model."""
        self._ledger.collect(number)
        began = time.monotonic()
        try:
            own = () if self._round.root is None else (await self._round.root,)
            result, state = await self._enduring(partial(self._combine, number, clients, own))
        except InputError as error:  # too few clients for the rule: the round's fault, not the run's
            self._settle("skipped", str(error))
            return
        self._metrics.aggregated(time.monotonic() - began)
        if state is None:
            self._settle("skipped", result.verdict.value, result, clients)
            return
        self._learnt = state
        self._settle("aggregated", "", result, clients)

    def _combine(
        self, number: int, clients: tuple[str, ...], anchors: tuple[Floats, ...]
    ) -> tuple[Aggregated, Floats | None]:
        """The robust mean of these clients' updates, and the state that it leads to, if it may."""
        slots = [self._round.slots[client] for client in clients]
        squares = np.array([self._round.norms[client] for client in clients]) ** 2
        rows, width = self._shards.rows(slots, anchors), self._shards.size
        result, self._round.spread = self._combination(
            number, clients, rows, width, squares, lambda: self._shards.gram(slots)
        )
        if result.verdict is Verdict.EXCEEDED and self._config.exceeded == "skip":
            return result, None
        state = self._folder.state(number, *self._learnt.shape)
        return result, self._shards.step(state)

    async def _enduring(self, work: Callable[[], T]) -> T:
        """Do what needs shards, in a thread; bring them back if some are lost, and do it again."""
        for attempt in range(_ATTEMPTS):
            try:
                if attempt:
                    await asyncio.to_thread(self._restore)
                return await asyncio.to_thread(work)
            except RayError as error:
                self._lost(error, last=attempt + 1 == _ATTEMPTS)
        raise ConnectionError(
            f"shards were lost {_ATTEMPTS} times in round {self._round.number}; "
            "its updates are kept, go on by --resume"
        )

    def _lost(self, error: RayError, *, last: bool) -> None:
        """Put down what became of shards, in one line that says why."""
        what = f"shards were lost {'too often' if last else 'and are started anew'}"
        self._metrics.restarts.inc(not last)
        self.note(f"{what}: {lifeline.reason(error)}")

    def _restore(self) -> None:
        """All shards as they were: the state before the round, and the accepted updates."""
        self._shards.start(self._learnt)
        if self._round.spool is not None:
            self._shards.open(self._round.spool)
            accepted = sorted(self._round.slots[client] for client in tuple(self._round.norms))
            self._shards.replay(self._round.spool, accepted)
            log.info(
                "shards read updates again",
                extra={"round": self._round.number, "updates": len(accepted)},
            )

    def _settle(
        self,
        outcome: str,
        reason: str,
        result: Aggregated | None = None,
        clients: tuple[str, ...] = (),
    ) -> None:
        """Go on to the next round, and see to this one meanwhile."""
        current = self._round
        weights, scores = ({}, {}) if result is None else by_client(clients, result)
        self.forget()
        closed = ClosedRound(
            number=current.number,
            outcome=outcome,
            reason=reason,
            accepted=len(current.norms),
            refused=current.refused,
            malformed=frozenset(current.malformed),
            spread=current.spread,
            aggregated=result,
            weights=weights,
            scores=scores,
            seconds=asyncio.get_running_loop().time() - current.opened,
            spool=current.spool,
        )
        self._aftermath.follow(closed, self._model)
        self._happened(machine.Excluded(self._aftermath.excluded))
        self._happened(machine.Settled(current.number))


def _resumed(standing: Standing) -> machine.Resumed:
    return machine.Resumed(
        standing.round,
        frozenset(standing.selected),
        frozenset(standing.accepted),
        standing.failed,
        collected=standing.collected,
        closed=standing.closed,
    )
