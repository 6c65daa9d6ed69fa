"""CIFAR-10 (Krizhevsky 2009): 60 000 colour photographs of 32 x 32 pixels, ten classes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrobust.data.files import find_files, need_files
from fedrobust.errors import InputError
from fedrobust.text import choose

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIZES = {"train": 50_000, "test": 10_000}
JPEG_FILE = "cifar10_jpeg.npz"
BINARY_FILES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}
_RECORD = 1 + 3 * 32 * 32
_WHAT = "CIFAR-10 (which `fedrobust data cifar10` fetches)"


def load_cifar10(
    part: str, data_dir: Path | None = None, rows: npt.NDArray[np.integer] | None = None
) -> tuple[Images, Labels]:
    """Read images and labels.

    Two forms are read, in `cifar10` or `cifar-10-batches-bin` below the data directory or there itself:
    the published binary batches, and `cifar10_jpeg.npz`, a tenth of their size: JPEG bytes end to end in
    `train_jpeg` (uint8), image i from `train_offsets[i]` to `train_offsets[i + 1]`, `train_labels`, and
    the same for `test`. JPEG is lossy: pixels are off by about 5 grey levels.

    Args:
        part: "train" (50 000) or "test" (10 000).
        data_dir: where datasets are; None means the directory that FEDROBUST_DATA names.
        rows: which images, from 0, in this order; None: all. JPEG takes about 0.4 ms an image.

    Returns:
        (n, 32, 32, 3) uint8, red, green, blue, and (n,) int64 in 0 .. 9.

    Raises:
        InputError: no such part or row, or its files are missing or malformed.
    """
    choose(part, SIZES, "part of CIFAR-10")
    binary = _find_part(part, data_dir)
    if binary is not None:
        return _read_binary(binary, rows)
    (path,) = need_files([JPEG_FILE], "cifar10", _WHAT, data_dir)
    return _read_jpeg(path, part, rows)


def find_binary(data_dir: Path | None = None) -> list[Path] | None:
    """The six binary batches, those to train on first, or None where one is missing."""
    parts = [_find_part(part, data_dir) for part in SIZES]
    found = [path for part in parts for path in part or []]
    return found if all(parts) else None


def _find_part(part: str, data_dir: Path | None) -> list[Path] | None:
    folders = ("cifar-10-batches-bin", "cifar10")
    found = (find_files(BINARY_FILES[part], folder, data_dir) for folder in folders)
    return next((paths for paths in found if paths), None)


def _read_binary(paths: list[Path], rows: npt.NDArray[np.integer] | None) -> tuple[Images, Labels]:
    batches = [np.fromfile(path, np.uint8) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if batch.size % _RECORD or batch.size == 0:
            raise InputError(
                f"{path} is {batch.size} bytes long, no multiple of {_RECORD}; it is truncated or "
                "damaged, fetch it again"
            )
        _check_labels(path, batch[::_RECORD])
    records = np.concatenate(batches).reshape(-1, _RECORD)
    _check_rows(paths[0].parent, rows, len(records))
    records = records if rows is None else records[rows]
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def _read_jpeg(path: Path, part: str, rows: npt.NDArray[np.integer] | None) -> tuple[Images, Labels]:
    try:
        from PIL import Image  # noqa: PLC0415 (only these files need it)
    except ImportError:
        raise InputError(f"{path} holds JPEG images, which Pillow reads: pip install pillow") from None
    packed, offsets, labels = (_array(path, f"{part}_{name}") for name in ("jpeg", "offsets", "labels"))
    _check_labels(path, labels)
    if offsets.dtype.kind not in "iu" or offsets.shape != (len(labels) + 1,):
        raise InputError(
            f"{path} holds {part}_offsets of {offsets.dtype} {offsets.shape}, expected integers, one "
            f"more than the {len(labels)} labels; fetch it again"
        )
    _check_rows(path, rows, len(labels))
    chosen, content = np.arange(len(labels)) if rows is None else rows, packed.tobytes()
    images = np.empty((len(chosen), 32, 32, 3), np.uint8)
    for image, row in zip(images, chosen, strict=True):
        try:
            image[:] = np.asarray(Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]])))
        except Exception as error:  # Pillow's decoders raise whatever they stumble on
            raise InputError(
                f"{path} holds no image {row} of 32 x 32 pixels ({error}); fetch it again"
            ) from error
    return images, labels[chosen].astype(np.int64)


def _array(path: Path, name: str) -> npt.NDArray[Any]:
    """One array of an archive of numpy's. Whatever zip, zlib and numpy raise: it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            found: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
    return found


def _check_labels(path: Path, labels: npt.NDArray[Any]) -> None:
    """Refuse what are no labels of ten classes."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) == 0:
        raise InputError(
            f"{path} holds labels of {labels.dtype} {labels.shape}, expected integers, one an image; "
            "fetch it again"
        )
    strange = labels[(labels < 0) | (labels > 9)]
    if len(strange):
        raise InputError(f"{path} holds the label {strange[0]}, expected 0 .. 9; fetch it again")


def _check_rows(path: Path, rows: npt.NDArray[np.integer] | None, count: int) -> None:
    """Refuse to look for images that a file does not have."""
    if rows is None or not len(rows):
        return
    if rows.min() < 0:
        raise InputError(f"rows are counted from 0, got {rows.min()}")
    if rows.max() >= count:
        raise InputError(f"{path} holds {count} images, no image {rows.max()}; fetch it again")
