"""How far do honest updates stand out among themselves? The evidence behind the verdict's two levels.

    python examples/honest_spectra.py

For federations in which nobody attacks: the ratio of the first eigenvalue of the updates' covariance
to the (f + 2)-th, the one that the honest bulk vouches for (`fedrobust.verdict`), at eps = 0.2, over
forty rounds; smallest, median and largest. Then the largest ratio to the one in the middle, which
`eps="auto"` looks at (`fedrobust.rules.fraction`), and the largest eps that it estimates; the truth
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedrobust.data import load
from fedrobust.gram import Gram
from fedrobust.rules.fraction import estimate_eps
from fedrobust.training import Learner, Shared, Task, to_vector
from fedrobust.verdict import bulk_edge

FEDERATIONS = [
    Task(clients=20),
    Task(clients=20, model="softmax"),
    Task(clients=20, model="cnn"),
    Task(clients=20, momentum=0.9),
    Task(clients=20, steps=1),
    Task(clients=10),
    Task(clients=50),
    Task(clients=20, split="dirichlet(0.5)"),
    Task(clients=20, split="dirichlet(0.1)"),
]


@dataclass(frozen=True)
class Spread:
    """How far the first eigenvalue of an attack-free round stands out.

    Attributes:
        edge: over the (f + 2)-th.
        middle: over the one that fewer than half of the rows cannot move.
        eps: the malicious fraction that would be estimated.
    """

    edge: float
    middle: float
    eps: float


def spreads(task: Task, rounds: int = 40) -> list[Spread]:
    """One for each round of an attack-free federation."""
    dataset = load(task.dataset)
    shared = Shared.of(task, dataset)
    learners = [Learner(task, dataset, i, shared=shared) for i in range(task.clients)]
    model = to_vector(shared.module)
    found = []
    for number in range(1, rounds + 1):
        rows = torch.stack([learner.update(number, model) for learner in learners])
        matrix = (rows.double() @ rows.double().T).numpy()
        gram = Gram(matrix.copy, np.full(len(rows), 1 / len(rows)), eps=0.2)
        values = gram.raw_eigenvalues
        first, half = float(values[0]), gram.assuming(0.499)
        edges = [bulk_edge(values, f) or np.nan for f in (gram.f, half.f)]
        found.append(Spread(first / edges[0], first / edges[1], estimate_eps(gram)))
        model = model + rows.mean(dim=0)
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table("federation", "smallest", "median", "largest", "to the middle", "estimated eps")
    for task in FEDERATIONS:
        found = spreads(task)
        edges = [spread.edge for spread in found]
        figures = (min(edges), float(np.median(edges)), max(edges), max(s.middle for s in found))
        estimate = f"{max(spread.eps for spread in found):.2f}"
        table.add_row(repr(task), *(f"{figure:.1f}" for figure in figures), estimate)
    Console(width=105).print(table)


if __name__ == "__main__":
    main()
