"""What arrives in pieces comes to the same as what is there at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedrobust as fr
from fedrobust import InputError, RunningAggregate
from fedrobust.kernels import Matrix


def rows(n: int, d: int, seed: int, sizes: list[float]) -> Matrix:
    X = np.random.default_rng(seed).normal(size=(n, d))
    X[: len(sizes)] *= np.array(sizes)[:, None]
    return X


def in_pieces(X: Matrix, seed: int, **options: Any) -> RunningAggregate:
    """All rows, cut at random places, the pieces of different rows mixed at random."""
    rng = np.random.default_rng(seed)
    running = RunningAggregate(len(X), X.shape[1], **options)
    ends = {}
    for _ in range(len(X)):
        cuts = rng.integers(1, X.shape[1], 3) if X.shape[1] > 1 else []
        ends[running.begin()] = sorted({*map(int, cuts), X.shape[1]})
    start = dict.fromkeys(ends, 0)
    while ends:
        row = int(rng.choice(list(ends)))
        end = ends[row].pop(0)
        running.write(row, start[row], X[row, start[row] : end])
        start[row] = end
        if not ends[row]:
            del ends[row]
    return running


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(3, 9),
    d=st.integers(1, 40),
    seed=st.integers(0, 1000),
    sizes=st.lists(st.sampled_from([0.0, 1e-30, 1e-12, 1e12, 1e30]), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rule=st.sampled_from(["filter", "nnm | geometric_median", "median", "multi_krum"]),
)
def test_pieces_come_to_the_same(
    n: int, d: int, seed: int, sizes: list[float], dtype: torch.dtype, rule: str
) -> None:
    X = torch.from_numpy(rows(n, d, seed, sizes)).to(dtype).numpy()
    at_once = fr.aggregate(X, rule, eps=0.1)
    running = in_pieces(X, seed, dtype=dtype)
    found = running.result(rule, eps=0.1)
    scale = 1e-4 * np.median(np.linalg.norm(X.astype(float), axis=1)) + 1e-30
    np.testing.assert_allclose(found.value.numpy(), at_once.value, atol=scale)
    if at_once.weights is not None:
        np.testing.assert_allclose(found.weights, at_once.weights, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_whole_rows_one_by_one_or_several_at_once(size: float) -> None:
    X = rows(30, 200_000, 0, [size, 1.0, 5.0]).astype(np.float32)
    one, several = RunningAggregate(30, 200_000), RunningAggregate(30, 200_000)
    for row in X:
        one.add(row)
    for part in np.split(X, [7, 8, 20]):
        several.extend(part)
    for running in (one, several):
        result = running.result("filter", eps=0.1)
        np.testing.assert_allclose(result.weights, fr.aggregate(X, "filter", eps=0.1).weights, atol=1e-6)
        assert result.certificate is not None


def test_shares_may_be_given_at_the_end() -> None:
    X, shares = rows(8, 50, 3, []), [1.0, 2, 1, 1, 3, 1, 1, 1]
    running = RunningAggregate(8, 50, dtype=torch.float64)
    running.extend(X)
    expected = fr.aggregate(X, "mean", shares)
    np.testing.assert_allclose(running.result("mean", shares=shares).value, expected.value)
    np.testing.assert_allclose(running.result("mean").value, X.mean(axis=0))
    for wrong in ([1.0], [-1.0] * 8, [np.nan] * 8):
        with pytest.raises(InputError, match="shares"):
            running.result("mean", shares=wrong)


def test_a_reference_and_shares_count_as_in_aggregate() -> None:
    X = rows(8, 50, 1, []) + 1000
    model, shares = np.full(50, 1000.0), [1.0, 2, 1, 1, 3, 1, 1, 1]
    running = RunningAggregate(8, 50, reference=model, dtype=torch.float64)
    running.extend(X[:5], shares[:5])
    for row, share in zip(X[5:], shares[5:], strict=True):
        running.add(row, share)
    expected = fr.aggregate(X, "geometric_median", shares, reference=model)
    found = running.result("geometric_median")
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-9)


def test_shares_of_any_size() -> None:
    running = RunningAggregate(3, 4)
    for row in np.eye(3, 4):
        running.add(row, share=1.7e308)
    np.testing.assert_allclose(running.result("mean").value, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("rule", ["fltrust", "monna", "last(20) | fltrust"])
def test_rules_may_look_at_a_row_of_the_servers_own(rule: str) -> None:
    X, model = rows(8, 50, 1, []) + 3, np.full(50, 2.0)
    running = RunningAggregate(8, 50, reference=model, dtype=torch.float64)
    running.extend(X)
    expected = fr.aggregate(X, rule, reference=model, anchors={"root": X.mean(0)})
    found = running.result(rule, anchors={"root": X.mean(0)})
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-9)
    with pytest.raises(InputError, match="the anchor 'root' has"):
        running.result(rule, anchors={"root": X[0, :9]})
    with pytest.raises(InputError, match="own row 'root' holds values that are not finite"):
        running.result(rule, anchors={"root": X[0] * np.inf})


def test_what_is_not_whole_or_not_finite_is_refused_and_more_may_follow() -> None:
    X = rows(6, 40, 2, [])
    running = RunningAggregate(8, 40, dtype=torch.float64)
    running.extend(X[:5])
    bad = running.add(np.full(40, np.nan))
    late = running.begin()
    running.write(late, 0, X[5, :10])
    first = running.result("median")
    assert first.refused == {bad: "holds values that are not finite", late: "has 10 of 40 coordinates"}
    np.testing.assert_allclose(first.value, np.median(X[:5], axis=0))
    running.write(late, 10, X[5, 10:])
    np.testing.assert_allclose(running.result("mean").value, X.mean(axis=0))
    running.write(bad, 0, X[0])
    assert not running.result("mean").refused


def test_a_row_that_starts_anew_leaves_nothing_behind() -> None:
    X = rows(5, 30, 3, [])
    running = RunningAggregate(5, 30, dtype=torch.float64)
    running.extend(X[:4])
    row = running.begin()
    running.write(row, 0, 1e9 * X[4, :20])
    running.write(row, 0, X[4])
    expected = fr.aggregate(X, "krum", eps=0.1)
    assert expected.scores is not None
    np.testing.assert_allclose(running.result("krum", eps=0.1).scores, expected.scores)


def test_a_row_that_starts_anew_leaves_no_counters_behind() -> None:
    """A vector has none, so those of `like` count, as if the row had come in pieces from the start."""
    like = {"w": np.zeros(3), "steps": np.array(7)}
    running = RunningAggregate(1, like=like)
    row = running.add({"w": np.ones(3), "steps": np.array(10**6)})
    running.write(row, 0, np.full(3, 2.0))
    found = running.result("mean").value
    assert (found["w"].tolist(), int(found["steps"])) == ([2.0] * 3, 7)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.write(7, 0, np.ones(3)), "there is no row 7"),
        (lambda r: r.write(1, 0, np.ones(11)), "cannot take 11 from 0"),
        (lambda r: r.write(1, 4, np.ones(3)), "has 3 of 10 coordinates, and cannot take 3 from 4"),
        (lambda r: r.write(1, 0, np.ones(0)), "cannot take 0"),
        (lambda r: r.write(1, 3, np.ones((1, 3))), "need floating-point values"),
        (lambda r: r.write(1, 3, np.ones(3, int)), "need floating-point values"),
        (lambda r: r.add(np.ones(9)), r"of shape \(10,\)"),
        (lambda r: r.write(1, 3, "abc"), "the piece holds str"),
        (lambda r: r.begin(-1.0), "not negative"),
        (lambda r: r.begin("much"), "a share must be a number, got 'much'"),
        (lambda r: r.result("mean", shares=["much", 1]), "shares must be numbers"),
        (lambda r: r.result("mean", shares=[1]), "expected 2 shares"),
        (lambda r: r.result("fltrust", anchors=[1]), "anchors must be a dict"),
        (lambda r: r.extend(np.ones((9, 10))), "9 rows more than 2 of 4"),
        (lambda r: r.extend(np.ones((2, 9))), r"of shape \(10,\)"),
        (lambda r: [r.begin() for _ in range(9)], "all is taken"),
        (lambda _: RunningAggregate(0, 3), "at least 1"),
        (lambda _: RunningAggregate(3, 3, dtype=torch.int32), "float32 or float64"),
        (lambda _: RunningAggregate(3, 3, reference=np.ones(4)), r"of shape \(3,\)"),
        (lambda _: RunningAggregate(3, 3).result("mean"), "none of the 0 rows"),
        (lambda _: RunningAggregate(3), "give size"),
        (lambda _: RunningAggregate(3, 3, like=np.ones(3)), "not both"),
        (lambda _: RunningAggregate(3, like={"w": "text"}), "the like holds str"),
        (lambda _: RunningAggregate(3, like={"w": 1}), "no floating-point values"),
        (lambda _: RunningAggregate(3, like=[np.ones(3)], reference=[np.ones(4)]), "the reference has"),
        (lambda _: RunningAggregate(3, reference=np.full(3, np.nan)), "the reference holds"),
        (lambda r: r.extend(np.ones((2, 10)), [1.0]), "a share for each of 2"),
        (lambda _: RunningAggregate(2.5, 3), r"capacity must be a whole number, got 2\.5"),  # type: ignore[arg-type]
        (lambda _: RunningAggregate(None, 3), "capacity must be a whole number, got None"),  # type: ignore[arg-type]
        (lambda _: RunningAggregate(3, "a"), "size must be a whole number, got 'a'"),  # type: ignore[arg-type]
        (lambda r: r.extend(np.ones((2, 10)), ["a", "b"]), "a share must be a number, got 'a'"),
        (lambda r: r.begin(np.complex128(1j)), "a share must be a number, got"),
        (lambda r: r.extend(np.ones((2, 10)), 5), "shares must be an array or a sequence, got 5"),
        (lambda r: r.extend(np.ones((2, 10)), [1, -1]), "not negative, got -1"),
        (lambda r: r.extend(5), "updates must be an array or a sequence, got 5"),
        (lambda r: r.extend(np.array(5.0)), "updates must be an array or a sequence, got array"),
        (lambda r: r.extend({"a": np.ones(10)}), "updates must be an array or a sequence, got {'a'"),
        (lambda r: r.add(np.ones(10), client=np.array([1, 2])), r"hashable, got array\(\[1, 2\]\)"),
        (lambda r: r.add(np.ones(10), client=([1], 2)), r"hashable, got \(\[1\], 2\)"),
        (lambda r: r.write("a", 0, np.ones(3)), "row must be a whole number, got 'a'"),
        (lambda r: r.write(1.0, 3, np.ones(7)), r"row must be a whole number, got 1\.0"),
        (lambda r: r.write(1, 3.0, np.ones(7)), r"start must be a whole number, got 3\.0"),
        (lambda r: r.write(1, "3", np.ones(7)), "start must be a whole number, got '3'"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(act: Any, message: str) -> None:
    running = RunningAggregate(4, 10, dtype=torch.float64)
    running.add(np.arange(10.0))
    running.write(running.begin(), 0, np.ones(3))
    with pytest.raises(InputError, match=message):
        act(running)
    running.write(1, 3, np.ones(7)[::-1].astype(">f4"))
    np.testing.assert_allclose(running.result("mean").value, (np.arange(10.0) + 1) / 2)


def network(seed: int, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A trained network with batch norm: its counters and running statistics are part of its state."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    for _ in range(1 + seed % 3):
        module(torch.randn(8, 6))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["nnm | filter", "median", "last(10) | krum"])
def test_state_dicts_come_to_what_they_do_at_once(dtype: torch.dtype, rule: str) -> None:
    start = network(100, dtype)
    states = [network(seed, dtype).state_dict() for seed in range(9)]
    expected = fr.aggregate(states, rule, reference=start.state_dict())
    running = RunningAggregate(9, reference=start.state_dict())
    for seed, state in enumerate(states):
        assert running.add(state, client=f"client {seed}") == seed
    found = running.result(rule)
    assert found.value.keys() == expected.value.keys()
    for key, leaf in expected.value.items():
        assert found.value[key].dtype == leaf.dtype == start.state_dict()[key].dtype
        torch.testing.assert_close(found.value[key], leaf)
    start.load_state_dict(found.value)
    assert running.clients == tuple(f"client {seed}" for seed in range(9))


def test_updates_may_come_from_a_generator_and_numbers_from_numpy() -> None:
    running = RunningAggregate(np.int64(4), np.int32(2))  # type: ignore[arg-type]
    assert running.extend((np.full(2, i, float) for i in range(3)), (1.0 for _ in range(3))) == [0, 1, 2]
    running.write(np.int64(running.begin()), np.int64(0), np.full(2, 3.0))  # type: ignore[arg-type]
    np.testing.assert_allclose(running.result("mean").value, 1.5)


def test_what_is_taken_is_a_copy() -> None:
    modules = [network(seed) for seed in range(5)]
    running = RunningAggregate(5, like=modules[0].state_dict())
    for module in modules:
        running.add(module.state_dict())
    before = running.result("median").value
    for module in modules:
        module(torch.randn(8, 6))  # trains on: its counters go up in place
    after = running.result("median").value
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("0.bias"), "lacks '0.bias'"),
        (lambda s: s.update(more=torch.ones(1)), "holds 'more', which"),
        (lambda s: s.update({"0.bias": torch.ones(5)}), r"shape \(5,\) at '0.bias'"),
        (lambda s: s.update({"1.num_batches_tracked": torch.tensor(0.5)}), "at '1.num_batches_tracked'"),
        (lambda s: s.update({"0.bias": "0123"}), "holds str"),
    ],
)
def test_a_state_dict_of_another_form_is_an_error_and_takes_no_room(spoil: Any, message: str) -> None:
    running = RunningAggregate(2, like=network(0).state_dict())
    bad = dict(network(1).state_dict())
    spoil(bad)
    for attempt in (lambda: running.add(bad, client="bad"), lambda: running.extend([bad])):
        with pytest.raises(InputError, match=f"the update .*{message}"):
            attempt()
    running.extend([network(2).state_dict(), network(3).state_dict()])
    assert not running.result("mean").refused


def test_a_client_is_taken_once_and_one_that_is_not_finite_is_refused() -> None:
    running = RunningAggregate(5, like=network(0).state_dict())
    for seed in range(4):
        running.add(network(seed).state_dict(), client=seed)
    with pytest.raises(InputError, match="client 3 has sent an update already, which is row 3"):
        running.add(network(9).state_dict(), client=3)
    bad = dict(network(5).state_dict())
    bad["1.running_var"] = torch.full((4,), torch.inf)
    row = running.add(bad, client="bad")
    result = running.result("median")
    assert result.refused == {row: "holds values that are not finite"}
    expected = fr.aggregate([network(seed).state_dict() for seed in range(4)], "median").value
    assert all(torch.equal(result.value[key], expected[key]) for key in expected)


def test_a_tree_may_come_in_pieces() -> None:
    states = [network(seed).state_dict() for seed in range(5)]
    running = RunningAggregate(5, like=states[0])
    running.extend(states[:4])
    row, start = running.begin(client="slow"), 0
    for leaf in states[4].values():
        if leaf.is_floating_point():
            running.write(row, start, leaf.flatten())
            start += leaf.numel()
    found, expected = (r.value for r in (running.result("mean"), fr.aggregate(states, "mean")))
    torch.testing.assert_close(found["2.weight"], expected["2.weight"])
