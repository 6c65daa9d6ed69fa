"""What every rule of the catalogue, and a handful of compositions, must do whatever its idea is."""

from __future__ import annotations

import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedrobust import (
    CATALOG,
    Aggregated,
    InputError,
    LocalRows,
    Rows,
    aggregate_rows,
    kernels,
)
from fedrobust import aggregate as aggregate_updates
from fedrobust import parse_rule as parse
from fedrobust.kernels import Block, Matrix
from fedrobust.rules import Mixing

COMPOSED = [
    "nnm | filter",
    "nnm | median",
    "bucketing(2) | trimmed_mean",
    "clip | geometric_median",
    "clip | nnm | krum",
    "arc | trimmed_mean",
    "nnm | centered_clipping(steps=3)",
    "clip | bulyan",
    "clip | foolsgold",
    "nnm | signguard",
]
RULES = [*(name for name, cls in CATALOG.items() if not issubclass(cls, Mixing)), *COMPOSED]
REPEATABLE = [rule for rule in RULES if "bucketing" not in rule]
KRUM = [rule for rule in RULES if "krum" in rule]

# What some rules do not do by their nature, and why.
UNPROTECTED = {"mean", "clustering", "foolsgold"}
"""One long row is enough: clustering and foolsgold look at directions only, the latter behind a clipping
too."""
VOTES = {"sign_majority"}
"""The value is a direction of fixed length, and a client that gives a coordinate no sign abstains."""
LENGTHENS = {"fltrust"}
"""Rows are brought to the length of the server's, so the value may lie beyond them all."""
ORIGIN = {
    *("arc", "centered_clipping", "clip", "clipped_clustering", "clustering", "flame", "fltrust"),
    *("foolsgold", "signguard", *VOTES),
}
"""Rows are measured from the reference: the value moves with the rows only if that moves along."""
FEASIBLE: dict[str, Callable[[int, int], bool]] = {
    "bulyan": lambda n, f: n >= 4 * f + 3,  # the paper's condition
    "smea": lambda n, f: math.comb(n, f) <= 200_000_000,  # its budget
}
"""Where a rule refuses n clients of which f are malicious, beside krum."""

MANY_WAYS = ["huge, both signs", "huge, random", "sixteen magnitudes"]
"""Malicious rows in many directions: dnc looks along one, once, and from a mean that they shift."""

ROBUST = [rule for rule in RULES if rule not in UNPROTECTED]
CONTINUOUS = [rule for rule in RULES if rule not in VOTES]
WEIGHTED = [
    *("mean", "geometric_median", "auto_gm", "median", "trimmed_mean", "medoid", "caf"),
    *("fltrust", "sign_majority", "clip | mean", "arc | mean"),
]
"""Rules with a weighted form that is exact: a share of two is two clients."""

UNEVEN = np.linspace(1.0, 1.5, 11)
"""Shares of eleven clients, even enough for every rule."""

MakeRows = Callable[..., Rows]


def aggregate(updates: Any, rule: Any, shares: Any = None, **options: Any) -> Aggregated:
    """With a row of the server's own, which most rules ignore, in the honest rows' midst."""
    options.setdefault("anchors", {"root": middle(list(updates))})
    return aggregate_updates(updates, rule, shares, **options)


def middle(trees: list[Any]) -> Any:
    """The median of every coordinate over the trees that are finite."""
    if isinstance(trees[0], dict):
        return {key: middle([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list | tuple):
        return type(trees[0])([middle(list(leaves)) for leaves in zip(*trees, strict=True)])
    plain = [leaf.double().numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in trees]
    stacked = np.stack(plain).astype(float)
    finite = np.isfinite(stacked.reshape(len(stacked), -1)).all(axis=1)
    return np.median(stacked[finite], axis=0) if finite.any() else np.zeros(stacked.shape[1:])


def feasible(rule: str, n: int, f: int) -> None:
    refused = [name for name, holds in FEASIBLE.items() if name in rule and not holds(n, f)]
    if refused:
        pytest.skip(f"{refused[0]} refuses {n} clients with f = {f}")


def from_origin(rule: str) -> bool:
    return any(part.split("(")[0] in ORIGIN for part in rule.split(" | "))


def sent(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 (our own bytes)


class PickledRows(LocalRows):
    """Rows that are sent everything, and answer, as bytes: what any remote implementation does."""

    def sum(self, part: Callable[[Block], Matrix]) -> Any:
        return sent(super().sum(sent(part)))

    def map(self, part: Callable[[Block], torch.Tensor]) -> Any:
        return sent(super().map(sent(part)))


@pytest.fixture(params=[LocalRows, PickledRows], ids=["local", "pickled"])
def make_rows(request: pytest.FixtureRequest) -> MakeRows:
    """make_rows(X, blocks, reference=None, anchor=None): X cut into so many blocks of coordinates."""

    def make(
        X: Matrix, blocks: int, reference: Matrix | None = None, anchor: Matrix | None = None
    ) -> Any:
        whole = [None if part is None else torch.from_numpy(part) for part in (X, reference, anchor)]
        cuts = [
            [None] * blocks if part is None else list(torch.tensor_split(part, blocks, dim=-1))
            for part in whole
        ]
        return request.param(
            tuple(Block(x, r, () if a is None else (a,)) for x, r, a in zip(*cuts, strict=True))
        )

    return make


def normal(n: int = 11, d: int = 30, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(1, 2, (n, d))


def same(a: Aggregated, b: Aggregated, tolerance: float = 1e-9) -> None:
    close(a.value, b.value, tolerance)
    assert (a.weights is None) == (b.weights is None)
    if a.weights is not None and b.weights is not None:
        np.testing.assert_allclose(a.weights, b.weights, atol=max(tolerance, 1e-6))
    assert a.verdict == b.verdict


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (np.abs(b).max() + 1e-300))


# Equivariance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", REPEATABLE)
def test_the_order_of_the_clients_does_not_matter(rule: str) -> None:
    X, order = normal(), np.random.default_rng(1).permutation(11)
    straight, shuffled = aggregate(X, rule), aggregate(X[order], rule)
    close(shuffled.value, straight.value)
    for field in ("weights", "scores"):
        if getattr(straight, field) is not None:
            np.testing.assert_allclose(
                getattr(shuffled, field), getattr(straight, field)[order], rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_moving_every_row_moves_the_value(rule: str, size: float) -> None:
    X, shift = normal(), size * normal(1, seed=2)[0]
    start = np.zeros(30) if from_origin(rule) else None
    here = aggregate(X, rule, reference=start)
    there = aggregate(X + shift, rule, reference=None if start is None else shift)
    np.testing.assert_allclose(there.value - shift, here.value, atol=1e-5)


@pytest.mark.parametrize("rule", CONTINUOUS)
@pytest.mark.parametrize("factor", [-1.0, 1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaling_every_row_scales_the_value(rule: str, factor: float, dtype: Any) -> None:
    X = normal().astype(dtype)
    ordinary, scaled = aggregate(X, rule), aggregate(X * dtype(factor), rule)
    close(scaled.value / dtype(factor), ordinary.value, 1e-5)


@pytest.mark.parametrize("rule", CONTINUOUS)
@pytest.mark.parametrize("number", [0.0, 0.1, 1.0, -1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identical_rows_give_that_row(rule: str, number: float, dtype: Any) -> None:
    close(aggregate(np.full((11, 5), number, dtype), rule).value, np.full(5, number, dtype), 1e-6)


@pytest.mark.parametrize("rule", [rule for rule in ROBUST if rule not in VOTES])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_majority_of_identical_rows_is_not_left(rule: str, scale: float) -> None:
    X = np.zeros((11, 5))
    X[[3, 8]] = scale * normal(2, 5)
    assert np.abs(aggregate(X, rule).value).max() <= 1e-3 * scale


# Attacks --------------------------------------------------------------------------------------------


def malicious(kind: str, f: int, d: int) -> Matrix:
    rng = np.random.default_rng(5)
    signs = rng.choice([-1.0, 1.0], (f, d))
    rows: dict[str, Matrix] = {
        "huge": np.full((f, d), 1e30),
        "huge, both signs": signs * 1e30,
        "huge, in pairs": np.full((f, d), 1e30) * (-1.0) ** np.arange(f)[:, None],
        "huge, random": 1e30 * rng.normal(size=(f, d)),
        "one coordinate": np.eye(1, d) * np.full((f, 1), 3e38),
        "sixteen magnitudes": signs * 10.0 ** np.linspace(1, 36, 16)[np.arange(f) % 16, None],
        "alike, large": np.full((f, d), 1e10),
        "alike, moderate": np.full((f, d), 1e4),
        "tiny": np.full((f, d), 1e-42),
    }
    return rows[kind]


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize(
    "kind",
    [
        "huge",
        "huge, both signs",
        "huge, in pairs",
        "huge, random",
        "one coordinate",
        "sixteen magnitudes",
        "alike, large",
        "alike, moderate",
        "tiny",
    ],
)
@pytest.mark.parametrize(
    ("n", "eps", "dtype"), [(7, 0.2, np.float32), (40, 0.2, np.float64), (46, 0.35, np.float32)]
)
def test_the_value_stays_near_the_honest(rule: str, kind: str, n: int, eps: float, dtype: Any) -> None:
    if "bucketing" in rule and eps > 0.25:
        pytest.skip("buckets of two double the malicious fraction")
    if rule == "dnc" and kind in MANY_WAYS:
        pytest.skip("one direction is not enough")
    f = int(eps * n)
    feasible(rule, n, f)
    honest = normal(n - f, 20)
    X = np.concatenate([malicious(kind, f, 20), honest]).astype(dtype)
    result = aggregate(X, rule, eps=eps)
    diameter = max(np.linalg.norm(honest - row, axis=1).max() for row in honest)
    assert np.linalg.norm(result.value.astype(float) - honest.mean(0)) < 2 * diameter
    if result.certificate is not None:
        assert result.certificate.bound() >= 0.0  # not NaN either


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("length", [1e100, 1e150, 1e153, 1.2e154, 1e155, 1e300])
def test_a_finite_row_whose_square_overflows_does_no_harm(rule: str, length: float) -> None:
    directions = np.linalg.qr(normal(50, 2, seed=1))[0].T
    X = np.concatenate([length * directions, normal(18, 50)])
    result = aggregate(X, rule)  # a refusal will do
    assert np.linalg.norm(result.value - normal(18, 50).mean(0)) < 30


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shares", [np.ones(11), UNEVEN], ids=["even", "uneven"])
def test_an_eps_next_to_a_half_gives_an_answer_or_says_why_not(rule: str, shares: Matrix) -> None:
    for eps in (0.49, 0.4999, 0.49999999999):
        try:
            result = aggregate(normal(), rule, shares, eps=eps)
        except InputError:
            continue
        assert np.isfinite(result.value).all()


@pytest.mark.parametrize("rule", RULES)
def test_an_update_that_is_not_finite_is_refused_and_named(rule: str) -> None:
    X = normal(16)
    X[2, 7], X[5, 0], X[11] = np.nan, -np.inf, np.inf
    good = np.setdiff1d(np.arange(16), [2, 5, 11])
    root = {"root": middle(list(X))}
    result, alone = aggregate(X, rule, anchors=root), aggregate(X[good], rule, anchors=root)
    assert sorted(result.refused) == [2, 5, 11]
    assert all("not finite" in reason for reason in result.refused.values())
    # A product of more rows may be rounded otherwise: 1e-12 is far below what a row could do.
    np.testing.assert_allclose(result.value, alone.value, rtol=1e-12, atol=1e-12)
    assert (result.certificate is None) == (alone.certificate is None)
    if result.certificate is not None and alone.certificate is not None:
        assert result.certificate.bound() == pytest.approx(alone.certificate.bound(), rel=1e-9)
    if result.weights is not None and alone.weights is not None:
        assert not result.weights[[2, 5, 11]].any()
        np.testing.assert_allclose(result.weights[good], alone.weights, rtol=1e-12, atol=1e-12)
    if result.scores is not None:
        assert np.isinf(result.scores[[2, 5, 11]]).all()


def test_no_finite_update_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="none of the 3 updates is usable"):
        aggregate(np.full((3, 4), np.nan), "mean")


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_one_huge_row_beside_rows_of_zeros(rule: str, eps: float) -> None:
    X = np.zeros((11, 5))
    X[4] = 1e30
    value = aggregate(X, rule, eps=eps).value
    assert np.isfinite(value).all()
    assert eps == 0 or np.abs(value).max() <= 1.0  # a vote among those who vote, for sign_majority


@pytest.mark.parametrize("rule", ["fltrust", "monna", "nnm | fltrust"])
def test_a_rule_says_that_it_needs_the_servers_row(rule: str) -> None:
    with pytest.raises(InputError, match=r"anchors=\{'root': \.\.\.\}"):
        aggregate_updates(normal(), rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"anchors": [np.zeros(30)]}, "anchors must be a dict of rows by name, got list"),
        ({"eps": True}, "eps must be in"),
        ({"eps": "0.1"}, "eps must be in .* or 'auto'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate_updates(normal(), "bucketing | mean", **options)


def test_eps_may_be_a_number_of_numpys() -> None:
    found = aggregate_updates(normal(), "filter", eps=np.float32(0.25)).certificate
    assert found is not None
    assert found.eps == 0.25


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (np.zeros(29), "expected floating-point values of shape"),
        (np.full(30, np.inf), "the anchor 'root' holds values that are not finite"),
        ({"w": np.zeros(30)}, "the anchor 'root' lacks|holds"),
        (np.full(30, 1e80), "the anchor 'root' has norm"),
    ],
)
def test_a_bad_anchor_is_named(root: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate(normal(), "fltrust", anchors={"root": root})


@pytest.mark.parametrize("rule", RULES)
def test_an_anchor_that_is_not_asked_for_changes_nothing(rule: str) -> None:
    if "fltrust" in rule or "monna" in rule:
        pytest.skip("asks for it")
    huge = {"other": np.full(30, 1e30), "root": np.zeros(30)}
    same(aggregate(normal(), rule, anchors=huge), aggregate(normal(), rule, anchors={}))


@pytest.mark.parametrize(
    ("rule", "n", "message"),
    [
        ("bulyan", 10, r"needs at least 4 f \+ 3 = 11 clients for f = 2"),
        ("smea", 60, r"60 clients with f = 12 may take 1.4e\+12 sets of rows, some 39 hours"),
        ("mda", 200, r"200 clients with f = 40 may take 1.1e\+10 nodes of search, some 25 days"),
        ("monna(20)", 10, "there are only 10 clients"),
    ],
)
def test_what_is_too_few_or_too_many_is_refused_by_number(rule: str, n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate(normal(n), rule, eps=0.2)


@pytest.mark.parametrize("rule", KRUM)
def test_krum_needs_2f_plus_3_clients(rule: str) -> None:
    with pytest.raises(InputError, match=r"needs at least 2 f \+ 3 = 11 clients"):
        aggregate(normal(10), rule, eps=0.4)
    aggregate(normal(11), rule, eps=0.4)


# The form of a rule, and of its answer ---------------------------------------------------------------


ARGUMENTS = [
    "multi_krum(m=3)",
    "nnm(eps=0.1) | filter(sigma=2.5)",
    "clip(radius=1.5) | krum",
    "centered_clipping(radius=2.0, steps=5)",
    "entropy_filter(alpha=8.0, sigma=1.0)",
    "monna(index=4)",
    "mda(budget=1000)",
    "dnc(c=1.5)",
    "auto_gm(regulariser=2.0)",
    "clustering(linkage='single')",
    "arc | sign_majority(scale=0.01)",
]


@pytest.mark.parametrize("text", [*RULES, *ARGUMENTS])
def test_a_rule_survives_its_text_and_pickle(text: str) -> None:
    rule = parse(text)
    assert repr(parse(repr(rule))) == repr(rule)
    assert parse(repr(rule)) == rule == sent(rule)
    assert hash(parse(text)) == hash(rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_round_repeats_exactly(rule: str) -> None:
    first, second = aggregate(normal(), rule, seed=3), aggregate(normal(), rule, seed=3)
    np.testing.assert_array_equal(first.value, second.value)
    assert first.certificate == second.certificate


def test_bucketing_draws_by_the_seed() -> None:
    values = [aggregate(normal(), "bucketing | median", seed=s).value[0] for s in range(5)]
    assert len(set(values)) > 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("measured", [False, True])
def test_the_number_of_blocks_does_not_matter(
    make_rows: MakeRows, rule: str, blocks: int, measured: bool
) -> None:
    X, reference = normal(11, 37), normal(1, 37, seed=9)[0] if measured else None
    rows = make_rows(X, blocks, reference, middle(list(X)))
    norms = np.sqrt(rows.sum(kernels.squared_norms))
    result = aggregate_rows(rows, rule, np.ones(11), norms, anchors=("root",))
    expected = aggregate(X, rule, reference=reference)
    close(torch.cat(list(result.value)).numpy(), expected.value, 1e-6)
    if expected.weights is not None and result.weights is not None:
        np.testing.assert_allclose(result.weights, expected.weights, atol=1e-6)
        assert result.certificate is not None
        assert expected.certificate is not None
        # Rows elsewhere are taken for float32, whose rounding the bound allows for.
        assert result.certificate.bound() == pytest.approx(expected.certificate.bound(), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_without_a_certificate_the_answer_is_the_same(rule: str) -> None:
    X, reference = normal(50, 300), normal(1, 300, seed=9)[0]
    full = aggregate(X, rule, eps=0.06, reference=reference)
    bare = aggregate(X, rule, eps=0.06, reference=reference, certified=False)
    assert bare.certificate is None
    close(bare.value, full.value, 1e-6)
    if full.weights is not None and bare.weights is not None:
        np.testing.assert_allclose(bare.weights, full.weights, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    ["mean", "clip | mean", "arc | mean", "clip | trimmed_mean", "centered_clipping", "fltrust"],
)
def test_without_a_certificate_rules_that_need_lengths_make_no_matrix(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = normal(50, 300)
    expected = aggregate(X, rule).value
    only_of_one = kernels.gram

    def of_one(block: Block, **options: bool) -> Matrix:
        return only_of_one(block, **options) if block.n == 1 else pytest.fail("a matrix was made")

    monkeypatch.setattr(kernels, "gram", of_one)
    close(aggregate(X, rule, certified=False).value, expected, 1e-6)
    close(aggregate(X, rule, certified=False, bfloat16=True).value, expected, 1e-6)


@pytest.mark.parametrize("rule", ["nnm | geometric_median(steps=3)", "nnm | centered_clipping(steps=3)"])
def test_who_has_the_matrix_passes_over_the_rows_no_more(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = normal(50, 300)
    expected = aggregate(X, rule).value
    monkeypatch.setattr(kernels, "products", lambda *_, **__: pytest.fail("another pass"))
    close(aggregate(X, rule, certified=False).value, expected, 1e-6)


@pytest.mark.parametrize("n", [20, 21, 30])
@pytest.mark.parametrize(
    "rule",
    ["clip | mean", "arc | mean", "centered_clipping", "fltrust", "clip | filter", "last(70) | mean"],
)
def test_rules_that_compare_no_pairs_need_no_matrix_of_many_rows(
    rule: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = np.concatenate([normal(n - 1, 100), np.full((1, 100), 20.0)])
    expected = aggregate(X, rule)
    for module in ("gram", "aggregate"):
        monkeypatch.setattr(sys.modules[f"fedrobust.{module}"], "LARGEST_MATRIX", 20)
    result = aggregate(X, rule)
    close(result.value, expected.value, 1e-6)
    assert result.certificate is not None
    assert expected.certificate is not None
    assert result.certificate.bound() == pytest.approx(expected.certificate.bound(), rel=0.02)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 2e-3),
        (torch.bfloat16, 1e-2),
    ],
)
def test_every_floating_dtype_comes_back_as_itself(
    rule: str, dtype: torch.dtype, precision: float
) -> None:
    X = torch.from_numpy(normal()).to(dtype)
    value = aggregate(X, rule).value
    assert (value.dtype, value.shape) == (dtype, (30,))
    close(value.double().numpy(), aggregate(X.double().numpy(), rule).value, precision)


@pytest.mark.parametrize("rule", RULES)
def test_leaves_together_are_one_vector(rule: str) -> None:
    X = normal(11, 9)
    trees = [{"w": x[:6].reshape(2, 3), "scale": (x[6], [x[7:]])} for x in X]
    value, flat = aggregate(trees, rule).value, aggregate(X, rule).value
    close(np.concatenate([value["w"].ravel(), [value["scale"][0]], value["scale"][1][0]]), flat)


def layouts(X: Matrix) -> Iterator[tuple[str, Matrix]]:
    wide = np.repeat(X, 2, axis=1)
    yield "every second column", wide[:, ::2]
    yield "backwards", X[::-1, ::-1].copy()[::-1, ::-1]
    yield "by columns", np.asfortranarray(X)
    yield "big-endian", X.astype(">f8")
    frozen = X.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", [name for name, _ in layouts(normal())])
def test_the_layout_in_memory_does_not_matter(rule: str, layout: str) -> None:
    X = dict(layouts(normal()))[layout]
    close(aggregate(X, rule).value, aggregate(normal(), rule).value)
    close(aggregate(list(X), rule).value, aggregate(normal(), rule).value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_callers_arrays_are_left_alone(rule: str, dtype: Any) -> None:
    X, reference, shares = normal().astype(dtype), normal(1).astype(dtype)[0], UNEVEN.copy()
    X[0] = 6e4
    copies = X.copy(), reference.copy(), shares.copy()
    result = aggregate(X, rule, shares, reference=reference)
    aggregate(list(X), rule, shares, reference=reference)
    for given, copy in zip((X, reference, shares), copies, strict=True):
        np.testing.assert_array_equal(given, copy)
    assert not np.shares_memory(result.value, X)


# Small rounds and shares ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (1, 7), (2, 1), (2, 7), (11, 1)])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_small_rounds(rule: str, n: int, d: int, eps: float) -> None:
    X = normal(n, d)
    if rule in KRUM and n < 3:
        with pytest.raises(InputError, match="needs at least"):
            aggregate(X, rule, eps=eps)
        return
    value = aggregate(X, rule, eps=eps, reference=np.zeros(d)).value
    if rule in VOTES | LENGTHENS:
        assert np.isfinite(value).all()
        return
    assert (value >= np.minimum(X.min(0), 0) - 1e-9).all()
    assert (value <= np.maximum(X.max(0), 0) + 1e-9).all()


@pytest.mark.parametrize("rule", ["mean", "filter", "clip | mean", "nnm | median", "nnm | filter"])
@pytest.mark.parametrize("n", [10, 11, 23])
def test_the_largest_numbers_have_a_mean(rule: str, n: int) -> None:
    """Equal weights rounded to float32 sum to more than 1, for some n."""
    largest = np.finfo(np.float32).max
    value = aggregate_updates(np.full((n, 30), largest, np.float32), rule, eps=0.1).value
    np.testing.assert_array_equal(value, np.float32(largest))


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_a_distribution_and_give_the_value(rule: str) -> None:
    X, reference = normal(), normal(1, seed=4)[0]
    result = aggregate(X, rule, UNEVEN, reference=reference)
    if result.weights is None:
        assert result.certificate is None
        return
    rest = 1 - result.weights.sum()
    assert (result.weights >= 0).all()
    if rule not in LENGTHENS:
        assert -1e-12 <= rest <= (1 if from_origin(rule) else 1e-12)
    close(result.value, result.weights @ X + rest * reference)


@pytest.mark.parametrize("rule", WEIGHTED)
def test_twice_the_share_is_two_clients(rule: str) -> None:
    X, root = normal(9), {"root": np.ones(30)}  # in effect ten clients, of which eps = 0.2 is two
    doubled = aggregate(X, rule, [1, 1, 1, 2, 1, 1, 1, 1, 1], anchors=root)
    two = aggregate(np.concatenate([X, X[3:4]]), rule, anchors=root)
    close(doubled.value, two.value, 1e-6)


@pytest.mark.parametrize("rule", WEIGHTED)
def test_a_client_without_share_has_no_influence(rule: str) -> None:
    X, root, shares = normal(10), {"root": np.ones(30)}, [0.0, *np.ones(10)]
    with_guest = aggregate(np.concatenate([np.full((1, 30), 1e30), X]), rule, shares, anchors=root)
    close(with_guest.value, aggregate(X, rule, anchors=root).value, 1e-6)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("seed", range(6))
def test_shares_of_zero_leave_a_round_sound(rule: str, seed: int) -> None:
    X = np.concatenate([np.full((2, 30), 1e30), normal(19)])
    value = aggregate(X, rule, [0.0, 1.0, 0.0, *np.ones(18)], eps=0.1, seed=seed).value
    assert np.linalg.norm(value - normal(19).mean(0)) < 50


@pytest.mark.parametrize(
    ("shares", "radius"), [([1, 1, 1, 1], 3), ([1, 1, 1, 7], 10), ([7, 1, 1, 1], 1)]
)
def test_centred_clippings_own_radius_is_by_mass(shares: list[float], radius: float) -> None:
    """Not of so many rows as can be malicious: with most of the mass, one row has its way."""
    X = np.array([[1.0], [2.0], [3.0], [10.0]])
    result = aggregate(X, "centered_clipping", shares, eps=0.3, anchors=None)
    close(result.scores, X[:, 0] / radius, 1e-12)


@pytest.mark.parametrize("rule", [*WEIGHTED, "clip | median"])
@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_crowd_with_next_to_no_share_decides_nothing(rule: str, share: float) -> None:
    if share > 0 and ("median" in rule or rule == "medoid"):
        pytest.skip("may lie among them, as long as it is in the midst of the others")
    honest, root = normal(10), {"root": np.ones(30)}
    crowd = 1e-9 * normal(20, seed=6)
    shares = [*np.full(20, share), *np.ones(10)]
    value = aggregate(np.concatenate([crowd, honest]), rule, shares, anchors=root).value
    close(value, aggregate(honest, rule, anchors=root).value, 1e-4)


@pytest.mark.parametrize(
    "rule", ["nnm | median", "meamed", "dnc", "krum", "multi_krum", "bulyan", "mda", "smea", "monna(0)"]
)
@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_crowd_with_next_to_no_share_is_refused_by_rules_that_count_rows(
    rule: str, share: float
) -> None:
    X = np.concatenate([30 + 1e-6 * normal(13), normal(12)])
    with pytest.raises(InputError, match=r"f = 1\d malicious"):
        aggregate(X, rule, [*np.full(13, share), *np.ones(12)])


def test_a_crowd_with_next_to_no_share_does_not_set_signguards_length() -> None:
    crowd, honest = 1e-9 * np.abs(normal(20)), np.abs(normal(10))
    shares = [*np.full(20, 1e-9), *np.ones(10)]
    value = aggregate(np.concatenate([crowd, honest]), "signguard", shares).value
    close(value, aggregate(honest, "signguard").value, 1e-4)


def crowd(kind: str) -> Matrix:
    """Rows beside twelve honest ones."""
    length = float(np.median(np.linalg.norm(normal(12), axis=1)))
    many = {
        "alike": 30 + 1e-6 * normal(13),
        "equal": np.full((13, 30), 30.0),
        "of ordinary length": np.full((13, 30), length / np.sqrt(30)),
        "tiny": 1e-9 * np.abs(normal(13)),
        "a thousand": np.full((1000, 30), length / np.sqrt(30)),
        "among the honest": normal(1000, seed=7),
    }
    return many[kind]


@pytest.mark.parametrize("rule", ["flame", "signguard"])
@pytest.mark.parametrize(
    "kind", ["alike", "equal", "of ordinary length", "tiny", "a thousand", "among the honest"]
)
@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_crowd_with_next_to_no_share_is_no_majority(rule: str, kind: str, share: float) -> None:
    guests, honest = crowd(kind), normal(12)
    result = aggregate(np.concatenate([guests, honest]), rule, [*[share] * len(guests), *np.ones(12)])
    assert result.weights is not None
    assert result.weights[: len(guests)].sum() < 1e-5
    assert result.weights[len(guests) :].sum() > 0.5  # nor is everything shortened to nothing


def test_a_crowd_with_next_to_no_share_does_not_lend_a_few_a_majority() -> None:
    """Two malicious rows, equal, and a crowd in which all distances but theirs to others are nothing."""
    few = np.tile([[3.0, -3.0]], (2, 15))
    X = np.concatenate([np.ones((1000, 30)), few, normal(10)])
    shares = [*np.full(1000, 1e-9), *np.ones(12)]
    for rule in ("flame", "signguard"):
        weights = aggregate(X, rule, shares).weights
        assert weights is not None
        assert weights[1000:1002].sum() < 0.4  # 2 eps


@pytest.mark.parametrize("rule", CATALOG)
def test_docstrings_say_what_shares_do_and_where_the_paper_is_left(rule: str) -> None:
    said = str(CATALOG[rule].__doc__)
    assert "Deviation" in said
    if issubclass(CATALOG[rule], Mixing):
        return
    shares = [*np.full(3, 0.1), *np.ones(8)]  # f = 4 of 11, not 2
    refused, values = False, []
    for given in (None, shares):
        try:
            values.append(aggregate(normal(), rule, given).value)
        except InputError:
            refused = True
    if refused or not np.array_equal(*values):
        assert not re.search(r"[Ss]hares\s+are\s+not\s+used", said)


def test_a_client_without_share_is_no_medoid() -> None:
    result = aggregate(np.array([[0.0], [1.0], [-1.0], [1.5], [-1.5]]), "medoid", [0, 1, 1, 1, 1])
    assert result.weights is not None
    assert result.weights[0] == 0


@pytest.mark.parametrize(
    "rule", ["clip | mean", "clip(1.0) | krum", "arc | mean", "signguard", "fltrust"]
)
def test_mixed_rows_that_cancel_out_have_no_length(rule: str) -> None:
    """Their squared length is nothing but rounding, which may be negative."""
    half = normal(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            signs = np.random.default_rng(seed).permutation([1.0, -1.0])
            X = np.concatenate([sign * half for sign in signs])
            value = aggregate(X, f"nnm | {rule}", eps=0.0, seed=seed).value
            assert np.isfinite(value).all()


def test_a_bucket_may_hold_no_share_at_all() -> None:
    X, shares = normal(), [0.0, 0.0, *np.ones(9)]
    for seed in range(40):  # in some of them the two clients without share meet
        close(aggregate(X, "bucketing | mean", shares, eps=0.0, seed=seed).value, X[2:].mean(0))


@pytest.mark.parametrize(
    ("rule", "factor"),
    [*((rule, 1e-300) for rule in RULES), *((rule, 1e6) for rule in RULES), ("mean", 1e308)],
)
def test_only_the_proportions_of_shares_count(rule: str, factor: float) -> None:
    same(aggregate(normal(), rule, factor * UNEVEN), aggregate(normal(), rule, UNEVEN), 1e-6)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (np.ones(10), "expected 11 shares"),
        (-np.ones(11), "not negative"),
        (np.full(11, np.nan), "finite"),
        (np.zeros(11), "no share"),
        (["many"] * 11, "shares"),
        (np.ones(11) * 1j, r"shares must be numbers, got array\(\[0\.\+1\.j"),
        ([1j] * 11, "shares must be numbers"),
        ([10**400] * 11, "shares must be numbers"),
    ],
)
def test_bad_shares_are_named(shares: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregate(normal(), "mean", shares)


@pytest.mark.parametrize("eps", [-0.1, 0.5, float("nan"), "0.2", np.array([0.1, 0.2])])
def test_a_bad_eps_is_named(eps: Any) -> None:
    with pytest.raises(InputError, match="eps"):
        aggregate(normal(), "mean", eps=eps)


def test_an_eps_of_numpy_is_one() -> None:
    assert aggregate(normal(), "filter", eps=np.int64(0)).certificate.eps == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "rule", ["clip | mean", "bucketing | filter", "centered_clipping", "nnm | krum"]
)
def test_more_rows_than_can_be_mixed_are_refused(rule: str) -> None:
    with pytest.raises(InputError, match="20001 of them are too many"):
        aggregate(np.ones((20_001, 3)), rule)
