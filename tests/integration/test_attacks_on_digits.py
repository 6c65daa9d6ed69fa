"""The claim of the first page: attacks break the mean, and the filter hardly notices them."""

from __future__ import annotations

import numpy as np

from examples.attacks_on_digits import accuracies

SEEDS = 3


def test_the_filter_stays_within_two_points_of_the_attack_free_mean() -> None:
    attacks = ("alie", "ipm", "sign_flip")
    calm = np.mean(accuracies(["mean"], [None], SEEDS)["mean", None])
    results = accuracies(["mean", "filter"], attacks, SEEDS)
    assert calm > 0.95
    for attack in attacks:
        assert calm - np.mean(results["filter", attack]) <= 0.02, attack
    assert max(calm - np.mean(results["mean", attack]) for attack in attacks) >= 0.20
