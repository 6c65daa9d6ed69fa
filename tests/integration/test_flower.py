"""The strategies for Flower, driven by Flower's own loops, and by its SuperLink and SuperNodes.

The quick tests run `Strategy.start` and `Server.fit` over a grid and proxies that call the clients in
this process: real messages, no network. The slow ones start real processes.
"""

# ruff: noqa: ARG002, ARG005 (arguments that the interfaces of the host have)

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="needs Flower: pip install 'fedrobust[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import Server, SimpleClientManager
from flwr.server import strategy as older
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid
from flwr.serverapp import strategy as newer

from fedrobust import InputError
from fedrobust.integrations.flower import RobustFitStrategy, RobustStrategy, load

Arrays = dict[str, np.ndarray[Any, Any]]
Client = Callable[[int, Message], RecordDict]

NODES = 10
START: Arrays = {
    "weight": np.zeros((3, 4), np.float32),
    "scale": np.float64(1.0) * np.ones(()),
    "batches": np.array(0, np.int64),
}


@pytest.fixture(autouse=True)
def _identity() -> None:
    """What a ServerApp's process knows of itself before it makes messages, since flwr 1.32."""
    with contextlib.suppress(ModuleNotFoundError):
        identity = import_module("flwr.supercore.task_identity").TaskIdentity
        identity.task_id = identity.run_id = identity.node_id = 1


class Loopback(Grid):
    """A grid whose nodes are functions of this process. `silent` ones never answer in time."""

    def __init__(self, client: Client, silent: Iterable[int] = ()) -> None:
        self.client, self.silent = client, set(silent)
        self.sent: list[Message] = []

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, NODES + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            self.sent.append(message)
            node = message.metadata.dst_node_id
            if node in self.silent:
                continue
            try:
                replies.append(Message(self.client(node, message), reply_to=message))
            except ArithmeticError as error:
                replies.append(Message(Error(0, str(error)), reply_to=message))
        return replies


def received(message: Message) -> Arrays:
    return {key: array.numpy() for key, array in message.content["arrays"].items()}


def trained(node: int, message: Message) -> Arrays:
    """One step towards ones, by each client in its own way; three more batches."""
    before, rng = received(message), np.random.default_rng(node)
    noise = rng.normal(scale=0.05, size=(3, 4)).astype(np.float32)
    return {
        "weight": before["weight"] + 0.5 * (1 + noise - before["weight"]),
        "scale": np.asarray(before["scale"] * 1.01),
        "batches": np.asarray(before["batches"] + 3),
    }


def content(arrays: Arrays, **metrics: Any) -> RecordDict:
    record = ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})
    return RecordDict(
        {"arrays": record, "metrics": MetricRecord({"num-examples": 10, "loss": 1.0, **metrics})}
    )


def honest(node: int, message: Message) -> RecordDict:
    if message.metadata.message_type == "evaluate":
        return RecordDict({"metrics": MetricRecord({"num-examples": 10, "accuracy": 0.5 + node / 100})})
    return content(trained(node, message))


def start(
    strategy: newer.Strategy, client: Client = honest, rounds: int = 3, silent: Iterable[int] = ()
) -> tuple[newer.Result, Loopback]:
    grid = Loopback(client, silent)
    arrays = ArrayRecord({key: Array(np.asarray(value)) for key, value in START.items()})
    return strategy.start(grid, arrays, num_rounds=rounds), grid


def inner(name: str = "FedAvg", **options: Any) -> Any:
    return getattr(newer, name)(min_train_nodes=NODES, min_available_nodes=NODES, **options)


# ---- what takes the server's step stays -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", {}),
        ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.9}),
        ("FedAdam", {"eta": 0.2}),
        ("FedYogi", {"eta": 0.2}),
        ("FedAdagrad", {"eta": 0.2}),
        ("FedProx", {"proximal_mu": 0.1}),
    ],
)
def test_with_the_plain_mean_it_is_the_wrapped_strategy(name: str, options: dict[str, Any]) -> None:
    expected, _ = start(inner(name, **options))
    found, _ = start(RobustStrategy("mean", inner(name, **options)))
    for key in ("weight", "scale"):
        np.testing.assert_allclose(
            found.arrays[key].numpy(), expected.arrays[key].numpy(), rtol=1e-5, atol=1e-6
        )
        assert found.arrays[key].numpy().dtype == START[key].dtype
    assert found.arrays["batches"].numpy() == 9
    assert found.arrays["batches"].numpy().dtype == np.int64
    loss = {number: record["loss"] for number, record in expected.train_metrics_clientapp.items()}
    assert {n: r["loss"] for n, r in found.train_metrics_clientapp.items()} == pytest.approx(loss)


# ---- a malformed reply costs its client the turn ----------------------------------------------------


def _bytes(array: Any, *, pickled: bool = False) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


def _raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(3, 4), stype=stype, data=data)


def _with(arrays: Arrays, **changed: Any) -> RecordDict:
    """The arrays of an honest client, some of them replaced, or left out where None is given."""
    record = ArrayRecord()
    for key, value in {**arrays, **changed}.items():
        if value is not None:
            record[key] = value if isinstance(value, Array) else Array(np.asarray(value))
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10, "loss": 1.0})})


_GOOD = np.ones((3, 4), np.float32)
_BOMB = _bytes(_GOOD).replace(b"(3, 4)", b"(9**9,)")
_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9), }"
_VAST = b"\x93NUMPY\x01\x00v\x00" + _HEADER.ljust(117) + b"\n"

REFUSED: dict[str, tuple[Callable[[Arrays], RecordDict], str]] = {
    "nan": (lambda a: _with(a, weight=a["weight"] * np.nan), "not finite"),
    "inf": (lambda a: _with(a, weight=np.full((3, 4), np.inf, np.float32)), "not finite"),
    "beyond float32": (lambda a: _with(a, weight=np.full((3, 4), 1e300)), "not finite"),
    "another shape": (lambda a: _with(a, weight=np.ones((4, 3), np.float32)), "has shape (4, 3)"),
    "a scalar": (lambda a: _with(a, weight=np.float32(1)), "has shape ()"),
    "a key too few": (lambda a: _with(a, weight=None), "lacks 'weight'"),
    "a key too many": (lambda a: _with(a, evil=a["weight"]), "holds 'evil'"),
    "integers": (lambda a: _with(a, weight=np.ones((3, 4), np.int64)), "has integers"),
    "complex": (lambda a: _with(a, weight=np.ones((3, 4), np.complex64)), "complex64"),
    "text": (lambda a: _with(a, weight=np.full((3, 4), "x")), "not numbers"),
    "records": (lambda a: _with(a, weight=np.zeros((3, 4), [("a", "f4")])), "not numbers"),
    "a counter in floats": (lambda a: _with(a, batches=np.float32(3)), "expected integers"),
    "pickled": (
        lambda a: _with(a, weight=_raw(_bytes(np.array([[print]], dtype=object), pickled=True))),
        "not numbers",
    ),
    "no array": (lambda a: _with(a, weight=_raw(b"rubbish")), "at 'weight'"),
    "no bytes": (lambda a: _with(a, weight=_raw(b"")), "at 'weight'"),
    "cut off": (lambda a: _with(a, weight=_raw(_bytes(_GOOD)[:-4])), "bytes"),
    "too long": (lambda a: _with(a, weight=_raw(_bytes(_GOOD) + b"12345678")), "bytes"),
    "a header of code": (lambda a: _with(a, weight=_raw(_BOMB)), "at 'weight'"),
    "a header of terabytes": (lambda a: _with(a, weight=_raw(_VAST)), "has shape"),
    "another format": (lambda a: _with(a, weight=_raw(_bytes(_GOOD), "torch")), "'torch'"),
    "no record": (lambda a: RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "0 records"),
    "empty": (lambda a: RecordDict(), "0 records"),
    "two records": (
        lambda a: RecordDict({"arrays": content(a)["arrays"], "more": content(a)["arrays"]}),
        "2 records",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_malformed_reply_costs_its_client_the_turn(kind: str) -> None:
    malformed, reason = REFUSED[kind]

    def client(node: int, message: Message) -> RecordDict:
        if node > 2 or message.metadata.message_type == "evaluate":
            return honest(node, message)
        return malformed(trained(node, message))

    strategy = RobustStrategy("filter(eps=0.2)", inner(fraction_evaluate=0.0))
    result, _ = start(strategy, client)
    np.testing.assert_allclose(result.arrays["weight"].numpy(), 7 / 8, atol=0.05)
    assert result.arrays["batches"].numpy() == 9
    assert [set(each.refused) for each in strategy.rounds] == [{1, 2}] * 3
    assert all(reason in why for each in strategy.rounds for why in each.refused.values()), (
        strategy.rounds[0].refused
    )
    last = result.train_metrics_clientapp[3]
    assert (last["fedrobust-accepted"], last["fedrobust-refused"]) == (8, 2)
    assert last["fedrobust-nodes"] == list(range(1, 11))
    assert last["fedrobust-weights"][:2] == [0.0, 0.0]
    assert sum(last["fedrobust-weights"]) == pytest.approx(1)
    assert last["fedrobust-scores"][:2] == [np.inf, np.inf]


@settings(deadline=None, max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 200),
    more=st.binary(max_size=20),
)
def test_whatever_the_bytes_are_they_give_the_right_shape_or_are_refused(
    changes: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    data = bytearray(_bytes(_GOOD))
    for place, value in changes:
        data[place] = value
    data = data[: len(data) - cut] + more
    try:
        found = load(bytes(data), (3, 4))
    except Exception:  # noqa: BLE001 (which the strategies catch as broadly)
        return
    assert found.shape == (3, 4)
    assert found.dtype.kind in "fiub"


@pytest.mark.parametrize("kind", ["a key too many", "another shape"])
def test_the_same_replies_end_a_run_of_flowers_own(kind: str) -> None:
    """What this is good for; should Flower come to refuse such replies, this test says so."""

    def client(node: int, message: Message) -> RecordDict:
        return honest(node, message) if node > 2 else REFUSED[kind][0](trained(node, message))

    with pytest.raises(Exception, match="same"):
        start(inner("FedMedian", fraction_evaluate=0.0), client)


@pytest.mark.parametrize("attack", [-1e4, 1e30, -5.0])
@pytest.mark.parametrize("rule", ["filter(eps=0.2)", "nnm | filter(eps=0.2)", "median", "multi_krum"])
def test_finite_lies_do_not_steer_the_mean(attack: float, rule: str) -> None:
    def client(node: int, message: Message) -> RecordDict:
        arrays, before = trained(node, message), received(message)
        if node <= 2:
            lie = before["weight"] + np.float32(attack) * (arrays["weight"] - before["weight"])
            return content({**arrays, "weight": lie}, **{"num-examples": 10**12, "loss": -1e300})
        return content(arrays)

    result, _ = start(RobustStrategy(rule, inner(fraction_evaluate=0.0), eps=0.2), client)
    np.testing.assert_allclose(result.arrays["weight"].numpy(), 7 / 8, atol=0.08)
    assert result.train_metrics_clientapp[3]["loss"] == 1.0


# ---- counts, failures, late clients -----------------------------------------------------------------


def test_reported_examples_count_up_to_the_cap_only() -> None:
    def client(node: int, message: Message) -> RecordDict:
        arrays = {**trained(node, message), "weight": np.full((3, 4), node == 1, np.float32)}
        return content(arrays, **{"num-examples": 10**12 if node == 1 else 10})

    def weight(**options: Any) -> float:
        result, _ = start(RobustStrategy("mean", inner(fraction_evaluate=0.0), **options), client, 1)
        return float(result.arrays["weight"].numpy()[0, 0])

    assert weight() == pytest.approx(0.1)
    assert weight(max_share=0.2) == pytest.approx(0.2)
    assert weight(max_share=0.05) == pytest.approx(0.1)


@pytest.mark.parametrize("count", [0, -45, float("nan"), float("inf"), [10], 1e300])
def test_impossible_counts_are_refused_where_they_matter(count: Any) -> None:
    def client(node: int, message: Message) -> RecordDict:
        return content(trained(node, message), **({"num-examples": count} if node == 1 else {}))

    strategy = RobustStrategy("mean", inner(fraction_evaluate=0.0), max_share=0.2)
    start(strategy, client, 1)
    assert strategy.rounds[0].refused == {1: f"reports {count!r} examples"}
    unconcerned = RobustStrategy("mean", inner(fraction_evaluate=0.0))
    start(unconcerned, client, 1)
    assert not unconcerned.rounds[0].refused


def test_failures_and_late_clients_are_told_apart_and_the_round_goes_on() -> None:
    def client(node: int, message: Message) -> RecordDict:
        if node == 3:
            raise ArithmeticError("no GPU\x1b[2J")
        return honest(node, message)

    strategy = RobustStrategy("filter", inner())
    result, _ = start(strategy, client, silent=[4, 5])
    last = result.train_metrics_clientapp[3]
    counts = ("asked", "accepted", "refused", "failed", "absent", "skipped")
    assert [last[f"fedrobust-{what}"] for what in counts] == [10, 7, 0, 1, 2, 0]
    assert strategy.rounds[0].failed == {3: "no GPU\x1b[2J"}
    assert not any("\x1b" in line for line in strategy.rounds[0].lines())


def test_with_too_few_the_model_stays_as_it_is() -> None:
    strategy = RobustStrategy("filter", inner(), quorum=0.7)
    result, grid = start(strategy, silent=[1, 2, 3, 4])
    assert [each.skipped for each in strategy.rounds] == ["6 updates, 7 are needed"] * 3
    np.testing.assert_equal(received(grid.sent[-1])["weight"], START["weight"])
    assert result.train_metrics_clientapp[1]["fedrobust-skipped"] == 1


@pytest.mark.parametrize("silent", [range(1, 11), ()])
def test_a_round_without_a_usable_reply_is_survived(silent: Iterable[int]) -> None:
    strategy = RobustStrategy("filter", inner(fraction_evaluate=0.0))
    start(strategy, lambda _node, _message: RecordDict(), silent=silent)
    assert [each.skipped for each in strategy.rounds] == ["there is no usable update"] * 3


def test_a_rule_that_needs_more_clients_skips_the_round() -> None:
    strategy = RobustStrategy("bulyan(eps=0.3)", inner())
    start(strategy, rounds=1)
    assert "bulyan" in strategy.rounds[0].skipped


# ---- metrics ----------------------------------------------------------------------------------------


def test_nothing_of_weights_or_scores_goes_to_clients() -> None:
    _, grid = start(RobustStrategy("filter", inner()))
    assert {message.metadata.message_type for message in grid.sent} == {"train", "evaluate"}
    for message in grid.sent:
        assert set(message.content) == {"arrays", "config"}
        assert isinstance(message.content["config"], ConfigRecord)
        assert set(message.content["config"]) == {"server-round"}
        assert set(message.content["arrays"]) == set(START)


def test_evaluation_is_the_median_of_what_sound_clients_report() -> None:
    def client(node: int, message: Message) -> RecordDict:
        if message.metadata.message_type == "train":
            return honest(node, message)
        odd = {
            1: {"accuracy": 1e300},
            2: {"accuracy": float("nan")},
            3: {"lies": 1},
            4: {"accuracy": [1]},
        }
        return RecordDict(
            {"metrics": MetricRecord(odd.get(node, {"accuracy": 0.9, "num-examples": -3}))}
        )

    result, _ = start(RobustStrategy("filter", inner()), client)
    assert all(dict(r) == {"accuracy": 0.9} for r in result.evaluate_metrics_clientapp.values())


def test_a_node_that_answers_often_is_heard_once() -> None:
    class Insistent(Loopback):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return [*replies, *[r for r in replies if r.metadata.src_node_id == 3] * 20]

    def client(node: int, message: Message) -> RecordDict:
        if message.metadata.message_type == "train":
            return content(trained(node, message), loss=1e9 if node == 3 else 1.0)
        return RecordDict({"metrics": MetricRecord({"num-examples": 10, "accuracy": float(node == 3)})})

    arrays = ArrayRecord({key: Array(np.asarray(value)) for key, value in START.items()})
    result = RobustStrategy("filter", inner()).start(Insistent(client), arrays, num_rounds=2)
    told = dict(result.train_metrics_clientapp[2])
    assert told["fedrobust-nodes"] == list(range(1, NODES + 1))
    assert len(told["fedrobust-weights"]) == NODES  # type: ignore[arg-type]
    assert told["loss"] == 1.0
    assert dict(result.evaluate_metrics_clientapp[2]) == {"accuracy": 0.0}


def test_metrics_functions_and_keys_of_the_wrapped_strategy_stay() -> None:
    def own(records: list[RecordDict], key: str) -> MetricRecord:
        (record,) = records
        return MetricRecord({"perplexity": float(np.exp(record["metrics"]["loss"])), "key": len(key)})

    strategy = RobustStrategy("filter", inner(train_metrics_aggr_fn=own, weighted_by_key="size"))
    result, _ = start(strategy)
    assert result.train_metrics_clientapp[1]["perplexity"] == pytest.approx(np.e)
    assert result.train_metrics_clientapp[1]["key"] == 4


@pytest.mark.parametrize("options", [{"max_share": 0.0}, {"quorum": 1.5}, {"rule": "filtre"}])
def test_bad_settings_are_told_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RobustStrategy(**options)
    with pytest.raises(InputError):
        RobustFitStrategy(**options)


# ---- the older API ----------------------------------------------------------------------------------


class Proxy(ClientProxy):
    """A client of the older API in this process."""

    def __init__(self, number: int, lie: Callable[[list[Any]], Parameters] | None) -> None:
        super().__init__(str(number))
        self.number, self.lie = number, lie

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        weight, batches = parameters_to_ndarrays(ins.parameters)
        noise = np.random.default_rng(self.number).normal(scale=0.05, size=(3, 4)).astype(np.float32)
        arrays = [weight + 0.5 * (1 + noise - weight), np.asarray(batches + 3)]
        parameters = self.lie(arrays) if self.lie else ndarrays_to_parameters(arrays)
        return FitRes(Status(Code.OK, ""), parameters, 10, {"loss": 1.0, "note": "text"})

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        loss = 1e300 if self.lie else 0.25
        return EvaluateRes(Status(Code.OK, ""), loss, -1 if self.lie else 10, {"accuracy": loss})

    def get_properties(self, *_: Any) -> Any:
        raise NotImplementedError

    def get_parameters(self, *_: Any) -> Any:
        raise NotImplementedError

    def reconnect(self, *_: Any) -> Any:
        raise NotImplementedError


def fit(strategy: older.Strategy, lie: Callable[[list[Any]], Parameters] | None = None) -> Any:
    manager = SimpleClientManager()
    for number in range(NODES):
        manager.register(Proxy(number, lie if number < 2 else None))
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(num_rounds=3, timeout=None)
    return parameters_to_ndarrays(server.parameters), history


def earlier(name: str = "FedAvg", **options: Any) -> Any:
    first = ndarrays_to_parameters([START["weight"], START["batches"]])
    sizes = {"min_fit_clients": NODES, "min_available_clients": NODES}
    return getattr(older, name)(initial_parameters=first, **sizes, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvg", {}),
        ("FedAvg", {"inplace": False}),
        ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.9}),
        ("FedAdam", {"eta": 0.2}),
        ("FedYogi", {"eta": 0.2}),
        ("FedAdagrad", {"eta": 0.2}),
    ],
)
def test_older_with_the_plain_mean_it_is_the_wrapped_strategy(
    name: str, options: dict[str, Any]
) -> None:
    expected, _ = fit(earlier(name, **options))
    (weight, batches), _ = fit(RobustFitStrategy("mean", earlier(name, **options)))
    np.testing.assert_allclose(weight, expected[0], rtol=1e-5, atol=1e-6)
    assert (weight.dtype, batches.dtype, int(batches)) == (np.float32, np.int64, 9)


LIES: dict[str, Callable[[list[Any]], Parameters]] = {
    "nan": lambda arrays: ndarrays_to_parameters([arrays[0] * np.nan, arrays[1]]),
    "an array too few": lambda arrays: ndarrays_to_parameters(arrays[:1]),
    "another shape": lambda arrays: ndarrays_to_parameters([arrays[0].T, arrays[1]]),
    "rubbish": lambda arrays: Parameters([b"rubbish", b""], "numpy.ndarray"),
    "nothing": lambda arrays: Parameters([], ""),
}


@pytest.mark.parametrize("kind", LIES)
def test_older_a_malformed_result_costs_its_client_the_turn(kind: str) -> None:
    strategy = RobustFitStrategy("filter(eps=0.2)", earlier(accept_failures=False))
    (weight, _), history = fit(strategy, LIES[kind])
    np.testing.assert_allclose(weight, 7 / 8, atol=0.05)
    assert [set(each.refused) for each in strategy.rounds] == [{"0", "1"}] * 3
    told = {key: values[-1][1] for key, values in history.metrics_distributed_fit.items()}
    assert told["fedrobust-refused"] == 2
    weights = dict(
        zip(json.loads(told["fedrobust-nodes"]), json.loads(told["fedrobust-weights"]), strict=True)
    )
    assert sum(weights.values()) == pytest.approx(1)
    assert (weights["0"], weights["1"]) == (0, 0)
    scores = json.loads(told["fedrobust-scores"], parse_constant=pytest.fail)  # JSON has no Infinity
    assert scores.count(None) == 2
    assert history.losses_distributed[-1] == (3, 0.25)
