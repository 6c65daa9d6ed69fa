"""What a round's updates come to, wherever they lie: in shards, or in the process that plays a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedrobust import Aggregated, kernels, parse_rule
from fedrobust.aggregate import Rows, combine, gram_of
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules import CoordinateWise
from fedrobust.training import Task
from fedrobust_server.config import RunConfig
from fedrobust_server.schedule import Sever, parse_schedule


@dataclass(frozen=True)
class Combination:
    """How a run combines updates.

    Attributes:
        task: seeds what the rule draws.
        rule: as text.
        eps: the share of the clients that may be malicious.
        schedule: leaves clients out; None leaves nobody out.
        anchors: names of the rows of the server's own that the rule looks at.
        weighs: whether the rule looks at the updates' inner products.
    """

    task: Task
    rule: str
    eps: float
    schedule: Sever | None
    anchors: tuple[str, ...]
    weighs: bool

    @classmethod
    def of(cls, config: RunConfig) -> Combination:
        """That of a run."""
        rule = parse_rule(config.rule)
        weighs = not isinstance(rule.rules[0], CoordinateWise)
        schedule = parse_schedule(config.schedule)
        return cls(config.task, config.rule, config.eps, schedule, rule.anchors, weighs)

    def __call__(
        self,
        number: int,
        clients: Sequence[str],
        rows: Rows,
        width: int,
        squares: Vector,
        gram: Callable[[], Matrix],
    ) -> tuple[Aggregated, dict[str, float]]:
        """Combine the updates of a round.

        Args:
            number: of the round.
            clients: whose updates these are.
            rows: the updates, as many, and beside them the anchors.
            width: coordinates of each.
            squares: (n,) their squared lengths.
            gram: makes their (n, n) inner products, where the rule weighs.

        Returns:
            The robust mean, and how far each client's update stands out; empty where the schedule does
            not look at this round.

        Raises:
            InputError: too few clients for the rule.
        """
        matrix = gram() if self.weighs else None
        if matrix is not None:
            squares = np.diag(matrix).copy()
        found = gram_of(
            rows,
            np.ones(len(clients)),
            squares,
            self.task.draws(number),
            self.anchors,
            matrix=matrix,
            precision=kernels.ARRIVING,
        )
        found = replace(found, width=width)
        result = combine(rows, self.rule, found, self.eps)
        if self.schedule is None or not self.schedule.looks(number):
            return result, {}
        return result, dict(zip(clients, self.schedule.score(found).tolist(), strict=True))
