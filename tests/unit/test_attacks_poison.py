"""Attacks that train on poisoned data: targeted label flips and backdoors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrobust.attacks import Backdoor, LabelFlip, Relabelled, Trigger, View
from fedrobust.errors import InputError
from fedrobust.training import Leash, Poison

RNG = np.random.default_rng(0)


def watching(poisons: list[Poison], f: int = 3, d: int = 4) -> View:
    """A view whose training gives the k-th poison rows full of k."""

    def train(poison: Poison, leash: Leash) -> Tensor:
        poisons.append(poison)
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


@pytest.mark.parametrize("attack", [LabelFlip(3, 4), LabelFlip(-1, 2), Backdoor(4), Backdoor(-1)])
def test_unknown_classes_are_refused(attack: LabelFlip | Backdoor) -> None:
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
