"""A run in a handful of figures, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedrobust.training import client_name
from fedrobust_server.config import RunConfig
from fedrobust_server.ledger import Ledger


def summarise(folder: Path) -> dict[str, Any]:
    """What a run came to.

    Returns:
        Name to figure; None where there is none. `malicious_weight` is the weight of the malicious
        clients together in the last aggregated round, certificates are those of that round, in the
        updates' units: `certificate` if honest clients spread no more than those kept,
        `certificate_without_assumption` without any assumption.
    """
    config = RunConfig.from_toml((folder / "config.toml").read_text())
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        rounds = [row for row in ledger.rounds() if row["closed"] is not None]
        answers = ledger.answers()
    finally:
        ledger.close()
    aggregated = [row for row in rounds if row["outcome"] == "aggregated"]
    last = aggregated[-1] if aggregated else {}
    rogues = {client_name(i) for i in range(config.malicious)}
    weights = [a["weight"] for a in answers if a["round"] == last.get("round") and a["client"] in rogues]
    weighted = any(a["weight"] is not None for a in answers if a["round"] == last.get("round"))
    return {
        "run": config.run,
        "rule": config.rule,
        "attack": config.attack if config.malicious else None,
        "accuracy": rounds[-1]["accuracy"] if rounds else None,
        "loss": rounds[-1]["loss"] if rounds else None,
        "rounds_aggregated": len(aggregated),
        "rounds_skipped": len(rounds) - len(aggregated),
        "updates_accepted": sum(a["status"] == "ACCEPTED" for a in answers),
        "updates_refused": sum(a["times"] for a in answers if a["status"] != "ACCEPTED"),
        "malicious_clients": config.malicious,
        "malicious_weight": sum(w or 0.0 for w in weights) if rogues and weighted else None,
        "verdict": last.get("verdict"),
        "certificate": last.get("bound_kept"),
        "certificate_without_assumption": last.get("bound"),
    }
