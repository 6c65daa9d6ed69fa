"""Updates are folded in a few at a time, at once in a lull, and as it comes where one comes alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fedrobust_server import folding
from fedrobust_server.folding import Folding
from fedrobust_server.shards import BATCH

SIZE = 1000


class Recorder:
    """Stands for shards, and keeps what it was told."""

    size = SIZE

    def __init__(self) -> None:
        self.told: list[Any] = []

    def follow(self, *what: int) -> None:
        self.told.append(what)

    def complete(self, slot: int, _ticket: int) -> None:
        self.told.append(slot)

    def fold(self) -> None:
        self.told.append("fold")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What shards are told when some happens: seconds, (slot, ticket, start, stop) or (slot, ticket)."""
    monkeypatch.setattr(folding, "_LULL", 0.1)
    monkeypatch.setattr(folding, "_STRIDE", 100)

    def told(*events: Any) -> list[Any]:
        async def run() -> list[Any]:
            shards: Any = Recorder()
            pace = Folding(shards)
            for event in events:
                match event:
                    case float(pause):
                        await asyncio.sleep(pause)
                    case (slot, ticket, start, stop):
                        pace.stored(slot, ticket, start, np.zeros(stop - start, "f4"))
                    case (slot, ticket):
                        pace.whole(slot, ticket)
            return shards.told

        return asyncio.run(run())

    return told


def test_a_few_go_together(play: Callable[..., list[Any]]) -> None:
    several = [(slot, slot + 1) for slot in range(BATCH + 1)]
    assert play(*several) == [*range(BATCH), "fold", BATCH]


def test_those_that_wait_go_in_a_lull(play: Callable[..., list[Any]]) -> None:
    assert play((0, 1), 0.06, (1, 2), 0.06) == [0, 1]
    assert play((0, 1), 0.06, (1, 2), 0.2, (2, 3)) == [0, 1, "fold", 2]
    together = [(slot, slot + 1) for slot in range(BATCH)]
    assert play(*together, 0.2) == [*range(BATCH), "fold"]


def test_one_that_comes_alone_is_followed(play: Callable[..., list[Any]]) -> None:
    steps = [(0, 1, at, at + 50) for at in range(0, SIZE, 50)]
    assert play(*steps) == [(0, 1, at, at + 100) for at in range(0, SIZE, 100)]
    assert play((0, 1, 0, 950), (0, 1, 950, SIZE))[-1] == (0, 1, 950, SIZE)  # its end, too


def test_a_later_admission_is_followed_from_the_start(play: Callable[..., list[Any]]) -> None:
    assert play((0, 1, 0, 300), 0.2, (0, 2, 300, 400)) == [(0, 1, 0, 300), (0, 2, 0, 400)]


def test_of_several_none_is_followed(play: Callable[..., list[Any]]) -> None:
    first, second = (0, 1, 0, 200), (1, 2, 0, 200)
    assert play(first, second, (0, 1, 200, 400)) == [(0, 1, 0, 200)]
    assert play(first, second, 0.2, (1, 2, 200, 400)) == [(0, 1, 0, 200), (1, 2, 0, 400)]


def test_while_others_wait_none_is_followed(play: Callable[..., list[Any]]) -> None:
    assert play((0, 1), (1, 2, 0, 200)) == [0]
    assert play((0, 1), 0.2, (1, 2, 0, 200)) == [0, "fold", (1, 2, 0, 200)]
