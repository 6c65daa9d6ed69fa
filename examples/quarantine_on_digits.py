"""Whom the quarantine excludes in a federation on digits: attackers, and honest clients by mistake.

    python examples/quarantine_on_digits.py

Twenty clients, four of them malicious if there is an attack, sixty rounds. The rows are how the data is
spread and what is sent, the columns rules; cells are how many honest clients were excluded at least
once, and how many attackers within the first ten rounds, each as a mean over the seeds. Takes some two
minutes on two cores.
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
from fedrobust_server.quarantine import Policy, Standing, State, evidence, observe
from rich.console import Console
from rich.table import Table

import fedrobust as fr
from fedrobust.data import load
from fedrobust.training import Learner, Shared, Task, to_vector

CLIENTS, MALICIOUS, ROUNDS, SOON = 20, 4, 60, 10


@dataclass(frozen=True)
class Run:
    """One federation of the table; no attack means that everybody is honest."""

    split: str
    attack: str | None
    rule: str
    seed: int


@dataclass(frozen=True)
class Excluded:
    """How many clients were excluded at least once: honest ones, and attackers in the first rounds."""

    honest: int
    attackers: int


def excluded(run: Run) -> Excluded:
    """Train one federation in this process with the quarantine turned on."""
    torch.set_num_threads(1)
    task = Task(clients=CLIENTS, split=run.split, seed=run.seed)
    dataset = load(task.dataset)
    shared = Shared.of(task, dataset)
    rogues = MALICIOUS if run.attack else 0
    learners = {i: Learner(task, dataset, i, shared=shared) for i in range(rogues, CLIENTS)}
    eps = MALICIOUS / CLIENTS
    coalition = run.attack and Threat(rogues, run.attack, run.rule, eps).coalition(task, dataset)
    model, state, first = to_vector(shared.module), State(), dict[int, int]()
    for number in range(1, ROUNDS + 1):
        asked = [i for i in range(CLIENTS) if str(i) not in state.excluded]
        bad = coalition.rows(number, model) if coalition and asked[0] < rogues else None
        rows = torch.stack(
            [learners[i].update(number, model) if bad is None or i >= rogues else bad[i] for i in asked]
        )
        result = fr.aggregate(rows, run.rule, eps=eps, seed=number)
        model = model + result.value
        weights = dict(
            zip(map(str, asked), [] if result.weights is None else result.weights.tolist(), strict=False)
        )
        state, changes = observe(Policy(), state, number, evidence(result.verdict, weights))
        for change in changes:
            if change.client.standing in (Standing.EXCLUDED, Standing.BANNED):
                first.setdefault(int(change.name), number)
    return Excluded(
        honest=sum(i >= rogues for i in first),
        attackers=sum(i < rogues and number <= SOON for i, number in first.items()),
    )


def table(
    splits: Sequence[str], attacks: Sequence[str | None], rules: Sequence[str], seeds: int
) -> Table:
    """The table, worked out on all cores."""
    runs = [Run(*key) for key in product(splits, attacks, rules, range(seeds))]
    # Forking a process in which torch has started threads can hang.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = dict(zip(runs, pool.map(excluded, runs), strict=True))
    lines = Table("split", "attack", *(f"{rule}: honest, attackers" for rule in rules))
    for split, attack in product(splits, attacks):
        cells = []
        for rule in rules:
            part = [found[Run(split, attack, rule, seed)] for seed in range(seeds)]
            honest = np.mean([one.honest for one in part])
            attackers = np.mean([one.attackers for one in part])
            total = CLIENTS - (MALICIOUS if attack else 0)
            cells.append(
                f"{honest:.1f} of {total}" + (f", {attackers:.1f} of {MALICIOUS}" if attack else "")
            )
        lines.add_row(split, attack or "none", *cells)
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    splits = ("iid", "dirichlet(0.5)", "dirichlet(0.1)")
    attacks = (None, "ipm", "sign_flip", "alie(1.5)")
    Console().print(table(splits, attacks, ("filter", "nnm | filter"), options.seeds))


if __name__ == "__main__":
    main()
