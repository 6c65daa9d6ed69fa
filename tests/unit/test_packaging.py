"""The gates of the tree: generated code is fresh, and the wheel installs what it should."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import fedrobust

ROOT = Path(__file__).parents[2]
PUBLIC = sorted(
    ".".join(part for part in path.relative_to(source).with_suffix("").parts if part != "__init__")
    for source in (ROOT, ROOT / "clients")
    for path in source.glob("fedrobust*/**/*.py")
    if "\n__all__ = [" in path.read_text()
)
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


def test_every_file_that_names_the_version_names_the_same() -> None:
    version = fedrobust.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{version}\]|^To be {version},", changes, re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone: what belongs to it is not known")
def test_the_source_distribution_can_be_tested_and_documented(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    git = ["git", "-C", str(ROOT), "ls-files"]
    tracked = subprocess.run(git, check=True, capture_output=True, text=True).stdout.splitlines()
    assert set(tracked) - held <= {".ci/run"}
    assert not {name for name in held if ".venv" in name or name.startswith(("runs/", "site/"))}


def test_the_wheel_carries_its_licence(wheel: list[str]) -> None:
    assert f"fedrobust-{fedrobust.__version__}.dist-info/licenses/LICENSE" in wheel


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_described(name: str) -> None:
    """What the reference lists; `make docs` ends in an error where one of them is missing there."""
    module = importlib.import_module(name)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for member in module.__all__:
        thing = getattr(module, member)
        if callable(thing) and not isinstance(thing, types.GenericAlias):
            assert inspect.getdoc(thing), f"{name}.{member} has no docstring"
