"""A round's updates as they come in: one sparse file with a slot of d float32 for each client asked.

The file is the record of the round. Shards that can see the run's folder map it, so that an update is
written once and never copied; what has been written survives the death of every process. It is written
rather than mapped here, so that a full disk is an error of one upload.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


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
        weakref.finalize(self, os.close, self.file)

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
        data = os.pread(self.file, (stop - start) * 4, (slot * self.size + start) * 4)
        return np.frombuffer(data, "<f4")

    def sync(self) -> None:
        """Wait until everything written is on the disk itself, safe from a loss of power."""
        os.fdatasync(self.file)

    def remove(self) -> None:
        """Forget the round."""
        self.path.unlink(missing_ok=True)
