"""What attacks do to a federation on digits, over several seeds: the plain mean, the filter, a peer.

    python examples/attacks_on_digits.py

Twenty clients with iid data, four of them malicious, eighty rounds of five local steps. The rows are
attacks, the columns rules; cells are test accuracy in percent, mean and spread (largest minus
smallest) over the seeds. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

import numpy as np
import torch
from fedrobust_clients.malicious import Threat
from rich.console import Console
from rich.table import Table

import fedrobust as fr
from fedrobust.data import load
from fedrobust.training import Learner, Shared, Task, evaluate, load_vector, to_vector, updates

CLIENTS, MALICIOUS, ROUNDS = 20, 4, 80


@dataclass(frozen=True)
class Run:
    """One federation of the table; no attack means that everybody is honest."""

    rule: str
    attack: str | None
    seed: int


def accuracy(run: Run) -> float:
    """Train one federation in this process and return its final test accuracy."""
    torch.set_num_threads(1)
    task = Task(clients=CLIENTS, seed=run.seed)
    dataset = load(task.dataset)
    shared = Shared.of(task, dataset)
    rogues = MALICIOUS if run.attack else 0
    learners = [Learner(task, dataset, i, shared=shared) for i in range(rogues, CLIENTS)]
    eps = MALICIOUS / CLIENTS
    coalition = run.attack and Threat(rogues, run.attack, run.rule, eps).coalition(task, dataset)
    model = to_vector(shared.module)
    for number in range(1, ROUNDS + 1):
        rows = updates(learners, number, model)
        if coalition:
            rows = torch.cat([coalition.rows(number, model), rows])
        result = fr.aggregate(rows, run.rule, eps=eps)
        model = model + result.value
    load_vector(shared.module, model)
    return evaluate(shared.module, dataset.test_x, dataset.test_y).accuracy


def accuracies(
    rules: Sequence[str], attacks: Sequence[str | None], seeds: int
) -> dict[tuple[str, str | None], list[float]]:
    """Final accuracies by rule and attack, one a seed, worked out on all cores."""
    runs = [Run(*key) for key in product(rules, attacks, range(seeds))]
    # Forking a process in which torch has started threads can hang.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = dict(zip(runs, pool.map(accuracy, runs), strict=True))
    return {
        (rule, attack): [results[Run(rule, attack, seed)] for seed in range(seeds)]
        for rule, attack in product(rules, attacks)
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=["mean", "filter", "nnm | filter", "multi_krum"])
    options = parser.parse_args()
    attacks = [None, "alie", "alie(1.5)", "ipm", "sign_flip", "gaussian", "mimic", "label_flip", "nan"]
    results = accuracies(options.rules, attacks, options.seeds)
    table = Table("attack", *options.rules)
    for attack in attacks:
        cells = (np.array(results[rule, attack]) * 100 for rule in options.rules)
        table.add_row(attack or "none", *(f"{c.mean():.1f} ({np.ptp(c):.1f})" for c in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
