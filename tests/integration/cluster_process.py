"""A Ray cluster of several nodes on this machine, which does what it is told on standard input.

A process of its own, because the tests have another Ray. `add`, `remove I` (kills the I-th node added,
without a farewell) and the end of the input, which ends it all; every answer is one JSON line.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from ray.cluster_utils import Cluster

ROOM = 100 * 1024 * 1024


def tell(**fact: Any) -> None:
    """Answer."""
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


def main(head_cpus: int) -> None:
    """Start the head, say where it is, and follow orders."""
    head: dict[str, Any] = {"include_dashboard": False, "object_store_memory": ROOM}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "num_cpus": head_cpus})
    nodes: list[Any] = []
    tell(address=cluster.address)
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=ROOM))
                tell(node=len(nodes) - 1)
            case ["remove", number]:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                tell(removed=int(number))
    signal.alarm(15)  # putting away what is dead already can take for ever
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
