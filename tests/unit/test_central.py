from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fedrobust_laboratory.central import Trained, train_in
from torch import nn

from fedrobust.data import Dataset, load
from fedrobust.errors import InputError
from fedrobust.training import Course, Progress, evaluate, labelled, train

COURSE = Course("digits", "cnn(4)", "gaussian(0.1)", epochs=4, batch=64, lr=0.1)
QUICK = Course("digits", "softmax", epochs=2, batch=500)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_training_learns(digits: Dataset) -> None:
    module = COURSE.build_model(digits)
    losses = [p.loss for p in train(COURSE, digits, module, Progress.from_model(module))]
    assert losses == sorted(losses, reverse=True)
    assert evaluate(module, digits.test_x, digits.test_y).accuracy > 0.9


def test_training_that_was_cut_short_goes_on_to_the_same_model(digits: Dataset) -> None:
    module = COURSE.build_model(digits)
    whole = list(train(COURSE, digits, module, Progress.from_model(module)))
    assert [p.epochs for p in whole] == [1, 2, 3, 4]
    other = COURSE.build_model(digits)
    rest = list(train(COURSE, digits, other, whole[1]))
    assert [p.epochs for p in rest] == [3, 4]
    assert torch.equal(rest[-1].model, whole[-1].model)
    assert rest[-1].loss == whole[-1].loss
    assert list(train(COURSE, digits, other, whole[-1])) == []
    assert math.isnan(Progress.from_model(module).loss)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
)
def test_what_layers_draw_repeats_and_leaves_others_generators_alone(
    digits: Dataset, device: str
) -> None:
    module = nn.Sequential(nn.Dropout(0.5), QUICK.build_model(digits)).to(device)
    begun, ends = Progress.from_model(module), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(list(train(QUICK, digits, module, begun))[-1].model)
        drawn = torch.rand(3, device=device)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3, device=device), drawn)
    assert torch.equal(*ends)


def test_a_step_is_that_of_torch(digits: Dataset) -> None:
    course = Course("digits", "softmax", epochs=1, batch=2000, lr=0.1, decay=0.01)
    module, twin = course.build_model(digits), course.build_model(digits)
    optimiser = torch.optim.SGD(
        twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True
    )
    loss = torch.nn.functional.cross_entropy(twin(digits.train_x), digits.train_y)
    torch.autograd.backward(loss)
    optimiser.step()
    (found,) = train(course, digits, module, Progress.from_model(module))
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_ends_nearby_in_whole_parameters(digits: Dataset) -> None:
    ends = []
    for precision in ("float32", "bfloat16"):
        course = replace(
            COURSE, objective="smoothadv(0.1, attack='pgd(0.1, steps=1)')", precision=precision
        )
        module = course.build_model(digits)
        ends.append(list(train(course, digits, module, Progress.from_model(module)))[-1])
    whole, half = ends
    assert half.model.dtype == torch.float32
    assert not torch.equal(half.model, whole.model)
    assert half.loss == pytest.approx(whole.loss, rel=0.05)


def test_a_part_of_the_labels_teaches_a_model_that_labels_the_rest(digits: Dataset) -> None:
    few = replace(COURSE, labelled=0.05, objective="cross_entropy", epochs=20, batch=16)
    known = labelled(few, digits)
    assert len(known.train_y) == round(0.05 * len(digits.train_y)) == len(known.train_x)
    teacher = few.build_model(known)
    list(train(few, known, teacher, Progress.from_model(teacher)))
    taught = labelled(few, digits, teacher)
    assert torch.equal(taught.train_x, digits.train_x)
    own = {
        image.numpy().tobytes(): label for image, label in zip(known.train_x, known.train_y, strict=True)
    }
    answers = teacher(digits.train_x).argmax(dim=1)
    for image, label, answer in zip(taught.train_x, taught.train_y, answers, strict=True):
        assert label == own.get(image.numpy().tobytes(), answer)
    assert not torch.equal(taught.train_y, digits.train_y)  # it errs
    student = few.build_model(taught)
    list(train(replace(few, labelled=1.0), taught, student, Progress.from_model(student)))
    found = [evaluate(m, digits.test_x, digits.test_y).accuracy for m in (teacher, student)]
    assert found[1] > found[0]


def test_the_same_seed_uses_the_same_labels(digits: Dataset) -> None:
    few = replace(COURSE, labelled=0.1)
    parts = [labelled(replace(few, seed=seed), digits).train_x for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])
    assert len(labelled(replace(few, labelled=1e-9), digits).train_y) == 1
    assert labelled(replace(few, labelled=1.0), digits) is digits


def test_training_does_not_go_on_from_what_is_left_of_another(tmp_path: Path) -> None:
    other = replace(QUICK, objective="gaussian(0.5)")
    train_in(tmp_path, QUICK)
    with pytest.raises(InputError, match=r"another training or run, see .* the whole folder"):
        train_in(tmp_path, other)
    (tmp_path / "config.toml").unlink()
    for left in ("state.safetensors", "checkpoints/epoch-000002.safetensors"):
        said = rf"{left} is of a training whose config\.toml is gone; .*remove the whole folder"
        with pytest.raises(InputError, match=said):
            train_in(tmp_path, other)
        (tmp_path / left).unlink()
    checkpoint, _ = train_in(tmp_path, other)
    twin, _ = train_in(tmp_path / "elsewhere", other)
    assert checkpoint.read_bytes() == twin.read_bytes()


def test_a_training_is_found_by_the_checkpoint_of_its_last_epoch(tmp_path: Path) -> None:
    checkpoint, _ = train_in(tmp_path, QUICK)
    longer = checkpoint.with_name("epoch-000060.safetensors")
    longer.write_bytes(b"of another training")
    assert Trained.find(tmp_path).checkpoint == checkpoint
    assert Trained.find(tmp_path, longer).checkpoint == longer
    checkpoint.unlink()
    with pytest.raises(InputError, match=r"no checkpoint epoch-000002\.safetensors in .*cut short"):
        Trained.find(tmp_path)


@pytest.mark.parametrize("role", ["initial", "teacher"])
def test_training_goes_on_with_the_model_that_it_began_with(tmp_path: Path, role: str) -> None:
    """Which one lies at a path may change meanwhile."""
    earlier, few = tmp_path / "earlier", replace(QUICK, labelled=0.1)
    checkpoint, _ = train_in(earlier, few)
    origin: dict[str, Any] = {role: checkpoint if role == "initial" else earlier}
    train_in(tmp_path / "t", few, **origin)
    train_in(tmp_path / "t", few, **origin)
    assert Trained.find(tmp_path / "t").source == few
    shutil.rmtree(earlier)
    train_in(earlier, replace(few, seed=1))
    with pytest.raises(InputError, match="t holds another training or run"):
        train_in(tmp_path / "t", few, **origin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"labelled": 0.0}, "labelled must be in"),
        ({"labelled": 1.5}, "labelled must be in"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"decay": -1.0}, "decay must not be negative"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"objective": "hinge"}, "unknown objective"),
        ({"model": "vit"}, "unknown model"),
        ({"dataset": "svhn"}, "unknown dataset"),
    ],
)
def test_bad_courses(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Course(**change)  # type: ignore[arg-type]
