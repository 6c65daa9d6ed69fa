"""What the documentation is made of beside its pages: the README, the changelog, and docstrings.

A module is public if it has an `__all__`; each has a page of its own in the reference. None of these
pages is kept in the tree. The build ends in an error if a public name is missing from them.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocstrings import Inventory

ROOT = Path(__file__).parents[1]
SOURCES = ROOT, ROOT / "clients"


def public() -> dict[str, list[str]]:
    """Every module that has an `__all__`, and the names in it."""
    found = {}
    for source in SOURCES:
        for path in source.glob("fedrobust*/**/*.py"):
            listed = re.search(r"^__all__ = (\[.*?\])$", path.read_text(), re.MULTILINE | re.DOTALL)
            if listed:
                parts = path.relative_to(source).with_suffix("").parts
                module = ".".join(part for part in parts if part != "__init__")
                found[module] = list(ast.literal_eval(listed[1]))
    return dict(sorted(found.items()))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the reference into the menu, and the version into the title."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.site_name = f"{project['name']} {project['version']}"
    for section in config.nav or []:
        if isinstance(section, dict) and "Reference" in section:
            section["Reference"] += [{module: f"api/{module}.md"} for module in public()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not kept."""
    pages = {f"api/{module}.md": page(module) for module in public()}
    pages |= {f"{name}.md": (ROOT / f"{name}.md").read_text() for name in ("README", "CHANGELOG")}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """What GitHub wants otherwise: links between docs/ and the root, and bars in code in tables."""
    markdown = re.sub(r"\]\((docs/|\.\./(?=[A-Z]+\.md))", "](", markdown)
    rows = re.compile(r"^\|.*$", re.MULTILINE)
    return rows.sub(lambda row: re.sub(r"`[^`]*`", lambda c: c[0].replace("\\|", "|"), row[0]), markdown)


def page(module: str) -> str:
    """The page of a module: what it holds itself, and where to find the names that it takes over."""
    modules = public()
    homes = {
        name: home
        for home, names in modules.items()
        for name in names
        if home.startswith(f"{module}.") and name in modules[module]
    }
    paths = [path(module, name) for name in modules[module] if name not in homes]
    paths.sort(key=lambda found: found.count("."), reverse=True)  # first what has a module of its name
    lines = [
        f"# {module}",
        "",
        f"::: {module}",
        "    options: {members: false, show_root_toc_entry: false}",
    ]
    for found in paths:
        lines += ["", f"::: {found}", "    options: {show_root_heading: true}"]
    if homes:
        lines += ["", "## From its packages", "", "| name | described in |", "| --- | --- |"]
        lines += [f"| [`{name}`][{home}.{name}] | `{home}` |" for name, home in sorted(homes.items())]
    return "\n".join(lines) + "\n"


def path(module: str, name: str) -> str:
    """Where a name is found; not at its own where a module has the same one (fedrobust.aggregate)."""
    home = ROOT.joinpath(*module.split("."), f"{name}.py")
    return f"{module}.{name}.{name}" if home.exists() else f"{module}.{name}"


def on_post_build(config: MkDocsConfig) -> None:
    """Every public name is described somewhere."""
    with (Path(config.site_dir) / "objects.inv").open("rb") as file:
        described = set(Inventory.parse_sphinx(file))
    missing = [
        f"{module}.{name}"
        for module, names in public().items()
        for name in names
        if path(module, name) not in described
    ]
    if missing:
        raise PluginError(f"not in the reference, for want of a docstring: {', '.join(missing)}")
