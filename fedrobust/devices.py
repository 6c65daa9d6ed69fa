"""Where models are trained and certified."""

from __future__ import annotations

import torch


def accelerator() -> torch.device:
    """The GPU, where torch sees one, else the processor. `CUDA_VISIBLE_DEVICES=` hides the GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
