"""What all commands share: how they are added, how they tell of progress, and of what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from fedrobust.errors import InputError
from fedrobust.text import Textual, printable


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` tells as any other bad input."""
        raise InputError(f"{message}; see {self.prog} --help")


def command(
    commands: Any,  # noqa: ANN401 (argparse keeps this type to itself)
    name: str,
    help_text: str,
    example: str,
    run: Callable[[argparse.Namespace], int] | None,
) -> argparse.ArgumentParser:
    """Add a command; without `run` it is a group of commands, and has no options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if run is None:
        return parser
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON lines for programs")
    return parser


def attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes:` of a Google-style docstring."""
    docs: dict[str, str] = {}
    last = ""
    # From Python 3.13 on a docstring comes without its indentation.
    for line in inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[2].splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name.isidentifier() and len(line) - len(line.lstrip()) == 4:
            docs[name], last = text.rstrip("."), name
        elif last and line.strip():
            docs[last] = f"{docs[last]} {line.strip().rstrip('.')}"
    return docs


def add_fields(
    parser: argparse.ArgumentParser, cls: type[Textual], title: str, without: Sequence[str] = ()
) -> None:
    """A flag for every field of a dataclass but some, described by its own docstring.

    What is given is found by `given_fields`.
    """
    group = parser.add_argument_group(title)
    hints, texts = typing.get_type_hints(cls), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        default = "the date and time" if (cls.name, field.name) == ("run", "run") else field.default
        kind: dict[str, Any] = {"type": hints[field.name], "metavar": field.name.upper()}
        if hints[field.name] is bool:
            kind = {"action": "store_const", "const": True}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"{cls.name}:{field.name}",
            help=f"{texts[field.name]} [{default}]".replace("%", "%%"),
            **kind,
        )


def given_fields(options: argparse.Namespace, cls: type[Textual]) -> dict[str, Any]:
    """The fields of a dataclass that the command line gives."""
    start = f"{cls.name}:"
    return {
        key.removeprefix(start): value
        for key, value in vars(options).items()
        if key.startswith(start) and value is not None
    }


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, where rich is installed; told what is done next."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:  # the bare library
        yield lambda _: None
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=total)
        begun = False

        def watch(name: str) -> None:
            nonlocal begun
            progress.update(bar, description=name.replace("[", "\\["), advance=int(begun))
            begun = True

        yield watch


def complain(message: str, code: int) -> int:
    """Say what is wrong, in one line; gives the exit code back."""
    print(f"fedrobust: {printable(' '.join(message.split()), 2000)}", file=sys.stderr)  # noqa: T201
    return code
