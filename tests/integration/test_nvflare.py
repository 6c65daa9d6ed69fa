"""The aggregator for NVFlare: by its own classes in this process, and, slow, by its simulator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedrobust[nvflare]'")

from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

import fedrobust as fr
from fedrobust import InputError
from fedrobust.integrations.nvflare import ROUND, RobustAggregator

EXAMPLE = Path(__file__).parents[2] / "examples" / "nvflare" / "job.py"
Params = dict[str, Any]
SITES = [f"site-{i}" for i in range(1, 11)]
MODEL: Params = {
    "weight": np.full((3, 4), 100.0, np.float32),
    "scale": np.array(2.0),
    "batches": np.array(5, np.int64),
}


def change(site: str) -> Params:
    """What an honest site's training does."""
    rng = np.random.default_rng(int(site.removeprefix("site-")))
    return {
        "weight": (1 + 0.05 * rng.normal(size=(3, 4))).astype(np.float32),
        "scale": np.asarray(0.5 + 0.01 * rng.normal()),
        "batches": np.array(3, np.int64),
    }


def trained(site: str) -> Params:
    return {key: np.asarray(MODEL[key] + value) for key, value in change(site).items()}


def context(model: Params | None = MODEL, number: int = 0) -> FLContext:
    """The server's, as the workflows leave it for an aggregator."""
    found = FLContext()
    found.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=False)
    if model is not None:
        learnable = make_model_learnable(weights=model, meta_props={})
        found.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=True)
    return found


class Engine:
    """What the aggregator asks of NVFlare's: who takes part, and where the run's files go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_clients(self) -> list[Client]:
        return [Client(site, "token") for site in SITES]

    def get_workspace(self) -> Engine:
        return self

    def get_run_dir(self, _job: str) -> str:
        return str(self._folder)

    def fire_event(self, _event: str, _fl_ctx: FLContext) -> None:
        pass

    def put_into(self, fl_ctx: FLContext) -> None:
        fl_ctx.set_prop(ReservedKey.ENGINE, self, private=True, sticky=False)


def result(site: str, params: Any, kind: ParamsType = ParamsType.FULL, **more: Any) -> FLModel:
    meta = {"client_name": site, MetaKey.NUM_STEPS_CURRENT_ROUND: more.pop("steps", 10)}
    return FLModel(params_type=kind, params=params, meta=meta, **more)


def gathered(
    send: Callable[[str], FLModel], model: Params | None = MODEL, **options: Any
) -> tuple[FLModel, RobustAggregator]:
    aggregator = RobustAggregator(**{"rule": "filter(eps=0.2)", **options})
    aggregator.fl_ctx = context(model)
    for site in SITES:
        aggregator.accept_model(send(site))
    return aggregator.aggregate_model(), aggregator


def checked(found: FLModel, kind: ParamsType = ParamsType.FULL, base: Params = MODEL) -> None:
    """It is the model after an honest round, or the difference, and of the model's form."""
    assert found.params_type == kind
    assert set(found.params) == set(MODEL)
    for key, value in found.params.items():
        before = np.zeros(()) if kind == ParamsType.DIFF else base[key]
        step = {"weight": 1.0, "scale": 0.5, "batches": 3}[key]
        np.testing.assert_allclose(np.asarray(value) - before, step, atol=0.08)
        assert np.asarray(value).dtype == MODEL[key].dtype
        assert np.shape(value) == np.shape(MODEL[key])


# ---- models and differences, arrays and tensors -----------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("kind", [ParamsType.FULL, ParamsType.DIFF])
def test_models_and_differences(kind: ParamsType, *, tensors: bool, known: bool) -> None:
    def put(params: Params) -> Params:
        return {key: torch.from_numpy(np.array(value)) for key, value in params.items()}

    def send(site: str) -> FLModel:
        params = trained(site) if kind == ParamsType.FULL else change(site)
        return result(site, put(params) if tensors else params, kind)

    model = put(MODEL) if tensors else MODEL
    found, aggregator = gathered(send, model if known else None)
    checked(found, kind)
    assert all(isinstance(value, torch.Tensor) == tensors for value in found.params.values())
    assert aggregator.rounds[0].accepted == 10


def test_models_and_differences_mix_where_the_model_is_known() -> None:
    found, aggregator = gathered(
        lambda site: (
            result(site, trained(site))
            if int(site[5:]) > 4
            else result(site, change(site), ParamsType.DIFF)
        )
    )
    checked(found)
    assert aggregator.rounds[0].accepted == 10


def test_it_is_what_aggregate_makes_of_the_same() -> None:
    """Updates that came one by one, measured from the model."""
    found, aggregator = gathered(lambda site: result(site, trained(site)), rule="nnm | filter(eps=0.2)")
    expected = fr.aggregate(list(map(trained, SITES)), "nnm | filter(eps=0.2)", reference=MODEL)
    for key, value in found.params.items():
        np.testing.assert_allclose(value, expected.value[key], rtol=1e-6)
    np.testing.assert_allclose(aggregator.rounds[0].result.weights, expected.weights, atol=1e-6)


def test_differences_of_a_part_of_the_model() -> None:
    """Of an adapter, say; the rest of the model stays."""
    found, _ = gathered(lambda site: result(site, {"weight": change(site)["weight"]}, ParamsType.DIFF))
    assert set(found.params) == {"weight"}
    updated = FLModelUtils.update_model(FLModel(params=dict(MODEL)), found)
    np.testing.assert_allclose(updated.params["weight"], 101, atol=0.1)


def test_tensors_on_disk_are_read_one_update_at_a_time() -> None:
    class OnDisk:
        read = 0

        def __init__(self, value: Any) -> None:
            self.value = value

        def materialize(self) -> torch.Tensor:
            OnDisk.read += 1
            return torch.from_numpy(np.array(self.value))

    aggregator = RobustAggregator("filter(eps=0.2)")
    aggregator.fl_ctx = context()
    for count, site in enumerate(SITES, 1):
        aggregator.accept_model(result(site, {k: OnDisk(v) for k, v in trained(site).items()}))
        assert OnDisk.read == 3 * count
    checked(aggregator.aggregate_model())


# ---- a malformed contribution is refused, and named -------------------------------------------------

MALFORMED: dict[str, tuple[Callable[[Params], Any], str]] = {
    "nan": (lambda a: {**a, "weight": a["weight"] * np.nan}, "not finite"),
    "nan last": (lambda a: {**a, "scale": np.array(np.nan)}, "not finite"),
    "inf": (lambda a: {**a, "weight": np.full((3, 4), np.inf)}, "not finite"),
    "beyond float32": (lambda a: {**a, "weight": np.full((3, 4), 1e200)}, "not finite"),
    "beyond all bounds": (lambda a: {**a, "scale": np.array(1e200)}, "size 1e+200"),
    "another shape": (lambda a: {**a, "weight": a["weight"].T}, "of shape (4, 3)"),
    "a key too few": (lambda a: {"weight": a["weight"]}, "lacks 'batches'"),
    "a key too many": (lambda a: {**a, "evil": a["weight"]}, "holds 'evil'"),
    "integers": (lambda a: {**a, "weight": a["weight"].astype(int)}, "has integers"),
    "text": (lambda a: {**a, "weight": "x" * 9}, "not a numeric array"),
    "objects": (lambda a: {**a, "weight": np.array([[print]], dtype=object)}, "not a numeric array"),
    "complex": (lambda a: {**a, "weight": a["weight"] * 1j}, "not a numeric array"),
    "nested": (lambda a: {**a, "weight": {"deep": a["weight"]}}, "nested at 'weight.deep'"),
    "encrypted": (lambda a: str(a).encode(), "holds bytes"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_contribution_is_refused(
    kind: str, caplog: pytest.LogCaptureFixture, *, first: bool
) -> None:
    """Whether it arrives before the others or after them."""
    make, reason = MALFORMED[kind]
    liars = {"site-1", "site-2"} if first else {"site-9", "site-10"}
    found, aggregator = gathered(
        lambda site: result(site, make(trained(site)) if site in liars else trained(site))
    )
    checked(found)
    refused = aggregator.rounds[0].refused
    assert set(refused) == liars
    assert all(reason in why for why in refused.values()), refused
    assert all(any(f"refused {site}: " in line for line in caplog.messages) for site in liars)


@pytest.mark.parametrize("kind", ["another shape", "a key too few", "a key too many", "integers"])
def test_the_first_arrival_does_not_decide_what_a_round_looks_like(kind: str) -> None:
    """Not even in a first round in which nobody knows the model."""
    liars = {"site-1", "site-2"}
    found, aggregator = gathered(
        lambda site: result(site, MALFORMED[kind][0](trained(site)) if site in liars else trained(site)),
        model=None,
    )
    checked(found)
    assert set(aggregator.rounds[0].refused) == liars


def test_a_site_counts_once_a_round() -> None:
    aggregator = RobustAggregator("mean")
    aggregator.fl_ctx = context()
    for site in [*SITES, *["site-1"] * 5]:
        params = {key: value + (site == "site-1") * 10 for key, value in trained(site).items()}
        aggregator.accept_model(result(site, params))
    found = aggregator.aggregate_model()
    assert found.params["weight"].mean() == pytest.approx(102, abs=0.1)  # a tenth of 10 and 1


@pytest.mark.parametrize("attack", [-1e4, 1e20, -5.0])
def test_finite_lies_do_not_steer_the_mean(attack: float) -> None:
    def send(site: str) -> FLModel:
        if site in SITES[:2]:
            lie = {key: np.asarray(MODEL[key] + attack * value) for key, value in change(site).items()}
            return result(
                site, {**lie, "batches": np.array(2**40)}, steps=1e300, metrics={"loss": -1e99}
            )
        return result(site, trained(site), metrics={"loss": 0.5})

    found, aggregator = gathered(send)
    checked(found)
    assert found.metrics == {"loss": 0.5}
    assert aggregator.rounds[0].result.weights[:2].tolist() == [0, 0]


def test_reported_steps_count_up_to_the_cap_only() -> None:
    def weight(**options: Any) -> float:
        found, _ = gathered(
            lambda site: result(
                site,
                {**trained(site), "weight": MODEL["weight"] + np.float32(site == "site-1")},
                steps=1e12 if site == "site-1" else 10,
            ),
            rule="mean",
            **options,
        )
        return float(found.params["weight"][0, 0]) - 100

    assert weight() == pytest.approx(0.1, abs=1e-4)
    assert weight(max_share=0.2) == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"weight": np.ones(4), "scale": np.array(np.nan)}, "not finite"),
        ({"weight": np.full(4, 9e59), "scale": np.array(1.0)}, "has norm"),  # no single value tells
    ],
    ids=["not finite", "too long"],
)
def test_who_is_refused_lifts_nobody_above_the_largest_share(lie: Params, reason: str) -> None:
    def send(site: str) -> FLModel:
        honest = {"weight": np.full(4, float(site == "site-4")), "scale": np.array(1.0)}
        params, steps = (lie if site in SITES[:3] else honest), (1e12 if site in SITES[:4] else 10)
        return result(site, params, steps=steps)

    start = {"weight": np.zeros(4), "scale": np.array(0.0)}
    found, aggregator = gathered(send, start, rule="mean", max_share=0.2)
    (done,) = aggregator.rounds
    assert set(done.refused) == set(SITES[:3])
    assert all(reason in why for why in done.refused.values())
    np.testing.assert_allclose(done.result.weights, [0, 0, 0, 0.2, *[0.8 / 6] * 6])
    np.testing.assert_allclose(found.params["weight"], 0.2)


def test_with_too_few_the_model_stays_as_it_is() -> None:
    aggregator = RobustAggregator("filter", quorum=0.5)
    aggregator.fl_ctx = context()
    for site in SITES:
        update = trained(site)
        aggregator.accept_model(result(site, {} if site in SITES[:6] else update))
    found = aggregator.aggregate_model()
    assert aggregator.rounds[0].skipped == "4 updates, 5 are needed"
    updated = FLModelUtils.update_model(FLModel(params=dict(MODEL)), found)
    assert updated.params == MODEL
    empty = RobustAggregator()
    empty.fl_ctx = context()
    assert empty.aggregate_model().params == {}


def test_nothing_of_the_report_is_in_what_goes_to_the_sites() -> None:
    found, aggregator = gathered(lambda site: result(site, trained(site)))
    assert (found.meta, found.metrics) == ({}, None)
    told = aggregator.fl_ctx.get_prop_detail(ROUND)
    assert told["value"] is aggregator.rounds[0]
    assert told["private"]
    assert not told["sticky"]


def test_the_report_is_lines_of_json(tmp_path: Path) -> None:
    """Without Infinity, which JSON has not: the score of a site that was refused."""
    aggregator = RobustAggregator("filter(eps=0.2)")
    aggregator.fl_ctx = context()
    Engine(tmp_path).put_into(aggregator.fl_ctx)
    for site in SITES:
        aggregator.accept_model(result(site, {} if site == "site-1" else trained(site)))
    checked(aggregator.aggregate_model())
    (line,) = (tmp_path / "fedrobust.jsonl").read_text().splitlines()
    told = json.loads(line, parse_constant=pytest.fail)
    assert (told["scores"][0], told["weights"][0], told["clients"]) == (None, 0, SITES)


def test_settings_are_as_the_job_writes_them_down() -> None:
    """NVFlare reads them off the object, by the names of the arguments, and checks for plain values."""
    options = {"rule": "median", "eps": 0.1, "max_share": 0.2, "quorum": 0.7, "seed": 3}
    aggregator = RobustAggregator(**options)
    assert {key: getattr(aggregator, key) for key in options} == options
    with pytest.raises(InputError, match="filtre"):
        RobustAggregator("filtre")


def test_the_model_is_the_one_that_went_out() -> None:
    """As the events of a round tell it, with how many were asked; tasks without a model are none."""
    aggregator = RobustAggregator("filter(eps=0.2)")
    peer = FLContext()
    for site in SITES:
        peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
        fl_ctx = context(model=None)
        fl_ctx.set_peer_context(peer)
        for task in (Shareable(), FLModelUtils.to_shareable(FLModel(params=MODEL))):
            fl_ctx.set_prop(AppConstants.TRAIN_SHAREABLE, task, private=True, sticky=False)
            aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, fl_ctx)
    aggregator.fl_ctx = context(model=None)
    for site in SITES[:6]:
        aggregator.accept_model(result(site, trained(site) if site != "site-1" else {"weight": 1.0}))
    checked(aggregator.aggregate_model())
    counts = aggregator.rounds[0].figures()
    assert [counts[key] for key in ("asked", "accepted", "refused", "absent")] == [10, 5, 1, 4]
    assert "lacks" in aggregator.rounds[0].refused["site-1"]


def test_made_up_names_are_not_asked(tmp_path: Path) -> None:
    """A site that asks for its task again and again, each time as somebody else, moves no quorum."""
    aggregator, peer = RobustAggregator("filter(eps=0.2)"), FLContext()
    for name in [*SITES, *(f"ghost-{i}" for i in range(100)), ["site-1"], 10**5000]:
        peer.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
        fl_ctx = context()
        fl_ctx.set_peer_context(peer)
        fl_ctx.set_prop(AppConstants.TRAIN_SHAREABLE, Shareable(), private=True, sticky=False)
        Engine(tmp_path).put_into(fl_ctx)
        aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, fl_ctx)
    aggregator.fl_ctx = context()
    for site in SITES[2:]:
        aggregator.accept_model(result(site, trained(site)))
    checked(aggregator.aggregate_model())
    assert aggregator.rounds[0].asked == 10


# ---- the classic interface --------------------------------------------------------------------------


def shareable(site: str, params: Params, number: Any = 0, kind: str = DataKind.WEIGHTS) -> Shareable:
    """What ScatterAndGather hands on: who sent it is in the peer's properties."""
    found = DXO(kind, data=params, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 10}).to_shareable()
    found.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    found.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
    return found


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_the_classic_interface(kind: str) -> None:
    aggregator, fl_ctx = RobustAggregator("filter(eps=0.2)"), context(number=7)
    make = trained if kind == DataKind.WEIGHTS else change
    for site in SITES[2:]:
        assert aggregator.accept(shareable(site, make(site), 7, kind), fl_ctx)
    assert not aggregator.accept(shareable("site-3", make("site-3"), 7, kind), fl_ctx)
    assert not aggregator.accept(shareable("site-1", make("site-1"), 6, kind), fl_ctx)
    assert not aggregator.accept(shareable("site-1", {"weight": np.ones(3)}, 7, kind), fl_ctx)
    assert not aggregator.accept(Shareable(), fl_ctx)
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    failed.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
    assert not aggregator.accept(failed, fl_ctx)
    found = from_shareable(aggregator.aggregate(fl_ctx))
    assert found.data_kind == kind
    for key, step in {"weight": 1.0, "scale": 0.5, "batches": 3}.items():
        before = MODEL[key] if kind == DataKind.WEIGHTS else 0
        np.testing.assert_allclose(found.data[key] - before, step, atol=0.08)
    assert aggregator.rounds[0].number == 7
    assert "returns EXECUTION_EXCEPTION" in aggregator.rounds[0].refused["site-2"]
    aggregator.reset(fl_ctx)
    json.dumps(aggregator.rounds[0].figures())


@pytest.mark.parametrize(
    "of",
    [np.array([0, 0]), 10**5000, "0\x1b[2J", [], 1],
    ids=["array", "huge", "text", "list", "late"],
)
def test_an_answer_for_whatever_other_round_is_left_out(
    of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = RobustAggregator("mean")
    assert not aggregator.accept(shareable("site-1", trained("site-1"), of), context())
    assert "\x1b" not in caplog.text
    assert "in 0; it is left out" in caplog.text


def test_a_site_cannot_answer_in_the_name_of_others() -> None:
    """The peer's properties are its own word; the client in the header is the one that was let in."""
    aggregator, fl_ctx = RobustAggregator("mean", quorum=0.1), context()
    for name in SITES:
        answer = shareable(name, trained("site-1"))
        answer.set_header(ServerCommandKey.FL_CLIENT, Client("site-1", "token"))
        assert aggregator.accept(answer, fl_ctx) == (name == SITES[0])
    aggregator.aggregate(fl_ctx)
    assert aggregator.rounds[0].clients == ("site-1",)


# ---- NVFlare's simulator ----------------------------------------------------------------------------


def simulated(workspace: Path, *arguments: str) -> tuple[float, str]:
    """What the example comes to, and its log."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--workspace", str(workspace), *arguments],
        cwd=workspace,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    told = done.stdout + done.stderr
    found = re.search(r"test accuracy (\S+) by", told)
    assert found, told[-5000:]
    return float(found[1]), told


@pytest.mark.slow
@pytest.mark.parametrize("workflow", ["fedavg", "classic"])
def test_the_example_in_the_simulator(workflow: str, tmp_path: Path) -> None:
    accuracy, told = simulated(tmp_path, "--workflow", workflow, "--rule", "filter(eps=0.3)")
    assert accuracy > 0.75
    assert "refused site-1: holds values that are not finite" in told
    run = tmp_path / "digits" / "server" / "simulate_job"
    rounds = [json.loads(line) for line in (run / "fedrobust.jsonl").read_text().splitlines()]
    assert [each["round"] for each in rounds] == list(range(5))
    for each in rounds:
        weights = dict(zip(each["clients"], each["weights"], strict=True))
        assert (each["asked"], each["accepted"], each["skipped"]) == (8, 7, 0)
        assert (weights.pop("site-1"), weights.pop("site-2")) == (0, 0)
        assert min(weights.values()) > 0


@pytest.mark.slow
def test_the_example_without_us(tmp_path: Path) -> None:
    assert simulated(tmp_path)[0] < 0.2
    assert simulated(tmp_path, "--malicious", "0")[0] > 0.75
