"""Slow clients do not keep a round open beyond its deadline, nor anybody else's update out of it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from benchmarks.clients import Setting, hold, section, write


@pytest.mark.slow
def test_sixty_clients_of_which_six_are_slow(tmp_path: Path) -> None:
    setting = Setting(clients=60, slow=6, rounds=2, deadline=4.0, model="mlp(20)", processes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # the server must raise it by itself
    try:
        found = hold(setting, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.held == [60, 60]
    assert found.connections == 60
    for seconds in found.lasted:
        assert 3.9 < seconds < 6.0
    assert (found.accepted, found.acknowledged, found.lost) == (108, 108, 0)
    assert "acknowledged updates lost | 0 |" in section(setting, found)


def test_a_section_goes_where_it_was_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write(page, "## Clients held\n\nold\n")
    page.write_text(page.read_text() + "\n## Ingest\n\nkept\n")
    write(page, "## Clients held\n\nnew\n")
    assert page.read_text() == (
        "# The server, measured\n\n## Clients held\n\nnew\n\n## Ingest\n\nkept\n"
    )
