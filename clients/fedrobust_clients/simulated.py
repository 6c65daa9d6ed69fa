"""Clients simulated on Ray: few worker processes, each the home of many clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from fedrobust import devices
from fedrobust.data import load
from fedrobust.errors import InputError
from fedrobust.training import Learner, Shared, Task, client_name, updates
from fedrobust_clients.malicious import Malicious, Threat
from fedrobust_clients.runtime import Connection, Floats, Honest, Update, participate

_MOMENT = 0.01
"""Seconds to wait for others whose work can be done together."""
_ELEMENTS = 1 << 24
"""Coordinates that travel at a time: batches of large models are small, and memory is bounded."""


class Crew:
    """Some of a task's clients in one worker process."""

    def __init__(
        self,
        task: Task,
        data_dir: Path | None,
        members: Sequence[int],
        threat: Threat,
        *,
        on_gpu: bool,
    ) -> None:
        """Bring the members to life; the threat says which of them are malicious."""
        torch.set_num_threads(1)
        dataset = load(task.dataset, data_dir).to(devices.chosen(gpu=on_gpu))
        shared = Shared.of(task, dataset)
        self._members: dict[int, Honest | Malicious] = {
            i: Honest(Learner(task, dataset, i, shared=shared)) for i in members
        }
        rogues = [i for i in members if i < threat.malicious]
        if rogues:
            coalition = threat.coalition(task, dataset, shared)
            for i in rogues:
                honest = Honest(Learner(task, dataset, i, shared=shared))
                self._members[i] = Malicious(honest, coalition, i)

    def ready(self) -> None:
        """Answers when the crew has come to life."""

    def updates(self, members: Sequence[int], number: int, model: Floats) -> list[Update]:
        """Some members' updates of a round; honest ones train together."""
        working = [self._members[i] for i in members]
        learners = [member.learner for member in working if isinstance(member, Honest)]
        rows = iter(updates(learners, number, torch.from_numpy(model.copy())) if learners else ())
        return [
            Update(next(rows).numpy(), member.learner.examples)
            if isinstance(member, Honest)
            else member.train(number, model)
            for member in working
        ]


@dataclass
class _Broadcast:
    """The current model in Ray's object store, put there once a round for all clients."""

    number: int = 0
    reference: Any = field(default=None)

    def of(self, number: int, model: Floats) -> Any:  # noqa: ANN401 (Ray's references are untyped)
        """The reference to this round's model."""
        if number != self.number:
            self.number, self.reference = number, ray.put(model)
        return self.reference


@dataclass(frozen=True)
class _Desk:
    """Hands a crew its members' work in batches: who comes within a moment goes along."""

    crew: Any
    broadcast: _Broadcast
    open: dict[int, tuple[list[int], asyncio.Task[list[Update]]]] = field(default_factory=dict)

    async def update(self, member: int, number: int, model: Floats) -> Update:
        """One member's update of a round."""
        if number not in self.open:
            begun: list[int] = []
            self.open[number] = begun, asyncio.create_task(self._work(begun, number, model))
        members, work = self.open[number]
        place = len(members)
        members.append(member)
        if len(members) * len(model) >= _ELEMENTS:
            del self.open[number]
        return (await asyncio.shield(work))[place]  # who leaves does not stop the others' work

    async def _work(self, members: list[int], number: int, model: Floats) -> list[Update]:
        await asyncio.sleep(_MOMENT)
        if number in self.open and self.open[number][0] is members:
            del self.open[number]
        reference = self.broadcast.of(number, model)
        try:
            done: list[Update] = await self.crew.updates.remote(members, number, reference)
        except RayTaskError as error:  # an InputError is told as the crew raised it
            raise (error.cause if isinstance(error.cause, InputError) else error) from None
        return done


@dataclass(frozen=True)
class Simulated:
    """A runtime whose work is done by a crew."""

    desk: _Desk
    member: int

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        """Have the crew work out this member's update."""
        return await self.desk.update(self.member, round, model)


async def simulate(
    connection: Connection,
    task: Task,
    data_dir: Path | None,
    threat: Threat,
    workers: int,
    *,
    on_gpu: bool = False,
) -> None:
    """Let all clients of a task take part in a federation until it ends.

    Args:
        connection: the coordinator itself.
        task: what is trained, and by how many clients.
        data_dir: where datasets are.
        threat: which clients are malicious, and how.
        workers: processes to spread the clients over; the coalition takes one of them for itself.
        on_gpu: whether they share the GPUs that Ray knows of, on which clients then train.

    Raises:
        InputError: Ray knows of no GPU.
    """
    malicious = threat.malicious
    honest = list(range(malicious, task.clients))
    spread = max(1, workers - (malicious > 0))
    groups = [list(range(malicious)), *(honest[k::spread] for k in range(spread))]
    groups = [members for members in groups if members]
    share = 1 / math.ceil(len(groups) / gpus()) if on_gpu else 0.0
    remote: Any = ray.remote(num_cpus=0, num_gpus=math.floor(share * 1e4) / 1e4)(Crew)
    broadcast = _Broadcast()
    crews: list[Any] = []
    runtimes: dict[int, Simulated] = {}
    for members in groups:
        crew = remote.remote(task, data_dir, members, threat, on_gpu=on_gpu)
        crews.append(crew)
        desk = _Desk(crew, broadcast)
        runtimes |= {i: Simulated(desk, i) for i in members}
    # A client joins when it can work: processes that are still starting must not spend the deadline.
    await asyncio.gather(*(crew.ready.remote() for crew in crews))
    await asyncio.gather(*(_participate(connection, i, r) for i, r in runtimes.items()))


def gpus() -> int:
    """How many GPUs Ray knows of.

    Raises:
        InputError: none.
    """
    count = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if not count:
        raise InputError("Ray knows of no GPU: train on processors, or join a cluster that has one")
    return count


async def _participate(connection: Connection, member: int, runtime: Simulated) -> None:
    # The server is in this very process, and its operator is ours.
    await participate(connection, client_name(member), lambda _task: runtime, imports=True)
