"""Objects of other people's modules, named as "package.module:attribute".

Importing runs the module's code: a path may come from an operator, never from whoever is at the other
end of a connection.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from fedrobust.errors import InputError

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_import_path(text: str) -> bool:
    """Whether a text is meant as an import path rather than as a name of ours; imports nothing.

    >>> is_import_path("hospital.models:unet"), is_import_path("mlp(64)")
    (True, False)
    """
    return ":" in text and "(" not in text


def check_import_path(path: str) -> str:
    """Return the path if it is well formed; imports nothing.

    Raises:
        InputError: it is not of the form package.module:attribute.
    """
    if not _PATH.fullmatch(path):
        raise InputError(f"the import path {path!r} is not of the form package.module:attribute")
    return path


def import_callable(path: str) -> Any:  # noqa: ANN401 (anything that can be called)
    """Import the module and return its attribute. Only ever call it on an operator's word.

    Raises:
        InputError: the path is malformed, there is no such module or attribute, importing the module
            raises, or the attribute cannot be called.
    """
    name, _, attribute = check_import_path(path).partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Of the module itself or of its packages, or of something that it imports.
        missing = error.name or name
        ours = name == missing or name.startswith(f"{missing}.")
        where = "" if ours else f", which {name} imports"
        raise InputError(
            f"{path!r}: there is no module {missing!r}{where}; install it, or put the folder that "
            "holds it on PYTHONPATH"
        ) from None
    except Exception as error:
        raise InputError(f"{path!r}: importing {name} raised {told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{path!r}: {name} has no attribute {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{path!r} is {type(found).__name__}, expected something that can be called")
    return found


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ")
