"""The peers' aggregation functions, called as their authors call them.

ByzFL's package imports torchvision for its own experiments, and torchvision's usual build does not load
beside a CPU-only torch. The aggregators need none of it, so they are imported without the package's
`__init__`. Flower's strategies look at a reply's content and at whether it is an error; a stand-in for
a message spares the network.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NEEDS = "the peers come with: pip install '.[bench]'"


def byzfl() -> ModuleType:
    """ByzFL's `aggregators`: a module that holds its aggregators and pre-aggregators.

    Raises:
        ModuleNotFoundError: ByzFL is not installed.
    """
    if "byzfl" not in sys.modules:
        spec = find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"ByzFL is not installed; {NEEDS}", name="byzfl")
        package = ModuleType("byzfl")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def byzfls_attacks() -> ModuleType:
    """ByzFL's `attacks`. Raises as `byzfl`."""
    byzfl()
    return importlib.import_module("byzfl.attacks")


def flower(module: str) -> ModuleType:
    """A module of Flower, such as `server.strategy.aggregate`, its chatter silenced.

    Raises:
        ModuleNotFoundError: Flower is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies about each other
        found = importlib.import_module(f"flwr.{module}")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    return found


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Reply:
    """What Flower's strategies look at in a client's reply.

    Attributes:
        content: a `RecordDict` with the client's arrays and metrics.
    """

    content: Any

    def has_error(self) -> bool:
        """Whether the client failed."""
        return False


def replies(layers: Sequence[Sequence[Array]], examples: Sequence[int] | None = None) -> list[Reply]:
    """The replies of clients with these layers; the arrays are serialised, as Flower has them."""
    app = flower("app")
    counts = [1] * len(layers) if examples is None else examples
    return [
        Reply(
            app.RecordDict(
                {
                    "arrays": app.ArrayRecord({str(i): app.Array(a) for i, a in enumerate(arrays)}),
                    "metrics": app.MetricRecord({"num-examples": count}),
                }
            )
        )
        for arrays, count in zip(layers, counts, strict=True)
    ]


def layered(rows: Array, layers: int = 10) -> list[list[Array]]:
    """Each row as a model of several layers, without copying it."""
    return [np.array_split(row, layers) for row in rows]


def flat(layers: Sequence[Array]) -> Array:
    """The layers of one model as a vector."""
    return np.concatenate([np.ravel(layer) for layer in layers])


def strategy(name: str, **options: Any) -> Callable[[list[Reply]], Array]:  # noqa: ANN401 (theirs)
    """A strategy of Flower's `serverapp` as a function from replies to the aggregate."""
    chosen = getattr(flower("serverapp.strategy"), name)(**options)

    def aggregate(answers: list[Reply]) -> Array:
        arrays, _ = chosen.aggregate_train(1, answers)
        return flat(arrays.to_numpy_ndarrays())

    return aggregate
