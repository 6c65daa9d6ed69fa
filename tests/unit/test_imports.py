from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedrobust.data import Dataset, load
from fedrobust.errors import InputError
from fedrobust.imports import import_callable, is_import_path
from fedrobust.training import Learner, Task, parse_model, to_vector

HOSPITAL = """
import torch
from torch import nn

torch.rand(3)  # as careless as can be


class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.inner(x)

    @staticmethod
    def narrow(shape, classes):
        return Net(shape, 3)


def frozen(shape, classes):
    net = Net(shape, classes)
    net.inner[3].requires_grad_(False)
    return net


def double(shape, classes):
    return Net(shape, classes).double()


def fixed(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))


def broken(shape, classes):
    raise KeyError("width")


def hollow(shape, classes):
    return None


depth = 3
"""


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of somebody's module, which has not been imported yet."""
    name = f"hospital_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(HOSPITAL)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_thing\n")
    (tmp_path / f"{name}_raising.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_a_model_by_import_path_is_made_from_its_seed_alone(hospital: str, digits: Dataset) -> None:
    task = Task(model=f"{hospital}:Net", seed=3)
    assert hospital not in sys.modules  # a task only names it
    before = torch.get_rng_state()
    first = to_vector(task.build_model(digits))
    torch.rand(1)
    assert torch.equal(first, to_vector(task.build_model(digits)))
    assert not torch.equal(first, to_vector(Task(model=f"{hospital}:Net", seed=4).build_model(digits)))
    torch.set_rng_state(before)
    module = task.build_model(digits)
    assert torch.equal(before, torch.get_rng_state())
    assert module(digits.test_x[:5]).shape == (5, 10)
    assert torch.isfinite(Learner(task, digits, 0).update(0, first)).all()
    assert parse_model(repr(parse_model(task.model))) == parse_model(task.model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such:thing", r"no module 'no'.*PYTHONPATH"),
        ("fedrobust.no_such:thing", r"no module 'fedrobust.no_such'"),
        ("{}_broken:Net", r"no module 'no_such_thing', which .* imports"),
        ("{}_raising:Net", r"importing .* raised RuntimeError: no licence"),
        ("{}:Nett", "has no attribute 'Nett'"),
        ("{}:Net.wide", "has no attribute 'Net.wide'"),
        ("{}:depth", "is int, expected something that can be called"),
        ("{}:broken", r"called with \(1, 8, 8\), 10: KeyError: 'width'"),
        ("{}:hollow", "returned NoneType, expected an nn.Module"),
        ("{}:fixed", r"cannot be trained on images of shape \(1, 8, 8\)"),
        ("{}:frozen", "cannot be trained on images"),
        ("{}:double", "cannot be trained on images"),
        ("{}:Net.narrow", r"maps 2 images to \(2, 3\), expected logits \(2, 10\)"),
    ],
)
def test_bad_models(hospital: str, path: str, message: str) -> None:
    model = parse_model(path.format(hospital))
    with pytest.raises(InputError, match=message):
        model((1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("path", [":", "a:", ":b", "a b:c", "a:b:c", "../a:b", "a.:b", "1a:b", "a:b "])
def test_malformed_paths(path: str) -> None:
    assert is_import_path(path)
    with pytest.raises(InputError, match=r"not of the form package\.module:attribute"):
        import_callable(path)


@pytest.mark.parametrize(
    ("name", "size"), [("bucketing_cnn", 1_199_882), ("byzfl_cnn", 431_080), ("f2ed_cnn", 319_520)]
)
def test_published_networks(name: str, size: int) -> None:
    model = parse_model(f"fedrobust.training.published:{name}")
    assert len(to_vector(model((1, 28, 28), 10, seed=0))) == size
    for shape in ((3, 32, 32), (1, 21, 26)):
        module = model(shape, 7, seed=0)
        assert isinstance(module, nn.Sequential)
        assert module(torch.zeros(4, *shape)).shape == (4, 7)
    with pytest.raises(InputError, match="nothing is left of images of 3 x 28 pixels"):
        model((1, 3, 28), 10, seed=0)
