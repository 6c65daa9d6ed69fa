"""Poisoning on real data, against the plain mean: attackers get what they want, the model works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from fedrobust_clients.malicious import Coalition
from torch import Tensor

from fedrobust.attacks import Attack, Backdoor, EdgeCase, LabelFlip, Targeted, Trigger, success_rate
from fedrobust.data import Dataset, load
from fedrobust.training import Learner, Shared, Task, evaluate, load_vector, to_vector

TASK = Task(clients=10, model="mlp", steps=20)
CALM = 15
"""How many rounds go by before anybody attacks."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def digits() -> Dataset:
    return load("digits")


@cache
def trained(task: Task) -> Tensor:
    """A model after the calm rounds."""
    shared = Shared.of(task, digits())
    learners = [Learner(task, digits(), i, shared=shared) for i in range(task.clients)]
    model = to_vector(shared.module)
    for number in range(CALM):
        model = model + torch.stack([u.update(number, model) for u in learners]).mean(dim=0)
    return model


@dataclass
class Outcome:
    """A federation under attack by its first f clients, who find a trained model.

    Attributes:
        task: what is trained.
        model: after the last round.
        lengths: of a malicious update in units of an honest one, by round.
    """

    task: Task
    model: Tensor
    lengths: list[float]

    @classmethod
    def of(cls, attack: Attack, rounds: int = 1, f: int = 2, task: Task = TASK) -> Outcome:
        shared = Shared.of(task, digits())
        honest = [Learner(task, digits(), i, shared=shared) for i in range(f, task.clients)]
        coalition = Coalition(task, digits(), f, attack)
        result = cls(task, trained(task), [])
        for number in range(CALM, CALM + rounds):
            kept = torch.stack([u.update(number, result.model) for u in honest])
            sent = coalition.rows(number, result.model)
            result.lengths.append(float(sent.norm(dim=1).mean() / kept.norm(dim=1).mean()))
            result.model = result.model + torch.cat([sent, kept]).mean(dim=0)
        return result

    def success(self, attack: Targeted) -> float:
        return success_rate(self._module(), attack, digits().test_x, digits().test_y)

    def accuracy(self, without: Tensor | None = None) -> float:
        """On the test data, or those but some."""
        kept = torch.ones(len(digits().test_y), dtype=torch.bool)
        if without is not None:
            kept[without] = False
        return evaluate(self._module(), digits().test_x[kept], digits().test_y[kept]).accuracy

    def _module(self) -> torch.nn.Module:
        module = self.task.build_model(digits())
        load_vector(module, self.model)
        return module


def clean(task: Task = TASK) -> Outcome:
    return Outcome(task, trained(task), [])


def test_without_an_attack_there_is_no_success() -> None:
    assert clean().accuracy() > 0.95
    assert clean().success(Backdoor()) < 0.02
    assert clean().success(LabelFlip(3, 8)) < 0.1


def test_a_backdoor_is_planted_in_one_round() -> None:
    outcome = Outcome.of(Backdoor())
    assert outcome.success(Backdoor()) > 0.9
    assert outcome.accuracy() > clean().accuracy() - 0.05


def test_a_backdoor_is_kept_up() -> None:
    outcome = Outcome.of(Backdoor(), rounds=4)
    assert outcome.success(Backdoor()) > 0.9
    assert outcome.accuracy() > clean().accuracy() - 0.03


def test_model_replacement_replaces_the_model() -> None:
    """What the others add to the members' mean is little, as the model is nearly trained."""
    model, f = trained(TASK), 2
    attack = Backdoor()
    poison = Trigger(attack.target, attack.size, attack.fraction)
    theirs = [Learner(TASK, digits(), i, poison).update(CALM, model) for i in range(f)]
    wanted = torch.stack(theirs).mean(dim=0)
    got = Outcome.of(attack).model - model
    assert float((got - wanted).norm() / wanted.norm()) < 0.2


LONG = Task(clients=10, model="mlp", steps=40)


def test_constrain_and_scale_gives_shorter_rows_at_comparable_success() -> None:
    free, constrained = (Outcome.of(a, rounds=4, task=LONG) for a in (Backdoor(), Backdoor(alpha=0.9)))
    assert all(c < a for a, c in zip(free.lengths, constrained.lengths, strict=True))
    assert sum(constrained.lengths[1:]) < 0.75 * sum(free.lengths[1:])
    assert constrained.success(Backdoor()) > free.success(Backdoor()) - 0.1
    assert constrained.success(Backdoor()) > 0.85
    assert constrained.accuracy() > clean(LONG).accuracy() - 0.03


def test_a_split_trigger_works_as_a_whole_and_less_in_parts() -> None:
    """As in DBA: nobody has trained on the whole, which is what the model obeys."""
    attack = Backdoor(size=4, parts=2)
    outcome = Outcome.of(attack, rounds=4)
    whole = outcome.success(attack)
    assert whole > 0.9
    assert outcome.accuracy() > clean().accuracy() - 0.04
    others = digits().test_y != attack.target
    for part in range(2):
        stamped = Trigger(attack.target, attack.size, 1.0, part, 2)(
            digits().test_x[others], digits().test_y[others]
        )
        module = TASK.build_model(digits())
        load_vector(module, outcome.model)
        assert evaluate(module, *stamped).accuracy < whole


@pytest.mark.parametrize("seed", range(3))
def test_edge_cases_are_taken_for_the_target(seed: int) -> None:
    """One client of five; success on edge cases of the test data, accuracy on all others.

    Projected training is kept up for three rounds and shows less in the accuracy.
    """
    task = Task(clients=5, model="mlp", steps=50, seed=seed)
    attack, projected = EdgeCase(3, 8), EdgeCase(3, 8, reach=8.0)
    edge = attack.poison.edge(digits().test_x, digits().test_y)
    before = clean(task)
    assert before.success(attack) == 0
    once = Outcome.of(attack, f=1, task=task)
    assert once.success(attack) > 0.75
    assert once.accuracy(edge) > before.accuracy(edge) - 0.1
    kept_up = Outcome.of(projected, rounds=3, f=1, task=task)
    assert kept_up.success(projected) > 0.35
    assert kept_up.accuracy(edge) > before.accuracy(edge) - 0.04
    assert max(kept_up.lengths) < 0.75 * once.lengths[0]


def test_relabelled_classes_are_confused_and_flipped_labels_cost_accuracy() -> None:
    """With two clients in five. Data poisoning alone is the weakest of these attacks."""
    targeted, untargeted = (Outcome.of(a, rounds=8, f=4) for a in (LabelFlip(3, 8), LabelFlip()))
    assert targeted.success(LabelFlip(3, 8)) > clean().success(LabelFlip(3, 8)) + 0.1
    assert targeted.accuracy() > clean().accuracy() - 0.05
    assert untargeted.accuracy() < clean().accuracy() - 0.05
