"""The code of a model's process on each Python that it may have: it compiles, it imports, it answers.

Interpreters that are not on this machine are skipped; the compile test needs none.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from gateway.environments.interpreters import SUPPORTED, Interpreters, named
from loaders.worker import bootstrap

ROOT = Path(__file__).parents[3]
LOADERS = ROOT / "loaders"
MINORS = [(3, minor) for minor in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1)]
#: What runs in the gateway, or where a user saves a model, and never in a model's process.
ELSEWHERE = ("enforcement/", "madeup.py", "samples.py")

_ASK = """
import sys, types
sys.argv = [sys.argv[1]]
numpy = types.ModuleType("numpy")
class Anything:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return Anything()
    def __getattr__(self, name): return Anything()
    def __getitem__(self, name): return Anything
    def __mro_entries__(self, bases): return (object,)
    def __hash__(self): return 1
numpy.__getattr__ = lambda name: Anything()
try:
    import numpy
except ImportError:
    sys.modules["numpy"] = numpy
import importlib, runpy
space = runpy.run_path(sys.argv[0])
sys.meta_path.insert(0, space["_Finder"]())
for name in sys.stdin.read().split():
    importlib.import_module("_gateway_loaders." + name)
print("imported")
"""


def sources() -> list[Path]:
    found = sorted(LOADERS.rglob("*.py"))
    return [f for f in found if not f.relative_to(LOADERS).as_posix().startswith(ELSEWHERE)]


@cache
def interpreter(minor: tuple[int, int]) -> str | None:
    found = Interpreters().find(minor)
    return None if found is None else found.path


@pytest.mark.parametrize("source", sources(), ids=lambda f: f.relative_to(LOADERS).as_posix())
def test_the_grammar_is_that_of_the_oldest_python(source: Path) -> None:
    ast.parse(source.read_text("utf-8"), feature_version=SUPPORTED[0])


@pytest.mark.parametrize("minor", MINORS, ids=named)
def test_every_module_of_a_process_imports_on_each_python(minor: tuple[int, int]) -> None:
    """With a stand-in for numpy where that Python has none: what is tested is our own code."""
    path = interpreter(minor)
    if path is None:
        pytest.skip(f"no Python {named(minor)} on this machine")
    names = [
        ".".join(source.relative_to(LOADERS).with_suffix("").parts)
        for source in sources()
        if source.name != "__init__.py"
    ]
    done = subprocess.run(
        [path, "-I", "-c", _ASK, bootstrap.__file__],
        input="\n".join(names),
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )
    assert done.returncode == 0, f"Python {named(minor)}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "imported"


def test_the_names_of_the_standard_library_are_found_without_a_list() -> None:
    """On Pythons that have no list of them."""
    path = interpreter((3, 8)) or interpreter((3, 9))
    if path is None:
        pytest.skip("no Python before 3.10 on this machine")
    code = (
        f"import sys; sys.path.insert(0, {str(LOADERS / 'compat')!r}); import json, pythons;"
        "print(json.dumps(sorted(pythons.standard_library())))"
    )
    answer = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, check=True)
    found = set(json.loads(answer.stdout))
    assert {"json", "sys", "os", "ctypes", "socket", "asyncio", "math"} <= found
    assert "numpy" not in found
    assert sys.stdlib_module_names >= {"json"}
