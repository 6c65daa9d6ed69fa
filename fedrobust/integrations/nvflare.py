"""NVFlare: an aggregator that takes a robust mean of what the sites send.

    from fedrobust.integrations.nvflare import RobustAggregator

    recipe = FedAvgRecipe(..., aggregator=RobustAggregator("filter(eps=0.2)"))

It is a `ModelAggregator`, which the FedAvg workflow and its recipes take, and with that an `Aggregator`
for ScatterAndGather. Each update goes into the matrix of inner products when it arrives, while other
sites still train, and is then let go by the framework: what is kept are n x d numbers, and what is left
to do at the end of the round is the rule and one weighted sum.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from nvflare.apis.client import Client
    from nvflare.apis.dxo import from_shareable
    from nvflare.apis.fl_constant import FLMetaKey, ReservedKey, ServerCommandKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import ReturnCode, Shareable
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; NVFlare comes with: pip install 'fedrobust[nvflare]'", name=error.name
    ) from error

from fedrobust.aggregate import LARGEST_NORM, Aggregated
from fedrobust.errors import InputError
from fedrobust.integrations.defence import Defence, Offer, Round, Unreadable, medians
from fedrobust.running import RunningAggregate
from fedrobust.text import brief, finite, printable
from fedrobust.trees import Leaves, form_of, misfit, read_leaves

REPORT = "fedrobust.jsonl"
"""The file in the server's run folder that has a line for every round."""
ROUND = "fedrobust_round"
"""The private property of the server's context that holds the latest `Round`."""
_ROOM = 100
"""For so many sites, where the engine does not tell how many there are."""


@dataclass
class _Arena:
    """Updates of one form.

    Attributes:
        like: leaves as they are to be returned: their shapes, dtypes, and whether they are tensors.
        running: the updates, in wider dtypes, by their sites.
        examples: the number that each reports.
    """

    like: Mapping[str, tuple[Tensor, bool]]
    running: RunningAggregate
    examples: list[object] = field(default_factory=list)


@dataclass
class _Intake:
    """What has come in of a round.

    Attributes:
        asked: the sites to which the task was sent.
        reference: the model that was sent to them, and whether each of its arrays is a tensor; None if
            nobody told.
        clients: those that answered.
        refused: those of them whose answers cannot be used, and why.
        metrics: what each reports.
        arenas: by what updates must agree on. The first to arrive does not decide which form is right.
        differences: how many updates came as differences rather than models.
    """

    asked: set[str] = field(default_factory=set)
    reference: dict[str, tuple[Tensor, bool]] | None = None
    clients: list[str] = field(default_factory=list)
    refused: dict[Hashable, str] = field(default_factory=dict)
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    arenas: dict[Hashable, _Arena] = field(default_factory=dict)
    differences: int = 0


class RobustAggregator(ModelAggregator):
    """An aggregator of NVFlare's that malicious sites cannot steer.

    Updates may be whole models or differences (FULL, DIFF), of numpy arrays or tensors. Whole models
    are measured from the model that was sent out. A malformed update costs its site this turn and is
    named in the log; with too few left the model stays as it is. Weights, scores and certificate of
    every round are in the server's log, in `fedrobust.jsonl` in its run folder, and in `rounds`; nothing
    of that is in the model's meta data, which NVFlare sends to all sites.
    """

    def __init__(
        self,
        rule: str = "filter",
        eps: float | str | None = None,
        max_share: float | None = None,
        quorum: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Set a rule; NVFlare writes the arguments into the job's configuration.

        Args:
            rule: how updates are combined, as text.
            eps: as `fedrobust.integrations.defence.Defence`, as all that follow.
            max_share: by default all sites count the same, whatever number of steps they report; with
                a cap they count by `NUM_STEPS_CURRENT_ROUND` up to it.
            quorum: as `Defence`.
            seed: as `Defence`.

        Raises:
            InputError: a bad rule, or a number out of its range.
        """
        super().__init__()
        self.rule, self.eps, self.max_share = rule, eps, max_share
        self.quorum, self.seed = quorum, seed
        self.rounds: list[Round] = []
        self._defence = Defence(rule, eps, max_share, quorum, seed)
        self._intake = _Intake()
        self._lock = threading.Lock()  # results arrive in threads of the framework's

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Remember which model goes out, and to whom."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            task, asking = fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE), _asking(fl_ctx)
            with self._lock:
                if asking:
                    self._intake.asked.add(asking)
                if self._intake.reference is None:
                    self._intake.reference = _sent(task)

    def accept_model(self, model: FLModel) -> None:
        """Take one site's update, or refuse it and say so in the log; never raises."""
        self._take(str((model.meta or {}).get("client_name", "?")), model)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """The same for ScatterAndGather, which tells the site and the round by the message."""
        self.fl_ctx = fl_ctx
        name = _sender(shareable)
        code, number = shareable.get_return_code(), fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if code and code != ReturnCode.OK:
            return self._take(name, Unreadable(f"returns {code}"))
        of = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
        if of is not None and not (isinstance(of, int) and of == number):  # it may be anything
            self.warning(f"{name} sends an update for round {brief(of)} in {number}; it is left out")
            return False
        try:
            from_shareable(shareable)
            model = FLModelUtils.from_shareable(shareable)
        except Exception as error:  # noqa: BLE001 (whatever a stranger sends, only that is refused)
            return self._take(name, Unreadable(f"cannot be read: {error}"))
        return self._take(name, model)

    def aggregate_model(self) -> FLModel:
        """The robust mean of what came in, as a model or a difference; no difference if skipped."""
        with self._lock:
            intake, self._intake = self._intake, _Intake()
        found, params, differences = self._decide(intake)
        self._publish(found)
        if params is None:
            return FLModel(params_type=ParamsType.DIFF, params={}, meta={})
        reported = medians([intake.metrics[str(client)] for client in found.influential])
        kind = ParamsType.DIFF if differences else ParamsType.FULL
        return FLModel(params_type=kind, params=params, metrics=reported or None, meta={})

    def reset_stats(self) -> None:
        """Forget what came in."""
        with self._lock:
            self._intake = _Intake()

    # ---- one update ---------------------------------------------------------------------------------

    def _take(self, name: str, model: FLModel | Unreadable) -> bool:
        with self._lock:
            if name in self._intake.clients:
                why: str | None = "answers twice; the first counts"
            else:
                self._intake.clients.append(name)
                try:
                    why = model.reason if isinstance(model, Unreadable) else self._fold(name, model)
                except Exception as error:  # noqa: BLE001 (as above)
                    why = f"cannot be read: {type(error).__name__}: {error}"
                if why:
                    self._intake.refused[name] = why
        if why:
            self.warning(f"refused {name}: {printable(why)}")
        return not why

    def _fold(self, name: str, model: FLModel) -> str | None:
        """Put an update into the arena of its form; why not, if it cannot be."""
        intake, difference = self._intake, model.params_type == ParamsType.DIFF
        examples = (model.meta or {}).get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        update = _model(model.params)
        leaves: Leaves = {(key,): leaf for key, (leaf, _) in update.items()}
        if why := self._defence.refusal(Offer(name, update, examples)):
            return why
        if intake.reference is None:
            intake.reference = self._global_model()
        like, key = update, _look(update, difference)
        if intake.reference is not None:
            like = {k: v for k, v in intake.reference.items() if k in update or not difference}
            wanted: Leaves = {(k,): leaf for k, (leaf, _) in like.items()}
            if why := misfit(leaves, form_of(wanted)):
                return why
            key = form_of(wanted)
            if not difference:
                update = {k: (_wide(leaf) - _wide(like[k][0]), t) for k, (leaf, t) in update.items()}
        form = {k: _wide(leaf) for k, (leaf, _) in like.items()}
        tree = {k: leaf.to(form[k].dtype) for k, (leaf, _) in update.items()}
        floating = [leaf for leaf in tree.values() if leaf.is_floating_point()]
        if not sum(leaf.numel() for leaf in floating):
            return "holds no floating-point values"
        # By numpy: Python's own max loses a NaN that does not come first.
        largest = float(np.max([float(leaf.abs().max()) for leaf in floating if leaf.numel()]))
        if not largest < LARGEST_NORM:
            return (
                "holds values that are not finite"
                if not math.isfinite(largest)
                else (f"holds a value of size {largest:.3g}, more than {LARGEST_NORM:.0g}")
            )
        arena = intake.arenas.get(key)
        if arena is None:
            arena = intake.arenas[key] = _Arena(like, RunningAggregate(self._room(), like=form))
        arena.running.add(tree, client=name)
        arena.examples.append(examples)
        intake.metrics[name] = model.metrics if isinstance(model.metrics, dict) else {}
        intake.differences += difference
        return None

    def _global_model(self) -> dict[str, tuple[Tensor, bool]] | None:
        """The model that the workflow says it has, if no event told."""
        learnable = self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL) if self.fl_ctx else None
        weights = learnable.get("weights") if isinstance(learnable, Mapping) else None
        return _model(weights) if weights else None

    def _room(self) -> int:
        engine = self.fl_ctx.get_engine() if self.fl_ctx else None
        return max(len(engine.get_clients()) if engine else _ROOM, len(self._intake.asked), 1)

    # ---- the round ----------------------------------------------------------------------------------

    def _decide(self, intake: _Intake) -> tuple[Round, dict[str, Any] | None, bool]:
        """The round, the arrays that come of it, and whether they are differences."""
        number = int((self.fl_ctx and self.fl_ctx.get_prop(AppConstants.CURRENT_ROUND)) or 0)
        asked = max(len(intake.asked), len(intake.clients))
        found = Round(number, asked, tuple(intake.clients), intake.refused)
        if not intake.arenas:
            return replace(found, skipped="there is no usable update"), None, False
        arena = max(intake.arenas.values(), key=lambda each: len(each.running))
        for other in intake.arenas.values():
            for site in other.running.clients if other is not arena else ():
                intake.refused[str(site)] = "differs from most others in its arrays"
        try:
            result = self._mean(arena, self.seed + number)
        except InputError as error:
            return replace(found, skipped=str(error)), None, False
        sites = [str(site) for site in arena.running.clients]
        intake.refused |= {sites[row]: why for row, why in result.refused.items()}
        known = intake.reference is not None
        differences = 2 * intake.differences > len(intake.metrics)
        params = _params(arena.like, result.value, add=known and not differences)
        places = [intake.clients.index(site) for site in sites]
        found = replace(found, result=result.over(len(intake.clients), places, None, {}))
        found = self._defence.judge(found, (_array(leaf) for leaf in params.values()))
        return found, None if found.skipped else params, differences

    def _mean(self, arena: _Arena, seed: int) -> Aggregated:
        """The robust mean of an arena's updates.

        Raises:
            InputError: the rule does not allow for one.
        """
        n, refused = len(arena.examples), set[int]()
        while True:
            left = [row for row in range(n) if row not in refused]
            shares = np.zeros(n)
            shares[left] = self._defence.shares([arena.examples[row] for row in left])
            found = arena.running.result(self.rule, self.eps, seed, shares=shares)
            if self.max_share is None or found.refused.keys() == refused:
                return found
            # What was theirs would go to the others, above the most that one may have.
            refused = set(found.refused)

    def _publish(self, found: Round) -> None:
        """For the operator: the log, the context, and a line in the run folder."""
        self.rounds.append(found)
        for line in found.lines():
            self.info(line)
        if not self.fl_ctx:
            return
        self.fl_ctx.set_prop(ROUND, found, private=True, sticky=False)
        if engine := self.fl_ctx.get_engine():
            folder = Path(engine.get_workspace().get_run_dir(self.fl_ctx.get_job_id()))
            who = {"round": found.number, "clients": found.clients, "refusals": found.refused}
            with (folder / REPORT).open("a") as file:
                file.write(json.dumps(finite(who | found.figures())) + "\n")


# ---- sites ------------------------------------------------------------------------------------------


def _sender(shareable: Shareable) -> str:
    """Who sent it: the client that the server authenticated, or, if it names none, who it says it is."""
    client = shareable.get_header(ServerCommandKey.FL_CLIENT)
    said = shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, default="?")
    return str(client.name if isinstance(client, Client) else said)


def _asking(fl_ctx: FLContext) -> str:
    """Who asks for a task: the site's own word, so only a name that the engine knows counts; else ""."""
    peer, engine = fl_ctx.get_peer_context(), fl_ctx.get_engine()
    name = peer.get_identity_name() if peer is not None else ""
    if not isinstance(name, str):
        return ""
    # Made-up names would raise the number of sites asked, and with it the quorum.
    known = engine is None or name in {client.name for client in engine.get_clients()}
    return name if known else ""


# ---- arrays -----------------------------------------------------------------------------------------


def _model(params: object) -> dict[str, tuple[Tensor, bool]]:
    """A model's arrays by name, as tensors, and whether each came as one.

    Raises:
        InputError: these are no arrays of numbers by name.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"holds {type(params).__name__}, expected arrays by name")
    # Tensors that NVFlare has put on disk are read here, one update at a time.
    held = {str(k): v.materialize() if hasattr(v, "materialize") else v for k, v in params.items()}
    leaves = read_leaves(held)
    if isinstance(leaves, str):
        raise InputError(leaves)
    if nested := [path for path in leaves if len(path) != 1]:
        raise InputError(f"is nested at {'.'.join(map(str, nested[0]))!r}, expected arrays by name")
    named = {str(path[0]): leaf for path, leaf in leaves.items()}
    return {key: (leaf, isinstance(held[key], Tensor)) for key, leaf in named.items()}


def _sent(task: object) -> dict[str, tuple[Tensor, bool]] | None:
    """The model in a task for the sites, if there is one."""
    try:
        params = FLModelUtils.from_shareable(task).params
    except ValueError:  # a task without data
        return None
    return _model(params) if params else None


def _look(update: Mapping[str, tuple[Tensor, bool]], difference: bool) -> Hashable:
    """What updates must agree on where the model that they come from is not known."""
    names = frozenset((k, tuple(leaf.shape), leaf.dtype, t) for k, (leaf, t) in update.items())
    return difference, names


def _wide(leaf: Tensor) -> Tensor:
    """In which differences, means and medians lose nothing that the model's own dtype keeps."""
    if leaf.is_floating_point():
        return leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    return leaf.to(torch.int64)


def _params(
    like: Mapping[str, tuple[Tensor, bool]], value: Mapping[str, Tensor], *, add: bool
) -> dict[str, Any]:
    """Arrays of the form of `like`; added to it, or not."""
    params = dict[str, Any]()
    for key, (leaf, is_tensor) in like.items():
        found = (value[key] + _wide(leaf) if add else value[key]).to(leaf.dtype)
        params[key] = found if is_tensor else found.cpu().numpy()
    return params


def _array(leaf: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401 (an array or a tensor)
    return np.asarray(leaf.float().cpu() if isinstance(leaf, Tensor) else leaf)


__all__ = ["REPORT", "ROUND", "RobustAggregator"]
