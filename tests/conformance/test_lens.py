"""What looks at the last coordinates only sees those, and mixes whole rows, wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrobust import InputError, LocalRows, RunningAggregate, Verdict, aggregate, aggregate_rows
from fedrobust.attacks import View, parse_attack
from fedrobust.attacks.rehearsal import Rehearsal
from fedrobust.kernels import Block, Matrix
from fedrobust.rules import parse_rule

RULES = ["filter", "krum", "nnm | filter", "signguard", "dnc", "geometric_median", "clip(1.0) | mean"]


def normal(n: int = 12, d: int = 40, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(0.5, 1, (n, d))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "d", "count"), [(12, 40, 7), (12, 40, 40), (40, 12, 5)])
def test_the_weights_are_those_of_the_last_coordinates(rule: str, n: int, d: int, count: int) -> None:
    X = normal(n, d)
    X[0, -count:] += 5.0
    seen, alone = aggregate(X, f"last({count}) | {rule}"), aggregate(X[:, -count:], rule)
    assert seen.weights is not None
    assert alone.weights is not None
    np.testing.assert_allclose(seen.weights, alone.weights, atol=1e-8)
    np.testing.assert_allclose(seen.value, seen.weights @ X, atol=1e-8)
    if alone.scores is not None:
        np.testing.assert_allclose(seen.scores, alone.scores, rtol=1e-6, atol=1e-8)


@given(st.integers(1, 40), st.lists(st.integers(1, 39), max_size=4), st.booleans())
def test_it_does_not_matter_how_rows_are_cut(count: int, cuts: list[int], reference: bool) -> None:
    X, anchor = normal(), np.full(40, 0.3)
    pieces = np.split(np.vstack([X, anchor]), sorted(set(cuts)), axis=1)
    blocks = [Block(torch.from_numpy(p[:-1]), torch.from_numpy(p[-1])) for p in pieces]
    blocks = blocks if reference else [replace(block, reference=None) for block in blocks]
    norms = np.linalg.norm(X - anchor * reference, axis=1)
    found = aggregate_rows(LocalRows(tuple(blocks)), f"last({count}) | krum", np.ones(12), norms)
    whole = aggregate(X, f"last({count}) | krum", reference=anchor if reference else None)
    np.testing.assert_allclose(torch.cat(found.value).numpy(), whole.value)


@pytest.mark.parametrize("rule", ["filter", "entropy_filter", "mean"])
def test_what_is_seen_through_a_lens_is_no_verdict_on_the_round(rule: str) -> None:
    X = np.random.default_rng(0).normal(size=(20, 500))
    X[:4, :400] += 5
    assert aggregate(X, f"last(50) | {rule}", eps=0.2).verdict is Verdict.EXCEEDED


def test_a_backdoor_in_the_last_layer_is_seen_there_and_drowns_in_the_whole() -> None:
    X = np.random.default_rng(0).normal(size=(40, 20_000))
    X[:4, -10:] += 3.0
    whole, seen = aggregate(X, "filter", eps=0.1), aggregate(X, "last(10) | filter", eps=0.1)
    assert whole.weights is not None
    assert seen.weights is not None
    assert whole.weights[:4].sum() > 0.09
    assert seen.weights[:4].sum() < 0.01
    assert seen.scores is not None
    assert set(np.argsort(seen.scores)[-4:]) == {0, 1, 2, 3}


def test_the_certificate_is_on_all_coordinates() -> None:
    X = normal(20, 30)
    X[:2, 0] += 100.0  # where nobody looks
    result = aggregate(X, "last(5) | filter", eps=0.1)
    honest = X[2:].mean(axis=0)
    moved = np.linalg.norm(np.asarray(result.value) - honest)
    assert moved > 5.0
    assert result.certificate is not None
    assert moved <= result.certificate.bound(1.5)


def test_trees_and_rows_that_arrive_piece_by_piece() -> None:
    X = normal()
    X[3, -4:] -= 9.0
    expected = aggregate(X, "last(6) | filter").weights
    trees = [{"a": row[:30].reshape(5, 6), "b": [row[30:37], row[37:]]} for row in X]
    np.testing.assert_allclose(aggregate(trees, "last(6) | filter").weights, expected)
    running = RunningAggregate(capacity=12, size=40)
    running.extend(X)
    np.testing.assert_allclose(running.result("last(6) | filter").weights, expected, atol=1e-6)


def test_behind_a_mixing_it_looks_at_the_mixed_rows() -> None:
    X = normal()
    found = aggregate(X, "nnm | last(6) | krum")
    near = np.argsort(((X[:, None] - X[None]) ** 2).sum(-1), axis=1, kind="stable")[:, :10]
    Y = X[near].mean(axis=1)
    np.testing.assert_allclose(found.value, Y[np.argmax(aggregate(Y[:, -6:], "krum").weights)])


@pytest.mark.parametrize(
    ("text", "why"),
    {
        "last | filter": "at least 1",
        "last(0) | filter": "at least 1",
        "last(5) | median": "last(count=5) changes nothing",
        "last(5)": "only looks; end it with a rule",
        "filter | last(5)": "cannot stand before",
        "last(41) | filter": "the last 41 coordinates, and there are 40",
    }.items(),
)
def test_what_cannot_be(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        aggregate(normal(), text)
    assert why in str(caught.value)


@pytest.mark.parametrize("attack", ["adaptive(budget=200)", "optimal_alie", "optimal_ipm"])
def test_white_box_attacks_look_through_it(attack: str) -> None:
    """The attacker's rehearsal and the server come to the same weights."""
    honest, own = torch.from_numpy(normal(10)).float(), torch.from_numpy(normal(2, seed=1)).float()
    rule = parse_rule("last(8) | filter")
    view = View.of(honest, own, rule=rule, eps=2 / 12)
    rows = parse_attack(attack)(view, np.random.default_rng(0))
    assert rows.shape == (2, 40)
    trial = Rehearsal.of(view, extra=tuple(own))
    sent = np.array([[*np.zeros(10), 1, 0], [*np.zeros(10), 0, 1]])
    expected = aggregate(torch.cat([own, honest]), rule, eps=2 / 12, seed=trial.seed).weights
    np.testing.assert_allclose(trial.weights(sent), expected, atol=1e-5)
