"""Where models are trained and certified."""

from __future__ import annotations

import torch

from fedrobust.errors import InputError


def accelerator() -> torch.device:
    """The GPU, where torch sees one, else the processor. `CUDA_VISIBLE_DEVICES=` hides the GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(*, gpu: bool) -> torch.device:
    """The GPU where that is asked for, else the processor.

    Raises:
        InputError: a GPU is asked for, and torch sees none.
    """
    if gpu and not torch.cuda.is_available():
        raise InputError("torch sees no GPU: train on the processor, or install its build for CUDA")
    return torch.device("cuda" if gpu else "cpu")
