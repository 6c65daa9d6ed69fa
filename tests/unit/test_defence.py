"""What the adapters share: caps on shares, medians of reports, and what is imported when."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedrobust as fr
from fedrobust import InputError
from fedrobust.integrations.defence import Defence, Offer, capped, medians

COUNTS = st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=12)


@given(counts=COUNTS, most=st.floats(0.01, 1.0))
def test_no_share_is_above_the_cap_and_all_are_in_order(counts: list[float], most: float) -> None:
    examples = np.array(counts)
    shares = capped(examples, most)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() <= max(most, 1 / len(counts)) * (1 + 1e-9)
    order = np.argsort(examples, kind="stable")
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(shares[order]))


@given(counts=COUNTS, most=st.floats(0.01, 1.0), lie=st.floats(1, 1e15))
def test_a_lie_wins_no_more_than_the_cap(counts: list[float], most: float, lie: float) -> None:
    shares = capped(np.array([*counts, lie]), most)
    assert shares[-1] <= max(most, 1 / len(shares)) * (1 + 1e-9)


def test_below_the_cap_shares_are_in_proportion() -> None:
    np.testing.assert_allclose(capped(np.array([1.0, 2.0, 3.0, 4.0]), 0.4), [0.1, 0.2, 0.3, 0.4])
    assert capped(np.array([1.0, 1.0, 2.0, 1e12]), 0.4) == pytest.approx([0.15, 0.15, 0.3, 0.4])


@given(
    honest=st.lists(st.floats(0, 1), min_size=3, max_size=9),
    lies=st.lists(
        st.sampled_from([1e300, -1e300, float("nan"), float("inf"), "x", [1.0, 2.0], None, {}])
    ),
)
def test_a_minority_cannot_push_a_report_out_of_the_honest_range(
    honest: list[float], lies: list[object]
) -> None:
    lies = lies[: (len(honest) - 1) // 2]
    found = medians([{"loss": value} for value in (*honest, *lies)])
    assert min(honest) <= found["loss"] <= max(honest)


def test_lists_are_reported_by_their_most_common_length() -> None:
    records = [{"history": [1.0, 2.0]}, {"history": [3.0, 4.0]}, {"history": [5.0]}]
    assert medians(records) == {"history": [2.0, 3.0]}
    assert medians([]) == {}


def test_figures_of_numpy_and_torch_count() -> None:
    kinds = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), np.longdouble(0.5)]
    assert medians([{"loss": value} for value in kinds]) == {"loss": 0.5}
    assert medians([{"right": value} for value in (np.int64(3), torch.tensor(3))]) == {"right": 3.0}
    assert medians([{"done": value} for value in (np.True_, torch.tensor(data=True))]) == {"done": 1.0}
    assert medians([{"loss": [np.float32(0.5), torch.tensor(2.0)]}]) == {"loss": [0.5, 2.0]}


def test_what_is_no_figure_does_not_count() -> None:
    trained = torch.tensor(1.0, requires_grad=True)
    for odd in (np.str_("1"), np.datetime64(1, "s"), np.complex64(1), np.ones(1), [trained], 10**400):
        assert medians([{"loss": odd}, {"loss": 0.5}, {"loss": 0.5}]) == {"loss": 0.5}
        assert medians([{"loss": odd}]) == {}


def test_names_that_are_not_text_do_not_count() -> None:
    assert medians([{1: 0.5, "loss": 0.3, ("a",): 2.0, None: 1.0}]) == {"loss": 0.3}


def test_the_same_client_counts_once() -> None:
    reference = {"w": np.zeros(3, np.float32)}
    offers = [
        Offer(who, {"w": np.full(3, value, np.float32)}) for who, value in (("a", 1), ("a", 9), ("b", 2))
    ]
    found = Defence("mean").decide(1, 2, offers, {}, reference)
    np.testing.assert_allclose(found.result.value["w"], 1.5)
    assert (found.refused, found.repeated, found.accepted) == ({}, ("a",), 2)
    assert "a answers twice; the first counts" in found.lines()


def test_answering_often_makes_no_quorum() -> None:
    offers = [Offer("evil", {"w": np.full(3, 1e6)})] * 10
    found = Defence("median").decide(1, 10, offers, {}, {"w": np.zeros(3)})
    assert found.accepted == 1
    assert found.skipped == "1 updates, 5 are needed"


def test_a_quorum_is_no_more_than_it_says() -> None:
    offers = [Offer(i, {"w": np.ones(3)}) for i in range(55)]
    assert not Defence("mean", quorum=0.55).decide(1, 100, offers, {}, {"w": np.zeros(3)}).skipped


@pytest.mark.parametrize(
    "options",
    [
        *({"eps": 0.7}, {"eps": "much"}, {"seed": -5}, {"seed": 0.5}, {"quorum": 2}),
        *({"rule": rule} for rule in (5, "fltrust", "monna", "nnm | monna", fr.MoNNA())),
    ],
)
def test_what_would_skip_every_round_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Defence(**options)


def test_counts_of_numpy_count() -> None:
    offers = [Offer(i, {"w": np.ones(3)}, np.int64(5)) for i in range(3)]
    assert Defence("mean", max_share=0.5).decide(1, 3, offers, {}, {"w": np.zeros(3)}).accepted == 3


def test_a_count_that_has_no_text_is_refused() -> None:
    offers = [Offer(i, {"w": np.ones(3)}, 10**5000 if i == 0 else 5) for i in range(3)]
    found = Defence("mean", max_share=0.5).decide(1, 3, offers, {}, {"w": np.zeros(3)})
    assert found.refused == {0: "reports <int that cannot be shown> examples"}


def test_who_is_refused_lifts_nobody_above_the_largest_share() -> None:
    offers = [Offer(0, {"w": np.ones(3)}, 10**15)]
    offers += [Offer(i, {"w": np.full(3, np.nan)}, 10**15) for i in (1, 2, 3)]
    offers += [Offer(i, {"w": np.zeros(3)}, 100) for i in range(4, 10)]
    found = Defence("mean", max_share=0.2).decide(1, 10, offers, {}, {"w": np.zeros(3)})
    assert set(found.refused) == {1, 2, 3}
    assert found.result is not None
    assert found.result.weights is not None
    np.testing.assert_allclose(found.result.weights, [0.2, 0, 0, 0, *[0.8 / 6] * 6])
    np.testing.assert_allclose(found.result.value["w"], 0.2)


def test_an_aggregate_that_is_not_finite_never_becomes_the_model() -> None:
    reference = {"w": np.zeros(2, np.float32)}
    offers = [Offer(i, {"w": np.full(2, 1e39)}) for i in range(4)]
    found = Defence("mean").decide(1, 4, offers, {}, reference)
    assert found.skipped == "the aggregate is not finite"


def test_a_broadcast_that_is_not_finite_is_told() -> None:
    found = Defence("mean").decide(1, 1, [Offer(1, {"w": np.ones(2)})], {}, {"w": np.full(2, np.nan)})
    assert found.skipped == "the reference holds values that are not finite"


def test_the_library_needs_no_host() -> None:
    code = "import sys, fedrobust, fedrobust.integrations; print({'flwr', 'nvflare'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
