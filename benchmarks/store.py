"""Samples on disk, one JSON object a line, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import scipy
import torch

from benchmarks import peers
from benchmarks.measure import Sample

FOLDER = Path("build/benchmarks")  # ignored by git, gone with `make clean`
Key = tuple[str, str, str]
"""Shape, kind of rows, case."""


@dataclass
class Store:
    """All samples of one state of the code on one machine.

    Attributes:
        path: the file; lines are only ever appended.
        samples: by key, then by repetition.
        skipped: why a case did not run, by key.
    """

    path: Path
    samples: dict[Key, dict[int, Sample]] = field(default_factory=lambda: defaultdict(dict))
    skipped: dict[Key, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            key = (entry["shape"], entry["rows"], entry["case"])
            if "skipped" in entry:
                self.skipped[key] = entry["skipped"]
            else:
                self.samples[key][entry["repetition"]] = Sample(**entry["sample"])

    def add(self, key: Key, repetition: int, taken: Sample) -> None:
        """Keep a sample."""
        self.samples[key][repetition] = taken
        self._append(key, {"repetition": repetition, "sample": asdict(taken)})

    def skip(self, key: Key, reason: str) -> None:
        """Keep the reason why a case does not run."""
        self.skipped[key] = reason
        self._append(key, {"skipped": reason})

    def timed(self, key: Key) -> list[Sample]:
        """The samples that count: all but the first, which warms up, unless it is the only one."""
        taken = self.samples.get(key, {})
        return [taken[r] for r in sorted(taken) if r > 0] or list(taken.values())

    def seconds(self, key: Key) -> float | None:
        """The median time, or None if there is none."""
        taken = self.timed(key)
        return median(s.wall for s in taken) if taken else None

    def peak(self, key: Key) -> float | None:
        """The extra memory of the first run, before which all freed memory was given back."""
        taken = self.samples.get(key, {})
        return taken[min(taken)].peak if taken else None

    def _append(self, key: Key, rest: Mapping[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"shape": key[0], "rows": key[1], "case": key[2], **rest}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def machine(threads: int) -> dict[str, str]:
    """What the figures depend on besides the code."""
    info = _first(Path("/proc/cpuinfo"), "model name") or platform.processor()
    memory = int((_first(Path("/proc/meminfo"), "MemTotal") or "0 kB").split()[0]) / 1e6
    return {
        "processor": f"{info}, {torch.get_num_threads()} threads used",
        "memory": f"{memory:.0f} GB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "libraries": f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}",
        "peers": ", ".join(f"{p} {peers.installed(p) or 'not installed'}" for p in ("byzfl", "flwr")),
        "threads": str(threads),
    }


def opened(about: Mapping[str, str], *, quick: bool, folder: Path = FOLDER) -> Store:
    """The store of this code on this machine: other code or another machine has another file."""
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for source in sorted(Path("fedrobust").rglob("*.py")):
        state.update(source.read_bytes())
    name = f"{'quick-' if quick else ''}{state.hexdigest()[:12]}.jsonl"
    return Store(folder / name)


def _first(path: Path, field_name: str) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith(field_name))
    return next(found, "")
