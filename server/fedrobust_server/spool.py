"""A round's updates as they come in: one sparse file with a slot of d float32 for each client asked.

The file is the record of the round. Shards that can see the run's folder map it, so that an update is
written once and never copied; what has been written survives the death of every process. It is written
rather than mapped here, so that a full disk is an error of one upload.
"""

from __future__ import annotations

import mmap
import os
import platform
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Identity = tuple[str, int, int]
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity(file: Path | int) -> Identity | None:
    """Which file of which machine a path or a descriptor names; None where there is none.

    On another machine the same name may be another file. Where it is the same one, over a network, what
    is written here is not at once seen there, and so it counts as another as well.
    """
    try:
        found = os.stat(file)  # noqa: PTH116 (a descriptor has no path)
    except OSError:
        return None
    machine = _BOOT.read_text() if _BOOT.exists() else platform.node()
    return machine, found.st_dev, found.st_ino


@dataclass(frozen=True)
class Spool:
    """The file of one round, open for as long as anything refers to this.

    Attributes:
        path: of the file.
        slots: how many updates it has room for.
        size: d, coordinates of an update.
        file: its descriptor.
    """

    path: Path
    slots: int
    size: int
    file: int
    _closing: Callable[[], object] = field(init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, slots: int, size: int) -> Spool:
        """Make room, which takes no space on disk yet, or find what is there.

        Raises:
            OSError: the file system refuses.
        """
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(file, slots * size * 4)
        return cls(path, slots, size, file)

    @classmethod
    def find(cls, path: Path, slots: int, size: int) -> Spool:
        """Open the file that another process has made.

        Raises:
            OSError: it is not there (any more).
        """
        return cls(path, slots, size, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def __post_init__(self) -> None:
        # What is still being written when the round ends must not end up in the file of another.
        object.__setattr__(self, "_closing", weakref.finalize(self, os.close, self.file))

    def write(self, slot: int, start: int, values: Floats) -> None:
        """Store some coordinates of the update in a slot.

        Raises:
            OSError: the disk is full, or broken.
        """
        data = values.data.cast("B")
        at = (slot * self.size + start) * 4
        while data:
            written = os.pwrite(self.file, data, at)
            data, at = data[written:], at + written

    def read(self, slot: int, start: int, stop: int) -> Floats:
        """(stop - start,) coordinates of the update in a slot."""
        values = np.empty(stop - start, "<f4")
        data, at = values.data.cast("B"), (slot * self.size + start) * 4
        while data:
            read = os.preadv(self.file, [data], at)
            if not read:
                raise OSError(f"{self.path} ends before the update in slot {slot}")
            data, at = data[read:], at + read
        return values

    def map(self) -> Floats:
        """(slots, size): everything, as long as anything refers to it. What is changed stays here."""
        memory = mmap.mmap(self.file, self.slots * self.size * 4, access=mmap.ACCESS_COPY)
        return np.frombuffer(memory, "<f4").reshape(self.slots, self.size)

    def sync(self) -> None:
        """Wait until everything written is on the disk itself, safe from a loss of power."""
        os.fdatasync(self.file)

    def close(self) -> None:
        """Leave the file as it is, before nothing refers to this any more."""
        self._closing()

    def remove(self) -> None:
        """Forget the round."""
        self.path.unlink(missing_ok=True)
