"""SEVER over clients: whose updates stand out is left out, and the others' model is as without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedrobust_server.config import RunConfig
from fedrobust_server.quarantine import Ban
from fedrobust_server.schedule import Sever, parse_schedule

from examples.estimators_on_clients import Run, train
from fedrobust import InputError
from fedrobust.aggregate import LocalRows, gram_of
from fedrobust.kernels import Block
from fedrobust.statistics import QUEDetector
from fedrobust.statistics.severing import spectral_scores


def test_the_text_form() -> None:
    assert parse_schedule("none") is None
    assert parse_schedule("sever(every=5, times=2)") == Sever(every=5, times=2)
    for text, named in {
        "sever(scores='entropy')": "que",
        "server": "did you mean sever?",
        "sever(every=0)": "at least 1 round",
        "sever(eps=0.5)": "[0, 0.5)",
        "sever(removal='soft')": "'soft'",
    }.items():
        with pytest.raises(InputError) as caught:
            RunConfig(schedule=text)
        assert named in str(caught.value)


def test_it_looks_so_often_and_no_more() -> None:
    assert [n for n in range(1, 50) if Sever(every=10, times=3).looks(n)] == [10, 20, 30]


def test_scores_are_those_of_the_estimators() -> None:
    X = np.random.default_rng(0).normal(size=(30, 8)) @ np.diag([3, *[1] * 7])
    squares = (X**2).sum(axis=1)
    gram = gram_of(LocalRows((Block(torch.from_numpy(X)),)), np.ones(30), squares)
    np.testing.assert_allclose(Sever().score(gram), spectral_scores(X, np.ones(30)), rtol=1e-6)
    entropy = -QUEDetector(method="exact").fit(X).score_samples(X)
    ours = Sever(scores="que").score(gram) ** 2
    np.testing.assert_allclose(ours / ours.max(), entropy / entropy.max(), rtol=1e-6)


def test_the_share_eps_over_2_goes_and_is_told_why() -> None:
    scores = {f"c{i}": float(i) for i in range(20)}
    first, second = Sever().decide(10, scores, eps=0.2, seed=10)
    assert (first.client, second.client, first.who, first.action) == ("c19", "c18", "sever", Ban())
    assert first.reason == (
        "look 1 of 3, after round 10: spectral score 19, number 1 of 20; their median is 9.5"
    )
    assert Sever().decide(10, dict.fromkeys("abcdefghij", 0.0), eps=0.2, seed=10) == []
    assert len(Sever(eps=0.4).decide(10, scores, eps=0.2, seed=10)) == 4
    drawn = Sever(removal="random").decide(10, scores, eps=0.2, seed=10)
    assert drawn[0].client == "c19"
    assert drawn == Sever(removal="random").decide(10, scores, eps=0.2, seed=10)


def test_the_example_tells_who_stands_out() -> None:
    mean, severed = (train(Run("iid", "ipm", "mean", sever, 22, 0)) for sever in (False, True))
    assert mean.areas["SEVER"][0] > 0.9
    assert mean.accuracy < 50
    assert severed.accuracy > 70
