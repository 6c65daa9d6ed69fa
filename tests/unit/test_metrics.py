"""The metrics are scraped over HTTP as Prometheus does, and tell of no single client."""

from __future__ import annotations

import math
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from fedrobust_server.metrics import Metrics, serve_metrics
from fedrobust_server.quarantine import Policy, State, evidence, observe
from fedrobust_server.round import Phase
from prometheus_client.parser import text_string_to_metric_families

from fedrobust import InputError, aggregate

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int, host: str = "127.0.0.1") -> Samples:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def figure(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"fedrobust_{name}", tuple(sorted(labels.items()))]


def test_a_round_is_scraped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    X = np.random.default_rng(0).normal(size=(10, 500))
    X[:2] += 3
    result = aggregate(X, "filter", eps=0.2)
    assert result.weights is not None
    found = evidence(result.verdict, {f"st-mary-{i}": w for i, w in enumerate(result.weights.tolist())})
    state, _ = observe(Policy(threshold=0.25), State(), 1, found)

    metrics.phase(Phase.COLLECTING)
    metrics.opened(1, 10)
    metrics.connected.set(11)
    for status in ["ACCEPTED"] * 10 + ["NON_FINITE"]:
        metrics.answered(status)
    metrics.received.inc(4096)
    metrics.sent.inc(1024)
    metrics.restarts.inc()
    metrics.backlog.set(3)
    metrics.aggregated(0.2)
    metrics.checkpointed(0.02)
    metrics.judged(found, state)
    metrics.closed("aggregated", 12.0, result)
    with serve_metrics(metrics, "0") as port, metrics.uploads.track_inprogress():
        samples = scrape(port)

    assert figure(samples, "round") == 1
    assert figure(samples, "phase", fedrobust_phase="collecting") == 1
    assert figure(samples, "phase", fedrobust_phase="done") == 0
    assert figure(samples, "rounds_total", outcome="aggregated") == 1
    assert figure(samples, "rounds_total", outcome="skipped") == 0
    assert figure(samples, "submissions_total", status="ACCEPTED") == 10
    assert figure(samples, "submissions_total", status="NON_FINITE") == 1
    assert figure(samples, "uploads_in_progress") == 1
    assert figure(samples, "clients_connected") == 11
    assert figure(samples, "clients_asked") == 10
    assert figure(samples, "received_bytes_total") == 4096
    assert figure(samples, "sent_bytes_total") == 1024
    assert figure(samples, "shard_restarts_total") == 1
    assert figure(samples, "fold_backlog") == 3
    assert figure(samples, "outliers") == 2
    assert figure(samples, "clients", standing="excluded") == 2
    assert figure(samples, "clients", standing="free") == 8
    assert figure(samples, "verdicts_total", verdict="outliers removed") == 1
    assert figure(samples, "round_seconds_sum") == 12
    assert figure(samples, "work_seconds_sum", work="aggregation") == 0.2
    assert figure(samples, "work_seconds_count", work="checkpoint") == 1
    certificate = result.certificate
    assert certificate is not None
    assert figure(samples, "certificate_bound", assumption="none") == pytest.approx(certificate.bound())
    assert figure(samples, "top_eigenvalue") > 0
    assert 0 < figure(samples, "disk_free_bytes") <= figure(samples, "disk_size_bytes")
    assert ("process_resident_memory_bytes", ()) in samples
    assert not any("st-mary" in str(key) for key in samples)


def test_a_round_without_a_certificate_has_no_bound() -> None:
    metrics = Metrics()
    metrics.closed("skipped", 1.0, None)
    with serve_metrics(metrics, "127.0.0.1:0") as port:
        samples = scrape(port)
    assert math.isnan(figure(samples, "certificate_bound", assumption="kept"))
    assert ("fedrobust_disk_free_bytes", ()) not in samples


def test_two_runs_do_not_mix_and_nothing_is_left_running() -> None:
    before = threading.active_count()
    one, other = Metrics(), Metrics()
    one.answered("LATE")
    with serve_metrics(one, "0") as first, serve_metrics(other, "0") as second:
        assert ("fedrobust_submissions_total", (("status", "LATE"),)) in scrape(first)
        assert ("fedrobust_submissions_total", (("status", "LATE"),)) not in scrape(second)
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        scrape(first)


def test_it_listens_beyond_loopback_only_where_asked_to() -> None:
    with serve_metrics(Metrics(), ":0") as port:
        assert scrape(port)
        taken = serve_metrics(Metrics(), str(port))
        with pytest.raises(InputError, match="cannot serve metrics on"), taken:
            pass
    with serve_metrics(Metrics(), "0.0.0.0:0") as port:
        assert scrape(port)


@pytest.mark.parametrize("address", ["", "host", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x", ":-1"])
def test_a_malformed_address_is_one_line(address: str) -> None:
    with pytest.raises(InputError, match="expected the address"), serve_metrics(Metrics(), address):
        pass


def test_an_unknown_host_is_one_line() -> None:
    unknown = serve_metrics(Metrics(), "host.invalid:0")
    with pytest.raises(InputError, match="cannot serve metrics on"), unknown:
        pass
