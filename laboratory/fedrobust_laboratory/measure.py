"""What is measured of one run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fedrobust_server.config import RunConfig
from torch import Tensor, nn

from fedrobust import InputError, Verdict
from fedrobust.attacks import Targeted, parse_attack, success_rate
from fedrobust.data import Dataset
from fedrobust.smoothing import Log, certified_accuracy
from fedrobust.training import client_name, load_vector
from fedrobust_laboratory.certification import Plan
from fedrobust_laboratory.play import Played, play
from fedrobust_laboratory.radii import FINER, STEP

LAST = 5
"""Over so many rounds at the end accuracy is averaged."""


def measure(
    config: RunConfig, dataset: Dataset, evaluations: int, plan: Plan | None = None
) -> dict[str, Any]:
    """Play a run and measure it.

    Args:
        config: of the run.
        dataset: that its task names; models are trained and judged on its device.
        evaluations: how often the model is judged on the way.
        plan: how the last model is certified; None: not at all.

    Returns:
        accuracy: of the last model, 0 .. 1.
        accuracy_last: the mean over the last five rounds.
        worst_class: the last model's accuracy on the class on which it is worst.
        success: of the attack's images, the fraction that gets the label it wants; only for attacks
            that aim at some.
        malicious_weight: of the malicious clients together; the mean over the rounds, only where the
            rule gives weights.
        honest_lost: the fraction of honest clients that have less than half an equal share, or are
            shut out, by the schedule or quarantine; likewise.
        displacement: distance of the aggregate from the mean of the honest clients that took part, over
            the root mean square distance of their updates from it; the median over the rounds.
        certificate: the bound on the same distance, on the assumption that honest clients spread no
            more than those kept, in the same units; likewise. Infinite where there is none.
        rounds_exceeded: the fraction of rounds with the verdict "bound exceeded".
        rounds_skipped: the fraction of rounds that did not move the model.
        curve: [round, accuracy] of the rounds in which the model was judged.
        average_radius: the average certified radius; this and the next only with a plan.
        certified: [radius, certified accuracy], up to 4 sigma, five radii to a step of the tables.

    Raises:
        InputError: the run cannot begin, or no round had enough clients for the rule.
    """
    module = config.task.build_model(dataset)
    every = max(config.rounds // max(evaluations, 1), 1)
    tally, curve = _Tally(config), list[tuple[int, float]]()
    for played in play(config, dataset):
        tally.add(played)
        if played.round % every == 0 or played.round > config.rounds - LAST:
            load_vector(module, played.model)
            right = predictions(module, dataset.test_x) == dataset.test_y
            curve.append((played.round, float(right.float().mean())))
    if not tally.combined:
        raise InputError(f"no round could be aggregated: {played.reason}")
    figures = {
        "accuracy": curve[-1][1],
        "accuracy_last": float(np.mean([accuracy for _, accuracy in curve[-LAST:]])),
        "worst_class": min(
            float(right[dataset.test_y == c].float().mean()) for c in set(dataset.test_y.tolist())
        ),
        **tally.figures(),
        "curve": curve,
    }
    attack = parse_attack(config.attack)
    if config.malicious and isinstance(attack, Targeted):
        with contextlib.suppress(InputError):  # a label flip that aims at no class
            figures["success"] = success_rate(module, attack, dataset.test_x, dataset.test_y)
    if plan is not None:
        figures |= _certified(module, dataset, plan)
    return figures


def _certified(module: nn.Module, dataset: Dataset, plan: Plan) -> dict[str, Any]:
    classifier = plan.classifier(dataset.normalisation.of_pixels(module), dataset.classes)
    log = Log.of(plan.ask(classifier, dataset, range(0, len(dataset.test_y), plan.every)))
    radii = STEP * np.arange(math.ceil(4 * plan.sigma / STEP * FINER) + 1) / FINER
    curve = zip(radii.tolist(), certified_accuracy(log, radii).tolist(), strict=True)
    return {"average_radius": log.average_radius, "certified": list(curve)}


def predictions(module: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
    """(n,) int64: the class that a model finds likeliest for each of n images."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(part).argmax(dim=1) for part in torch.split(x, batch)])


@dataclass
class _Tally:
    """Figures of each round."""

    config: RunConfig
    rounds: list[Mapping[str, float]] = field(default_factory=list)
    combined: bool = False
    shut_out: frozenset[str] = frozenset()

    def add(self, played: Played) -> None:
        result = played.result
        found = {"rounds_skipped": float(bool(played.reason))}
        self.rounds.append(found)
        shut_out, self.shut_out = self.shut_out, played.excluded
        if result is None:
            return
        self.combined = True
        found["rounds_exceeded"] = float(result.verdict is Verdict.EXCEEDED)
        rogues = {client_name(i) for i in range(self.config.malicious)}
        honest = np.array([client not in rogues for client in played.clients])
        if result.weights is not None:
            found["malicious_weight"] = float(result.weights[~honest].sum())
        absent = len(shut_out - rogues - set(played.clients))
        if result.weights is not None and (all_honest := int(honest.sum()) + absent):
            low = int((result.weights[honest] < 0.5 / len(honest)).sum())
            found["honest_lost"] = (low + absent) / all_honest
        if not honest.any():
            return
        rows = played.rows if honest.all() else played.rows[torch.from_numpy(honest)]
        centre = rows.mean(dim=0)
        spread = float((rows - centre).square().sum(dim=1).mean().sqrt())
        if not spread:  # one honest client, or clients that agree: there is no unit to measure in
            return
        found["displacement"] = float((result.value[0] - centre).norm()) / spread
        if result.certificate is not None:
            bound = result.certificate.bound(result.certificate.spread)
            found["certificate"] = bound / spread

    def figures(self) -> dict[str, float]:
        """Means over the rounds, and medians of what may be infinite."""
        found = {}
        for name in ("malicious_weight", "honest_lost", "rounds_exceeded", "rounds_skipped"):
            if values := [row[name] for row in self.rounds if name in row]:
                found[name] = float(np.mean(values))
        for name in ("displacement", "certificate"):
            if values := [row[name] for row in self.rounds if name in row]:
                found[name] = float(np.median(values))
        return found
