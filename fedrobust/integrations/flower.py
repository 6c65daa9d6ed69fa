"""Flower: any strategy, its weighted average replaced by a robust mean.

    from fedrobust.integrations.flower import RobustStrategy

    strategy = RobustStrategy("filter(eps=0.2)")                           # in place of FedAvg()
    strategy = RobustStrategy("filter", FedAdam(eta=0.01), max_share=0.1)  # and FedAdam's step stays

The wrapped strategy samples clients, writes their messages, and takes the server's step. Of a round's
replies it sees one: the robust mean, with the medians of what the clients report. So whatever it does
with an average, its optimiser, its metrics functions, it does with ours.

`RobustStrategy` is for the message API (`flwr.serverapp.strategy`), from flwr 1.28 on;
`RobustFitStrategy` does the same for the older one (`flwr.server.strategy`).
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any, TypeVar

import numpy as np

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.common import (
        EvaluateIns,
        EvaluateRes,
        FitIns,
        FitRes,
        Parameters,
        Scalar,
        ndarrays_to_parameters,
        parameters_to_ndarrays,
    )
    from flwr.server import strategy as older
    from flwr.server.client_manager import ClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Strategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; Flower comes with: pip install 'fedrobust[flower]'", name=error.name
    ) from error

from fedrobust.integrations.defence import Client, Defence, Offer, Round, Unreadable, medians
from fedrobust.rules import Aggregator, Rule
from fedrobust.text import finite, printable

NDArray = np.ndarray[Any, Any]

PREFIX = "fedrobust-"
"""Of our figures among the metrics."""

_log = logging.getLogger("flwr")
T = TypeVar("T")


class RobustStrategy(Strategy):
    """A strategy of Flower's whose weighted average is replaced by a robust mean.

    A reply that is malformed (an error, no arrays, other keys or shapes, values that are not finite, far
    too large) costs its client this turn; with fewer than `quorum` of those asked the model stays as it
    is. Every round is in `rounds`, without the model, and its figures are among the round's train
    metrics: `fedrobust-weights` and `fedrobust-scores` in the order of `fedrobust-nodes`,
    `fedrobust-certificate` (the farthest that malicious clients can have moved the mean, if honest
    updates spread no more than those kept) and others. Nothing of that is sent to clients.
    """

    def __init__(
        self,
        rule: str | Rule | Aggregator = "filter",
        strategy: Strategy | None = None,
        *,
        eps: float | str | None = None,
        max_share: float | None = None,
        quorum: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Wrap a strategy.

        Args:
            rule: how updates, the differences from the broadcast model, are combined.
            strategy: one that averages what its `aggregate_train` is given: FedAvg, FedAdam, FedAvgM,
                FedProx, ...; FedAvg() if not given.
            eps: as `Defence`, as all that follow.
            max_share: by default all clients count the same, whatever number of examples they report;
                with a cap they count by `num-examples` (the strategy's `weighted_by_key`) up to it.
            quorum: as `Defence`.
            seed: as `Defence`.

        Raises:
            InputError: a bad rule, or a number out of its range.
        """
        self.defence = Defence(rule, eps, max_share, quorum, seed)
        self.strategy = FedAvg() if strategy is None else strategy
        self.rounds: list[Round] = []
        self._asked: set[int] = set()
        self._broadcast = ArrayRecord()

    def summary(self) -> None:
        """Log what this is, and what it wraps."""
        _log.info("\t├──> Robust mean: %s", self.defence)
        _log.info("\t├──> of what %s would average:", type(self.strategy).__name__)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy does; what is broadcast, and to whom, is remembered."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._broadcast, self._asked = arrays, {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The wrapped strategy's step with the robust mean of the replies; None leaves the model."""
        answers, failed = _sorted(replies)
        reference = {key: array.numpy() for key, array in self._broadcast.items()}
        offers = [self._offer(reply, reference) for reply in answers]
        found = self.defence.decide(server_round, len(self._asked), offers, failed, reference)
        value = None if found.skipped or found.result is None else found.result.value
        self.rounds.append(_kept(found))
        for line in found.lines():
            _log.info("%s", line)
        answers, used = _firsts(answers, _node), set(found.influential)
        reported = [_metrics(reply) for reply in answers if _node(reply) in used]
        own = {f"{PREFIX}{key}": figure for key, figure in found.figures().items()}
        if answers:
            own[f"{PREFIX}nodes"] = [_node(reply) for reply in answers]
        if value is None:
            return None, MetricRecord(own)
        arrays = ArrayRecord({key: Array(leaf) for key, leaf in value.items()})
        one = self._one(answers[0], {self._key("arrayrecord_key", "arrays"): arrays}, reported)
        stepped, metrics = self.strategy.aggregate_train(server_round, [one])
        if stepped is not None:
            for key in stepped.keys() & value.keys():
                stepped[key] = Array(_settled(stepped[key].numpy(), value[key]))
        return stepped, MetricRecord({**(metrics or {}), **own})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the wrapped strategy makes of the medians of what the clients report."""
        answers, failed = _sorted(replies)
        for node, why in failed.items():
            _log.info("round %d: failed to evaluate %s: %s", server_round, node, printable(why))
        answers = _firsts(answers, _node)
        reported = [metrics for reply in answers if (metrics := _metrics(reply))]
        if not reported:
            return None
        return self.strategy.aggregate_evaluate(server_round, [self._one(answers[0], {}, reported)])

    def _offer(self, reply: Message, reference: Mapping[str, NDArray]) -> Offer:
        node, metrics = _node(reply), _metrics(reply)
        if node not in self._asked:
            return Offer(node, Unreadable("was not asked"))
        update = _arrays(reply, reference)
        return Offer(node, update, metrics.get(self._key("weighted_by_key", "num-examples")))

    def _one(
        self, reply: Message, arrays: dict[str, ArrayRecord], reported: list[Mapping[str, Any]]
    ) -> Message:
        """A reply with these arrays and the medians of what is reported, in place of all others."""
        metrics = {**medians(reported), self._key("weighted_by_key", "num-examples"): 1}
        one = copy.copy(reply)
        one.content = RecordDict({**arrays, "metrics": MetricRecord(metrics)})
        return one

    def _key(self, name: str, default: str) -> str:
        return str(getattr(self.strategy, name, default))


class RobustFitStrategy(older.Strategy):
    """`RobustStrategy` for the older strategy API, with its options.

    Figures that are lists are JSON text among the round's fit metrics, and clients go by the numbers of
    their nodes (`fedrobust-nodes`), or by their `cid` where they have none.
    """

    def __init__(
        self,
        rule: str | Rule | Aggregator = "filter",
        strategy: older.Strategy | None = None,
        *,
        eps: float | str | None = None,
        max_share: float | None = None,
        quorum: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Wrap a strategy; arguments and errors as `RobustStrategy`.

        Failures are judged by the quorum, in place of the wrapped strategy's `accept_failures`.
        """
        super().__init__()
        self.defence = Defence(rule, eps, max_share, quorum, seed)
        self.strategy = older.FedAvg() if strategy is None else strategy
        self.rounds: list[Round] = []
        self._asked: set[Client] = set()
        self._broadcast: list[NDArray] = []

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """As the wrapped strategy does."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """As the wrapped strategy does; what is broadcast, and to whom, is remembered."""
        asked = self.strategy.configure_fit(server_round, parameters, client_manager)
        self._asked = {_proxy(client) for client, _ in asked}
        self._broadcast = parameters_to_ndarrays(parameters)
        return asked

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """The wrapped strategy's step with the robust mean of the results; None leaves the model."""
        reference = {str(i): array for i, array in enumerate(self._broadcast)}
        results = sorted(results, key=lambda each: str(_proxy(each[0])))
        offers = [self._offer(client, result, reference) for client, result in results]
        failed = {_failed(i, failure): _why(failure) for i, failure in enumerate(failures)}
        found = self.defence.decide(server_round, len(self._asked), offers, failed, reference)
        value = None if found.skipped or found.result is None else found.result.value
        self.rounds.append(_kept(found))
        for line in found.lines():
            _log.info("%s", line)
        own: dict[str, Scalar] = {
            f"{PREFIX}{key}": json.dumps(finite(figure)) if isinstance(figure, list) else figure
            for key, figure in found.figures().items()
        }
        results = _firsts(results, _sender)
        own[f"{PREFIX}nodes"] = json.dumps([_proxy(client) for client, _ in results])
        if value is None:
            return None, own
        used = set(found.influential)
        reported = [result.metrics for client, result in results if _proxy(client) in used]
        one = replace(
            results[0][1],
            parameters=ndarrays_to_parameters([value[key] for key in reference]),
            num_examples=1,
            metrics=_scalars(reported),
        )
        stepped, metrics = self.strategy.aggregate_fit(server_round, [(results[0][0], one)], [])
        if stepped is not None:
            pairs = zip(parameters_to_ndarrays(stepped), map(value.__getitem__, reference), strict=True)
            stepped = ndarrays_to_parameters([_settled(new, robust) for new, robust in pairs])
        return stepped, {**metrics, **own}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """As the wrapped strategy does."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """What the wrapped strategy makes of the medians of what the clients report."""
        for index, failure in enumerate(failures):
            who, why = _failed(index, failure), printable(_why(failure))
            _log.info("round %d: failed to evaluate %s: %s", server_round, who, why)
        results = _firsts(results, _sender)
        loss = medians([{"loss": result.loss} for _, result in results]).get("loss")
        if not isinstance(loss, float):
            return None, {}
        metrics = _scalars([result.metrics for _, result in results])
        one = replace(results[0][1], loss=loss, num_examples=1, metrics=metrics)
        return self.strategy.aggregate_evaluate(server_round, [(results[0][0], one)], [])

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """As the wrapped strategy does."""
        return self.strategy.evaluate(server_round, parameters)

    def _offer(self, client: ClientProxy, result: FitRes, reference: Mapping[str, NDArray]) -> Offer:
        who, tensors = _proxy(client), result.parameters.tensors
        if who not in self._asked:
            return Offer(who, Unreadable("was not asked"))
        if len(tensors) != len(reference):
            return Offer(who, Unreadable(f"holds {len(tensors)} arrays, expected {len(reference)}"))
        update = _read({str(i): data for i, data in enumerate(tensors)}, reference)
        return Offer(who, update, result.num_examples)


# ---- what clients send ------------------------------------------------------------------------------


def _sorted(replies: Iterable[Message]) -> tuple[list[Message], dict[Client, str]]:
    """Those with content, and what the others say of their failures: by node, not as they came."""
    answers, failed = [], dict[Client, str]()
    for reply in sorted(replies, key=_node):
        if reply.has_error():
            failed[_node(reply)] = str(reply.error.reason)
        else:
            answers.append(reply)
    return answers, failed


def _firsts(replies: Iterable[T], client: Callable[[T], Client]) -> list[T]:
    """The first reply of each client, which is the one that counts."""
    found: dict[Client, T] = {}
    for reply in replies:
        found.setdefault(client(reply), reply)
    return list(found.values())


def _sender(result: tuple[ClientProxy, Any]) -> Client:
    return _proxy(result[0])


def _node(reply: Message) -> int:
    return int(reply.metadata.src_node_id)


def _metrics(reply: Message) -> Mapping[str, Any]:
    """The metrics in a reply; none if there is no record of them, or several."""
    records = list(reply.content.metric_records.values())
    return records[0] if len(records) == 1 else {}


def _arrays(reply: Message, reference: Mapping[str, NDArray]) -> dict[str, NDArray] | Unreadable:
    """The arrays in a reply; what the reply holds of them is let go."""
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        return Unreadable(f"holds {len(records)} records of arrays, expected one")
    (record,) = records
    if missing := [key for key in reference if key not in record]:
        return Unreadable(f"lacks {missing[0]!r}")
    if extra := [key for key in record if key not in reference]:
        return Unreadable(f"holds {extra[0]!r}, which was not broadcast")
    data = {key: record[key].data for key in reference}
    if wrong := [key for key in reference if record[key].stype != "numpy.ndarray"]:
        return Unreadable(f"holds {record[wrong[0]].stype!r} at {wrong[0]!r}, expected 'numpy.ndarray'")
    update = _read(data, reference)
    record.clear()
    return update


def _read(
    data: Mapping[str, bytes], reference: Mapping[str, NDArray]
) -> dict[str, NDArray] | Unreadable:
    """Arrays from their bytes, or what is wrong with the first that is not as it should be."""
    found = {}
    for key, array in reference.items():
        try:
            found[key] = load(data[key], array.shape)
        except Exception as error:  # noqa: BLE001 (whatever a stranger's bytes do, only they are refused)
            return Unreadable(f"{error} at {key!r}")
    return found


def load(data: bytes, shape: tuple[int, ...]) -> NDArray:
    """An array of numbers from numpy's format, as Flower's clients send it.

    Nothing is unpickled, and nothing is made room for before the header is found to be right.

    Raises:
        ValueError: these are no such bytes, or the array has another shape.
    """
    stream = BytesIO(data)
    if (version := np.lib.format.read_magic(stream)) != (1, 0):
        raise ValueError(f"is in version {version} of numpy's format, expected (1, 0)")
    found, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "fiub":
        raise ValueError(f"holds {dtype}, not numbers")
    if found != shape:
        raise ValueError(f"has shape {found}, expected {shape}")
    count = math.prod(shape)
    if len(data) != stream.tell() + count * dtype.itemsize:
        raise ValueError(f"holds {len(data)} bytes, not what {count} of {dtype} take")
    numbers = np.frombuffer(data, dtype, count, stream.tell())
    return numbers.reshape(shape, order="F" if by_columns else "C")


def _settled(stepped: NDArray, robust: NDArray) -> NDArray:
    """What the server's step came to, in the dtype of the broadcast; counters take no step."""
    return stepped.astype(robust.dtype, copy=False) if robust.dtype.kind == "f" else robust


def _proxy(client: ClientProxy) -> Client:
    return getattr(client, "node_id", None) or client.cid


def _failed(index: int, failure: tuple[ClientProxy, Any] | BaseException) -> Client:
    return f"#{index}" if isinstance(failure, BaseException) else _proxy(failure[0])


def _why(failure: tuple[ClientProxy, Any] | BaseException) -> str:
    return str(failure) if isinstance(failure, BaseException) else str(failure[1].status.message)


def _scalars(reported: Sequence[Mapping[str, Scalar]]) -> dict[str, Scalar]:
    return {key: value for key, value in medians(reported).items() if isinstance(value, float)}


def _kept(found: Round) -> Round:
    """A round without the model."""
    return found if found.result is None else replace(found, result=replace(found.result, value=None))


__all__ = ["RobustFitStrategy", "RobustStrategy"]
