"""Rows spread over Ray actors aggregate as rows in one process do, whatever the number of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from fedrobust_server.shards import Shard, Shards
from fedrobust_server.spool import Floats, Spool
from ray.exceptions import RayError

import fedrobust as fr
from fedrobust.aggregate import combine, gram_of
from fedrobust.optimisers import SGD, Optimiser, parse_optimiser
from fedrobust.rules import CATALOG, Mixing

N, D = 13, 1000
PLAIN = SGD()
RULES = [
    *(name for name, rule in CATALOG.items() if not issubclass(rule, Mixing)),
    *("nnm | filter(eps=0.2)", "bucketing(2) | median", "clip | trimmed_mean", "clip | nnm | krum"),
    *("last(7) | filter", "last(500) | nnm | krum", "clip | last(400) | signguard"),  # of three shards
    *("last(400) | fltrust", "nnm | monna"),
]
ROOT = np.random.default_rng(5).normal(0.3, 1, D).astype(np.float32)
"""The server's own update, which some rules look at."""


SLOTS = [5, 1, 3, 0, 2, 4, 6, 8, 7, 9, 10, 11, 14]  # one was not used, and two arrived out of order


@dataclass
class Filled:
    """Shards in the middle of a round whose updates are all there."""

    shards: Shards
    spool: Spool
    learnt: Floats

    @property
    def model(self) -> Floats:
        return self.learnt[0]

    @property
    def state(self) -> Path:
        return self.spool.path.with_name("state")

    def begin(self, rows: Floats, slots: Sequence[int] = SLOTS) -> None:
        self.shards.open(self.spool)
        for slot, row in zip(slots, rows, strict=True):
            for start in range(0, len(row), 333):
                self.spool.write(slot, start, row[start : start + 333])
                self.shards.write(slot, start, row[start : start + 333])
            self.shards.complete(slot)

    def aggregate(self, rule: str, slots: Sequence[int] = SLOTS) -> tuple[fr.Aggregated, Floats]:
        """The answer, and how far the model moved."""
        matrix = self.shards.gram(slots)
        rows, squares = self.shards.rows(slots, [ROOT[: self.shards.size]]), np.diag(matrix)
        gram = gram_of(rows, np.ones(len(slots)), squares, 3, ("root",), matrix=matrix)
        result = combine(rows, rule, gram)
        before, state = self.model, Spool.open(self.state, *self.learnt.shape)
        if not self.spool.path.exists():  # as on another machine
            self.state.unlink()
        self.learnt = self.shards.step(state)
        self.state.unlink(missing_ok=True)
        return result, self.model - before


def filled(folder: Path, count: int, *, size: int = D, optimiser: Optimiser = PLAIN) -> Filled:
    state = optimiser.begin(torch.arange(size) / size).numpy()
    shards = Shards(size, count, optimiser)
    shards.start(state)
    return Filled(shards, Spool.open(folder / "round.rows", max(SLOTS) + 1, size), state)


@pytest.fixture(scope="module", params=["one", "three", "three that cannot see the spool"])
def shards(
    request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Filled]:
    ready = filled(tmp_path_factory.mktemp("spool"), 1 if request.param == "one" else 3)
    if "cannot" in request.param:
        hidden = ready.spool.path.rename(ready.spool.path.with_suffix(".hidden"))
        assert not ready.spool.path.exists()
        assert hidden.exists()
    yield ready
    ready.shards.stop()


def updates(seed: int = 0) -> Floats:
    rows = np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)
    rows[:2] += 2
    return rows


@pytest.mark.parametrize("rule", RULES)
def test_sharded_equals_local(shards: Filled, rule: str) -> None:
    rows = updates()
    shards.begin(rows)
    result, moved = shards.aggregate(rule)
    expected = fr.aggregate(rows, rule, seed=3, anchors={"root": ROOT})
    np.testing.assert_allclose(moved, expected.value, atol=2e-5)
    assert result.verdict == expected.verdict
    for ours, theirs in ((result.weights, expected.weights), (result.scores, expected.scores)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_gram_matrix_that_grew_is_the_one_of_all_rows(shards: Filled) -> None:
    rows = updates(1)
    rows[3] *= 1e30
    rows[7] *= 1e-30
    shards.begin(rows)
    exact = rows.astype(float)
    lengths = np.linalg.norm(exact, axis=1)
    error = np.abs(shards.shards.gram(SLOTS) - exact @ exact.T) / np.outer(lengths, lengths)
    assert error.max() < 1e-6


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """A shard in this process changes what torch does in it."""
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def followed(folder: Path, rows: Floats) -> tuple[Shard, Spool]:
    """A shard of the middle of all coordinates, in which all rows but the last two are whole."""
    spool = Spool.open(folder / "rows", len(rows), rows.shape[1])
    first, size = 200, 600
    shard = Shard(first, np.zeros((1, size), "f4"), PLAIN, 1)
    shard.open(len(rows), str(spool.path))
    for slot in range(len(rows) - 2):
        spool.write(slot, 0, rows[slot])
        shard.complete(slot, slot + 1)
    shard.fold()
    return shard, spool


def check_inner(shard: Shard, rows: Floats) -> None:
    slots = list(range(len(rows)))
    exact = rows[:, 200:800].astype(float)
    lengths = np.linalg.norm(exact, axis=1)
    error = np.abs(shard.gram(slots) - exact @ exact.T) / np.outer(lengths, lengths)
    assert error.max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_an_update_is_followed_as_it_comes_in(as_it_was: None, tmp_path: Path, scale: float) -> None:
    rows = updates(5)
    rows[-1] *= scale
    shard, spool = followed(tmp_path, rows)
    spool.write(N - 2, 0, rows[-2])
    shard.complete(N - 2, 98)
    shard.fold()
    for stop in (100, 300, 301, 900, 1000):  # before the slice, within it, beyond it
        spool.write(N - 1, 0, rows[-1, :stop])
        shard.follow(N - 1, 99, stop)
    shard.complete(N - 1, 99)
    check_inner(shard, rows)


def test_what_was_followed_does_not_count_for_another_update(as_it_was: None, tmp_path: Path) -> None:
    rows = updates(6)
    shard, spool = followed(tmp_path, rows)
    spool.write(N - 1, 0, rows[0])  # given up half way, and then another one comes to its place
    shard.follow(N - 1, 98, 500)
    spool.write(N - 1, 0, rows[-1])
    shard.follow(N - 1, 99, 400)
    shard.follow(N - 1, 98, 600)  # told late of the one before
    spool.write(N - 2, 0, rows[-2])
    shard.complete(N - 2, 100)  # becomes whole first
    shard.complete(N - 1, 99)
    check_inner(shard, rows)


def test_another_update_that_becomes_whole_first_is_not_missed(as_it_was: None, tmp_path: Path) -> None:
    rows = updates(7)
    shard, spool = followed(tmp_path, rows)
    for slot in (N - 1, N - 2):
        spool.write(slot, 0, rows[slot])
    shard.follow(N - 1, 99, 500)
    shard.complete(N - 2, 98)
    shard.fold()
    shard.follow(N - 1, 99, 700)
    shard.complete(N - 1, 99)
    check_inner(shard, rows)


def test_shards_follow_what_they_see(shards: Filled) -> None:
    rows = updates(8)
    shards.begin(rows[:-1], SLOTS[:-1])
    shards.shards.fold()
    *_, slot = SLOTS
    for start in range(0, D, 250):
        part = rows[-1, start : start + 250]
        shards.spool.write(slot, start, part)
        shards.shards.write(slot, start, part)
        shards.shards.follow(slot, 99, start, start + 250)
    shards.shards.complete(slot, 99)
    exact = rows.astype(float) @ rows.astype(float).T
    np.testing.assert_allclose(shards.shards.gram(SLOTS), exact, rtol=1e-5, atol=1e-3)


def alive(actor: Any) -> bool:
    try:
        ray.get(actor.ready.remote())
    except RayError:
        return False
    return True


def test_shards_that_start_anew_read_the_round_again(shards: Filled) -> None:
    rows = updates(2)
    shards.begin(rows)
    before = shards.shards.gram(SLOTS)
    lost = shards.shards._actors[0]
    ray.kill(lost)  # which takes effect a little later
    while alive(lost):
        pass
    with pytest.raises(RayError):
        shards.shards.gram(SLOTS)
    shards.shards.start(shards.learnt)
    shards.shards.open(shards.spool)
    shards.shards.replay(shards.spool, sorted(SLOTS))
    np.testing.assert_allclose(shards.shards.gram(SLOTS), before, rtol=1e-6, atol=1e-3)


def test_a_full_disk_is_not_taken_for_a_lost_shard(shards: Filled) -> None:
    shards.begin(updates(4))
    shards.shards.rows(SLOTS).map(lambda block: block.tile(slice(0, block.width))[0])
    full = Spool.find(Path("/dev/full"), 1, D)
    with pytest.raises(OSError, match="No space left on device"):
        shards.shards.step(full)


@pytest.mark.parametrize(
    ("optimiser", "count"),
    [
        ("adam", 2),
        *(pytest.param("sgd(lr=0.5, momentum=0.9)", n, marks=pytest.mark.slow) for n in (1, 3)),
        *(pytest.param("adagrad", count, marks=pytest.mark.slow) for count in (1, 3)),
        *(pytest.param("yogi", count, marks=pytest.mark.slow) for count in (1, 3)),
        pytest.param("adam", 1, marks=pytest.mark.slow),
    ],
)
def test_shards_step_as_one_process_does_and_go_on_from_what_they_left(
    ray_cluster: None, tmp_path: Path, optimiser: str, count: int
) -> None:
    whole = parse_optimiser(optimiser)
    ready = filled(tmp_path, count, optimiser=whole)
    state = torch.from_numpy(ready.learnt.copy())
    for seed in range(2):  # the second step needs what the first one left
        rows = updates(seed)
        ready.begin(rows)
        ready.aggregate("mean")
        whole.step(state, torch.from_numpy(rows).mean(dim=0))
        ready.shards.start(ready.learnt)
    np.testing.assert_allclose(ready.learnt, state, rtol=1e-5, atol=1e-6)
    ready.shards.stop()


def test_more_shards_than_coordinates(ray_cluster: None, tmp_path: Path) -> None:
    ready = filled(tmp_path, 8, size=3)
    ready.begin(np.ones((1, 3), np.float32), [0])
    _, moved = ready.aggregate("mean", [0])
    np.testing.assert_allclose(moved, 1.0)
    ready.shards.stop()


def test_rules_without_a_gram_matrix_wait_for_what_is_on_its_way(
    ray_cluster: None, tmp_path: Path
) -> None:
    ready = filled(tmp_path, 1, size=4000)
    ready.spool.path.rename(tmp_path / "elsewhere")
    ready.shards.open(ready.spool)
    for start in range(ready.shards.size):
        ready.shards.write(0, start, np.ones(1, np.float32))
    total = ready.shards.rows([0]).sum(lambda block: np.array([[block.rows[0].sum()]]))
    assert total == ready.shards.size
    ready.shards.stop()


def test_a_shard_takes_no_other_file_of_the_same_name_for_the_spool(
    ray_cluster: None, tmp_path: Path
) -> None:
    ready = filled(tmp_path, 2)
    ready.spool.path.rename(tmp_path / "elsewhere")  # as on another machine, where an old run left one
    Spool.open(ready.spool.path, ready.spool.slots, ready.spool.size)
    rows = updates(3)
    ready.begin(rows)
    _, moved = ready.aggregate("mean")
    np.testing.assert_allclose(moved, rows.mean(axis=0), atol=2e-5)
    ready.shards.stop()
