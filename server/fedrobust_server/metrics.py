"""Figures for Prometheus: how the federation is doing, on a port of their own.

Nothing here is about one client: a label for each would be as many time series as there are clients, and
whoever may read the metrics would learn who takes part and who is suspected. That is in the ledger.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

from fedrobust import Aggregated, InputError, Verdict
from fedrobust_server.quarantine import State
from fedrobust_server.record import columns
from fedrobust_server.round import Phase

_ROUND_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, math.inf)
_WORK_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, math.inf)


class Metrics:
    """All figures of one run. Its methods may be called from any thread.

    Attributes:
        registry: what is scraped; not the process's global one, so that several runs do not mix.
        received: bytes of updates taken from clients; `inc(bytes)`.
        sent: bytes of models sent to clients; `inc(bytes)`.
        uploads: uploads in progress; `with uploads.track_inprogress():`.
        connected: clients that wait for work or work now; `set(count)`.
        backlog: complete updates that are not in the Gram matrix yet; `set_function(count)`.
        restarts: shard actors that were started anew; `inc()`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin at 0.

        Args:
            folder: of the run; the room on its disk is shown.
        """
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"fedrobust_{name}", what, labels, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"fedrobust_{name}", what, labels, registry=registry)

        self.received = counter("received_bytes", "Bytes of updates taken from clients")
        self.sent = counter("sent_bytes", "Bytes of models sent to clients")
        self.uploads = gauge("uploads_in_progress", "Uploads in progress")
        self.connected = gauge("clients_connected", "Clients that wait for work or work now")
        self.backlog = gauge("fold_backlog", "Complete updates that are not in the Gram matrix yet")
        self.restarts = counter("shard_restarts", "Shard actors that were started anew")

        self._rounds = counter("rounds", "Rounds that ended", "outcome")
        self._round = gauge("round", "The current round; 0 before the first")
        self._asked = gauge("clients_asked", "Clients asked for updates in the current round")
        self._phase = Enum(
            "fedrobust_phase",
            "What is going on",
            states=[phase.name.lower() for phase in Phase],
            registry=registry,
        )
        self._submissions = counter(
            "submissions",
            "Submissions by what became of them; ACCEPTED are those acknowledged",
            "status",
        )
        self._verdicts = counter("verdicts", "Verdicts on rounds", "verdict")
        self._outliers = gauge("outliers", "Clients that lost half of their weight in the last round")
        self._clients = gauge("clients", "Clients by standing in the quarantine", "standing")
        self._eigenvalue = gauge("top_eigenvalue", "Of the last round's covariance, as it came in")
        self._bound = gauge(
            "certificate_bound",
            "How far the last aggregate can have been moved, in the updates' units, assuming that honest"
            " clients spread no more than those kept, or nothing",
            "assumption",
        )
        self._closed = gauge("round_closed_timestamp_seconds", "When a round last ended")
        self._saved = gauge("checkpoint_timestamp_seconds", "When a checkpoint was last written")
        self._round_seconds = Histogram(
            "fedrobust_round_seconds",
            "From a round's opening to its end",
            buckets=_ROUND_SECONDS,
            registry=registry,
        )
        self._work_seconds = Histogram(
            "fedrobust_work_seconds",
            "Time of the server's own work: aggregation, checkpoint",
            ["work"],
            buckets=_WORK_SECONDS,
            registry=registry,
        )
        for outcome in ("aggregated", "skipped"):
            self._rounds.labels(outcome)  # there from the start, so that the first one is an increase
        for verdict in Verdict:
            self._verdicts.labels(verdict.value)
        self._submissions.labels("ACCEPTED")
        if folder is not None:
            for index, name in ((0, "size"), (2, "free")):
                disk = gauge(f"disk_{name}_bytes", "Of the disk that holds the run's folder")
                disk.set_function(lambda index=index: shutil.disk_usage(folder)[index])  # type: ignore[misc]

    def opened(self, number: int, asked: int) -> None:
        """A round begins and asks so many clients."""
        self._round.set(number)
        self._asked.set(asked)

    def phase(self, phase: Phase) -> None:
        """Something else is going on now."""
        self._phase.state(phase.name.lower())

    def answered(self, status: str) -> None:
        """A submission came to an end; its status is the ledger's, such as "ACCEPTED"."""
        self._submissions.labels(status).inc()

    def closed(self, outcome: str, seconds: float, result: Aggregated | None) -> None:
        """A round ended.

        Args:
            outcome: "aggregated" or "skipped".
            seconds: since it was opened.
            result: what the rule said; None if it was not asked.
        """
        self._rounds.labels(outcome).inc()
        self._round_seconds.observe(seconds)
        self._closed.set(time.time())
        certificate = None if result is None else result.certificate
        kept, nothing = math.nan, math.nan
        if certificate is not None:
            kept, nothing = certificate.bound(certificate.spread), certificate.bound()
        self._bound.labels("kept").set(kept)
        self._bound.labels("none").set(nothing)
        if result is not None:
            self._verdicts.labels(result.verdict.value).inc()
            self._eigenvalue.set(columns(result).get("top_eigenvalue", math.nan))

    def judged(self, found: Mapping[str, float], state: State) -> None:
        """A round's evidence by client, and how all clients stand after it."""
        self._outliers.set(sum(e >= 0.5 for e in found.values()))
        self.stand(state)

    def stand(self, state: State) -> None:
        """How all clients stand."""
        for standing, count in state.standings.items():
            self._clients.labels(standing.name.lower()).set(count)

    def aggregated(self, seconds: float) -> None:
        """The rule and the optimiser's step took so long."""
        self._work_seconds.labels("aggregation").observe(seconds)

    def checkpointed(self, seconds: float) -> None:
        """A checkpoint was written, which took so long."""
        self._work_seconds.labels("checkpoint").observe(seconds)
        self._saved.set(time.time())


@contextlib.contextmanager
def serve_metrics(metrics: Metrics, address: str) -> Iterator[int]:
    """Let Prometheus scrape `http://address/metrics` until the context ends.

    In the clear and without authentication, hence on loopback unless another address is asked for.

    Args:
        metrics: what to serve.
        address: "host:port", or a port alone for loopback; port 0 lets the system choose.

    Yields:
        The port.

    Raises:
        InputError: the address is malformed, or cannot be listened on.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise InputError(f"expected the address of the metrics as host:port or port, got {address!r}")
    try:
        server, thread = start_http_server(
            int(port), host.strip("[]") or "127.0.0.1", registry=metrics.registry
        )
    except OSError as error:
        raise InputError(f"cannot serve metrics on {address}: {error.strerror or error}") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
