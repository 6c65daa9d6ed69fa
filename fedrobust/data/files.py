"""Where files of datasets are found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedrobust.errors import InputError

ENVIRONMENT_VARIABLE = "FEDROBUST_DATA"


def find_files(names: Sequence[str], folder: str, data_dir: Path | None = None) -> list[Path] | None:
    """The files of these names in one folder, or None where one of them is missing.

    Args:
        names: of the files.
        folder: where they are customarily kept, below `data_dir`; that itself is tried as well.
        data_dir: None means the directory that FEDROBUST_DATA names.
    """
    for place in places(folder, data_dir):
        paths = [place / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return None


def need_files(names: Sequence[str], folder: str, what: str, data_dir: Path | None = None) -> list[Path]:
    """As `find_files`, but all must be there.

    Raises:
        InputError: a file is missing; it names the first one, and where it was looked for.
    """
    found = find_files(names, folder, data_dir)
    if found is not None:
        return found
    tried = places(folder, data_dir)
    missing = next((n for n in names if not any((p / n).is_file() for p in tried)), ", ".join(names))
    looked = ", ".join(map(str, tried)) if tried else "nowhere, no directory was given"
    raise InputError(
        f"{what} needs the file {folder}/{missing}; looked in: {looked}; "
        f"give the directory with --data-dir or {ENVIRONMENT_VARIABLE}"
    )


def places(folder: str, data_dir: Path | None) -> list[Path]:
    """The folder below the data directory, and that directory itself; none where no one names it."""
    data_dir = data_directory(data_dir)
    return [] if data_dir is None else [data_dir / folder, data_dir]


def data_directory(data_dir: Path | None) -> Path | None:
    """The directory that was given, else the one that FEDROBUST_DATA names, else none."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if data_dir is None and named else data_dir
