"""Modules whose hosts are not installed are not looked at for doctests."""

from __future__ import annotations

from importlib.util import find_spec

_HOSTS = {"flower": "flwr", "nvflare": "nvflare"}

collect_ignore = [
    f"fedrobust/integrations/{module}.py" for module, host in _HOSTS.items() if find_spec(host) is None
]
