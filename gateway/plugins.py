"""Tables of interchangeable parts: a name, the import path of the part, and the package that it needs.

A part is imported on first use, so that a table costs nothing. Other distributions add parts through entry
points; a name in the table is preferred to an entry point. Must not know any part.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any


class PluginError(Exception):
    """A part is unknown, or cannot be imported here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """`path` is `package.module:attribute`; `install` is the distribution that it needs in addition to
    ours."""

    path: str
    install: str | None = None


def find(group: str, table: Mapping[str, Plugin], name: str) -> Any:
    """The part `name` of `table`, or the entry point of that name in `group`. Raises PluginError."""
    plugin = table.get(name)
    if plugin is not None:
        module, _, attribute = plugin.path.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            if plugin.install is None:
                raise
            needs = f"{name} needs the package {plugin.install}: pip install {plugin.install}"
            raise PluginError(needs) from error
    for entry in entry_points(group=group, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise PluginError(f"cannot import {name} ({entry.value}): {error}") from error
    raise PluginError(f"{group} has no {name}; known: {', '.join(sorted(known(group, table)))}")


def known(group: str, table: Mapping[str, Plugin]) -> set[str]:
    """The names that `find` finds."""
    return {*table, *entry_points(group=group).names}
