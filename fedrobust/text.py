"""Text forms: `filter(eps=0.2)` in a config, on the command line and in logs is one and the same.

Rules, attacks, splits and models are frozen dataclasses deriving from `Textual`; their `repr` is the
text that `parse` reads back. Text is parsed, never evaluated: only names of a catalogue, literals
and `|` are understood.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from fedrobust.errors import InputError

T = TypeVar("T", bound="Textual")


@dataclasses.dataclass(frozen=True, repr=False)
class Textual:
    """A frozen dataclass of literals with a short text form; arguments equal to a default are left out.

    Subclasses set `name` and may check their fields in `__post_init__`, calling this one first: it
    raises `InputError` on a value of the wrong type, and makes plain what derives from a type of
    literals, such as numpy's float64.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field, hint in _hints(type(self)).items():  # type: ignore[arg-type] # mypy looks at the instances' hash
            value = getattr(self, field)
            if not _fits(value, hint):
                wanted = getattr(hint, "__name__", str(hint))
                raise InputError(f"{self.name}: {field} must be {wanted}, got {brief(value)}")
            if isinstance(value, int | float) and not abs(value) < 2**63:  # no text form reads it back
                raise InputError(f"{self.name}: {field} must be finite and within 64 bits")
            object.__setattr__(self, field, _plain(value))

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def require(self, condition: bool, message: str) -> None:
        """Raise `InputError`, naming this object, unless the condition holds."""
        if not condition:
            raise InputError(f"{self!r}: {message}")


def parse(text: str, catalog: Mapping[str, type[T]], kind: str) -> T:
    """Read one object such as `krum`, `dirichlet(0.1)` or `alie(z=1.5)`.

    Args:
        text: the text form.
        catalog: the names understood.
        kind: what the catalogue holds ("rule", "attack"), for the error message.

    Raises:
        InputError: the text is no call of a known name with literal arguments.
    """
    stages = parse_chain(text, catalog, kind)
    if len(stages) != 1:
        raise InputError(f"{kind} {text!r} has {len(stages)} parts joined by '|', expected one")
    return stages[0]


def parse_chain(text: str, catalog: Mapping[str, type[T]], kind: str) -> list[T]:
    """Read `a | b(c=1) | d` as a list of objects. Arguments and errors as for `parse`."""
    if not isinstance(text, str):
        raise InputError(f"{kind} must be a text of the form name(argument=value), got {brief(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{kind} {text!r} is not of the form name(argument=value)") from None
    return [_build(node, text, catalog, kind) for node in _stages(tree)]


def choose(value: str, choices: Iterable[str], what: str) -> str:
    """Return `value` if it is among the choices, else raise an `InputError` that lists them."""
    known = sorted(choices)
    if value in known:
        return value
    close = difflib.get_close_matches(value, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(f"unknown {what} {value!r}{hint}; choose from {', '.join(known)}")


def printable(text: str, limit: int = 200) -> str:
    """Text of a stranger's, safe for a terminal, a log line and a message.

    Whatever a terminal could take for a command (escapes, line ends, characters that turn the direction
    of writing) is shown by its number instead.

    Args:
        text: anything.
        limit: how many characters may remain; cut text ends in "...".
    """
    shown = "".join(c if c.isprintable() else _escaped(c) for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: max(limit - 3, 0)] + "..."[:limit]


def brief(value: object, limit: int = 60) -> str:
    """A value as messages show it: its repr, printable and cut; its type alone where it has none.

    Of an integer of thousands of digits Python makes no text, and of a stranger's value who knows.

    >>> brief("x" * 99, limit=9)
    "'xxxxx..."
    >>> brief([16**5000])
    '<list that cannot be shown>'
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 (whatever a thing does when it is shown)
        text = f"<{type(value).__name__} that cannot be shown>"
    return printable(text, limit)


def finite(value: Any) -> Any:  # noqa: ANN401 (whatever JSON can hold)
    """The same, with None in the place of numbers that are not finite, which JSON cannot hold.

    >>> finite({"loss": math.nan, "curve": [(1, 0.5), (2, math.inf)]})
    {'loss': None, 'curve': [[1, 0.5], [2, None]]}
    """
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _stages(node: ast.expr) -> list[ast.expr]:
    stages: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        stages.append(node.right)
        node = node.left
    return [node, *reversed(stages)]


def _build(node: ast.expr, text: str, catalog: Mapping[str, type[T]], kind: str) -> T:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
        raise InputError(f"{kind} {text!r} is not of the form name(argument=value)")
    cls = catalog[choose(call.func.id, catalog, kind)]
    fields = [f.name for f in dataclasses.fields(cls)]
    positional = [f.name for f in dataclasses.fields(cls) if not f.kw_only]
    if len(call.args) > len(positional):
        raise InputError(
            f"{text!r}: {cls.name} takes {len(positional)} arguments without a name, "
            f"got {len(call.args)}; its arguments are {', '.join(fields) or 'none'}"
        )
    named = ((k.arg or "", k.value) for k in call.keywords)
    pairs = [*zip(positional, call.args, strict=False), *named]
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        choose(key, fields, f"argument of {cls.name}")
        if key in arguments:
            raise InputError(f"{cls.name}: argument {key} is given twice in {text!r}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise InputError(f"{cls.name}: {key} must be a plain value in {text!r}") from None
    return cls(**arguments)


@functools.cache  # large grids check thousands of texts of a few classes
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _plain(value: object) -> object:
    """The same value, of a type whose repr is a literal: numpy's and enumerations' have others."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 (a type hint has no narrower type)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(v, item) for v in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)
