"""Labelled images for classification: the digits of scikit-learn, MNIST, Fashion-MNIST and CIFAR-10.

The digits come with scikit-learn, the others are read from the files in which they are published
(CIFAR-10 also from smaller ones, `fedrobust.data.cifar10`). Loading downloads nothing; that is what
`fedrobust.data.sources` is for.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.data.cifar10 import Images, load_cifar10
from fedrobust.data.dataset import Dataset, Normalisation
from fedrobust.data.files import ENVIRONMENT_VARIABLE, data_directory
from fedrobust.data.imported import load_imported
from fedrobust.errors import InputError
from fedrobust.imports import check_import_path, is_import_path
from fedrobust.text import choose

_UNIT = (0.0, 1.0)


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a dataset of the `CATALOG` by name, or any by import path.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10" or a path as for `load_imported`.
        data_dir: the directory of the files, or the one above it; None means the directory
            that the environment variable FEDROBUST_DATA names. The digits need none.

    Raises:
        InputError: the name is unknown, or its files are missing or malformed; or as `load_imported`.
    """
    check_name(name)
    data_dir = data_directory(data_dir)
    return load_imported(name, data_dir) if is_import_path(name) else CATALOG[name](data_dir)


def check_name(name: str) -> str:
    """Return the name if it is in the `CATALOG` or a well-formed import path; imports nothing.

    Raises:
        InputError: it is neither.
    """
    return check_import_path(name) if is_import_path(name) else choose(name, CATALOG, "dataset")


def digits(_: Path | None = None) -> Dataset:
    """The 1797 handwritten digits of UCI, 8 x 8 pixels, 0 .. 16, that scikit-learn brings along.

    The published set has no test part. Ours is a stratified fifth, drawn with seed 0 of numpy's
    `RandomState`, whose stream never changes: 1437 examples to train on and 360 to test on.
    Normalised by the mean 0.3053 and the standard deviation 0.3760 of all pixels divided by 16.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 (takes a second)
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    source, scale = load_digits(), Normalisation((0.3053,), (0.3760,), _UNIT)
    images = _images(source.images, 16, scale)
    labels = _labels(source.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=source.target
    )
    return Dataset("digits", images[train], labels[train], images[test], labels[test], 10, scale)


def cifar10(data_dir: Path | None = None) -> Dataset:
    """CIFAR-10: 50 000 photographs to train on, 10 000 to test on, (3, 32, 32), ten classes.

    Normalised, channel by channel, by the mean 0.4914, 0.4822, 0.4465 and the standard deviation 0.2470,
    0.2435, 0.2616 of the training pixels divided by 255. Takes 740 MB; half a minute from JPEG.
    """
    train_x, train_y = load_cifar10("train", data_dir)
    test_x, test_y = load_cifar10("test", data_dir)
    scale = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _UNIT)
    train, test = ((_colours(x, scale), _labels(y)) for x, y in ((train_x, train_y), (test_x, test_y)))
    return Dataset("cifar10", *train, *test, 10, scale)


def _colours(pixels: Images, scale: Normalisation) -> Tensor:
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32, "C")).div_(255)
    mean, std = torch.tensor([scale.mean, scale.std])[..., None, None]
    return images.sub_(mean).div_(std)


@dataclass(frozen=True)
class IdxDataset:
    """A dataset of ten classes published as MNIST was: four IDX files, gzipped or not.

    Attributes:
        name: its name in the `CATALOG`.
        folders: directories in which it is customarily kept.
        mean: mean of the training pixels, scaled to 0 .. 1.
        std: their standard deviation.
    """

    name: str
    folders: tuple[str, ...]
    mean: float
    std: float

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Read the four files from the first place below `data_dir` that has them all."""
        train_x, train_y, test_x, test_y = self._need(data_dir)
        train, test = self._read(train_x, train_y), self._read(test_x, test_y)
        shapes = [" x ".join(map(str, x.shape[2:])) for x, _ in (train, test)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{train_x} holds images of {shapes[0]} pixels but {test_x} of {shapes[1]}; "
                "take both from the same release"
            )
        return Dataset(self.name, *train, *test, 10, self.scale)

    @property
    def scale(self) -> Normalisation:
        """How the images are normalised."""
        return Normalisation((self.mean,), (self.std,), _UNIT)

    def find(self, data_dir: Path | None) -> list[Path] | None:
        """The four files, in the order of `IDX_FILES`, or None where no place has them all."""
        for place in self._places(data_dir):
            # The plain file comes first: where both are kept, it is the faster to read.
            found = [_first_file(place / f, place / f"{f}.gz") for f in IDX_FILES]
            files = [file for file in found if file is not None]
            if len(files) == len(IDX_FILES):
                return files
        return None

    def _need(self, data_dir: Path | None) -> list[Path]:
        found, places = self.find(data_dir), self._places(data_dir)
        if found is not None:
            return found
        looked = ", ".join(map(str, places)) if places else "nowhere, no directory was given"
        raise InputError(
            f"dataset {self.name!r} needs the files {', '.join(IDX_FILES)} (or the same with .gz) "
            f"in one directory; looked in: {looked}; "
            f"give the directory with --data-dir or {ENVIRONMENT_VARIABLE}, or fetch them: "
            f"fedrobust data {self.name} --to DIRECTORY"
        )

    def _places(self, data_dir: Path | None) -> list[Path]:
        if data_dir is None:
            return []
        # Datasets of this family use the same file names, so a directory named after the dataset
        # goes before the bare one, which may hold another.
        named = [data_dir / folder for folder in self.folders]
        return [p for place in [*named, data_dir] for p in (place, place / "raw")]

    def _read(self, images_file: Path, labels_file: Path) -> tuple[Tensor, Tensor]:
        images = read_idx(images_file, dimensions=3)
        labels = read_idx(labels_file, dimensions=1)
        if len(images) != len(labels):
            raise InputError(
                f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels; "
                "take both from the same release"
            )
        if images.size == 0:
            raise InputError(f"{images_file} holds no pixels; fetch it again")
        if labels.max() > 9:
            raise InputError(f"{labels_file} holds the label {labels.max()}, expected 0 .. 9")
        return _images(images, 255, self.scale), _labels(labels)


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

MNIST = IdxDataset("mnist", ("mnist", "MNIST"), mean=0.1307, std=0.3081)
FASHION_MNIST = IdxDataset(
    "fashion_mnist", ("fashion_mnist", "fashion-mnist", "FashionMNIST"), mean=0.2860, std=0.3530
)

CATALOG: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": digits,
    "mnist": MNIST,
    "fashion_mnist": FASHION_MNIST,
    "cifar10": cifar10,
}


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    The format (LeCun, Cortes, Burges, "The MNIST database"): two zero bytes, one byte for the type
    of the items (8: unsigned byte), one for the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the items in C order.

    Args:
        path: the file; a name that ends in .gz is decompressed.
        dimensions: how many dimensions the array must have.

    Returns:
        A read-only array of the shape that the file declares.

    Raises:
        InputError: the file cannot be read, is of another kind, or is not as long as it declares.
    """
    raw = read_bytes(path)
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise InputError(f"{path} is {len(raw)} bytes long, shorter than an IDX header; fetch it again")
    magic = int.from_bytes(raw[:4], "big")
    wanted = 0x0800 | dimensions
    if magic != wanted:
        raise InputError(
            f"{path} starts with the number {magic}, expected {wanted} "
            f"(IDX, unsigned bytes, {dimensions} dimensions); is it another file under this name?"
        )
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise InputError(
            f"{path} declares {' x '.join(map(str, shape))} bytes but holds {len(raw) - start}; "
            "it is truncated or damaged, fetch it again"
        )
    try:
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    except ValueError:  # of no items at all, but too many in some dimensions
        raise InputError(
            f"{path} declares {' x '.join(map(str, shape))} bytes, more than any array can have; "
            "it is damaged, fetch it again"
        ) from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; a name that ends in .gz is decompressed.

    Raises:
        InputError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error


def _first_file(*paths: Path) -> Path | None:
    return next((p for p in paths if p.is_file()), None)


def _images(pixels: npt.NDArray[Any], white: int, scale: Normalisation) -> Tensor:
    # In place, since the largest of these arrays is most of what a process holds.
    images = torch.from_numpy(pixels[:, None].astype(np.float32))
    return images.div_(white).sub_(scale.mean[0]).div_(scale.std[0])


def _labels(labels: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))
