from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedrobust.data import Dataset, load
from fedrobust.errors import InputError
from fedrobust.training import (
    CNN,
    FREE,
    MLP,
    Learner,
    Leash,
    Model,
    ResNet,
    Shared,
    Softmax,
    Task,
    cohort,
    evaluate,
    load_vector,
    manifest,
    own_learner,
    parse_model,
    split_vector,
    to_vector,
    updates,
)
from fedrobust.training.objectives import Step

MODELS = [Softmax(), MLP(), MLP(5), CNN(), CNN(width=3), ResNet(8), ResNet(18)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Work this small is slowed down by a second thread, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 7)])
def test_model_maps_images_to_logits(model: Model, shape: tuple[int, int, int]) -> None:
    module = model(shape, 7, seed=0)
    assert module(torch.zeros(2, *shape)).shape == (2, 7)
    assert parse_model(repr(model)) == model


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_model_is_made_from_its_seed_alone(model: Model) -> None:
    before = torch.get_rng_state()
    first = to_vector(model((1, 8, 8), 10, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)  # whatever others do with the global generator
    assert torch.equal(first, to_vector(model((1, 8, 8), 10, seed=3)))
    assert not torch.equal(first, to_vector(model((1, 8, 8), 10, seed=4)))


@pytest.mark.parametrize(("depth", "size"), [(20, 269_722), (18, 11_173_962)])
def test_residual_networks_have_the_published_size(depth: int, size: int) -> None:
    """0.27 million parameters (table 6 of the paper), 11.2 million: ours with projections, no biases."""
    module = ResNet(depth)((3, 32, 32), 10, seed=0)
    projections = sum(p.numel() for n, p in module.named_parameters() if "shortcut" in n)
    assert len(to_vector(module)) - (projections if depth == 20 else 0) == size
    assert not list(module.buffers())  # all it knows is in its parameters


def test_bad_models() -> None:
    with pytest.raises(InputError, match="at least 4 x 4"):
        CNN()((1, 3, 9), 10, seed=0)
    with pytest.raises(InputError, match="cnn, lenet, mlp, resnet, softmax"):
        parse_model("transformer")
    for text in ("mlp(0)", "cnn(width=-1)", "mlp(hidden=2.5)", "resnet(19)", "resnet(2)"):
        with pytest.raises(InputError, match=r"hidden|width|depth"):
            parse_model(text)


def test_vector_round_trip() -> None:
    source, target = CNN(3)((1, 8, 8), 10, seed=0), CNN(3)((1, 8, 8), 10, seed=1)
    vector = to_vector(source)
    assert vector.dtype == torch.float32
    assert not vector.requires_grad
    load_vector(target, vector)
    for (name, mine), (other, theirs) in zip(
        source.named_parameters(), target.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
    vector.zero_()
    assert to_vector(source).abs().sum() > 0
    assert to_vector(target).abs().sum() > 0


def test_split_vector_gives_named_views() -> None:
    module = MLP(3)((1, 2, 2), 2, seed=0)
    vector = to_vector(module)
    pieces = split_vector(vector, manifest(module))
    assert {name: piece.shape for name, piece in pieces.items()} == dict(manifest(module))
    for name, parameter in module.named_parameters():
        assert torch.equal(pieces[name], parameter)
        assert pieces[name].untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(9,), (11,), (10, 1), ()])
def test_wrong_vector_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"need \(10,\)"):
        load_vector(nn.Linear(4, 2), torch.zeros(shape))


def test_batch_statistics_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for call in (manifest, to_vector, lambda m: load_vector(m, torch.zeros(1))):
        with pytest.raises(InputError, match=r"running_mean.*group normalisation"):
            call(module)
    manifest(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))


def test_module_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameters"):
        to_vector(nn.ReLU())


tasks = st.builds(
    Task,
    dataset=st.sampled_from(["digits", "mnist"]),
    split=st.sampled_from(["iid", "dirichlet(0.3)"]),
    model=st.sampled_from(["softmax", "mlp(hidden=3)"]),
    clients=st.integers(1, 1000),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 50),
    batch=st.integers(0, 512),
    lr=st.floats(1e-6, 10),
    momentum=st.floats(0, 1, exclude_max=True),
    proximal=st.floats(0, 10),
    decay=st.floats(0, 10),
    outsiders=st.just(0),
)


@given(task=tasks)
def test_task_json_round_trip(task: Task) -> None:
    assert Task.from_json(task.to_json()) == task


def test_task_json_may_leave_out_defaults() -> None:
    assert Task.from_json('{"clients": 3, "lr": 1}') == Task(clients=3, lr=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "imagenet"}, "digits, fashion_mnist, mnist"),
        ({"split": "sorted"}, "dirichlet, iid"),
        ({"split": "dirichlet(-1)"}, "alpha"),
        ({"model": "vit"}, "cnn, lenet, mlp, resnet, softmax"),
        ({"clients": 0}, "clients must be at least 1"),
        ({"clients": 2.5}, "clients must be int"),
        ({"clients": True}, "clients must be int"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": float("inf")}, "lr must be finite"),
        ({"lr": "fast"}, "lr must be float"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"decay": -0.1}, "decay must not be negative"),
        ({"outsiders": -1}, "outsiders must be in 0 .. 9"),
        ({"outsiders": 10}, "outsiders must be in 0 .. 9"),
        ({"model": None}, "model must be str"),
        ({"objective": "gaussian(0.0)"}, "sigma must be above 0"),
        ({"objective": "hinge"}, "unknown objective 'hinge'"),
        ({"rate": 1}, "unknown task field 'rate'.*batch, clients, dataset, decay, lr"),
    ],
)
def test_bad_task(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task.from_json(json.dumps(change))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"a": ' * 100_000])
def test_task_must_be_an_object(text: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        Task.from_json(text)


@pytest.mark.parametrize("split", ["iid", "dirichlet(0.5)"])
def test_partition_depends_on_the_seed(digits: Dataset, split: str) -> None:
    labels = digits.train_y.numpy()
    first, again, other = (Task(split=split, seed=s).partition(labels) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))


def test_one_step_is_one_gradient(digits: Dataset) -> None:
    task = Task(model="mlp(8)", clients=4, steps=1, batch=0, lr=0.3)
    model = to_vector(task.build_model(digits))
    before = model.clone()
    learner = Learner(task, digits, client=2)

    module = task.build_model(digits)
    mine = torch.from_numpy(task.partition(digits.train_y.numpy())[2])
    loss = cross_entropy(module(digits.train_x[mine]), digits.train_y[mine])
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])

    update = learner.update(0, model)
    assert update.dtype == torch.float32
    torch.testing.assert_close(update, -0.3 * gradient, rtol=1e-4, atol=1e-7)
    assert torch.equal(model, before)
    assert learner.examples == len(mine)


def test_several_steps_walk_through_the_examples(digits: Dataset) -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            result: Tensor = self.inner(x)
            return result

    task = Task(model="softmax", clients=50, steps=7, batch=10)
    plain = Shared.of(task, digits)
    shared = Shared(Recorder(plain.module), plain.parts)
    learner = Learner(task, digits, 0, shared=shared)
    learner.update(0, to_vector(plain.module))
    assert [len(x) for x in seen] == [10] * 7
    mine = digits.train_x[torch.from_numpy(plain.parts[0])]
    times = torch.tensor([sum(bool((x == e).all()) for x in torch.cat(seen)) for e in mine])
    assert times.sum() == 70
    assert times.max() - times.min() <= 1 + int(70 % len(mine) > 0)


@pytest.mark.parametrize(
    "task",
    [
        Task(model="mlp(7)", clients=9, split="dirichlet(0.2)", steps=4, batch=16, momentum=0.5),
        Task(model="softmax", clients=30, split="quantity(0.5)", steps=3, batch=0, proximal=1.0),
        Task(model="softmax", clients=6, steps=4, batch=8, decay=0.7, proximal=0.5),
        Task(model="cnn(2)", clients=3, steps=2, batch=8),
        Task(model="mlp(64)", clients=60, steps=1, batch=20),  # in several parts
    ],
    ids=repr,
)
def test_together_clients_come_to_the_same_updates(
    digits: Dataset, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort, "_ELEMENTS", 1 << 18)
    shared, model = Shared.of(task, digits), to_vector(task.build_model(digits))
    alone, together = (
        [Learner(task, digits, i, shared=shared) for i in range(task.clients)] for _ in range(2)
    )
    before = model.clone()
    for number in (3, 4):
        expected = torch.stack([learner.update(number, model) for learner in alone])
        found = updates(together, number, model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(model, before)
    held = torch.stack([learner.update(5, model, Leash(radius=0.01)) for learner in alone])
    torch.testing.assert_close(
        updates(together, 5, model, Leash(radius=0.01)), held, rtol=1e-4, atol=1e-6
    )


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old, and still met with
        layer = nn.utils.weight_norm(nn.Conv2d(1, 2, 3))
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(72, 10))


def tripled() -> nn.Module:
    layer = nn.Linear(64, 10)
    layer.register_forward_hook(lambda _layer, _inputs, output: 3 * output)
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)),
        lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 10, bias=False), nn.ReLU())),
        tripled,
        normed,
    ],
    ids=["a rectifier first", "nested", "a hook", "a norm"],
)
def test_together_clients_of_any_network_come_to_the_same(
    digits: Dataset, build: Callable[[], nn.Module]
) -> None:
    task = Task(model="softmax", clients=4, steps=3, batch=8, decay=0.1)
    shared = replace(Shared.of(task, digits), module=build())
    model = to_vector(shared.module)
    learners = [Learner(task, digits, i, shared=shared) for i in range(4)]
    expected = torch.stack([learner.update(0, model) for learner in learners])
    torch.set_num_threads(2)
    try:
        found = updates(learners, 0, model)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_together_clients_that_share_images_have_labels_of_their_own(digits: Dataset) -> None:
    task = Task(model="softmax", clients=2, steps=2, batch=8)
    shared = Shared.of(task, digits)
    wrong = replace(digits, train_y=9 - digits.train_y)
    learners = [Learner(task, data, i, shared=shared) for i, data in enumerate((digits, wrong))]
    model = to_vector(shared.module)
    expected = torch.stack([learner.update(0, model) for learner in learners])
    torch.testing.assert_close(updates(learners, 0, model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["mlp(7)", "cnn(2)"])
@pytest.mark.parametrize("objective", ["cross_entropy", "gaussian(0.5)"])
def test_several_threads_come_to_the_same_updates(
    digits: Dataset, model: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort, "_ELEMENTS", 1 << 12)
    task = Task(model=model, clients=7, steps=2, batch=8, momentum=0.5, objective=objective)
    shared = Shared.of(task, digits)
    start = to_vector(shared.module)
    one, many = ([Learner(task, digits, i, shared=shared) for i in range(7)] for _ in range(2))
    room = torch.empty(7, len(start))
    for number in range(3):
        expected = updates(one, number, start)
        torch.set_num_threads(3)
        try:
            found = updates(many, number, start, out=room)
        finally:
            torch.set_num_threads(1)
        assert found is room
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_learners_that_share_copy_no_images(digits: Dataset) -> None:
    task = Task(clients=5)
    together = Learner(task, digits, 3, shared=Shared.of(task, digits))
    alone = Learner(task, digits, 3)
    assert together.x.data_ptr() == digits.train_x.data_ptr()
    assert len(alone.x) == alone.examples == together.examples
    assert torch.equal(together.x[together.mine], alone.x[alone.mine])


OBJECTIVES = ["cross_entropy", "gaussian(0.5)", 'smoothadv(0.5, attack="pgd(1.0, steps=2)")']


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_update_does_not_depend_on_who_else_works(digits: Dataset, objective: str) -> None:
    split = "dirichlet(0.5)"
    task = Task(model="cnn(2)", clients=5, split=split, steps=3, batch=8, objective=objective)
    model = to_vector(task.build_model(digits))
    alone = [Learner(task, digits, i).update(4, model) for i in range(5)]

    state = torch.get_rng_state()
    shared = Shared.of(task, digits)
    together = {i: Learner(task, digits, i, shared=shared) for i in (3, 0, 4, 2, 1)}
    together[1].update(7, model)
    for i in (2, 4, 0, 3, 1):
        assert torch.equal(together[i].update(4, model), alone[i])
    assert torch.equal(state, torch.get_rng_state())

    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(together[0].update(5, model), alone[0])


def test_the_proximal_term_is_that_of_the_loss(digits: Dataset) -> None:
    task = Task(model="mlp(5)", clients=5, steps=4, batch=0, proximal=2.0)
    module = task.build_model(digits)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    x, y = (
        part[torch.from_numpy(task.partition(digits.train_y.numpy())[1])]
        for part in (digits.train_x, digits.train_y)
    )
    for _ in range(4):
        moved = sum((p - o).square().sum() for p, o in zip(module.parameters(), start, strict=True))
        loss = cross_entropy(module(x), y) + 0.5 * 2.0 * moved
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    model = to_vector(task.build_model(digits))
    found = Learner(task, digits, 1).update(0, model)
    torch.testing.assert_close(found, to_vector(module) - model, rtol=1e-4, atol=1e-6)
    free = Learner(dataclasses.replace(task, proximal=0.0), digits, 1).update(0, model)
    assert found.norm() < free.norm()


def test_decay_is_the_weight_decay_of_torch(digits: Dataset) -> None:
    task = Task(model="mlp(5)", clients=5, steps=4, batch=0, decay=0.3)
    module = task.build_model(digits)
    model = to_vector(module)
    optimiser = torch.optim.SGD(module.parameters(), lr=task.lr, weight_decay=0.3)
    mine = torch.from_numpy(task.partition(digits.train_y.numpy())[1])
    for _ in range(4):
        optimiser.zero_grad()
        torch.autograd.backward(cross_entropy(module(digits.train_x[mine]), digits.train_y[mine]))
        optimiser.step()
    found = Learner(task, digits, 1).update(0, model)
    torch.testing.assert_close(found, to_vector(module) - model, rtol=1e-4, atol=1e-6)


def test_an_objective_is_told_how_many_rounds_came_before(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that of a warm-up of k rounds the k-th is the first with all of eps."""
    times: list[int] = []

    def watched(step: Step, x: Tensor, y: Tensor) -> Tensor:
        times.append(step.time)
        return cross_entropy(step.module(x), y)

    learner = Learner(Task(model="softmax", clients=3, steps=1), digits, 0)
    monkeypatch.setattr(learner, "objective", watched)
    for number in (1, 2, 3):
        learner.update(number, to_vector(learner.module))
    assert times == [0, 1, 2]


def test_outsiders_hold_samples_of_what_the_others_divide(digits: Dataset) -> None:
    labels = digits.train_y.numpy()
    task = Task(clients=7, outsiders=2, split="dirichlet(0.5)", seed=5)
    parts = task.partition(labels)
    assert len(parts) == 7
    assert sorted(np.concatenate(parts[2:])) == list(range(len(labels)))
    alone = dataclasses.replace(task, clients=5, outsiders=0).partition(labels)
    assert all(map(np.array_equal, parts[2:], alone))
    for sample in parts[:2]:
        assert len(np.unique(sample)) == len(sample) == len(labels) // 7
        assert (np.diff(sample) > 0).all()
    assert not np.array_equal(*parts[:2])
    assert all(map(np.array_equal, parts, task.partition(labels)))
    with pytest.raises(InputError, match="10 examples are too few for 11 clients"):
        Task(clients=11, outsiders=2).partition(labels[:10])


def test_momentum_is_the_closed_form(digits: Dataset) -> None:
    plain = Task(model="softmax", clients=3, steps=2)
    model = to_vector(plain.build_model(digits))
    without = Learner(plain, digits, 1)
    deltas = torch.stack([without.update(r, model) for r in range(6)]).double()

    m = 0.9
    learner = Learner(dataclasses.replace(plain, momentum=m), digits, 1)
    for t in range(6):
        sent = learner.update(t, model)
        weights = torch.tensor([(1 - m if s else 1.0) * m ** (t - s) for s in range(t + 1)])
        assert weights.sum() == pytest.approx(1)
        expected = (weights.double() @ deltas[: t + 1]).float()
        torch.testing.assert_close(sent, expected, rtol=1e-4, atol=1e-7)
        sent.zero_()  # what was sent belongs to the caller


def test_poison_is_applied_once_to_the_local_data(digits: Dataset) -> None:
    calls: list[int] = []

    def poison(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return -x, 9 - y

    task = Task(model="softmax", clients=10)
    flipped = dataclasses.replace(digits, train_x=-digits.train_x, train_y=9 - digits.train_y)
    shared = Shared.of(task, digits)
    model = to_vector(shared.module)
    poisoned = Learner(task, digits, 6, poison, shared=shared)
    expected = Learner(task, flipped, 6, shared=shared)
    for r in range(2):
        assert torch.equal(poisoned.update(r, model), expected.update(r, model))
    assert calls == [poisoned.examples]


def test_a_client_with_data_of_its_own_trains_on_all_of_it(digits: Dataset) -> None:
    task = Task(model="softmax", clients=5, outsiders=1, split="dirichlet(0.1)", batch=0)
    few = replace(digits, train_x=digits.train_x[:7], train_y=digits.train_y[:7])
    own, model = own_learner(task, few, 3), torch.zeros(650)
    alone = Learner(replace(task, clients=1, outsiders=0, split="iid"), few, 0)
    assert own.examples == 7
    assert torch.equal(own.update(1, model), alone.update(1, model))
    first, second = (own_learner(replace(task, batch=2), few, i).update(1, model) for i in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(InputError, match=r"no client 5; the task has 0 .. 4"):
        own_learner(task, few, 5)
    with pytest.raises(InputError, match="another model"):
        own_learner(task, replace(few, classes=9), 0).update(1, model)


def test_bad_learners(digits: Dataset) -> None:
    task = Task(clients=3)
    for client in (-1, 3):
        with pytest.raises(InputError, match=f"no client {client}; the task has 0 .. 2"):
            Learner(task, digits, client)
    with pytest.raises(InputError, match="left client 0 with 0 images"):
        Learner(task, digits, 0, lambda x, y: (x[:0], y[:0]))
    with pytest.raises(InputError, match="another model"):
        Learner(task, digits, 0).update(0, torch.zeros(3))
    with pytest.raises(InputError, match="1437 examples over 2000 clients"):
        Learner(Task(clients=2000), digits, 0)


def test_evaluation(digits: Dataset) -> None:
    module = Softmax()(digits.shape, 10, seed=0)
    result = evaluate(module, digits.test_x, digits.test_y)
    logits = module(digits.test_x).detach()
    assert result.loss == pytest.approx(float(cross_entropy(logits, digits.test_y)), rel=1e-5)
    assert result.accuracy == float((logits.argmax(1) == digits.test_y).double().mean())
    small = evaluate(module, digits.test_x, digits.test_y, batch=7)
    assert small.loss == pytest.approx(result.loss, rel=1e-5)
    assert small.accuracy == result.accuracy
    assert module.training
    with pytest.raises(InputError, match="0 images"):
        evaluate(module, digits.test_x[:0], digits.test_y[:0])


@pytest.mark.parametrize("label", [-1, 10, -100])
def test_a_model_is_not_judged_by_labels_that_it_does_not_have(digits: Dataset, label: int) -> None:
    module, labels = Softmax()(digits.shape, 10, seed=0), digits.test_y.clone()
    labels[300] = label
    with pytest.raises(InputError, match=f"the label {label} is none of the model's, .* 0 .. 9"):
        evaluate(module, digits.test_x, labels)
    assert module.training


@pytest.mark.parametrize(
    ("model", "steps", "lr"), [("softmax", 300, 0.1), ("mlp", 200, 0.2), ("cnn(8)", 120, 0.2)]
)
def test_one_client_with_all_data_learns_the_digits(
    digits: Dataset, model: str, steps: int, lr: float
) -> None:
    task = Task(model=model, clients=1, steps=steps, lr=lr)
    module = task.build_model(digits)
    start = to_vector(module)
    load_vector(module, start + Learner(task, digits, 0).update(0, start))
    assert evaluate(module, digits.test_x, digits.test_y).accuracy > 0.9


def test_rounds_of_averaging_learn_the_digits(digits: Dataset) -> None:
    task = Task(model="mlp", clients=5, split="dirichlet(0.5)", momentum=0.5, lr=0.2)
    shared = Shared.of(task, digits)
    learners = [Learner(task, digits, i, shared=shared) for i in range(task.clients)]
    model = to_vector(shared.module)
    for r in range(40):
        model = model + torch.stack([x.update(r, model) for x in learners]).mean(0)
    load_vector(shared.module, model)
    assert evaluate(shared.module, digits.test_x, digits.test_y).accuracy > 0.9


def leashed(digits: Dataset, leash: Leash, steps: int = 10, model: str = "mlp(8)") -> Tensor:
    task = Task(model=model, clients=4, steps=steps, batch=0, lr=0.3)
    return Learner(task, digits, client=2).update(0, to_vector(task.build_model(digits)), leash)


@pytest.mark.parametrize("name", ["mlp(8)", "cnn(2)"])
def test_the_anomaly_term_is_part_of_the_loss(digits: Dataset, name: str) -> None:
    task = Task(model=name, clients=4, steps=3, batch=0, lr=0.3)
    module = task.build_model(digits)
    model = to_vector(module)
    start = model.clone().requires_grad_()
    mine = torch.from_numpy(task.partition(digits.train_y.numpy())[2])
    vector = start
    for _ in range(3):
        values = split_vector(vector, manifest(module))
        logits = torch.func.functional_call(module, values, (digits.train_x[mine],))
        loss = 0.6 * cross_entropy(logits, digits.train_y[mine])
        if not torch.equal(vector, model):
            loss = loss + 0.4 * (vector - model).square().sum().sqrt()
        (gradient,) = torch.autograd.grad(loss, vector)
        vector = (vector - 0.3 * gradient).detach().requires_grad_()
    expected = (vector - model).detach()
    torch.testing.assert_close(leashed(digits, Leash(0.6), 3, name), expected, rtol=1e-4, atol=1e-5)


def test_a_leash_shortens_updates(digits: Dataset) -> None:
    free = leashed(digits, FREE)
    lengths = [float(leashed(digits, Leash(alpha)).norm()) for alpha in (0.6, 0.8, 0.9)]
    assert lengths == sorted(lengths)
    assert lengths[-1] < float(free.norm())
    held = leashed(digits, Leash(radius=0.1))
    assert float(held.norm()) == pytest.approx(0.1, rel=1e-3)
    assert torch.equal(free, leashed(digits, Leash(radius=1e6)))


@pytest.mark.parametrize("leash", [{"alpha": 0}, {"alpha": 1.1}, {"radius": 0}, {"radius": math.nan}])
def test_bad_leashes(leash: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be above 0"):
        Leash(**leash)
