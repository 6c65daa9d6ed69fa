"""ByzFL's and Flower's aggregators as second implementations; and where they are wrong, each shown.

A peer is an oracle where it is right: the first half asks for agreement to 1e-5. The second half holds
a test for each place where it is not, so that a later release that mends it is noticed; docs/peers.md
lists them by the tests' names.
"""
# ruff: noqa: ARG005 (peers share one form of call, and some need no f)

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks import peers
from fedrobust import aggregate
from fedrobust.attacks import View, parse_attack
from fedrobust.optimisers import parse_optimiser
from fedrobust.rules import parse_rule

if peers.installed("byzfl") is None or peers.installed("flwr") is None:
    pytest.skip(peers.NEEDS, allow_module_level=True)

B = peers.byzfl()
F = peers.flower("server.strategy.aggregate")
multi_krum = peers.flower("serverapp.strategy.multikrum")

Rows = npt.NDArray[Any]
Peer = Callable[[Any, int], Any]

SHAPES = [(10, 30, 2), (15, 7, 3), (23, 200, 5), (40, 50, 9)]
ATTACKS = [None, "ipm", "alie(3)", "sign_flip", "gaussian", "min_max"]
# These malicious rows are all alike. `min_max` also puts them exactly as far away as an honest row is,
# a tie that float32 decides by chance.
CONTAINERS: dict[str, Callable[[Rows], Any]] = {
    "numpy float32": lambda X: X.astype(np.float32),
    "numpy float64": lambda X: X.astype(np.float64),
    "torch float32": lambda X: torch.from_numpy(X.astype(np.float32)),
}


def rows(n: int, d: int, f: int, attack: str | None = None, seed: int = 0) -> Rows:
    """A round of Gaussian updates, the first f of them replaced by the attack's."""
    rng = np.random.default_rng(seed)
    X = rng.normal(0.3, 1, size=(n, d)).astype(np.float32)
    if attack:
        X[:f] = parse_attack(attack)(View.of(X[f:], X[:f]), rng).numpy()
    return X


def ours(X: Any, rule: str, f: int, seed: int = 0) -> Rows:
    return np.asarray(aggregate(X, rule, eps=f / len(X), seed=seed).value, dtype=np.float64)


def distance(value: Any, other: Any, X: Any) -> float:
    """The largest difference, relative to the rows' largest entry."""
    return float(np.abs(np.asarray(value) - np.asarray(other)).max() / np.abs(np.asarray(X)).max())


def copied(X: Any) -> Any:
    """Some of ByzFL's functions write to the array that they are given."""
    return X.clone() if isinstance(X, torch.Tensor) else X.copy()


def exact(rule: type, steps: int = 500) -> type:
    """ByzFL's CAF or SMEA with more than the single power step that it takes."""

    def patched(code: CodeType) -> CodeType:
        constants = [(steps,) if constant == (1,) else constant for constant in code.co_consts]
        assert constants.count((steps,)) == 1
        return code.replace(co_consts=tuple(constants))

    call = rule.__call__
    return type(
        rule.__name__, (rule,), {"__call__": FunctionType(patched(call.__code__), call.__globals__)}
    )


# Agreement -------------------------------------------------------------------------------------------


def weiszfeld(X: Any, nu: float, steps: int) -> Any:
    """ByzFL starts at the origin and we at the mean: about the mean the two starts are the same."""
    centre = X.mean(0)
    return B.GeometricMedian(nu=nu, T=steps)(X - centre) + centre


# ByzFL's Krum sums over the n - f - 1 nearest others where the paper, and we, take n - f - 2: its f + 1
# is our f, and its multi-Krum then averages one row fewer.
BYZFL: dict[str, Peer] = {
    "mean": lambda X, f: B.Average()(X),
    "median": lambda X, f: B.Median()(X),
    "trimmed_mean": lambda X, f: B.TrMean(f)(X),
    "meamed": lambda X, f: B.Meamed(f)(X),
    "krum": lambda X, f: B.Krum(f + 1)(X),
    "multi_krum(m={fewer})": lambda X, f: B.MultiKrum(f + 1)(X),
    "monna(index=4)": lambda X, f: B.MoNNA(f, idx=4)(X),
    "centered_clipping(radius=3.0)": lambda X, f: B.CenteredClipping(tau=3.0)(X),
    "centered_clipping(radius=3.0, steps=5)": lambda X, f: B.CenteredClipping(tau=3.0, L=5)(X),
    "geometric_median(steps=3)": lambda X, f: weiszfeld(X, 1e-6, 3),
    "geometric_median(steps=20)": lambda X, f: weiszfeld(X, 1e-6, 20),
    "geometric_median": lambda X, f: B.GeometricMedian(nu=1e-6, T=300)(X),
    "clip(2.0) | mean": lambda X, f: B.Average()(B.Clipping(2.0)(copied(X))),
    "clip(2.0) | median": lambda X, f: B.Median()(B.Clipping(2.0)(copied(X))),
    "arc | mean": lambda X, f: B.Average()(B.ARC(f)(copied(X))),
    "arc | trimmed_mean": lambda X, f: B.TrMean(f)(B.ARC(f)(copied(X))),
    "nnm | mean": lambda X, f: B.Average()(B.NNM(f)(X)),
    "nnm | median": lambda X, f: B.Median()(B.NNM(f)(X)),
    "nnm | trimmed_mean": lambda X, f: B.TrMean(f)(B.NNM(f)(X)),
    "nnm | geometric_median": lambda X, f: B.GeometricMedian(nu=1e-9, T=300)(B.NNM(f)(X)),
    "nnm | centered_clipping(radius=3.0)": lambda X, f: B.CenteredClipping(tau=3.0)(B.NNM(f)(X)),
    "arc | nnm | median": lambda X, f: B.Median()(B.NNM(f)(B.ARC(f)(copied(X)))),
}


@pytest.mark.parametrize("rule", BYZFL)
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_as_byzfl(rule: str, n: int, d: int, f: int, container: str) -> None:
    ties = "nnm" in rule and container != "numpy float64"
    for seed, attack in enumerate(ATTACKS):
        if ties and attack == "min_max":
            continue
        X = CONTAINERS[container](rows(n, d, f, attack, seed))
        expected = BYZFL[rule](X, f)
        assert distance(ours(X, rule.format(fewer=n - f - 1), f), expected, X) < 1e-5


@pytest.mark.parametrize("nu", [0.6, 0.7, 0.8])
def test_as_byzfl_where_smoothing_decides(nu: float) -> None:
    X = rows(15, 7, 3, "sign_flip").astype(float)
    unit = float(np.median(np.linalg.norm(X - X.mean(0), axis=1)))
    value = ours(X, f"geometric_median(steps=1, nu={nu})", 3)
    assert distance(value, weiszfeld(X, nu * unit, 1), X) < 1e-9


def closest(X: Rows, f: int) -> list[Rows]:
    """The means of all sets of n - f rows of the smallest diameter."""
    pairs = np.linalg.norm(X[:, None] - X[None, :], axis=2)
    sets = [list(chosen) for chosen in itertools.combinations(range(len(X)), len(X) - f)]
    diameters = [pairs[np.ix_(chosen, chosen)].max() for chosen in sets]
    return [X[s].mean(0) for s, size in zip(sets, diameters, strict=True) if size == min(diameters)]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("seed", range(3))
def test_as_byzfls_mda(attack: str | None, seed: int) -> None:
    """Where several sets have the smallest diameter, ByzFL takes the first and we the least spread."""
    X = rows(11, 20, 3, attack, seed).astype(float)
    sets, peer, value = closest(X, 3), B.MDA(3)(X), ours(X, "mda", 3)
    assert min(distance(peer, other, X) for other in sets) < 1e-9
    assert min(distance(value, other, X) for other in sets) < 1e-9
    assert len(sets) > 1 or distance(value, peer, X) < 1e-9


@pytest.mark.parametrize(("n", "d", "f"), [(9, 1, 2), (10, 30, 2), (11, 7, 1)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_as_byzfls_smea_with_the_whole_eigenvalue(n: int, d: int, f: int, attack: str | None) -> None:
    for seed in range(3):
        X = rows(n, d, f, attack, seed).astype(float)
        assert distance(ours(X, "smea", f), exact(B.SMEA)(f)(X), X) < 1e-9


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack != "gaussian"])
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
def test_as_byzfls_caf_with_the_whole_eigenvector(n: int, d: int, f: int, attack: str | None) -> None:
    """But for attacks in many directions: `test_byzfls_caf_measures_by_rows_that_it_removed`."""
    for seed in range(3):
        X = rows(n, d, f, attack, seed).astype(float)
        assert distance(ours(X, "caf", f), exact(B.CAF)(f)(X), X) < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_in_one_dimension_byzfls_smea_is_exact(seed: int) -> None:
    """The code as it is: whatever direction it starts from is the only one."""
    X = rows(11, 1, 2, "alie(3)", seed).astype(float)
    assert distance(ours(X, "smea", 2), B.SMEA(2)(X), X) < 1e-9


@pytest.mark.parametrize(("n", "s"), [(12, 2), (12, 3), (20, 4)])
@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean", "geometric_median"])
def test_as_byzfls_bucketing_by_the_same_permutation(
    n: int, s: int, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[str, Peer] = {name: peer for name, peer in BYZFL.items() if name == rule}
    for seed in range(5):
        X = rows(n, 25, 1, "ipm", seed).astype(float)
        order = np.random.default_rng(seed).permutation(n)
        monkeypatch.setattr(np.random, "permutation", lambda vectors, order=order: vectors[order])
        expected = ends[rule](B.Bucketing(s)(X), 1)
        monkeypatch.undo()
        assert distance(ours(X, f"bucketing({s}) | {rule}", 1, seed), expected, X) < 1e-5


def legacy(X: Rows, examples: int = 1) -> list[tuple[list[Rows], int]]:
    """Clients' results as Flower's functions take them: layers and a number of examples."""
    return [(layers, examples) for layers in peers.layered(X, 3)]


def selected(X: Rows, f: int, m: int) -> Rows:
    """What `serverapp`'s multi-Krum returns."""
    return peers.strategy("MultiKrum", num_malicious_nodes=f, num_nodes_to_select=m)(
        peers.replies(peers.layered(X, 3))
    )


FLOWER: dict[str, Peer] = {
    "mean": lambda X, f: peers.flat(F.aggregate(legacy(X))),
    "median": lambda X, f: peers.flat(F.aggregate_median(legacy(X))),
    "trimmed_mean": lambda X, f: peers.flat(F.aggregate_trimmed_avg(legacy(X), f / len(X) + 1e-9)),
    "krum": lambda X, f: peers.flat(F.aggregate_krum(legacy(X), f, 0)),
    "multi_krum": lambda X, f: peers.flat(F.aggregate_krum(legacy(X), f, len(X) - f)),
    "multi_krum(m=2)": lambda X, f: selected(X, f, 2),
}
STRATEGIES: dict[str, Peer] = {
    "mean": lambda X, f: peers.strategy("FedAvg")(peers.replies(peers.layered(X, 3))),
    "median": lambda X, f: peers.strategy("FedMedian")(peers.replies(peers.layered(X, 3))),
    "trimmed_mean": lambda X, f: peers.strategy("FedTrimmedAvg", beta=f / len(X) + 1e-9)(
        peers.replies(peers.layered(X, 3))
    ),
    "krum": lambda X, f: peers.strategy("Krum", num_malicious_nodes=f)(
        peers.replies(peers.layered(X, 3))
    ),
    "multi_krum": lambda X, f: selected(X, f, len(X) - f),
}


@pytest.mark.parametrize("rule", FLOWER)
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
def test_as_flowers_functions(rule: str, n: int, d: int, f: int) -> None:
    for attack, dtype in itertools.product(ATTACKS, [np.float32, np.float64]):
        X = rows(n, d, f, attack).astype(dtype)
        assert distance(ours(X, rule, f), FLOWER[rule](X, f), X) < 1e-5


@pytest.mark.parametrize("rule", STRATEGIES)
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
def test_as_flowers_strategies(rule: str, n: int, d: int, f: int) -> None:
    for seed, attack in enumerate(ATTACKS):
        X = rows(n, d, f, attack, seed)
        assert distance(ours(X, rule, f), STRATEGIES[rule](X, f), X) < 1e-5


@pytest.mark.parametrize(("n", "d", "f"), [(15, 7, 3), (23, 200, 5), (40, 50, 9)])
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack != "ipm"])
def test_as_flowers_bulyan(n: int, d: int, f: int, attack: str | None) -> None:
    """With f < 3, or under ipm, Krum ends among rows that tie, of which Flower takes the first."""
    for seed, dtype in itertools.product(range(3), [np.float32, np.float64]):
        X = rows(n, d, f, attack, seed).astype(dtype)
        peer = peers.flat(F.aggregate_bulyan(legacy(X), f, F.aggregate_krum, to_keep=0))
        assert distance(ours(X, "bulyan", f), peer, X) < 1e-5


ATTACKS_OF_BYZFL: dict[str, tuple[str, dict[str, float]]] = {
    "ipm(1.0)": ("SignFlipping", {}),
    "ipm(3.0)": ("InnerProductManipulation", {"tau": 3.0}),
    "alie(-1.5)": ("ALittleIsEnough", {"tau": 1.5}),
    "mimic(4)": ("Mimic", {"epsilon": 4}),
    "inf": ("Inf", {}),
}


@pytest.mark.parametrize("attack", ATTACKS_OF_BYZFL)
@pytest.mark.parametrize(("h", "d"), [(5, 3), (12, 200)])
def test_as_byzfls_attacks(attack: str, h: int, d: int) -> None:
    """Its standard deviation has h - 1 in the denominator, ours h."""
    X, (name, arguments) = rows(h, d, 1), ATTACKS_OF_BYZFL[attack]
    if "tau" in arguments and name == "ALittleIsEnough":
        arguments = {"tau": arguments["tau"] * float(np.sqrt((h - 1) / h))}
    mine = parse_attack(attack)(View.of(X, X[:1]), np.random.default_rng(0)).numpy()
    peer = getattr(peers.byzfls_attacks(), name)(**arguments)(X)
    np.testing.assert_allclose(mine[0], peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delta", [1.0, 10.0])
def test_as_byzfls_optimal_ipm(delta: float) -> None:
    for seed in range(5):
        X = rows(12, 20, 1, seed=seed)
        attack = parse_attack(f"optimal_ipm(20, step={delta})")
        view = View.of(X, X[:3], rule=parse_rule("trimmed_mean"), eps=0.2)
        mine = attack(view, np.random.default_rng(0)).numpy()
        search = peers.byzfls_attacks().Optimal_InnerProductManipulation
        peer = search(B.TrMean(3), pre_agg_list=[], f=3, evals=20, delta=delta)(X)
        np.testing.assert_allclose(mine[0], peer, rtol=1e-4, atol=1e-5)


OPTIMISERS: dict[str, tuple[str, dict[str, float]]] = {
    "sgd(lr=0.5, momentum=0.9)": ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.9}),
    "adagrad(lr=0.1)": ("FedAdagrad", {"eta": 0.1, "tau": 1e-3}),
    "yogi(lr=0.1)": ("FedYogi", {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
}


@pytest.mark.parametrize("text", OPTIMISERS)
def test_as_flowers_optimisers(text: str) -> None:
    """From a first v of 0, which is Flower's; the paper's is tau^2."""
    app = peers.flower("app")
    name, options = OPTIMISERS[text]
    chosen = getattr(peers.flower("serverapp.strategy"), name)(**options)
    optimiser = parse_optimiser(text)
    theirs, *steps = rows(6, 40, 0)
    state = optimiser.begin(torch.from_numpy(theirs))
    state[1:] = 0
    for number, step in enumerate(steps, start=1):
        layers = {str(i): layer for i, layer in enumerate(np.array_split(theirs, 3))}
        if name == "FedAvgM":
            layers = app.ArrayRecord({key: app.Array(layer) for key, layer in layers.items()})
        chosen.current_arrays = layers
        replies = peers.replies(peers.layered(np.stack([theirs + step] * 2), 3))
        theirs = peers.flat(chosen.aggregate_train(number, replies)[0].to_numpy_ndarrays())
        optimiser.step(state, torch.from_numpy(step))
        np.testing.assert_allclose(state[0], theirs, rtol=1e-5, atol=1e-5)


# Where ByzFL is wrong --------------------------------------------------------------------------------


def test_byzfls_caf_depends_on_the_seed() -> None:
    """One power step from a random start is no eigenvector: two seeds, two aggregates."""
    X = rows(20, 2000, 4, "ipm(0.5)")
    values = []
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002 (the peer draws from the global state)
        values.append(B.CAF(4)(X))
    assert max(distance(value, values[0], X) for value in values) > 0.01
    assert all(np.array_equal(ours(X, "caf", 4, seed), ours(X, "caf", 4)) for seed in range(4))


def test_byzfls_caf_misses_a_shift_that_the_eigenvector_shows() -> None:
    """With few rows in many dimensions the single step sees noise: it does no more than the mean."""
    n, d, f = 50, 20_000, 10
    X = rows(n, d, 0)
    X[:f] += 0.2
    honest = X[f:].mean(0)
    np.random.seed(0)  # noqa: NPY002 (the peer draws from the global state)
    errors = {
        "mean": np.linalg.norm(X.mean(0) - honest),
        "peer": np.linalg.norm(B.CAF(f)(X) - honest),
        "ours": np.linalg.norm(ours(X, "caf", f) - honest),
    }
    assert errors["peer"] > 0.9 * errors["mean"]
    assert errors["ours"] < 0.9 * errors["mean"], errors


def test_byzfls_caf_measures_by_rows_that_it_removed() -> None:
    """The largest tau is taken over rows of weight 0 as well, so the others' weights shrink slower."""
    rounds = [rows(15, 7, 3, "gaussian", seed).astype(float) for seed in range(6)]
    differences = [distance(ours(X, "caf", 3), exact(B.CAF)(3)(X), X) for X in rounds]
    assert max(differences) > 0.005


def test_byzfls_caf_returns_none_where_nobody_is_malicious() -> None:
    X = rows(10, 30, 0)
    assert B.CAF(0)(X) is None
    np.testing.assert_allclose(ours(X, "caf", 0), X.mean(0), atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_byzfls_caf_returns_none_for_a_row_that_is_not_finite() -> None:
    X = rows(10, 30, 2)
    X[0, 0] = np.nan
    assert B.CAF(2)(X) is None
    assert np.isfinite(ours(X, "caf", 2)).all()


def test_byzfls_caf_goes_on_for_as_long_as_the_attacker_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows far away keep the largest tau after their removal: the attacker chooses the steps."""
    X = rows(20, 200, 4).astype(float)
    X[:4] *= 1e5
    draws = iter(np.random.default_rng(0).normal(size=(300, 200)))
    monkeypatch.setattr(np.random, "randn", lambda d: next(draws))
    with pytest.raises(StopIteration):  # it draws once a step, and 300 are not enough
        B.CAF(4)(X)
    assert aggregate(X, "caf", eps=0.2).notes["steps"] <= 10


def test_byzfls_smea_depends_on_the_seed() -> None:
    X = rows(10, 500, 2, "alie(3)")
    values = []
    for seed in range(6):
        np.random.seed(seed)  # noqa: NPY002 (the peer draws from the global state)
        values.append(B.SMEA(2)(X))
    assert max(distance(value, values[0], X) for value in values) > 0.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", ["mean", "median", "krum", "meamed", "geometric_median", "clipping"])
def test_one_nan_spoils_byzfl(rule: str) -> None:
    """A single value of a single client, and the aggregate holds NaN."""
    X = rows(12, 30, 2)
    X[0, 7] = np.nan
    functions: dict[str, Peer] = {
        **BYZFL,
        "geometric_median": lambda X, f: B.GeometricMedian()(X),
        "clipping": lambda X, f: B.CenteredClipping()(X),
    }
    name = "centered_clipping" if rule == "clipping" else rule
    assert not np.isfinite(functions[rule](torch.from_numpy(X), 2).numpy()).all()
    assert np.isfinite(ours(X, name, 2)).all()


def test_byzfls_krum_chooses_the_attacker_at_3e38() -> None:
    """The float32 square overflows, the distances become NaN, and `argmin` takes NaN for the least."""
    X = torch.from_numpy(rows(40, 50, 0))
    X[17, 3] = 3e38
    assert float(B.Krum(4)(X)[3]) > 1e38
    assert np.abs(ours(X, "krum", 4)).max() < 10


def test_byzfls_distances_are_rounding_beside_a_common_mean() -> None:
    """Beyond 25 rows `torch.cdist` expands the square in float32: Krum of similar models is chance."""
    rng = np.random.default_rng(0)
    centre = 3000 * rng.normal(size=5000)
    X = centre + 0.05 * np.linspace(0.5, 1.5, 40)[::-1, None] * rng.normal(size=(40, 5000))
    exact_choice = int(np.argmin(np.abs(X - ours(X, "krum", 4)).sum(axis=1)))
    single = torch.from_numpy(X).float()
    peer = int((single - B.Krum(5)(single)).abs().sum(dim=1).argmin())
    own = aggregate(single, "krum", eps=0.1, reference=torch.from_numpy(centre).float()).weights
    assert own is not None
    assert int(np.argmax(own)) == exact_choice != peer


def test_byzfls_krum_counts_one_neighbour_more_than_the_paper() -> None:
    differ = 0
    for seed in range(40):
        X = rows(9, 3, 3, seed=seed).astype(float)
        differ += distance(B.Krum(3)(X), ours(X, "krum", 3), X) > 0
        assert distance(B.Krum(4)(X), ours(X, "krum", 3), X) == 0
    assert differ > 0


def test_byzfls_centered_clipping_keeps_state() -> None:
    """The same call twice, two results; ours is a function, the last aggregate its reference."""
    X = rows(10, 30, 2, "ipm")
    rule = B.CenteredClipping(tau=1.0)
    first, second = rule(X), rule(X)
    assert distance(first, second, X) > 0.01
    again = aggregate(X, "centered_clipping(radius=1.0)", reference=first).value
    assert distance(again, second, X) < 1e-6


def test_byzfls_centered_clipping_accepts_no_centre() -> None:
    """Its check asks that the centre be an array and a tensor at once."""
    with pytest.raises(TypeError):
        B.CenteredClipping(m=np.zeros(3))


@pytest.mark.parametrize("mixing", ["Clipping", "ARC"])
def test_byzfls_clipping_overwrites_the_callers_rows(mixing: str) -> None:
    X = rows(10, 30, 2)
    before = X.copy()
    {"Clipping": B.Clipping(1.0), "ARC": B.ARC(2)}[mixing](X)
    assert not np.array_equal(X, before)
    aggregate(before, "clip(1.0) | mean")
    np.testing.assert_array_equal(before, rows(10, 30, 2))


def test_byzfls_arc_clips_one_row_too_few() -> None:
    """floor(2 f / n (n - f)) in floating point: 2 * 33 / 242 * 209 is 57, and comes out below."""
    n, f = 242, 33
    X = np.arange(1.0, n + 1)[:, None]
    assert distance(B.Average()(B.ARC(f)(X.copy())), ours(X, "arc | mean", f), X) > 1e-4


def test_byzfls_bucketing_weighs_a_short_bucket_as_a_whole_one() -> None:
    """With 9 rows in buckets of 2 the last row counts twice: the mean of the buckets is not the mean."""
    X = rows(9, 5, 0).astype(float)
    means = [B.Average()(B.Bucketing(2)(X)) for _ in range(5)]
    assert max(distance(value, X.mean(0), X) for value in means) > 0.001
    np.testing.assert_allclose(ours(X, "bucketing(2) | mean", 0), X.mean(0))


def test_byzfls_geometric_median_stops_short() -> None:
    """Three steps from the origin, whatever is left: a round far from it ends nearer to the mean."""
    X = rows(20, 10, 4, "gaussian").astype(float) + 50
    X[:4] += 1000
    settled = B.GeometricMedian(nu=1e-6, T=3000)(X)
    assert distance(ours(X, "geometric_median", 4), settled, X) < 1e-6
    assert np.linalg.norm(B.GeometricMedian()(X) - settled) > 1


# Where Flower is wrong -------------------------------------------------------------------------------


def test_flowers_strategies_choose_by_rounding_beside_a_common_mean() -> None:
    """Clients send models; float32 |x|^2 + |y|^2 - 2 x y loses what they differ by."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=20_000)
    X = (centre + 1e-4 * rng.normal(size=(10, 20_000))).astype(np.float32)
    X[:2] += np.float32(3e-4)
    records = [next(iter(r.content.array_records.values())) for r in peers.replies(peers.layered(X))]
    assert multi_krum.compute_distances(records).min() < 0
    exact_rows = np.argsort(np.linalg.norm(X.astype(float) - X[2:].astype(float).mean(0), axis=1))
    assert set(exact_rows[-2:]) == {0, 1}
    result = aggregate(X, "multi_krum", eps=0.2, reference=centre.astype(np.float32))
    assert result.weights is not None
    np.testing.assert_array_equal(result.weights[:2], 0)
    chosen = multi_krum.select_multikrum([r.content for r in peers.replies(peers.layered(X))], 2, 8)
    first = peers.replies(peers.layered(X[:2]))
    names = [peers.flat(next(iter(c.array_records.values())).to_numpy_ndarrays())[:50] for c in chosen]
    attackers = [
        peers.flat(next(iter(r.content.array_records.values())).to_numpy_ndarrays())[:50] for r in first
    ]
    assert any(np.array_equal(a, b) for a in names for b in attackers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", ["mean", "median"])
def test_one_nan_spoils_flower(rule: str) -> None:
    X = rows(12, 30, 2)
    X[0, 7] = np.nan
    assert not np.isfinite(FLOWER[rule](X, 2)).all()
    assert not np.isfinite(STRATEGIES[rule](X, 2)).all()
    assert np.isfinite(ours(X, rule, 2)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_flowers_krum_chooses_a_row_of_nan() -> None:
    X = rows(12, 30, 2)
    X[5, 7] = np.nan
    assert np.isnan(FLOWER["krum"](X, 2)).any()
    assert np.isfinite(ours(X, "krum", 2)).all()


def test_flowers_multi_krum_weighs_by_what_clients_claim() -> None:
    """One client in range that claims many examples is the aggregate; a negative claim reverses it."""
    X = rows(12, 30, 2)
    strategy = peers.strategy("MultiKrum", num_malicious_nodes=2, num_nodes_to_select=10)
    middle = int(np.argmax(aggregate(X, "krum", eps=2 / 12).weights))
    claims = [10**12 if i == middle else 1 for i in range(12)]
    assert distance(strategy(peers.replies(peers.layered(X), claims)), X[middle], X) < 1e-5
    claims[middle] = -8
    lied = strategy(peers.replies(peers.layered(X), claims))
    assert np.linalg.norm(lied) > 3 * np.linalg.norm(ours(X, "multi_krum", 2))


def test_flowers_bulyan_strategy_chooses_all_rows_at_once() -> None:
    """The paper runs Krum again after each choice, as Flower's older function does."""
    differ = 0
    for seed in range(4):
        X = rows(15, 4, 3, seed=seed)
        strategy = peers.strategy("Bulyan", num_malicious_nodes=3)(peers.replies(peers.layered(X, 1)))
        function = peers.flat(F.aggregate_bulyan(legacy(X), 3, F.aggregate_krum, to_keep=0))
        assert distance(ours(X, "bulyan", 3), function, X) < 1e-5
        differ += distance(strategy, function, X) > 1e-3
    assert differ > 0


def test_flowers_bulyan_function_empties_the_callers_list() -> None:
    results = legacy(rows(15, 7, 3))
    F.aggregate_bulyan(results, 3, F.aggregate_krum, to_keep=0)
    assert len(results) < 15


def test_flowers_trimmed_mean_cuts_one_row_too_few() -> None:
    """int(0.29 * 100) is 28: the fraction is multiplied before it is rounded."""
    X = rows(100, 5, 0)
    X[:29] = 1000
    peer = peers.flat(F.aggregate_trimmed_avg(legacy(X), 0.29))
    value = np.asarray(aggregate(X, "trimmed_mean", eps=0.29).value)
    assert np.abs(value).max() < 10 < np.abs(peer).max()
