"""The examples of embedding run, say what they should, and stand in the documentation as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("embed_*.py"))


def said(name: str) -> str:
    """What an example prints; a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / f"embed_{name}.py"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def figures(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"-?\d+\.\d+", text)]


def test_a_pytorch_loop_learns_though_a_fifth_attack() -> None:
    accuracy, malicious = figures(said("pytorch"))
    assert accuracy > 0.85
    assert malicious == 0


def test_updates_that_arrive_one_by_one() -> None:
    second, malformed, weights = said("running").splitlines()
    assert second.startswith("a is refused: client 'a' has sent an update already")
    assert malformed == "i is refused: the update lacks '0.bias'"
    assert weights.startswith("{'a': 0.1")
    assert weights.endswith("'j': 0.0}")


def test_arrays() -> None:
    mean, _, best, bound = said("numpy").splitlines()
    assert figures(best)[0] < 1.5
    assert figures(mean)[0] > 10
    assert best.endswith("outliers removed    refused {7: 'holds values that are not finite'}")
    assert figures(bound)[0] > figures(best)[0]


def test_pipelines_and_searches() -> None:
    plain, sever = said("sklearn").splitlines()
    assert figures(plain)[0] < -1
    assert figures(sever)[0] > 0.25


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_stands_in_the_documentation_as_it_is(path: Path) -> None:
    code = path.read_text()
    assert (
        f"```python\n# {path.relative_to(ROOT)}\n{code}```\n"
        in (ROOT / "docs" / "embedding.md").read_text()
    ), f"copy {path.name} into docs/embedding.md"
    assert len(code.splitlines()) < 36
