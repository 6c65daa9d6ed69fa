"""What the coordinator does with a round that went wrong: the model stays, and the run goes on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fedrobust_clients.runtime import Floats, Update, participate
from fedrobust_server.aftermath import RoundReport
from fedrobust_server.config import RunConfig

from fedrobust.training import Task

from .conftest import Served

D = 650


@dataclass(frozen=True)
class Fixed:
    """A client of an engineer's own making: always the same value, after a while."""

    value: float
    delay: float = 0.0

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        await asyncio.sleep(self.delay)
        noise = np.random.default_rng([round, int(self.value)]).normal(size=len(model))
        return Update((self.value + noise).astype(np.float32), 1)


def run(
    serve: Served, clients: dict[str, Fixed], **changes: Any
) -> tuple[list[RoundReport], Floats, list[dict[str, Any]]]:
    """Run a federation with these clients in this process."""
    task = Task(model="softmax", clients=len(clients))
    config = RunConfig(task=task, rounds=2, **changes)
    reports: list[RoundReport] = []

    async def scenario() -> tuple[Floats, list[dict[str, Any]]]:
        async with serve(config, reports.append) as (_, federation):
            running = asyncio.ensure_future(federation.coordinator.run())
            parts = [
                participate(federation.coordinator, name, lambda _, f=fixed: f)  # type: ignore[misc]
                for name, fixed in clients.items()
            ]
            start = federation.coordinator._model
            await asyncio.gather(*parts)
            return await running - start, federation.coordinator._ledger.rounds()

    moved, rounds = asyncio.run(scenario())
    return reports, moved, rounds


def many(count: int, *values: float) -> dict[str, Fixed]:
    return {f"c{i}": Fixed(values[i] if i < len(values) else 0.0) for i in range(count)}


def test_too_few_clients_for_the_rule_skip_the_round(serve: Served) -> None:
    reports, moved, rounds = run(serve, many(3), rule="krum", eps=0.4)
    assert [r.round.outcome for r in reports] == ["skipped", "skipped"]
    assert not moved.any()
    assert "2 f + 3 = 5 clients" in rounds[0]["reason"]


@pytest.mark.parametrize(("policy", "outcome"), [("skip", "skipped"), ("warn", "aggregated")])
def test_the_operator_chooses_what_an_exceeded_bound_does(
    serve: Served, policy: str, outcome: str
) -> None:
    attacked = many(8, 50.0, 90.0)
    reports, moved, rounds = run(serve, attacked, rule="mean", exceeded=policy)
    assert [r.round.outcome for r in reports] == [outcome] * 2
    assert [r["verdict"] for r in rounds] == ["bound exceeded"] * 2
    assert moved.any() == (policy == "warn")


def test_the_filter_needs_no_such_choice(serve: Served) -> None:
    reports, moved, rounds = run(serve, many(10, 50.0, 90.0), exceeded="skip")
    assert [r["verdict"] for r in rounds] == ["outliers removed"] * 2
    assert np.abs(moved).max() < 5
    assert rounds[0]["bound_kept"] < rounds[0]["bound"]
    assert [r.round.accepted for r in reports] == [10, 10]


def test_a_round_ends_at_its_deadline_without_those_who_are_slow(serve: Served) -> None:
    clients = {**many(3), "slow": Fixed(0.0, delay=3.0)}
    reports, _, rounds = run(serve, clients, rule="mean", deadline=1.0)
    assert [r.round.outcome for r in reports] == ["aggregated", "aggregated"]
    assert [r.round.accepted for r in reports] == [3, 3]
    assert all(r["closed"] - r["opened"] < 2.5 for r in rounds)


def test_a_fault_of_the_servers_own_ends_the_run_and_is_told(serve: Served) -> None:
    def broken(_report: RoundReport) -> None:
        raise OSError("no space left on the device")

    async def scenario() -> None:
        config = RunConfig(task=Task(model="softmax", clients=1), rounds=1, rule="mean")
        async with serve(config, broken) as (_, federation):
            running = asyncio.ensure_future(federation.coordinator.run())
            await participate(federation.coordinator, "c", lambda _: Fixed(1.0))
            with pytest.raises(OSError, match="no space left"):
                await running

    asyncio.run(scenario())
