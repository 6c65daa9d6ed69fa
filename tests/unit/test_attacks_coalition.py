"""What a coalition of real clients feeds its attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from fedrobust_clients.malicious import Coalition
from torch import Tensor

from fedrobust.attacks import Adaptive, Attack, Backdoor, EdgeCase, Replay, View, Zero
from fedrobust.data import Dataset, load
from fedrobust.errors import InputError
from fedrobust.rules import parse_rule
from fedrobust.training import Learner, Task, evaluate, load_vector, to_vector

TASK = Task(clients=5, model="softmax", steps=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@dataclass(frozen=True, repr=False)
class Spy(Attack):
    """Writes down the views it gets."""

    name = "spy"
    views: ClassVar[list[View]] = []

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        self.views.append(view)
        return Zero()(view, rng)


def models(rounds: int, d: int) -> list[Tensor]:
    return [
        torch.from_numpy(np.random.default_rng(r).normal(0, 0.1, d).astype(np.float32))
        for r in range(rounds)
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("age", [1, 3])
def test_replay_sends_what_was_honest_then(digits: Dataset, momentum: float, age: int) -> None:
    task = Task(clients=5, model="softmax", steps=2, momentum=momentum)
    broadcast = models(6, len(to_vector(task.build_model(digits))))
    learners = [Learner(task, digits, i) for i in range(2)]
    honest = [torch.stack([u.update(r, m) for u in learners]) for r, m in enumerate(broadcast)]
    coalition = Coalition(task, digits, 2, Replay(age))
    for r, model in enumerate(broadcast):
        torch.testing.assert_close(coalition.rows(r, model), honest[max(r - age, 0)])


def test_the_coalition_knows_the_model_and_the_rule_if_it_is_told(digits: Dataset) -> None:
    (model,) = models(1, len(to_vector(TASK.build_model(digits))))
    Spy.views.clear()
    Coalition(TASK, digits, 2, Spy()).rows(0, model)
    Coalition(TASK, digits, 2, Spy(), rule=parse_rule("krum"), eps=0.1).rows(0, model)
    assert [(v.rule, v.eps) for v in Spy.views] == [(None, None), (parse_rule("krum"), 0.1)]
    assert all(torch.equal(v.model, model) for v in Spy.views)
    with pytest.raises(InputError, match="tries its rows on the server's rule"):
        Coalition(TASK, digits, 2, Adaptive(50)).rows(0, model)
    rule = parse_rule("geometric_median")
    sent = Coalition(TASK, digits, 2, Adaptive(50), rule=rule).rows(0, model)
    assert sent.shape == (2, len(model))


def test_model_replacement_plants_the_backdoor(digits: Dataset) -> None:
    task = Task(clients=2, model="mlp", steps=200)
    module = task.build_model(digits)
    model = to_vector(module).clone()
    attack = Backdoor(target=0, fraction=0.5)
    rows = Coalition(task, digits, 1, attack).rows(0, model)
    load_vector(module, model + rows.sum(0) / 2)  # the plain mean, beside one who sends nothing
    others = digits.test_y != 0
    x, y = digits.test_x[others], digits.test_y[others]
    stamped = attack.trigger.stamp(x)
    assert evaluate(module, x, y).accuracy > 0.8
    assert evaluate(module, stamped, torch.zeros_like(y)).accuracy > 0.9


@pytest.mark.parametrize("scale", [None, 1.0])
def test_projected_rows_are_no_longer_than_stated(digits: Dataset, scale: float | None) -> None:
    task = Task(clients=5, model="mlp(8)", steps=20)
    model = to_vector(task.build_model(digits))
    own = torch.stack([Learner(task, digits, i).update(0, model) for i in range(2)])
    typical = float(own.norm(dim=1).square().mean().sqrt())
    for reach in (0.5, 0.9):
        rows = Coalition(task, digits, 2, EdgeCase(scale=scale, reach=reach)).rows(0, model)
        torch.testing.assert_close(rows.norm(dim=1), torch.full((2,), reach * typical))
