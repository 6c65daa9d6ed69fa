"""Somebody else's dataset: a callable named by import path."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrobust.data.dataset import Dataset
from fedrobust.errors import InputError
from fedrobust.imports import import_callable, told
from fedrobust.seeding import seeded


def load_imported(path: str, data_dir: Path | None) -> Dataset:
    """Import a callable, call it, and read what it returns.

    It takes no argument, or `data_dir`. It returns a `Dataset`, or the pair (train, test) of datasets as
    torch has them: with a length, and items (image, label). Images are taken as follows:

    * a tensor, (channels, height, width) or (height, width), as it is, in float32;
    * an image of Pillow's or an array, uint8, (height, width) or (height, width, channels), over 255.

    Labels are integers, from 0; the largest one tells how many classes there are. What torch's global
    generator gives meanwhile is the same on every machine, and the generator is left as it was.

    Args:
        path: "package.module:attribute".
        data_dir: what the callable gets as `data_dir`, if it takes that.

    Raises:
        InputError: there is nothing to call at the path, the call raises, or it returns something else.
    """
    function = import_callable(path)
    try:
        with seeded(0):
            return _read(path, function(data_dir=data_dir) if _takes_data_dir(function) else function())
    except InputError as error:
        raise InputError(f"dataset {path!r}: {error}") from error
    except Exception as error:
        raise InputError(f"dataset {path!r}: loading it raised {told(error)}") from error


def _takes_data_dir(function: Callable[..., Any]) -> bool:
    try:
        return "data_dir" in inspect.signature(function).parameters
    except ValueError:  # written in C, and without a signature
        return False


def _read(path: str, found: object) -> Dataset:
    if isinstance(found, Dataset):
        dataset = dataclasses.replace(found, name=path)
    elif isinstance(found, tuple | list) and len(found) == 2:
        (train_x, train_y), (test_x, test_y) = _part(found[0], "training"), _part(found[1], "test")
        classes = int(max(train_y.max(), test_y.max())) + 1
        dataset = Dataset(path, train_x, train_y, test_x, test_y, classes)
    else:
        raise InputError(
            f"it returned {type(found).__name__}, expected a Dataset or a pair (train, test) of datasets"
        )
    _check(dataset.train_x, dataset.train_y, dataset.train_x, dataset.classes, "training")
    _check(dataset.test_x, dataset.test_y, dataset.train_x, dataset.classes, "test")
    return dataset


def _part(part: Any, name: str) -> tuple[Tensor, Tensor]:  # noqa: ANN401 (a dataset of torch's kind)
    """All images, (n, channels, height, width) float32, and labels, (n,) int64."""
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise InputError(
            f"its {name} part is {type(part).__name__}, expected a dataset with a length and with items"
        )
    if len(part) == 0:
        raise InputError(f"its {name} part is empty")
    labels = torch.empty(len(part), dtype=torch.int64)
    images = torch.empty(0)
    for i in range(len(part)):
        item, where = part[i], f"item {i} of its {name} part"
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(f"{where} is {type(item).__name__}, expected a pair (image, label)")
        image = _image(item[0], where)
        if i == 0:
            images = torch.empty(len(part), *image.shape)
        if image.shape != images.shape[1:]:
            raise InputError(
                f"{where} has the shape {tuple(image.shape)}, the first one {tuple(images.shape[1:])}; "
                "crop or resize all images to one size"
            )
        images[i], labels[i] = image, _label(item[1], where)
    return images, labels


def _image(image: object, where: str) -> Tensor:
    """(channels, height, width) float32."""
    if isinstance(image, Tensor):
        found = image.detach().to(torch.float32)
    else:
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise InputError(
                f"the image of {where} is {type(image).__name__} of {pixels.dtype}, expected a tensor, "
                "or pixels of uint8"
            )
        found = torch.from_numpy(pixels.astype(np.float32)).div_(255)
        found = found.movedim(-1, 0) if found.ndim == 3 else found
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3:
        raise InputError(
            f"the image of {where} has {found.ndim} dimensions, expected (channels, height, width) for "
            "tensors, (height, width, channels) for pixels, or (height, width)"
        )
    return found


def _label(label: Any, where: str) -> int:  # noqa: ANN401 (whatever the dataset has)
    try:
        return operator.index(label)
    except TypeError:
        raise InputError(f"the label of {where} is {label!r}, expected an integer from 0") from None


def _check(x: Tensor, y: Tensor, first: Tensor, classes: int, name: str) -> None:
    """Refuse a part that could not be trained or judged on."""
    if x.ndim != 4 or x.dtype != torch.float32 or y.dtype != torch.int64 or y.ndim != 1:
        raise InputError(
            f"its {name} part is {x.dtype} {tuple(x.shape)} with labels {y.dtype} {tuple(y.shape)}, "
            "expected float32 (n, channels, height, width) with int64 (n,)"
        )
    if not 0 < len(x) == len(y):
        raise InputError(f"its {name} part has {len(x)} images and {len(y)} labels")
    if x.numel() == 0:
        raise InputError(f"the images of its {name} part have no pixels, shape {tuple(x.shape[1:])}")
    bad = ~x.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise InputError(
            f"image {int(bad.nonzero()[0])} of its {name} part has pixels that are not finite; leave "
            "such images out, or repair them"
        )
    if x.shape[1:] != first.shape[1:]:
        raise InputError(
            f"images to test on have the shape {tuple(x.shape[1:])}, those to train on "
            f"{tuple(first.shape[1:])}"
        )
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise InputError(
            f"the labels of its {name} part are {int(y.min())} .. {int(y.max())}, expected "
            f"0 .. {classes - 1}"
        )
