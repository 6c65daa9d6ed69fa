"""Updates as people have them: arrays, or dicts, lists and tuples of arrays, nested at will.

`tabulate` lays n of them out as rows for aggregation and finds the malformed ones; `rebuild` gives
one result the form of an update again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.errors import InputError
from fedrobust.kernels import Block

T = TypeVar("T", bound=Hashable)

Tree = Any
"""An array-like (numpy array, torch tensor, number), or a dict, list or tuple of trees."""

Path = tuple[object, ...]
"""Dict keys and sequence indices on the way to a leaf."""

Leaves = dict[Path, Tensor]

Form = frozenset[tuple[Path, tuple[int, ...], bool]]
"""Path, shape and whether floating, of every leaf: what updates must agree on to be averaged."""

_DEEPEST = 32


@dataclass(frozen=True)
class Table:
    """n updates laid out leaf by leaf.

    Attributes:
        like: a well-formed update, the model of the result's form.
        kept: indices of the well-formed updates.
        refused: index to reason for the others.
        blocks: one for each floating leaf: all its values in the kept updates.
        counters: one list for each integer leaf: its values in the kept updates.
    """

    like: Tree
    kept: list[int]
    refused: dict[int, str]
    blocks: tuple[Block, ...]
    counters: tuple[list[Tensor], ...]


def tabulate(updates: Tree, reference: Tree = None) -> Table:
    """Lay updates out as rows, without copying arrays that are laid out well already.

    Updates must have the form of the reference, or else the most common form among them, so that no
    single client, however early, decides what a round looks like. Containers, the order of leaves,
    precision and array library are those of most updates.

    Args:
        updates: an (n, ...) array or tensor, or a sequence of n trees.
        reference: a tree of the form of one update, or None.

    Raises:
        InputError: no update at all, none well formed, none with a floating leaf, or a bad reference.
    """
    if isinstance(updates, np.ndarray | Tensor):
        return _tabulate_array(updates, reference)
    if isinstance(updates, Mapping):
        raise InputError(
            "updates must be an array or a sequence, got a dict: give list(updates.values())"
        )
    if not isinstance(updates, Iterable) or isinstance(updates, str | bytes):
        raise InputError(f"updates must be an array or a sequence, got {type(updates).__name__}")
    trees = list(updates)
    if not trees:
        raise InputError("there are no updates to aggregate")
    read = [read_leaves(tree) for tree in trees]
    anchor = None if reference is None else _read_reference(reference)
    forms = [form_of(found) for found in _wellformed(read)] if anchor is None else [form_of(anchor)]
    wanted = _commonest(forms) if forms else frozenset()
    refused = {i: reason for i, found in enumerate(read) if (reason := misfit(found, wanted))}
    kept = [i for i in range(len(read)) if i not in refused]
    if not kept:
        raise InputError(f"none of the {len(read)} updates is usable; the first {refused[0]}")
    looks = {i: _look(trees[i]) for i in kept}
    usual = _commonest(looks.values())
    orders = {i: tuple(read[i]) for i in kept if looks[i] == usual}
    ordered = _commonest(orders.values())
    first = next(i for i, order in orders.items() if order == ordered)
    (model,), rows = _wellformed([read[first]]), _wellformed([read[i] for i in kept])
    floating = [path for path, leaf in model.items() if leaf.is_floating_point()]
    if not floating:
        raise InputError("updates hold no floating-point values, so there is nothing to aggregate")
    return Table(
        like=trees[first],
        kept=kept,
        refused=refused,
        blocks=tuple(
            Block(
                [row[path].to(model[path]).reshape(-1) for row in rows],
                None if anchor is None else anchor[path].reshape(-1),
            )
            for path in floating
        ),
        counters=tuple([row[p].to(model[p]) for row in rows] for p in model if p not in floating),
    )


def with_anchors(table: Table, anchors: Mapping[str, Tree]) -> tuple[Block, ...]:
    """The table's blocks with the server's own rows beside the clients'.

    Raises:
        InputError: one of them is not finite, or not of the form of the updates.
    """
    model = dict(_leaves(table.like))
    read = {f"anchor {name!r}": read_leaves(tree) for name, tree in anchors.items()}
    for name, found in read.items():
        if reason := misfit(found, form_of(model)):
            raise InputError(f"the {name} {reason}")
        _check_finite(found, name)
    floating = [path for path, leaf in model.items() if leaf.is_floating_point()]
    blocks = []
    for path, block in zip(floating, table.blocks, strict=True):
        own = (row[path].to(block.rows[0]).reshape(-1) for row in _wellformed(read.values()))
        blocks.append(replace(block, anchors=tuple(own)))
    return tuple(blocks)


def fit(update: Tree, like: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """The floating leaves of an update, flat, and its integer leaves; in the dtypes of `like`'s.

    Raises:
        InputError: the update has not the form of `like`; the message goes on from its name.
    """
    found, model = read_leaves(update), read_leaves(like)
    reason = misfit(found, form_of(model)) if isinstance(model, dict) else model
    if reason is not None or isinstance(found, str) or isinstance(model, str):
        raise InputError(reason)
    leaves = [(found[path].to(leaf), leaf.is_floating_point()) for path, leaf in model.items()]
    return (
        [leaf.reshape(-1) for leaf, floating in leaves if floating],
        [leaf for leaf, floating in leaves if not floating],
    )


def rebuild(like: Tree, floating: Sequence[Tensor], counters: Sequence[Tensor]) -> Tree:
    """A tree of the form of `like` with these flat floating leaves and these integer leaves."""
    return _rebuild(like, iter(floating), iter(counters))


def _tabulate_array(updates: npt.NDArray[Any] | Tensor, reference: Tree) -> Table:
    """An array needs no search for the commonest form, and no copy."""
    rows = as_tensor(updates)
    if rows.ndim < 2 or len(rows) == 0 or not rows.is_floating_point():
        raise InputError(
            f"updates must be (n, d) floating-point values, n at least 1; got shape {tuple(rows.shape)} "
            f"of {rows.dtype}"
        )
    anchor = None if reference is None else _read_reference(reference)
    if anchor is not None and (reason := misfit({(): rows[0]}, form_of(anchor))):
        raise InputError(f"none of the {len(rows)} updates is usable; the first {reason}")
    block = Block(rows.reshape(len(rows), -1), None if anchor is None else anchor[()].reshape(-1))
    return Table(updates[0], list(range(len(rows))), {}, (block,), ())


def read_leaves(tree: Tree) -> Leaves | str:
    """A tree's leaves, or why it has none."""
    try:
        return dict(_leaves(tree))
    except InputError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (whatever a thing does when it is read, only it is refused)
        return f"cannot be read: {type(error).__name__}: {error}"


def _read_reference(reference: Tree) -> Leaves:
    found = read_leaves(reference)
    if isinstance(found, str):
        raise InputError(f"the reference {found}")
    _check_finite(found, "reference")
    return found


def _check_finite(found: Leaves | str, what: str) -> None:
    if isinstance(found, dict) and not all(torch.isfinite(leaf).all() for leaf in found.values()):
        raise InputError(f"the {what} holds values that are not finite")


def _wellformed(read: Iterable[Leaves | str]) -> list[Leaves]:
    return [found for found in read if isinstance(found, dict)]


def _leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if len(path) > _DEEPEST:
        raise InputError(f"is nested more than {_DEEPEST} deep")
    if isinstance(tree, Mapping):
        for key in tree:
            yield from _leaves(tree[key], (*path, key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from _leaves(item, (*path, index))
    else:
        yield path, as_tensor(tree, path)


def _rebuild(like: Tree, floating: Iterator[Tensor], counters: Iterator[Tensor]) -> Tree:
    if isinstance(like, Mapping):
        return {key: _rebuild(like[key], floating, counters) for key in like}
    if isinstance(like, list | tuple):
        items = [_rebuild(item, floating, counters) for item in like]
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    leaf = as_tensor(like)
    value = next(floating if leaf.is_floating_point() else counters).reshape(leaf.shape)
    return value if isinstance(like, Tensor) else value.cpu().numpy()


def as_tensor(leaf: object, path: Path = ()) -> Tensor:
    """An array as a tensor, a view of it if it can be.

    Args:
        leaf: anything that numpy makes an array of, or a tensor.
        path: where it stands in its tree, to be named in the error.

    Raises:
        InputError: it holds no numbers; the message says what it holds.
    """
    where = f" at {_show(path)!r}" if path else ""
    if isinstance(leaf, Tensor):
        plain = leaf.layout == torch.strided and not (
            leaf.is_nested or leaf.is_meta or leaf.is_quantized
        )
        if not plain or not _is_numeric(leaf.dtype):
            kind = "nested" if leaf.is_nested else leaf.layout
            raise InputError(f"holds a {kind} tensor of {leaf.dtype}{where}, not a numeric array")
        return leaf.detach()
    array = np.asarray(leaf)
    if array.dtype.kind not in "fiub":
        raise InputError(f"holds {type(leaf).__name__} of {array.dtype}{where}, not a numeric array")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # torch knows no longer floats
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


@lru_cache
def _is_numeric(dtype: torch.dtype) -> bool:
    """Whether there are numbers of this dtype, and not two packed into one, or no way to read them."""
    try:
        return not dtype.is_complex and torch.zeros(1, dtype=dtype).double().item() == 0
    except (NotImplementedError, RuntimeError):
        return False


def _look(tree: Tree) -> Hashable:
    """Containers, dtypes and array library of a well-formed tree."""
    if isinstance(tree, Mapping):
        return dict, tuple((key, _look(tree[key])) for key in sorted(tree, key=str))
    if isinstance(tree, list | tuple):
        return type(tree), tuple(map(_look, tree))
    return isinstance(tree, Tensor), as_tensor(tree).dtype


def form_of(found: Leaves) -> Form:
    """What updates with these leaves agree on."""
    return frozenset((p, tuple(leaf.shape), leaf.is_floating_point()) for p, leaf in found.items())


def _commonest(items: Iterable[T]) -> T:
    """The most common item; the first of them where several are."""
    return Counter(items).most_common(1)[0][0]


def misfit(found: Leaves | str, wanted: Form) -> str | None:
    """Why an update does not have the wanted form; None if it does."""
    if isinstance(found, str):
        return found
    form = form_of(found)
    if form == wanted:
        return None
    targets = {path: (shape, floating) for path, shape, floating in wanted}
    if missing := targets.keys() - found.keys():
        return f"lacks {min(map(_show, missing))!r}"
    if extra := found.keys() - targets.keys():
        return f"holds {min(map(_show, extra))!r}, which the others do not"
    path, shape, floating = min(form - wanted, key=lambda item: _show(item[0]))
    kinds = ("integers", "floating-point values")
    wanted_shape, wanted_floating = targets[path]
    where = f" at {_show(path)!r}" if path else ""
    return (
        f"has {kinds[floating]} of shape {shape}{where}, "
        f"expected {kinds[wanted_floating]} of shape {wanted_shape}"
    )


def _show(path: Path) -> str:
    """A path as people write it: layers.0.weight."""
    return ".".join(str(key) for key in path)
