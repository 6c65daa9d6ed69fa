"""The server's optimisers are those of the papers, whatever part of the model they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fedrobust_server.config import RunConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust import InputError
from fedrobust.optimisers import CATALOG, SGD, Adagrad, Adam, Optimiser, Yogi, parse_optimiser

Floats = npt.NDArray[np.float64]

LR = st.floats(1e-3, 10)
DECAY = st.floats(0, 0.999)
TAU = st.floats(1e-4, 1)
OPTIMISERS = st.one_of(
    st.builds(SGD, lr=LR, momentum=st.just(0.0) | DECAY),
    st.builds(Adagrad, lr=LR, tau=TAU),
    st.builds(Adam, lr=LR, tau=TAU, beta1=DECAY, beta2=DECAY),
    st.builds(Yogi, lr=LR, tau=TAU, beta1=DECAY, beta2=DECAY),
)


def averaged(o: Any, x: Floats, deltas: list[Floats]) -> tuple[Floats, Floats]:
    """FedAvgM; float32 loses nothing to speak of."""
    v = np.zeros_like(x)
    for delta in deltas:
        v = o.momentum * v + delta
        x = x + o.lr * v
    return x, np.zeros_like(x)


def adaptive(o: Any, x: Floats, deltas: list[Floats]) -> tuple[Floats, Floats]:
    """Algorithm 2 of Reddi et al., line by line, in float64, and how far float32 may end from it.

    Yogi takes squares away from v: what they leave may be less than what rounding them has cost.
    """
    beta1 = getattr(o, "beta1", 0.0)
    m, v = np.zeros_like(x), np.full_like(x, o.tau**2)
    doubt, slack = np.zeros_like(x), np.zeros_like(x)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        match o:
            case Adagrad():
                v = v + delta**2
            case Yogi():
                doubt = doubt + 2.0**-22 * (v + delta**2)
                doubt = np.where(np.abs(v - delta**2) <= doubt, np.inf, doubt)  # of either sign
                v = v - (1 - o.beta2) * delta**2 * np.sign(v - delta**2)
            case Adam():
                v = o.beta2 * v + (1 - o.beta2) * delta**2
        x = x + o.lr * m / (np.sqrt(v) + o.tau)
        least, most = np.sqrt(np.maximum(v - doubt, 0.0)), np.sqrt(v + doubt)
        slack = slack + np.abs(o.lr * m) * (1 / (least + o.tau) - 1 / (most + o.tau))
    return x, slack


@settings(deadline=None)
@given(
    optimiser=OPTIMISERS,
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-4, 1e3),
    steps=st.integers(1, 8),
)
def test_steps_are_the_papers(optimiser: Optimiser, seed: int, scale: float, steps: int) -> None:
    rng = np.random.default_rng(seed)
    model, *deltas = rng.normal(size=(1 + steps, 30)).astype(np.float32)
    deltas = [np.float32(scale) * delta for delta in deltas]
    state = optimiser.begin(torch.from_numpy(model))
    assert state.shape == (1 + optimiser.kept, 30)
    for delta in deltas:
        optimiser.step(state, torch.from_numpy(delta))
    paper: Callable[..., tuple[Floats, Floats]] = averaged if isinstance(optimiser, SGD) else adaptive
    expected, slack = paper(optimiser, model.astype(float), [delta.astype(float) for delta in deltas])
    moved = np.abs(expected - model).max()
    allowed = 1e-5 * np.abs(expected) + 1e-5 * moved + slack
    np.testing.assert_array_less(np.abs(state[0].numpy() - expected), allowed + 1e-30)


@settings(deadline=None)
@given(optimiser=OPTIMISERS, cut=st.integers(0, 40))
def test_columns_move_by_themselves(optimiser: Optimiser, cut: int) -> None:
    model, *deltas = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    whole = optimiser.begin(model)
    parts = [optimiser.begin(model[:cut]), optimiser.begin(model[cut:])]
    for delta in deltas:
        before = delta.clone()
        optimiser.step(whole, delta)
        for part, piece in zip(parts, (delta[:cut], delta[cut:]), strict=True):
            optimiser.step(part, piece)
        assert torch.equal(delta, before)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimiser", [Adagrad(), Adam(), Yogi()], ids=repr)
def test_a_model_stays_finite_whatever_the_aggregates(optimiser: Optimiser) -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([0.0, 1e-45, 1e-20, 1.0, 1e19, 1e20, largest])
    state = optimiser.begin(torch.zeros(len(values)))
    for sign in (1, 1, -1, 0, 1):
        optimiser.step(state, sign * values)
        assert torch.isfinite(state[0]).all()
        assert state[0].abs().max() < 1


def test_what_is_kept() -> None:
    kept = {SGD(): 0, SGD(momentum=0.9): 1, Adagrad(): 1, Adam(): 2, Yogi(): 2}
    assert {optimiser: optimiser.kept for optimiser in kept} == kept
    model = torch.arange(3.0)
    state = Adam(tau=0.5).begin(model)
    np.testing.assert_array_equal(state, [[0, 1, 2], [0, 0, 0], [0.25, 0.25, 0.25]])
    SGD().step(SGD().begin(model), torch.ones(3))
    assert model.tolist() == [0, 1, 2]  # begin copies it


@pytest.mark.parametrize(
    ("text", "optimiser"),
    [
        ("sgd", SGD()),
        ("sgd(0.5, 0.9)", SGD(lr=0.5, momentum=0.9)),
        ("adagrad(lr=0.1)", Adagrad(lr=0.1)),
        ("adam(tau=1e-4, beta1=0)", Adam(tau=1e-4, beta1=0)),
        ("yogi(lr=1)", Yogi(lr=1)),
    ],
)
def test_the_text_form(text: str, optimiser: Optimiser) -> None:
    assert parse_optimiser(text) == optimiser
    assert parse_optimiser(repr(optimiser)) == optimiser
    assert list(CATALOG) == ["sgd", "adagrad", "adam", "yogi"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw", r"unknown optimiser 'adamw' \(did you mean adam\?\)"),
        ("adam(beta=0.9)", r"unknown argument of adam 'beta'"),
        ("sgd | adam", r"has 2 parts"),
        ("sgd(lr=0)", r"sgd\(lr=0\): lr must be above 0"),
        ("sgd(momentum=1.0)", r"momentum must be in \[0, 1\)"),
        ("sgd(lr='much')", r"lr must be float, got 'much'"),
        ("adagrad(lr=-1)", r"lr must be above 0"),
        ("adagrad(tau=0)", r"tau must be at least 1e-18"),
        ("adam(beta1=1)", r"beta1 must be in \[0, 1\)"),
        ("yogi(beta2=-0.1)", r"beta2 must be in \[0, 1\)"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_optimiser(text)


def test_a_run_names_its_optimiser() -> None:
    config = RunConfig.from_toml("optimiser = 'adam(lr=0.1)'\n")
    assert RunConfig.from_toml(config.to_toml()) == config
    with pytest.raises(InputError, match="lr must be above 0"):
        RunConfig(optimiser="adam(lr=0)")
    with pytest.raises(InputError, match=r"unknown configuration key 'server_lr'.*optimiser"):
        RunConfig.from_toml("server_lr = 0.5\n")
