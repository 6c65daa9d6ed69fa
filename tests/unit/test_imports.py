from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from fedrobust.data import Dataset, load
from fedrobust.errors import InputError
from fedrobust.imports import import_callable, is_import_path
from fedrobust.training import Learner, Shared, Task, parse_model, to_vector, updates

HOSPITAL = """
import numpy as np
import torch
from PIL import Image
from torch import nn

from fedrobust.data import Dataset

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


def careless(shape, classes):
    return nn.Sequential(Net(shape, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, classes))


def broken(shape, classes):
    raise KeyError("width")


def hollow(shape, classes):
    return None


depth = 3


class Pairs:
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


GREY, COLOUR = np.full((4, 5), 51, np.uint8), np.zeros((4, 5, 3), np.uint8)
ONE = Pairs((GREY, 1))


def pixels():
    return Pairs((GREY, np.int64(2)), (GREY // 3, 0)), ONE


def colours():
    first = COLOUR.copy()
    first[1, 2] = 255, 102, 0
    return Pairs((Image.fromarray(first), torch.tensor(0))), Pairs((COLOUR, 1))


def tensors():
    return Pairs((torch.rand(2, 4, 5) + 7, 3)), Pairs((torch.full((2, 4, 5), 9, dtype=torch.uint8), 0))


def of_folder(data_dir=None):
    return Pairs((torch.full((4, 5), float(len(str(data_dir)))), 0)), Pairs((torch.zeros(4, 5), 1))


def ours():
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    return Dataset("anything", x, y, x, y, 2)


def unfinished():
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    return Dataset("anything", x, y, x.clone().index_fill_(0, y[1:], float("nan")), y, 2)


def ours_wrongly():
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 2])
    return Dataset("anything", x, y, x, y, 2)


no_pair = lambda: [1, 2, 3]
not_map_style = lambda: (iter([]), ONE)
empty = lambda: (ONE, Pairs())
shapes = lambda: (Pairs((GREY, 0), (GREY.T, 1)), ONE)
other_test = lambda: (ONE, Pairs((GREY.T, 1)))
floats = lambda: (Pairs((GREY / 255, 0)), ONE)
flat = lambda: (Pairs((torch.zeros(20), 0)), ONE)
labels = lambda: (Pairs((GREY, 1.0)), ONE)
below = lambda: (Pairs((GREY, -1)), ONE)
no_label = lambda: (Pairs(GREY), ONE)
no_pixels = lambda: (Pairs((GREY[:0], 0)), ONE)
needy = lambda root: (ONE, ONE)
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Work this small is slowed down by a second thread, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_nothing_is_imported_at_the_word_of_a_server(hospital: str) -> None:
    for task in (Task(model=f"{hospital}:Net"), Task(dataset=f"{hospital}:pixels")):
        with pytest.raises(InputError, match=rf"names '{hospital}:.*--allow-imports"):
            Task.from_json(task.to_json())
        assert Task.from_json(task.to_json(), imports=True) == task
    for wrong in ('{"model": "a:"}', '{"dataset": ":b"}'):
        with pytest.raises(InputError, match="import path"):
            Task.from_json(wrong, imports=True)
    assert hospital not in sys.modules


def test_pixels_become_numbers_and_tensors_stay(hospital: str, tmp_path: Path) -> None:
    data = load(f"{hospital}:pixels")
    assert (data.name, data.shape, data.classes) == (f"{hospital}:pixels", (1, 4, 5), 3)
    assert data.train_x.dtype == torch.float32
    torch.testing.assert_close(data.train_x[:, 0, 0, 0], torch.tensor([0.2, 17 / 255]))
    assert data.train_y.tolist() == [2, 0]
    data = load(f"{hospital}:colours")
    assert (data.shape, data.classes) == ((3, 4, 5), 2)
    torch.testing.assert_close(data.train_x[0, :, 1, 2], torch.tensor([1.0, 0.4, 0.0]))
    before = torch.get_rng_state()
    data, again = load(f"{hospital}:tensors"), load(f"{hospital}:tensors")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(data.train_x, again.train_x)  # what it draws is the same everywhere
    assert (data.shape, data.classes, data.train_x.min() >= 7) == ((2, 4, 5), 4, True)
    assert data.test_x.unique().tolist() == [9.0]
    assert load(f"{hospital}:of_folder", tmp_path).train_x[0, 0, 0, 0] == len(str(tmp_path))
    assert load(f"{hospital}:ours").name == f"{hospital}:ours"


def test_the_data_directory_may_come_from_the_environment(
    hospital: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDROBUST_DATA", "/some/where")
    assert load(f"{hospital}:of_folder").train_x.max() == len("/some/where")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("no_such", "no attribute"),
        ("no_pair", "it returned list, expected a Dataset or a pair"),
        ("not_map_style", "training part is list_iterator, expected a dataset with a length"),
        ("empty", "its test part is empty"),
        ("shapes", r"item 1 of its training part has the shape \(1, 5, 4\), the first one \(1, 4, 5\)"),
        ("other_test", r"to test on have the shape \(1, 5, 4\), those to train on \(1, 4, 5\)"),
        ("floats", "image of item 0 of its training part is ndarray of float64, expected a tensor"),
        ("flat", "image of item 0 of its training part has 1 dimensions"),
        ("labels", r"label of item 0 of its training part is 1\.0, expected an integer"),
        ("below", r"labels of its training part are -1 \.\. -1, expected 0 \.\. 1"),
        ("no_label", "item 0 of its training part is ndarray, expected a pair"),
        ("no_pixels", r"images of its training part have no pixels, shape \(1, 0, 5\)"),
        ("needy", "loading it raised TypeError: .*root"),
        ("unfinished", r"image 1 of its test part has pixels that are not finite"),
        ("ours_wrongly", r"labels of its training part are 0 \.\. 2, expected 0 \.\. 1"),
    ],
)
def test_bad_datasets(hospital: str, attribute: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(f"{hospital}:{attribute}")


@pytest.mark.parametrize("name", ["Net", "careless", "published"])
def test_updates_with_dropout_depend_on_the_client_and_round_alone(
    hospital: str, digits: Dataset, name: str
) -> None:
    path = {"published": "fedrobust.training.published:bucketing_cnn"}.get(name, f"{hospital}:{name}")
    task = Task(model=path, clients=4, steps=2, batch=8)
    shared = Shared.of(task, digits)
    model = to_vector(shared.module)
    first = Learner(task, digits, 1).update(3, model)
    before = torch.get_rng_state()
    learners = [Learner(task, digits, i, shared=shared) for i in range(4)]
    together = updates(learners, 3, model)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert torch.equal(together[1], first)
    apart = [Learner(task, digits, i) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:  # as clients in one process are
        again = list(threads.map(lambda learner: learner.update(3, model), apart))
    assert torch.equal(torch.stack(again), together)


def test_dropout_draws_anew_every_round(digits: Dataset) -> None:
    task = Task(clients=4, steps=1, batch=0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    shared = Shared(module, task.partition(digits.train_y.numpy()))
    model = to_vector(module)
    before = torch.get_rng_state()
    learners = [Learner(task, digits, i, shared=shared) for i in (0, 0, 1)]
    rounds = [[learner.update(r, model) for r in (1, 2)] for learner in learners]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(rounds[0][0], rounds[1][0])
    assert not torch.equal(rounds[0][0], rounds[0][1])  # on the same examples, all of the client's
