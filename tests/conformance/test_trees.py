"""The door: a malformed update is refused and named; the round goes on in the form of the others."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fedrobust import InputError, aggregate


class Layer(NamedTuple):
    weight: Any
    bias: Any


def vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=4).astype(np.float32)


def update(seed: int = 0) -> dict[str, Any]:
    return {"w": vector(seed).reshape(2, 2), "b": np.float32(seed), "seen": np.int64(seed)}


def nested(depth: int) -> Any:
    tree: Any = vector()
    for _ in range(depth):
        tree = [tree]
    return tree


def cyclic() -> list[Any]:
    tree: list[Any] = []
    tree.append(tree)
    return tree


def ragged() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # its form may change
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


MALFORMED: dict[str, tuple[Any, str]] = {
    "lacks a key": ({"w": vector().reshape(2, 2), "b": np.float32(0)}, "lacks 'seen'"),
    "extra key": ({**update(), "x": vector()}, "holds 'x', which the others do not"),
    "other key": ({"v": vector(), "b": np.float32(0), "seen": 1}, "lacks 'w'"),
    "shape": ({**update(), "w": vector()}, r"shape \(4,\) at 'w', expected .* \(2, 2\)"),
    "integers for floats": ({**update(), "b": 1}, "has integers .* at 'b'"),
    "floats for integers": ({**update(), "seen": 1.5}, "has floating-point values .* at 'seen'"),
    "objects": ({**update(), "w": np.array([None] * 4)}, "holds .* at 'w', not a numeric array"),
    "text": ({**update(), "w": "0123"}, "holds str of <U4 at 'w', not a numeric array"),
    "none": (None, "holds NoneType"),
    "complex": ({**update(), "w": np.ones((2, 2), complex)}, "at 'w'"),
    "complex counter": ({**update(), "seen": torch.tensor(1j)}, "at 'seen'"),
    "dates": ({**update(), "w": np.zeros((2, 2), "M8[s]")}, "at 'w', not a numeric array"),
    "sparse": ({**update(), "w": torch.eye(2).to_sparse()}, "at 'w'"),
    "no data": ({**update(), "w": torch.zeros(2, 2, device="meta")}, "at 'w'"),
    "nested tensor": (
        {**update(), "w": ragged()},
        "holds a nested tensor of torch.float32 at 'w'",
    ),
    "two numbers in a byte": (
        {**update(), "w": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)},
        "float4_e2m1fn_x2 at 'w', not a numeric array",
    ),
    "array": (vector(), "lacks"),
    "list": ([vector()], "lacks"),
    "empty": ({}, "lacks"),
    "not finite": ({**update(), "b": np.float32("nan")}, "not finite"),
    "list for array": ({**update(), "w": [[0.0, 1.0], [2.0, 3.0]]}, "lacks 'w'"),
    "very deep": (nested(5000), "nested"),
    "cyclic": (cyclic(), "nested"),
}


@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_update_is_refused_and_named(kind: str, place: int) -> None:
    bad, message = MALFORMED[kind]
    good = [update(i) for i in range(5)]
    result = aggregate([*good[:place], bad, *good[place:]], "median")
    expected = aggregate(good, "median")
    assert list(result.refused) == [place]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.refused[place])
    assert "\n" not in result.refused[place]
    for key in update():
        np.testing.assert_array_equal(result.value[key], expected.value[key])


@pytest.mark.parametrize(
    "kind", ["longdouble", "float16", "float64", "torch", "int8 counter", "uint64 counter"]
)
def test_one_update_does_not_choose_the_type_of_the_result(kind: str) -> None:
    """Numbers of another width are numbers; but their sender, even the first, decides for nobody."""
    odd: Any = {
        "longdouble": {**update(), "w": np.ones((2, 2), np.longdouble)},
        "float16": {**update(), "w": np.ones((2, 2), np.float16)},
        "float64": {**update(), "w": np.ones((2, 2))},
        "torch": {key: torch.as_tensor(leaf) for key, leaf in update().items()},
        "int8 counter": {**update(), "seen": np.int8(1)},
        "uint64 counter": {**update(), "seen": np.uint64(1)},
    }[kind]
    good = [update(i) for i in range(5)]
    for leaf in good:
        leaf["w"] = leaf["w"] * np.float32(1e6)  # beyond float16
    result = aggregate([odd, *good], "median")
    assert not set(result.refused) - {0}
    assert {key: type(leaf) for key, leaf in result.value.items()} == dict.fromkeys(good[0], np.ndarray)
    assert [result.value[key].dtype for key in ("w", "seen")] == [np.float32, np.int64]
    np.testing.assert_allclose(result.value["w"], np.median([g["w"] for g in good], 0), rtol=2)


def test_clients_whose_keys_are_in_no_common_order_still_decide_the_types_together() -> None:
    odd = {key: np.asarray(leaf).astype(np.float16) for key, leaf in update().items() if key != "seen"}
    orders = [("w", "b"), ("b", "w")]
    good = [{key: update(i)[key] for key in orders[i % 2]} for i in range(2)]
    result = aggregate([odd, *good], "mean")
    assert result.value["w"].dtype == np.float32


def test_the_majority_decides_the_form() -> None:
    other = {"v": vector()}
    result = aggregate([other, other, *(update(i) for i in range(3))], "mean")
    assert list(result.refused) == [0, 1]
    assert set(result.value) == {"w", "b", "seen"}


def test_the_same_paths_in_another_structure_are_another_form() -> None:
    good = [{"a.b": vector(i)} for i in range(4)]
    result = aggregate([{"a": {"b": vector()}}, *good], "mean")
    assert list(result.value) == ["a.b"]


def test_leaves_lie_in_their_order_in_most_updates() -> None:
    """Where a rule looks at the last layer, that is the model's last, whatever the layers are called."""
    trees = [{"features": vector(i), "classifier": vector(i + 10)} for i in range(9)]
    trees[0] = dict(reversed(trees[0].items()))  # neither a client's own order decides
    rows = np.array([np.concatenate([t["features"], t["classifier"]]) for t in trees])
    found, expected = aggregate(trees, "last(4) | krum"), aggregate(rows, "last(4) | krum")
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert list(found.value) == ["features", "classifier"]


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": vector()}, "a.b": vector(1)},
        {1: vector(), "1": vector(1)},
        {"": vector(), "a": vector(1)},
    ],
    ids=["dotted", "number and text", "empty key"],
)
def test_keys_that_read_alike_are_kept_apart(tree: dict[Any, Any]) -> None:
    value = aggregate([tree] * 3, "mean").value
    assert list(value) == list(tree)
    key = list(tree)[1]
    np.testing.assert_allclose(value[key], tree[key], rtol=1e-6)


def test_a_reference_decides_the_form_against_any_majority() -> None:
    wrong = [{"v": vector(i)} for i in range(4)]
    result = aggregate([*wrong, update(1)], "mean", reference=update(0))
    assert list(result.refused) == [0, 1, 2, 3]
    np.testing.assert_array_equal(result.value["w"], update(1)["w"])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"w": vector()}, "lacks|holds"),
        ({**update(), "w": "text"}, "not a numeric array"),
        ({**update(), "w": np.full((2, 2), np.nan, np.float32)}, "reference"),
    ],
    ids=["form", "text", "not finite"],
)
def test_a_bad_reference_is_an_error(reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate([update(i) for i in range(4)], "mean", reference=reference)


@pytest.mark.parametrize("rule", ["mean", "filter", "median", "clip | nnm | filter", "krum"])
def test_models_with_a_reference_are_differences_plus_the_model(rule: str) -> None:
    model, deltas = 1e4 * vector(9).astype(float), np.random.default_rng(1).normal(size=(9, 4))
    models = aggregate(model + deltas, rule, reference=model)
    differences = aggregate(deltas, rule)
    np.testing.assert_allclose(models.value, model + differences.value, rtol=1e-9)
    if models.certificate is not None and differences.certificate is not None:
        assert models.certificate.bound() == pytest.approx(differences.certificate.bound(), rel=1e-6)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda x: x, lambda v: isinstance(v, np.ndarray)),
        (torch.from_numpy, lambda v: isinstance(v, torch.Tensor)),
        (lambda x: torch.nn.Parameter(torch.from_numpy(x)), lambda v: not v.requires_grad),
        (lambda x: [x, x], lambda v: isinstance(v, list) and len(v) == 2),
        (lambda x: (x,), lambda v: isinstance(v, tuple)),
        (lambda x: Layer(x, x[0]), lambda v: isinstance(v, Layer) and v.bias.shape == ()),
        (lambda x: {"a": {"b": [x, (x,)]}}, lambda v: isinstance(v["a"]["b"][1], tuple)),
        (lambda x: OrderedDict(z=x, a=x), lambda v: list(v) == ["z", "a"]),
        (lambda x: {2: x, 10: x, "k": x}, lambda v: list(v) == [2, 10, "k"]),
        (lambda x: float(x[0]), lambda v: v.shape == ()),
        (lambda x: {"w": x, "none": x[:0]}, lambda v: v["none"].shape == (0,)),
    ],
)
def test_the_result_has_the_form_of_an_update(build: Any, shape: Any) -> None:
    assert shape(aggregate([build(vector(i)) for i in range(5)], "median").value)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint16, np.uint64, np.bool_])
def test_counters_take_their_lower_median(kind: Any) -> None:
    counts = [np.array([c], kind) for c in (0, 0, 1, 1)]
    value = aggregate([{"w": vector(i), "c": c} for i, c in enumerate(counts)], "mean").value["c"]
    assert (value.dtype, value[0]) == (np.dtype(kind), 0)


@pytest.mark.parametrize(
    "updates",
    [
        [],
        np.zeros((0, 3)),
        np.zeros(3),
        np.zeros((3, 2), int),
        [1, 2, 3],
        ["a", "b"],
        np.array([["a"]]),
        [{}, {}],
        {"client": vector()},
        {"client": {"w": vector()}},
        5,
        None,
    ],
)
def test_what_is_no_round_is_an_error(updates: Any) -> None:
    with pytest.raises(InputError) as error:
        aggregate(updates, "mean")
    assert "\n" not in str(error.value)


def test_updates_may_come_from_a_generator() -> None:
    expected = aggregate([vector(i) for i in range(4)], "mean").value
    np.testing.assert_array_equal(aggregate((vector(i) for i in range(4)), "mean").value, expected)


class Unreadable:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


def test_an_update_that_cannot_be_read_is_refused_and_named() -> None:
    updates = [{"w": vector(i)} for i in range(4)] + [{"w": Unreadable()}]
    assert aggregate(updates, "median").refused == {4: "cannot be read: RuntimeError: no"}
