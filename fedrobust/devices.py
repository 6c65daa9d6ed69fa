"""Where models are trained and certified."""

from __future__ import annotations

import torch

from fedrobust.errors import InputError

CPU = torch.device("cpu")


def accelerator() -> torch.device:
    """The GPU, where torch sees one, else the processor. `CUDA_VISIBLE_DEVICES=` hides the GPUs."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def gpu() -> torch.device:
    """The GPU.

    Raises:
        InputError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise InputError("torch sees no GPU: train on the processor, or install its build for CUDA")
    return torch.device("cuda")
