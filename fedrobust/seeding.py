"""Torch's global generator, on loan to code that cannot be given one of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_TURN = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global generator start from this seed, and leave it as it was.

    All threads share that generator, so only one at a time gets past this.

    Args:
        seed: 0 .. 2**64 - 1.
    """
    with _TURN, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which reseeds the accelerators too, and for good.
        torch.default_generator.manual_seed(seed)
        yield
