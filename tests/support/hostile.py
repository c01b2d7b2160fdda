"""Packages that misbehave on demand: a real model directory whose loader runs given lines of Python at
import, at load or at predict. And what tests ask of `/proc` about the processes that come of it."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from loaders.package import Package, read

_LOADER = """
import os, sys
{at_import}

class Model:
    def __init__(self):
        self.calls = 0

    def predict(self, data, params=None):
        self.calls += 1
        params = params or {{}}
{at_predict}
        return data


def _load_pyfunc(path):
{at_load}
    return Model()
"""


def write_package(
    directory: Path,
    *,
    at_import: str = "",
    at_load: str = "",
    at_predict: str = "",
    extra: dict[str, str] | None = None,
) -> Package:
    """A package that echoes its input, after these lines. `extra`: further files of `code/`."""
    code = directory / "code"
    code.mkdir(parents=True)
    source = _LOADER.format(
        at_import=textwrap.dedent(at_import),
        at_load=textwrap.indent(textwrap.dedent(at_load) or "pass", " " * 4),
        at_predict=textwrap.indent(textwrap.dedent(at_predict) or "pass", " " * 8),
    )
    (code / "own_loader.py").write_text(source)
    for name, text in (extra or {}).items():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text(text)
    (directory / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: own_loader\n    code: code\n    data: code\n"
    )
    return read(directory)


def descendants(pid: int | None = None) -> dict[int, str]:
    """The living processes below one (default: this one), and their command's name."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text("utf-8", "replace")
            except OSError:
                continue
            head, _, tail = stat.rpartition(")")
            if tail.split()[0] != "Z":
                parents[int(entry)] = int(tail.split()[1])
                names[int(entry)] = head.partition("(")[2]
    found: dict[int, str] = {}
    level = {os.getpid() if pid is None else pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= {child: names[child] for child in level}
    return found


def alive(pid: int) -> bool:
    """Returns True if a process exists and is not a zombie."""
    try:
        return (
            Path("/proc", str(pid), "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def eventually(condition: Callable[[], object], seconds: float = 90.0) -> bool:
    """Polls a condition of the operating system that has no event; returns False after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
