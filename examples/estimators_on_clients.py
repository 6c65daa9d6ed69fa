"""The estimators of `fedrobust.statistics`, on clients instead of examples: who stands out, and SEVER.

    python examples/estimators_on_clients.py

Twenty clients of the digits, four of them malicious, local training of five steps. First table: how well
scores of single rounds tell the malicious clients from the honest ones, as the area under the ROC curve
(0.5 is chance), mean over the first thirty rounds of a federation whose model the filter keeps going.
Scores are taken of whole updates and of their last layer. Second table: test accuracy in percent after
eighty rounds, where SEVER trains by the plain mean and looks three times, ten rounds apart. Cells: mean
and spread (largest minus smallest) over the seeds. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import torch
from fedrobust_clients.malicious import Threat
from fedrobust_server.schedule import Sever
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

import fedrobust as fr
from fedrobust.data import load
from fedrobust.statistics import QUEDetector
from fedrobust.statistics.severing import spectral_scores
from fedrobust.training import Learner, Shared, Task, evaluate, load_vector, manifest, to_vector, updates

CLIENTS, MALICIOUS = 20, 4
EPS = MALICIOUS / CLIENTS
ATTACKS = ("sign_flip", "ipm", "alie", "alie(1.5)", "label_flip", "backdoor")
SPLITS = ("iid", "dirichlet(0.5)")

Scores = npt.NDArray[np.float64]


SCORES: dict[str, Callable[[Scores], Scores]] = {
    "length": lambda rows: np.linalg.norm(rows, axis=1),
    "SEVER": lambda rows: spectral_scores(rows, np.ones(len(rows))),
    "QUE": lambda rows: -QUEDetector(method="exact").fit(rows).score_samples(rows),
    "filter": lambda rows: np.asarray(fr.aggregate(rows, "filter", eps=EPS).scores),
}


@dataclass(frozen=True)
class Run:
    """One federation; `rule` aggregates, and SEVER, if it is used, leaves clients out."""

    split: str
    attack: str
    rule: str
    sever: bool
    rounds: int
    seed: int


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        accuracy: of the last model, in percent.
        areas: under the ROC curve, by score, of whole updates and of the last layer; means over rounds.
    """

    accuracy: float
    areas: dict[str, tuple[float, float]]


def train(run: Run) -> Found:
    """Train one federation in this process."""
    torch.set_num_threads(1)
    task = Task(clients=CLIENTS, split=run.split, seed=run.seed)
    dataset = load(task.dataset)
    shared = Shared.of(task, dataset)
    learners = {i: Learner(task, dataset, i, shared=shared) for i in range(MALICIOUS, CLIENTS)}
    coalition = Threat(MALICIOUS, run.attack, run.rule, EPS).coalition(task, dataset)
    model, asked = to_vector(shared.module), list(range(CLIENTS))
    seen: list[list[list[float]]] = []
    last, schedule = sum(math.prod(shape) for _, shape in manifest(shared.module)[-2:]), Sever()
    for number in range(1, run.rounds + 1):
        bad = [i for i in asked if i < MALICIOUS]
        rows = updates([learners[i] for i in asked if i >= MALICIOUS], number, model)
        rows = torch.cat([coalition.rows(number, model)[bad], rows]) if bad else rows
        draws = task.draws(number)
        model = model + fr.aggregate(rows, run.rule, eps=EPS, seed=draws).value
        points = rows.double().numpy()
        if run.sever and schedule.looks(number):
            scores = dict(zip(map(str, asked), SCORES["SEVER"](points), strict=True))
            out = {int(decided.client) for decided in schedule.decide(number, scores, EPS, draws)}
            asked = [i for i in asked if i not in out]
        elif not run.sever:
            truth = np.arange(CLIENTS) < MALICIOUS
            both = (points, points[:, -last:])
            seen.append(
                [[float(roc_auc_score(truth, score(x))) for x in both] for score in SCORES.values()]
            )
    load_vector(shared.module, model)
    accuracy = 100 * evaluate(shared.module, dataset.test_x, dataset.test_y).accuracy
    means = np.mean(seen, axis=0) if seen else np.empty((0, 2))
    return Found(accuracy, {name: (a, b) for name, (a, b) in zip(SCORES, means.tolist(), strict=False)})


def trained(runs: Sequence[Run]) -> dict[Run, Found]:
    """All of them, on all cores."""
    # Forking a process in which torch has started threads can hang.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return dict(zip(runs, pool.map(train, runs), strict=True))


def cell(values: Sequence[float], digits: int) -> str:
    """Mean and spread."""
    return f"{np.mean(values):.{digits}f} ({np.ptp(values):.{digits}f})"


def tables(
    splits: Sequence[str], attacks: Sequence[str], seeds: int, watched: int = 30, rounds: int = 80
) -> tuple[Table, Table]:
    """Both tables; the first of so many rounds, the second after so many."""
    ways = ["mean", "mean, SEVER", "filter", "filter, SEVER", "multi_krum"]
    plan = {
        (split, attack, way, seed): Run(
            split, attack, way.partition(",")[0], "SEVER" in way, rounds, seed
        )
        for split, attack, way, seed in product(splits, attacks, ways, range(seeds))
    }
    looks = {
        key: Run(*key[:2], "filter", False, watched, key[2])  # noqa: FBT003 (as above)
        for key in product(splits, attacks, range(seeds))
    }
    found = trained([*plan.values(), *looks.values()])
    places = ("whole", "last layer")
    areas = Table("split", "attack", *(f"{name}: {place}" for name in SCORES for place in places))
    ends = Table("split", "attack", *ways)
    for split, attack in product(splits, attacks):
        one = [found[looks[split, attack, seed]].areas for seed in range(seeds)]
        cells = [cell([seen[name][at] for seen in one], 2) for name in SCORES for at in range(2)]
        areas.add_row(split, attack, *cells)
        final = [[found[plan[split, attack, way, s]].accuracy for s in range(seeds)] for way in ways]
        ends.add_row(split, attack, *(cell(values, 1) for values in final))
    return areas, ends


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for table in tables(SPLITS, ATTACKS, options.seeds):
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
