"""Shows the doctests of docstrings as the code that they are, not as quotations."""

from __future__ import annotations

import re

import griffe

_BLOCK = re.compile(r"^( *)>>> (?:.*\S.*(?:\n|\Z))+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each run of lines that begins with `>>>` into a fence."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change a docstring before it is read."""
        if obj.docstring:
            obj.docstring.value = _BLOCK.sub(_fenced, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """The package itself, for which the other is not called."""
        self.on_object(obj=pkg)


def _fenced(block: re.Match[str]) -> str:
    indent = block[1]
    return f"{indent}```pycon\n{block[0].rstrip()}\n{indent}```\n"
