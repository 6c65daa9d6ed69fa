"""The statistic, against plain numpy on the rows themselves; and the parser, against anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

import fedrobust as fr
from fedrobust import CATALOG, InputError, aggregate, kernels, parse_rule
from fedrobust.gram import Gram
from fedrobust.kernels import Block, Matrix, Vector
from fedrobust.text import parse, parse_chain
from fedrobust.threads import few_threads


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """Passes cut the coordinates into stretches, also where the other tests keep to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


SHAPES = [(1, 1), (1, 9), (2, 3), (7, 3), (7, 40), (20, 500)]


def rows(n: int, d: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).normal(0.5, 1, (n, d))


def shares(n: int, zeros: int = 0) -> Vector:
    mass = np.random.default_rng(1).uniform(0.5, 1, n)
    mass[:zeros] = 0
    return np.asarray(mass / mass.sum())


def gram_of(X: Matrix, dtype: Any = np.float64, reference: Matrix | None = None) -> Gram:
    block = Block(
        torch.from_numpy(X.astype(dtype)),
        None if reference is None else torch.from_numpy(reference.astype(dtype)),
    )
    return Gram(lambda: kernels.gram(block), shares(len(X)), 0.2)


@pytest.mark.parametrize(("n", "d"), [*SHAPES, (3, 300_000), (431, 90)])
@pytest.mark.parametrize(("dtype", "precision"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_inner_products_and_distances(n: int, d: int, dtype: Any, precision: float) -> None:
    X = rows(n, d).astype(dtype).astype(float)
    gram = gram_of(X, dtype)
    lengths = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(gram.matrix, X @ X.T, atol=precision * lengths.max() ** 2)
    np.testing.assert_array_equal(gram.matrix, gram.matrix.T)
    expected = ((X[:, None] - X[None, :]) ** 2).sum(-1)
    np.testing.assert_allclose(gram.squared_distances, expected, atol=4 * precision * lengths.max() ** 2)
    assert not np.diag(gram.squared_distances).any()


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("zeros", [0, 2])
def test_centring_spectrum_and_projections(n: int, d: int, zeros: int) -> None:
    X, weights = rows(n, d), shares(n, min(zeros, n - 1))
    support = weights > 0
    centred = (X - weights @ X)[support]
    gram = gram_of(X)
    values, projections = gram.spectrum(weights)
    _, singular, directions = np.linalg.svd(
        np.sqrt(weights[support])[:, None] * centred, full_matrices=False
    )
    rank = min(len(singular), 3)
    np.testing.assert_allclose(values[:rank], singular[:rank] ** 2, atol=1e-9 * d)
    assert (np.diff(values) <= 0).all()
    for j in np.flatnonzero(singular[:rank] > 1e-6):
        along = centred @ directions[j]
        sign = np.sign(along @ projections[:, j])
        np.testing.assert_allclose(sign * projections[:, j], along, atol=1e-6 * np.abs(along).max())
    assert gram.eigenvalues(weights)[0] == pytest.approx(singular[0] ** 2, abs=1e-9 * d)


def test_through_a_mixing() -> None:
    X, M = rows(6, 20), np.random.default_rng(2).dirichlet(np.ones(6), 3)
    mixed = gram_of(X).through(M, shares(3), 0.1)
    np.testing.assert_allclose(mixed.matrix, (M @ X) @ (M @ X).T, atol=1e-9)
    assert (mixed.n, mixed.eps) == (3, 0.1)
    np.testing.assert_array_equal(mixed.matrix, mixed.matrix.T)


@pytest.mark.parametrize(("n", "d"), [(6, 20), (300, 310), (20, 6), (1, 5)])
@pytest.mark.parametrize("rest", [0.0, 1e-6, 0.3, 0.999, 1.0])
def test_weight_that_is_lacking_lies_on_the_reference(
    n: int, d: int, rest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, weights = rows(n, d) + 3.0, (1 - rest) * np.random.default_rng(1).dirichlet(np.ones(n))
    Y, held = np.concatenate([X, np.zeros((1, d))]), np.append(weights, rest)
    centred = np.sqrt(held)[:, None] * (Y - held @ Y)
    exact = np.linalg.svd(centred, compute_uv=False) ** 2
    gram = gram_of(X)
    thin = replace(gram, factor=X) if d < n else gram
    for some in (gram, thin):
        found = some.eigenvalues(weights)
        k = min(len(found), len(exact))
        np.testing.assert_allclose(found[:k], exact[:k], atol=1e-9 * max(exact[0], 1.0))
    monkeypatch.setattr("fedrobust.gram.LARGEST_MATRIX", 0)
    free = replace(gram, multiply=lambda vectors: X @ (X.T @ vectors))
    assert free.eigenvalues(weights)[0] == pytest.approx(exact[0], rel=0.02, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "eps", "f"), [(10, 0.2, 2), (5, 0.2, 1), (4, 0.2, 0), (10, 0.3, 3), (9, 0.0, 0)]
)
def test_f_is_the_floor_of_eps_n(n: int, eps: float, f: int) -> None:
    assert Gram(lambda: np.eye(n), np.full(n, 1 / n), eps).f == f


@pytest.mark.parametrize("n", [2, 5, 10, 15, 16, 40])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.013])
def test_equal_constant_rows_are_off_by_no_more_than_is_said(n: int, value: float) -> None:
    """Nothing is worse: every rounding of a sum goes the same way."""
    X = torch.full((n, 200_000), value)
    exact = float(X[0].double() @ X[0].double())
    assert np.abs(kernels.gram(Block(X)) / exact - 1).max() < kernels.FLOAT32
    assert np.abs(kernels.squared_norms(Block(X)) / exact - 1).max() < kernels.FLOAT32
    assert np.abs(kernels.cross(Block(X), Block(X[:1])) / exact - 1).max() < kernels.ARRIVING
    result = fr.aggregate(X, "filter")
    assert result.verdict is fr.Verdict.CLEAR
    np.testing.assert_allclose(result.weights, 1 / n, rtol=1e-12)  # type: ignore[arg-type]
    assert fr.aggregate(X, "mean", eps="auto").certificate.eps == 0  # type: ignore[union-attr]
    running = fr.RunningAggregate(n, 200_000)
    for row in X:
        running.add(row)
    assert running.result("filter").verdict is fr.Verdict.CLEAR


@pytest.mark.parametrize("n", [2, 8, 20, 40])
def test_no_constant_rows_are_off_by_more(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        values = rng.uniform(1, 2, n).astype(np.float32)
        X = torch.from_numpy(values)[:, None].expand(n, 70_000).contiguous()
        exact = np.outer(values, values.astype(float)) * 70_000
        assert np.abs(kernels.gram(Block(X)) / exact - 1).max() < kernels.FLOAT32
        assert np.abs(kernels.squared_norms(Block(X)) / exact.diagonal() - 1).max() < kernels.FLOAT32
        for m in (1, 2):
            found = kernels.cross(Block(X), Block(X[:m]))
            assert np.abs(found / exact[:, :m] - 1).max() < kernels.ARRIVING
        vectors = np.eye(n)[:, :2] + rng.uniform(0, 1, (n, 2))
        found = kernels.products(Block(X), vectors, np.sqrt(np.diag(exact)))
        assert np.abs(found / (exact @ vectors) - 1).max() < kernels.MULTIPLIED


def test_a_row_that_stands_alone_is_not_copied() -> None:
    row = torch.arange(5.0)
    assert Block((row,)).tile(slice(1, 4)).data_ptr() == row[1:].data_ptr()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "extreme", [[1e30, 1e30], [1e-30, 1e-30], [1e30, 1e-30], [1e-20, 1e19], [3e38, 1e-38]]
)
@pytest.mark.parametrize("n", [10, 310])
def test_a_row_of_any_size_leaves_the_others_entries_alone(
    dtype: Any, extreme: list[float], n: int
) -> None:
    X = rows(n, 60).astype(dtype)
    X[:2] *= np.array(extreme, dtype)[:, None] / np.abs(X[:2]).max(axis=1, keepdims=True)
    exact = X.astype(np.longdouble)
    lengths = np.sqrt((exact**2).sum(1))
    relative = np.abs(gram_of(X, dtype).matrix - exact @ exact.T) / (lengths[:, None] * lengths[None, :])
    assert relative[2:, 2:].max() < 1e-6
    assert relative.max() < 1e-6  # and its own are right, too


@pytest.mark.parametrize("sizes", [[1e16], [1e30, 1e-30], [1e17, 0.0, 3e38], []])
@pytest.mark.parametrize("k", [1, 3])
def test_products_with_rows_of_any_size(sizes: list[float], k: int) -> None:
    X = rows(20, 300).astype(np.float32)
    X[: len(sizes)] *= np.array(sizes, np.float32)[:, None] / np.abs(X[: len(sizes)]).max(
        1, keepdims=True
    )
    exact, V = X.astype(np.longdouble), np.random.default_rng(3).normal(size=(20, k))
    norms = np.sqrt((exact**2).sum(1))
    found = kernels.products(Block(torch.from_numpy(X)), V, norms.astype(float))
    terms = norms[:, None] * (np.abs(V) * norms[:, None]).sum(axis=0)
    assert (np.abs(found - exact @ (exact.T @ V)) <= 1e-6 * terms).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_norms_of_any_size(scale: float) -> None:
    X = rows(4, 50).astype(np.float32) * np.float32(scale)
    norms = np.sqrt(kernels.squared_norms(Block(torch.from_numpy(X))))
    np.testing.assert_allclose(norms, np.linalg.norm(X.astype(float), axis=1), rtol=1e-6)


def test_a_reference_keeps_the_digits_that_a_common_part_takes() -> None:
    difference, common = rows(8, 4000), 1e4 * rows(1, 4000, seed=3)[0]
    X = (common + difference).astype(np.float32)
    anchor = common.astype(np.float32)
    exact = X.astype(float) - anchor.astype(float)
    distances = ((exact[:, None] - exact[None, :]) ** 2).sum(-1)
    found = gram_of(X, np.float32, anchor).squared_distances
    np.testing.assert_allclose(found, distances, rtol=1e-5)
    assert np.abs(gram_of(X, np.float32).squared_distances - distances).max() > distances.max()


# The parser ------------------------------------------------------------------------------------------

WORDS = [
    "nnm",
    "filter",
    "krum",
    "clip",
    "bucketing",
    "multi_krum",
    "flter",
    "eps",
    "sigma",
    "radius",
    "m",
    "s",
]
SIGNS = [*"|(),=.-*[]{}:'\"#\\@ \n", "**", "==", ":=", "lambda", "None", "True", "not ", "if", "f'{m}'"]
NUMBERS = [
    "0",
    "0.2",
    "2",
    "-1",
    "1e999",
    "1j",
    "9" * 5000,
    "0x" + "f" * 5000,
    "'x'",
    "b''",
    "[1]",
    "{[1]: 2}",
]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*WORDS, *SIGNS, *NUMBERS]), max_size=12).map("".join),
        st.builds("{}({}={})".format, *map(st.sampled_from, (WORDS[:6], WORDS[6:], NUMBERS))),
        st.builds(" | ".join, st.lists(st.sampled_from(WORDS), max_size=6)),
    )
)
def test_text_parses_or_is_an_input_error(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (a refusal is one of two right outcomes)
    else:
        assert parse_rule(repr(rule)) == rule


HARD = {
    "unhashable key": "clip({[1]: 2})",
    "unhashable item": "clip({[1]})",
    "endless integer": "multi_krum(-0x" + "f" * 5000 + ")",
    "long chain": "nnm" + " | nnm" * 20000,
    "open brackets": "(" * 500,
    "many signs": "clip(" + "-" * 5000 + "1)",
    "nested lists": "clip(" + "[" * 150 + "]" * 150 + ")",
    "null byte": "krum\0",
    "infinity": "clip(1e999)",
    "nothing": "",
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
@pytest.mark.parametrize("read", [parse, parse_chain])
def test_text_that_is_hard_on_a_parser(text: str, read: Any) -> None:
    with pytest.raises(InputError):
        read(text, CATALOG, "rule")


def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch multiplies float32 in bfloat16 if it may; elsewhere the rounding is done here."""
    inner, there = kernels._inner, kernels._units(torch.device("cpu"))

    def rounded(*tiles: torch.Tensor) -> torch.Tensor:
        if torch.get_float32_matmul_precision() == "medium" and not there:
            tiles = tuple(t if t.dtype == torch.float64 else t.bfloat16().float() for t in tiles)
        return inner(*tiles)

    monkeypatch.setattr(kernels, "_inner", rounded)
    monkeypatch.setattr(kernels, "_units", lambda _: True)


def off(found: Matrix, X: Matrix) -> float:
    """The largest error of inner products, in units of the rows' lengths."""
    lengths = np.linalg.norm(X.astype(float), axis=1)
    exact = X.astype(float) @ X.T.astype(float)
    return float((np.abs(found - exact) / (lengths[:, None] * lengths[None, :])).max())


@pytest.mark.parametrize("n", [20, 40, 210])
def test_bfloat16_is_near_and_leaves_the_setting_alone(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_units(monkeypatch)
    X = rows(n, 200_000).astype(np.float32)
    before = torch.get_float32_matmul_precision()
    found = kernels.gram(Block(torch.from_numpy(X)), bfloat16=True)
    assert torch.get_float32_matmul_precision() == before
    assert 1e-6 < off(found, X) < kernels.BFLOAT16
    exact = aggregate(X, "filter")
    for certified in (True, False):
        result = aggregate(X, "filter", bfloat16=True, certified=certified)
        assert result.weights is not None
        np.testing.assert_allclose(result.weights, exact.weights, atol=1e-3)
        if result.certificate is not None and exact.certificate is not None:
            assert result.certificate.spread > exact.certificate.spread


@pytest.mark.parametrize("n", [20, 40, 210])
def test_bfloat16_changes_nothing_where_there_are_no_units(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_units", lambda _: False)
    X = rows(n, 20_000).astype(np.float32)
    block = Block(torch.from_numpy(X))
    np.testing.assert_array_equal(kernels.gram(block, bfloat16=True), kernels.gram(block))
    lowered, exact = (aggregate(X, "filter", bfloat16=b) for b in (True, False))
    assert lowered.certificate == exact.certificate


def test_bfloat16_leaves_float64_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_units(monkeypatch)
    X = rows(40, 2000)
    lowered, exact = (aggregate(X, "filter", bfloat16=b) for b in (True, False))
    assert lowered.certificate == exact.certificate
    np.testing.assert_array_equal(lowered.value, exact.value)


def test_the_units_for_bfloat16_are_seen_from_products_of_any_rows() -> None:
    X = rows(100, 5000).astype(np.float32)
    error = off(kernels.gram(Block(torch.from_numpy(X)), bfloat16=True), X)
    assert (error > 1e-6) == kernels.lowers(Block(torch.from_numpy(X)))


def test_passes_and_small_matrices_leave_the_threads_of_the_process_alone() -> None:
    pools, threads = ThreadpoolController(), torch.get_num_threads()
    before = [pool["num_threads"] for pool in pools.info()]
    subnormal = torch.full((4, 50_000), 1e-40)
    kernels.gram(Block(subnormal))
    with few_threads(10), few_threads(20):
        assert {pool["num_threads"] for pool in pools.info() if pool["user_api"] == "blas"} == {1}
    assert [pool["num_threads"] for pool in pools.info()] == before
    assert torch.get_num_threads() == threads
    assert (subnormal * 1.0 == subnormal).all()  # and its arithmetic
