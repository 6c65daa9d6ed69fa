"""The library alone: what `pip install fedrobust` must do without any extra."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "sklearn",
    "scipy.stats",
    "scipy.optimize",
    "scipy.sparse",
    "joblib",
    "pandas",
    "matplotlib",
    "rich",
    "torchvision",
    "torch._dynamo",
    "ray",
    "grpc",
    "google.protobuf",
    "flwr",
)
"""What `import fedrobust` must not load: each costs a tenth of a second or more."""
OF_THE_SERVER = ("ray", "grpc", "tomlkit", "cryptography", "rich", "jinja2", "psutil", "zstandard")


def python(code: str) -> Any:
    """What the code prints, as JSON, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def test_importing_the_library_loads_nothing_heavy_but_torch() -> None:
    loaded = set(python("import json, sys, fedrobust; print(json.dumps(list(sys.modules)))"))
    assert "torch" in loaded
    assert not loaded & set(HEAVY)
    ours = {name.partition(".")[0] for name in loaded if name.startswith("fedrobust")}
    assert ours == {"fedrobust"}


@pytest.mark.parametrize("module", ["fedrobust_server.launch", "fedrobust_clients.remote"])
def test_servers_and_clients_start_without_what_only_some_need(module: str) -> None:
    loaded = set(python(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))
    rarely = {"sklearn", "scipy.optimize", "scipy.stats", "pandas", "matplotlib", "torchvision", "flwr"}
    assert not loaded & rarely


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str]]:
    """Exit code and error line of each command where the server's packages cannot be imported."""
    commands = [
        "--help",
        "redteam --help",
        "simulate",
        "serve",
        "client --server localhost:1 --id 0",
        "compare digits",
        "data",
    ]
    return {
        command: (code, line)
        for command, code, line in python(f"""
import contextlib, io, json, sys
for name in {OF_THE_SERVER}: sys.modules[name] = None  # as if it were not installed
from fedrobust.cli import main
answers = []
for command in {commands}:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try: code = main(command.split())
        except SystemExit as end: code = end.code
    answers.append((command, code, error.getvalue()))
print(json.dumps(answers))
""")
    }


@pytest.mark.parametrize(
    "command", ["simulate", "serve", "client --server localhost:1 --id 0", "compare digits"]
)
def test_a_command_that_needs_the_server_says_so_in_one_line(
    answers: dict[str, tuple[int, str]], command: str
) -> None:
    code, line = answers[command]
    assert code == 2
    assert line.count("\n") == 1
    assert line.startswith(f"fedrobust: {command.partition(' ')[0]} needs the extra 'server' (")
    assert line.rstrip().endswith("is not installed): pip install 'fedrobust[server]'")


@pytest.mark.parametrize("command", ["--help", "redteam --help", "data"])
def test_other_commands_do_without(answers: dict[str, tuple[int, str]], command: str) -> None:
    assert answers[command] == (0, "")


def test_the_bare_install_asks_for_five_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {text.partition(">")[0] for text in project["dependencies"]}
    assert names == {"numpy", "scipy", "scikit-learn", "threadpoolctl", "torch"}
