"""A device that is none: torch takes its tensors to be elsewhere, and the processor does the work.

As with a GPU, tensors that are on two devices do not go together, and none of them becomes an array; but
a generator of the other device's, which a GPU refuses, passes. What comes out is to be, to the last bit,
what comes out on the processor. For a process of its own: torch cannot forget a device.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
_MIXED = "copy_", "_to_copy", "index"
"""Operations that take tensors of two devices; `index` does where the indices are the processor's."""


def _work(_owner: Any, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Have the processor do it, and say where the result is: torch's `__torch_dispatch__`."""
    kwargs = kwargs or {}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    name = operation.overloadpacket.__name__
    away = bool(there)
    if away and name not in _MIXED and any(t.ndim for t in tensors if not isinstance(t, Elsewhere)):
        raise RuntimeError(f"{operation}: tensors are on two devices")
    if name == "copy_" and not isinstance(args[0], Elsewhere):
        away = False
    if away and name == "index" and not isinstance(args[0], Elsewhere):
        raise RuntimeError("indices of the device's, and a tensor of the processor's")
    if (device := kwargs.get("device")) is not None:
        away = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def here(value: Any) -> Any:
        return value.here if isinstance(value, Elsewhere) else value

    def found(value: Any) -> Any:
        if not (away and isinstance(value, Tensor)):
            return value
        written = [tensor for tensor in there if tensor.here is value]
        return written[0] if written else Elsewhere(value)

    return tree_map(found, operation(*tree_map(here, args), **tree_map(here, kwargs)))


class Elsewhere(Tensor):
    """A tensor on the device; `here` holds its values."""

    here: Tensor
    __torch_dispatch__ = classmethod(_work)

    def __new__(cls, here: Tensor) -> Self:
        """Tell torch of a tensor of the same shape on the device."""
        made: Self = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        """Of a subclass's values torch itself makes none."""
        return self.here.tolist()


class Device(TorchDispatchMode):
    """Within it the device is there."""

    __torch_dispatch__ = _work


class _Generator(torch.Generator):
    """The processor's, for the device as well, whose work it does."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        del device
        return super().__new__(cls, "cpu")


class _Module(backend_registration._DummyBackendModule):
    """What torch asks such a device about beside tensors."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """That `torch.autocast` may go to."""
        return [torch.bfloat16]


def set_up() -> None:
    """Tell torch of the device, for as long as this process lasts."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.Generator = _Generator  # type: ignore[misc]
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # not for subclasses
    # `torch.tensor` goes past modes and subclasses, so that these two have to be there as well.
    torch.library.impl("aten::empty_strided", "PrivateUse1")(_empty)
    torch.library.impl("aten::copy_", "PrivateUse1")(_copy)


def _empty(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy(to: Elsewhere, source: Tensor, non_blocking: bool = False) -> Tensor:
    del non_blocking
    to.here.copy_(source)
    return to


def difference(work: Callable[[torch.device], Any]) -> str:
    """What is wrong with some work on the device; nothing if it comes to what the processor does."""
    expected = work(torch.device("cpu"))
    try:
        with Device():
            found = work(torch.device(NAME))
    except Exception:  # noqa: BLE001 (whatever it is, it is the difference)
        return traceback.format_exc()
    return "" if found == expected else f"{found}, and on the processor {expected}"
