"""Torch's global generators, on loan to code that cannot be given one of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_TURN = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Let torch's global generator start from this seed, and leave it as it was.

    All threads share that generator, so only one at a time gets past this.

    Args:
        seed: 0 .. 2**64 - 1.
        device: where there is work; if that is a GPU, its generator starts from the seed as well.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with _TURN, torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed, which reseeds all accelerators, and for good.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
