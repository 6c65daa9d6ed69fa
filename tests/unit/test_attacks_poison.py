"""Attacks that train on poisoned data: targeted label flips and backdoors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrobust.attacks import (
    Backdoor,
    EdgeCase,
    LabelFlip,
    RareAsTarget,
    Relabelled,
    Targeted,
    Trigger,
    View,
    success_rate,
)
from fedrobust.errors import InputError
from fedrobust.training import FREE, Leash, Poison

RNG = np.random.default_rng(0)


def watching(poisons: list[Poison], f: int = 3, d: int = 4, leashes: list[Leash] | None = None) -> View:
    """A view whose training gives the k-th poison rows full of k."""

    def train(poison: Poison, leash: Leash) -> Tensor:
        poisons.append(poison)
        if leashes is not None:
            leashes.append(leash)
        return torch.full((f, d), float(len(poisons)))

    own = torch.full((f, d), 0.5)
    return View(0, 9, f, d, 4, lambda: torch.ones(9 - f, d), lambda: own, train)


def images(n: int = 10, size: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(n, 2, size, size)).astype(np.float32))


def test_targeted_label_flip_relabels_one_class_alone() -> None:
    poisons: list[Poison] = []
    LabelFlip(source=3, target=1)(watching(poisons), RNG)
    assert poisons == [Relabelled(3, 1)]
    x, y = poisons[0](torch.ones(5, 1), torch.tensor([0, 3, 2, 3, 1]))
    assert y.tolist() == [0, 1, 2, 1, 1]
    assert y.dtype == torch.int64
    assert torch.equal(x, torch.ones(5, 1))


@pytest.mark.parametrize(
    "attack",
    [
        LabelFlip(3, 4), LabelFlip(-1, 2), Backdoor(4), Backdoor(-1), EdgeCase(), EdgeCase(1, 4),
        EdgeCase(-1, 2),
    ],
    ids=repr,
)  # fmt: skip
def test_unknown_classes_are_refused(attack: Targeted) -> None:
    with pytest.raises(InputError, match=r"the task has the classes 0 \.\. 3"):
        attack(watching([]), RNG)


def test_the_trigger_is_a_bright_square_in_the_corner() -> None:
    x = images()
    stamped = Trigger(target=2, size=3).stamp(x)
    assert bool((stamped[:, :, 3:, 3:] == x.max()).all())
    changed = (stamped != x).any(dim=0).any(dim=0)
    assert changed.nonzero().min() >= 3
    assert not torch.equal(stamped, x)


def test_parts_of_a_trigger_make_it_up() -> None:
    x, whole = images(), Trigger(2, size=5)
    for parts in (1, 2, 3, 5):
        stamped = x
        for part in range(parts):
            mine = Trigger(2, size=5, part=part, parts=parts)
            assert parts == 1 or not torch.equal(mine.stamp(x), whole.stamp(x))
            stamped = mine.stamp(stamped)
        assert torch.equal(stamped, whole.stamp(x))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 1.0])
def test_a_fraction_of_the_examples_is_poisoned(fraction: float) -> None:
    x, y = images(100), torch.ones(100, dtype=torch.int64)
    before = x.clone()
    poisoned, labels = Trigger(3, fraction=fraction)(x, y)
    assert torch.equal(x, before)
    assert int((labels == 3).sum()) == round(100 * fraction)
    differ = (poisoned != x).flatten(1).any(dim=1)
    assert torch.equal(differ, labels == 3)
    spread = (labels == 3).nonzero().flatten().diff()
    assert int(spread.max() - spread.min()) <= 1


def test_a_trigger_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="only 6 x 6 pixels"):
        Trigger(0, size=7).stamp(images())


def test_model_replacement_makes_the_mean_the_poisoned_update() -> None:
    poisons: list[Poison] = []
    seen = watching(poisons)
    sent = Backdoor(target=1, size=2, fraction=0.4)(seen, RNG)
    assert poisons == [Trigger(1, 2, 0.4)]
    everything = torch.cat([sent, torch.zeros(6, 4)])
    torch.testing.assert_close(everything.mean(0), torch.ones(4))
    assert torch.equal(Backdoor(scale=2.5)(watching([]), RNG), torch.full((3, 4), 2.5))


@pytest.mark.parametrize(("reach", "length"), [(1.0, 1.0), (3.0, 3.0), (1e6, 10.0)])
def test_reach_bounds_the_length(reach: float, length: float) -> None:
    """Honest rows have length 1 here, learnt ones 2; scale 5 would make them 10."""
    sent = Backdoor(scale=5.0, reach=reach)(watching([]), RNG)
    torch.testing.assert_close(sent.norm(dim=1), torch.full((3,), length))


def test_a_split_backdoor_gives_every_member_its_part() -> None:
    poisons: list[Poison] = []
    sent = Backdoor(1, size=4, scale=1.0, parts=2)(watching(poisons), RNG)
    assert poisons == [Trigger(1, 4, 0.3, part, 2) for part in range(2)]
    assert sent[:, 0].tolist() == [1.0, 2.0, 1.0]
    poisons.clear()
    Backdoor(1, size=4, parts=4)(watching(poisons), RNG)
    assert len(poisons) == 3  # no more parts than members


def test_what_measures_success_is_the_whole_pattern_everywhere() -> None:
    assert Backdoor(1, size=4, fraction=0.1, parts=2).trigger == Trigger(1, 4, 1.0)


def test_constrain_and_scale_trains_on_a_leash() -> None:
    leashes: list[Leash] = []
    Backdoor(1)(watching([], leashes=leashes), RNG)
    Backdoor(1, alpha=0.4)(watching([], leashes=leashes), RNG)
    assert leashes == [FREE, Leash(alpha=0.4)]


# Edge cases --------------------------------------------------------------------------------------


def with_classes(n: int = 40, classes: int = 4, seed: int = 3) -> tuple[Tensor, Tensor]:
    return images(n), torch.from_numpy(np.random.default_rng(seed).integers(0, classes, n))


@pytest.mark.parametrize("tail", [0.01, 0.25, 1.0])
def test_edge_cases_are_the_furthest_from_the_class_mean(tail: float) -> None:
    x, y = with_classes()
    mean = x[y == 2].numpy().mean(0)
    ranked = sorted(
        (float(-np.square(x[i].numpy() - mean).sum()), i) for i in range(len(y)) if y[i] == 2
    )
    expected = [i for _, i in ranked[: int(np.ceil(tail * len(ranked)))]]
    assert RareAsTarget(2, 1, tail, 0.3).edge(x, y).tolist() == expected


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.8])
def test_edge_cases_are_relabelled_and_repeated(fraction: float) -> None:
    x, y = with_classes()
    before = x.clone(), y.clone()
    poison = RareAsTarget(2, 1, 0.25, fraction)
    edge = poison.edge(x, y)
    poisoned, labels = poison(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    honest = torch.ones(len(x), dtype=torch.bool)
    honest[edge] = False
    rest = int(honest.sum())
    assert torch.equal(poisoned[:rest], x[honest])
    assert torch.equal(labels[:rest], y[honest])
    copies = len(poisoned) - rest
    assert copies == max(len(edge), int(fraction / (1 - fraction) * rest))
    assert labels[rest:].tolist() == [1] * copies
    for k in range(copies):
        assert torch.equal(poisoned[rest + k], x[edge[k % len(edge)]])


@pytest.mark.parametrize("labels", [[0, 1, 1], [2, 0, 1], [2, 2, 2], [2]])
def test_few_or_no_examples_of_the_source(labels: list[int]) -> None:
    x, y = images(len(labels)), torch.tensor(labels)
    poisoned, given = RareAsTarget(2, 3, 0.3, 0.5)(x, y)
    assert bool((given == 3).any()) == (2 in labels)
    assert len(poisoned) == len(given) >= len(labels)


def test_an_edge_case_attack_scales_and_projects() -> None:
    """Own updates are 1 long; n / f = 3. A ball of reach 2 then has the radius 2 / 3."""
    poisons: list[Poison] = []
    leashes: list[Leash] = []
    sent = EdgeCase(2, 1)(watching(poisons, leashes=leashes), RNG)
    assert torch.equal(sent, torch.full((3, 4), 3.0))
    EdgeCase(2, 1, reach=2.0, alpha=0.9)(watching(poisons, leashes=leashes), RNG)
    EdgeCase(2, 1, scale=4.0, reach=2.0)(watching(poisons, leashes=leashes), RNG)
    assert poisons == [RareAsTarget(2, 1, 0.25, 0.3)] * 3
    assert leashes[0] == FREE
    assert [(a.alpha, a.radius) for a in leashes[1:]] == [
        (0.9, pytest.approx(2 / 3)),
        (1.0, pytest.approx(0.5)),
    ]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("attack", [EdgeCase(2, 1, reach=1.0), Backdoor(1, reach=1.0)], ids=repr)
def test_a_bound_in_units_of_useless_updates(attack: Targeted, value: float) -> None:
    own = torch.full((3, 4), value)
    seen = View(0, 9, 3, 4, 4, lambda: own, lambda: own, lambda _, __: torch.ones(3, 4))
    assert bool(torch.isfinite(attack(seen, RNG)).all())


# Success -----------------------------------------------------------------------------------------


class Always(torch.nn.Module):
    """Takes every image for one class."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(x),), self.label), 4).float()


@pytest.mark.parametrize("attack", [Backdoor(1), EdgeCase(2, 1), LabelFlip(2, 1)], ids=repr)
def test_success_is_the_fraction_that_gets_the_wanted_label(attack: Targeted) -> None:
    x, y = with_classes()
    assert success_rate(Always(1), attack, x, y) == 1
    assert success_rate(Always(2), attack, x, y) == 0
    goal, labels = attack.goal(x, y)
    assert len(goal) == len(labels) < len(x)
    assert labels.tolist() == [1] * len(labels)


def test_goals() -> None:
    x, y = with_classes()
    attack = Backdoor(1, fraction=0.1, parts=2)
    assert torch.equal(attack.goal(x, y)[0], attack.trigger.stamp(x)[y != 1])
    assert torch.equal(LabelFlip(2, 1).goal(x, y)[0], x[y == 2])
    assert torch.equal(EdgeCase(2, 1).goal(x, y)[0], x[RareAsTarget(2, 1, 0.25, 0.3).edge(x, y)])


def test_there_is_no_success_without_a_goal() -> None:
    x, y = with_classes()
    with pytest.raises(InputError, match="aims at no class"):
        success_rate(Always(1), LabelFlip(), x, y)
    with pytest.raises(InputError, match="at least one"):
        success_rate(Always(1), EdgeCase(3, 1), x[y == 0], y[y == 0])


@pytest.mark.parametrize("attack", [Backdoor(1), EdgeCase(2, 1), LabelFlip(2, 1)], ids=repr)
def test_there_is_no_success_without_images(attack: Targeted) -> None:
    x, y = with_classes()
    for images, labels in ((x[:0], y[:0]), (x, y[:-1])):
        with pytest.raises(InputError, match=f"on {len(images)} images and {len(labels)} labels"):
            success_rate(Always(1), attack, images, labels)


@pytest.mark.parametrize("target", [-1, 4])
def test_there_is_no_success_in_a_class_that_the_model_does_not_have(target: int) -> None:
    with pytest.raises(InputError, match=f"the label {target} is none of the model's"):
        success_rate(Always(1), Backdoor(target), *with_classes())
