"""Certification logs in the columns of Cohen et al. 2019, and what they show.

Tab-separated, with a header: idx (the image's number), label, predict (-1: abstained), radius (0 when it
abstained), correct (0 or 1), time. The authors' scripts, and Salman et al.'s, read what is written here.
"""

from __future__ import annotations

import csv
import datetime as dt
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_DOWN, Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedrobust.errors import InputError

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


@dataclass(frozen=True)
class Entry:
    """What is certified of one image.

    Attributes:
        idx: its number in the test set.
        label: its true class.
        predict: the smoothed classifier's; -1 where that abstained.
        radius: within which the answer is certain; 0 when it abstained.
        seconds: that it took.
    """

    idx: int
    label: int
    predict: int
    radius: float
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the answer is the true class."""
        return self.predict == self.label

    def line(self) -> str:
        """As it stands in the log; the radius has 3 digits, rounded down, so that it stays certain."""
        time = dt.timedelta(seconds=round(self.seconds, 6))
        cells = (self.idx, self.label, self.predict, _down(self.radius), int(self.correct), time)
        return "\t".join(map(str, cells))


@dataclass(frozen=True, eq=False)
class Log:
    """Many images' entries, column by column.

    Attributes:
        idx: (n,) int64.
        label: (n,) int64.
        predict: (n,) int64, -1 where it abstained.
        radius: (n,) float64.
        correct: (n,) bool.
    """

    idx: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    predict: npt.NDArray[np.int64]
    radius: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Log:
        """From entries, in their order."""
        rows = [(e.idx, e.label, e.predict, e.radius, e.correct) for e in entries]
        idx, label, predict, radius, correct = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            np.array(idx, np.int64),
            np.array(label, np.int64),
            np.array(predict, np.int64),
            np.array(radius, np.float64),
            np.array(correct, np.bool_),
        )

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def average_radius(self) -> float:
        """The average certified radius: the mean of the correct answers' radii, 0 for all others.

        Zhai, Dan, He, Zhang, Gong, Ravikumar, Hsieh, Wang, "MACER", ICLR 2020 (arXiv 2001.02378).
        """
        return float(np.where(self.correct, self.radius, 0.0).mean())

    @property
    def abstained(self) -> float:
        """The fraction of images on which the classifier abstained."""
        return float((self.predict == -1).mean())


def common(logs: Sequence[Log]) -> list[Log]:
    """Of each log, the images that all of them have.

    Raises:
        InputError: there is none.
    """
    shared = set.intersection(*(set(log.idx.tolist()) for log in logs))
    if not shared:
        raise InputError("the logs have no image in common")
    kept = [np.isin(log.idx, sorted(shared)) for log in logs]
    return [
        Log(*(getattr(log, column.name)[keep] for column in fields(Log)))
        for log, keep in zip(logs, kept, strict=True)
    ]


def certified_accuracy(log: Log, radii: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The fraction of images that are classified correctly with at least such a certified radius.

    Args:
        log: not empty.
        radii: of any shape.

    Returns:
        float64, of the same shape.
    """
    certain = np.where(log.correct, log.radius, -np.inf)
    return np.asarray((certain >= np.asarray(radii, float)[..., None]).mean(axis=-1), np.float64)


def envelope(logs: Sequence[Log], radii: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """For each radius the best of several models' certified accuracies."""
    return np.asarray(np.max([certified_accuracy(log, radii) for log in logs], axis=0), np.float64)


def read_log(path: Path) -> Log:
    """Read a certification log, of ours or of others.

    Raises:
        InputError: it cannot be read, a line is none of such a log, or an image has two lines.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [c for c in COLUMNS[:5] if c not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} is no certification log: its first line lacks the column {missing[0]}; "
                    f"expected {', '.join(COLUMNS)}, separated by tabs"
                )
            rows = list(reader)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no certification log: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no image yet")
    try:
        log = Log(
            idx=np.array([int(row["idx"]) for row in rows], np.int64),
            label=np.array([int(row["label"]) for row in rows], np.int64),
            predict=np.array([int(row["predict"]) for row in rows], np.int64),
            radius=np.array([float(row["radius"]) for row in rows], np.float64),
            correct=np.array([("0", "1").index(row["correct"]) for row in rows], np.bool_),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} has a line that is none of a certification log: {error}") from None
    wrong = log.radius[~(np.isfinite(log.radius) & (log.radius >= 0))]
    if wrong.size:
        raise InputError(f"{path} has the radius {wrong[0]}; radii are finite and at least 0")
    numbers, counts = np.unique(log.idx, return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"{path} has image {numbers[counts > 1][0]} more than once, as two commands at a time leave "
            "it: keep one line of each image"
        )
    return log


def begun(path: Path) -> set[int]:
    """The numbers of the images that a log has; makes it, or cuts off a last line that a crash left.

    Raises:
        InputError: the file is something else, or as `read_log`.
    """
    header = ("\t".join(COLUMNS) + "\n").encode()
    found = path.read_bytes() if path.exists() else b""
    if not (found.startswith(header) or header.startswith(found)):
        raise InputError(f"{path} is no log of ours to go on with")
    whole = found.rfind(b"\n") + 1
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header)
        return set()
    if whole < len(found):  # in place: a crash here must not cost what is there
        os.truncate(path, whole)
    return set() if whole == len(header) else set(read_log(path).idx.tolist())


def _down(radius: float) -> str:
    """To 3 significant digits, towards 0."""
    if radius <= 0:
        return "0.0"
    exact = Decimal(repr(float(radius)))  # in binary 2.01 is a little less
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), ROUND_DOWN):.3g}"
