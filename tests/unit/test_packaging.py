"""The gates of the tree: generated code is fresh, and the wheel installs what it should."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fedrobust

ROOT = Path(__file__).parents[2]
GENERATED = ("federation_pb2.py", "federation_pb2.pyi", "federation_pb2_grpc.py")


def test_the_generated_protobuf_code_is_fresh(tmp_path: Path) -> None:
    proto = ROOT / "proto"
    out = str(tmp_path)
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto}"),
            *(f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"),
            *map(str, (proto / "fedrobust_proto" / "v1").glob("*.proto")),
        ],
        check=True,
    )
    for name in GENERATED:
        checked_in = proto / "fedrobust_proto" / "v1" / name
        fresh = tmp_path / "fedrobust_proto" / "v1" / name
        assert fresh.read_text() == checked_in.read_text(), f"{name} is stale: run `make proto`"


def test_the_generated_code_runs_under_protobuf_6_and_7() -> None:
    text = (ROOT / "proto/fedrobust_proto/v1/federation_pb2.py").read_text()
    assert "# Protobuf Python Version: 6." in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_installs_exactly_the_five_packages(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {
        "fedrobust",
        *(f"fedrobust_{part}" for part in ("server", "clients", "laboratory", "proto")),
    }


def test_the_wheel_is_typed_and_whole(wheel: list[str]) -> None:
    assert "fedrobust/py.typed" in wheel
    assert "fedrobust_server/report.html.j2" in wheel
    assert "fedrobust_laboratory/presets/digits.toml" in wheel
    sources = {
        str(path.relative_to(root))
        for root in (ROOT, *(ROOT / part for part in ("server", "clients", "laboratory", "proto")))
        for package in root.glob("fedrobust*")
        for path in package.rglob("*.py")
    }
    assert sources <= set(wheel)


def test_the_version_is_one() -> None:
    assert f'version = "{fedrobust.__version__}"' in (ROOT / "pyproject.toml").read_text()
