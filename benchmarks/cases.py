"""What is measured: the machine's limits, our kernels, every rule, and the peers' equal functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.cluster.hierarchy  # noqa: F401 (what a rule imports at its first call is not its memory)
import torch
from torch import Tensor

import fedrobust
from benchmarks import peers
from benchmarks.rounds import EXACT, FEW, Shape
from fedrobust import CATALOG, RunningAggregate, kernels, reducers
from fedrobust.errors import InputError
from fedrobust.rules import Mixing

READ, WEIGHTED_SUM, PRODUCT, COPY, SQUARE = "read", "w @ X", "X @ X.T", "copy", "square product"
GRAM, GRAM_REFERENCE, GRAM_BFLOAT16 = "gram", "gram, reference", "gram, bfloat16"
MIX, SORT, NORMS, PRODUCTS = "mix", "sorted reduce", "norms", "product with one vector"
BARE = "without certificate"
PEERS = ("byzfl", "flower", "flower strategy")
EDGE = 4096  # of the square matrices whose product shows the processor's limit


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: `group/what`, the same for every shape.
        call: what is timed; it takes what `prepare` made of the rows.
        prepare: work that is not timed; it runs before every sample.
        memory: extra bytes that the call is known to need, to leave out what cannot run.
        reason: why it is left out in any case.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = lambda X: X
    memory: float = 0.0
    reason: str | None = None


def floors(shape: Shape) -> Iterator[Case]:
    """What the machine can do at best."""
    w = torch.full((shape.n,), 1 / shape.n)
    out = torch.empty(shape.n, min(shape.d, 10**6))
    square = torch.randn(EDGE, EDGE)
    yield Case(f"floor/{READ}", torch.sum)
    yield Case(f"floor/{WEIGHTED_SUM}", lambda X: torch.mv(X.T, w))
    yield Case(f"floor/{PRODUCT}", lambda X: X @ X.T)
    yield Case(f"floor/{COPY}", lambda X: out.copy_(X[:, : out.shape[1]]))
    yield Case(f"floor/{SQUARE}", lambda _: square @ square)


def kernel_cases(shape: Shape) -> Iterator[Case]:
    """The functions that touch all coordinates, one at a time."""
    w = np.full((1, shape.n), 1 / shape.n)
    reference = torch.full((shape.d,), 0.01)
    norms = np.full(shape.n, np.sqrt(shape.d))
    reducer = partial(reducers.rank_mean, low=shape.f, high=shape.n - shape.f)
    yield Case(f"kernel/{GRAM}", lambda X: kernels.gram(kernels.Block(X)))
    yield Case(f"kernel/{GRAM_REFERENCE}", lambda X: kernels.gram(kernels.Block(X, reference)))
    lowers = kernels.lowers(kernels.Block(torch.empty(1, 1)))
    yield Case(
        f"kernel/{GRAM_BFLOAT16}",
        lambda X: kernels.gram(kernels.Block(X), bfloat16=True),
        reason=None if lowers else f"in float32 on this processor, as `{GRAM}`",
    )
    yield Case(f"kernel/{PRODUCTS}", lambda X: kernels.products(kernels.Block(X), w.T, norms))
    yield Case(f"kernel/{MIX}", lambda X: kernels.mix_and_reduce(kernels.Block(X), w, None))
    yield Case(f"kernel/{SORT}", lambda X: kernels.mix_and_reduce(kernels.Block(X), None, reducer))
    yield Case(f"kernel/{NORMS}", lambda X: kernels.squared_norms(kernels.Block(X)))


COORDINATE_WISE = ["median", "trimmed_mean", "meamed", "sign_majority", "bulyan"]
STEPS = {"geometric_median": "geometric_median(steps=3)", "monna": "monna(index=0)"}
"""The parameters that ByzFL has by default, so that both sides do the same work."""
COMPOSED = ["nnm | filter", "nnm | geometric_median(steps=3)", "nnm | caf", "nnm | median"]


def rules() -> list[str]:
    """Every rule of the catalogue, mixings before the mean, and some compositions."""
    singles = [
        f"{name} | mean" if issubclass(rule, Mixing) else STEPS.get(name, name)
        for name, rule in CATALOG.items()
    ]
    return [*singles, "centered_clipping(radius=100.0, steps=3)", *COMPOSED]


def weightings() -> list[str]:
    """Those that end in a weighted sum."""
    return [rule for rule in rules() if rule.split(" | ")[-1] not in COORDINATE_WISE]


def ours(shape: Shape, *, bare: bool = True) -> Iterator[Case]:
    """Every rule; and again without the certificate."""
    for rule in rules():
        call = partial(_aggregate, rule=rule, eps=shape.f / shape.n)
        yield Case(f"ours/{rule}", call, _with_root if rule == "fltrust" else lambda X: X)
        if bare and rule in weightings():
            plain = partial(call, certified=False)
            prepare = _with_root if rule == "fltrust" else lambda X: X
            yield Case(f"ours {BARE}/{rule}", plain, prepare)


def hostile(shape: Shape) -> list[Case]:
    """What meets hostile values there: every rule, or those that take no more clients than that."""
    return [case for case in ours(shape, bare=False) if shape != FEW or case.name.split("/")[1] in EXACT]


LAST_ROW, LAST_PIECE = "filter after the last row", "filter after the last 2 MiB"
PIECE = 1 << 19


def arrival(shape: Shape) -> Iterator[Case]:
    """From the last update to the result, where all others have arrived before."""
    size = float(shape.bytes)
    yield Case(f"arrival/{LAST_ROW}", partial(_finish, eps=shape.f / shape.n), _all_but(0), memory=size)
    if shape.d > PIECE:
        held = _all_but(shape.d - PIECE)
        yield Case(f"arrival/{LAST_PIECE}", partial(_finish, eps=shape.f / shape.n), held, memory=size)


Arrived = tuple[RunningAggregate, int, int, Tensor]
"""What is there, the last row, how much of it is there, and the rest."""


def _all_but(start: int) -> Callable[[Tensor], Arrived]:
    def prepare(X: Tensor) -> Arrived:
        running = RunningAggregate(*X.shape)
        running.extend(X[:-1])
        row = running.begin()
        if start:
            running.write(row, 0, X[-1, :start])
        return running, row, start, X[-1, start:]

    return prepare


def _finish(arrived: Arrived, eps: float) -> Any:  # noqa: ANN401
    running, row, start, rest = arrived
    running.write(row, start, rest)
    return running.result("filter", eps)


def _with_root(X: Tensor) -> tuple[Tensor, Tensor]:
    return X, X[-1].clone()


def _aggregate(X: Any, rule: str, eps: float, **options: Any) -> Any:  # noqa: ANN401
    if isinstance(X, tuple):
        X, options = X[0], {**options, "anchors": {"root": X[1]}}
    return fedrobust.aggregate(X, rule, eps=eps, **options)


def byzfl(shape: Shape) -> Iterator[Case]:
    """ByzFL's functions on torch tensors, under the text of our rule that does the same."""
    if peers.installed("byzfl") is None:
        return
    B, (n, f, size) = peers.byzfl(), (shape.n, shape.f, shape.bytes)
    nnm = {"memory": 4.0 * n * (n - f) * shape.d}
    over = "enumerates the subsets of the clients" if n > 20 else None

    def case(rule: str, *chain: Callable[[Any], Any], **options: Any) -> Case:  # noqa: ANN401
        return Case(f"byzfl/{rule}", partial(_chain, chain), **{"memory": 2.0 * size, **options})

    yield case("mean", B.Average())
    yield case("krum", B.Krum(f))
    yield case("multi_krum", B.MultiKrum(f))
    yield case("monna(index=0)", B.MoNNA(f))
    yield case("geometric_median(steps=3)", B.GeometricMedian(T=3))
    yield case("centered_clipping", B.CenteredClipping(tau=100.0))
    yield case("centered_clipping(radius=100.0, steps=3)", B.CenteredClipping(L=3, tau=100.0))
    yield case("caf", B.CAF(f), memory=3.0 * size)
    yield case("nnm | mean", B.NNM(f), B.Average(), **nnm)
    yield case("nnm | geometric_median(steps=3)", B.NNM(f), B.GeometricMedian(T=3), **nnm)
    yield case("nnm | caf", B.NNM(f), B.CAF(f), **nnm)
    yield case("nnm | median", B.NNM(f), B.Median(), **nnm)
    yield case("bucketing | mean", B.Bucketing(2), B.Average())
    yield case("clip | mean", B.Clipping(100.0), B.Average(), prepare=torch.clone)
    yield case("arc | mean", B.ARC(f), B.Average(), prepare=torch.clone)
    yield case("median", B.Median(), memory=3.0 * size)
    yield case("trimmed_mean", B.TrMean(f), memory=3.0 * size)
    yield case("meamed", B.Meamed(f), memory=5.0 * size)
    yield case("mda", B.MDA(f), reason=over)
    yield case("smea", B.SMEA(f), reason="enumerates the subsets of the clients: minutes for 20 of them")


def _chain(functions: tuple[Callable[[Any], Any], ...], X: Any) -> Any:  # noqa: ANN401
    for function in functions:
        X = function(X)
    return X


def flower(shape: Shape) -> Iterator[Case]:
    """Flower's functions and strategies on models of ten layers, under our rules' texts."""
    if peers.installed("flwr") is None:
        return
    functions = peers.flower("server.strategy.aggregate")
    f, share, size = shape.f, shape.f / shape.n + 1e-9, float(shape.bytes)
    pairs = "loops over all pairs of clients in Python" if shape.n > 200 else None
    anew = "loops over all pairs of clients for each of the n - 2f choices" if shape.n > 50 else None

    def function(rule: str, call: Callable[[Any], Any], **options: Any) -> Case:  # noqa: ANN401
        return Case(f"flower/{rule}", call, _results, **options)

    def strategy(rule: str, name: str, **options: Any) -> Case:  # noqa: ANN401
        call = peers.strategy(name, **options)
        return Case(f"flower strategy/{rule}", call, _replies, memory=4.0 * size)

    yield function("mean", functions.aggregate, memory=size)
    yield function("median", functions.aggregate_median, memory=0.3 * size)
    yield function(
        "trimmed_mean", lambda r: functions.aggregate_trimmed_avg(r, share), memory=0.3 * size
    )
    yield function("krum", lambda r: functions.aggregate_krum(r, f, 0), memory=2 * size, reason=pairs)
    yield function(
        "multi_krum",
        lambda r: functions.aggregate_krum(r, f, len(r) - f),
        memory=2 * size,
        reason=pairs,
    )
    yield function(
        "bulyan",
        lambda r: functions.aggregate_bulyan(r, f, functions.aggregate_krum, to_keep=0),
        memory=2 * size,
        reason=anew,
    )
    yield strategy("mean", "FedAvg")
    yield strategy("median", "FedMedian")
    yield strategy("trimmed_mean", "FedTrimmedAvg", beta=share)
    yield strategy("krum", "Krum", num_malicious_nodes=f)
    yield strategy("multi_krum", "MultiKrum", num_malicious_nodes=f, num_nodes_to_select=shape.n - f)
    yield strategy("bulyan", "Bulyan", num_malicious_nodes=f)


def _results(X: Tensor) -> list[tuple[list[peers.Array], int]]:
    return [(layers, 1) for layers in peers.layered(X.numpy())]


def _replies(X: Tensor) -> list[peers.Reply]:
    return peers.replies(peers.layered(X.numpy()))


def cases(shape: Shape) -> list[Case]:
    """Everything that is measured at a shape."""
    return [
        *floors(shape),
        *kernel_cases(shape),
        *ours(shape),
        *arrival(shape),
        *byzfl(shape),
        *flower(shape),
    ]


REFUSALS = (InputError,)
"""What a call raises if a rule does not take so many clients: a reason, no failure."""
