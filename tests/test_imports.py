"""Who may import whom: the table of the architecture, enforced on the syntax trees of both packages.

Statements under `if TYPE_CHECKING:` are free, everything else counts, imports inside functions included,
so that a lazy import is no way around the table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.registries import REGISTRIES
from loaders.flavors import FLAVORS

ROOT = Path(__file__).parents[1]
STDLIB = frozenset(sys.stdlib_module_names)

FORBIDDEN = frozenset({"pickle", "cloudpickle", "joblib", "dill", "sklearn", "torch", "mlflow"})
"""What nothing in `gateway` imports, wherever it stands: it executes models, or is a framework."""

LEAVES = frozenset(
    {
        "names",
        "errors",
        "events",
        "tracing",
        "record",
        "settings",
        "configuration",
        "quantities",
        "policy",
        "plugins",
        "state",
        "cgroup",
        "yamltext",
        "backoff",
    }
)
PARTS = frozenset({"registries", "artifacts", "environments", "runners"})
SERVICE = LEAVES | PARTS | {"serving", "rollouts", "service"}

NO_LIBRARY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layer:
    """What a module may import: modules of `gateway` (a first name allows all below it), other packages, and
    whether `loaders`."""

    gateway: frozenset[str]
    libraries: frozenset[str]
    loaders: bool = False


CORE_LIBRARIES = frozenset({"pydantic", "cachetools", "numpy"})
FAMILY_LIBRARIES = frozenset(
    {"pydantic", "httpx", "fsspec", "yaml", "filelock", "platformdirs", "packaging", "numpy", "orjson", "uv"}
)

LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("names", "errors", "events", "tracing", "record"), Layer(LEAVES, NO_LIBRARY)),
    "configuration": Layer(LEAVES, frozenset({"pydantic"})),
    "settings": Layer(LEAVES, frozenset({"pydantic", "pydantic_core", "yaml", "platformdirs"})),
    **dict.fromkeys(("quantities", "policy"), Layer(LEAVES, frozenset({"pydantic"}))),
    **dict.fromkeys(("cgroup", "backoff"), Layer(NO_LIBRARY, NO_LIBRARY)),
    "yamltext": Layer(NO_LIBRARY, frozenset({"yaml"})),
    "plugins": Layer(LEAVES, frozenset({"pydantic"})),
    "state": Layer(LEAVES, frozenset({"pydantic", "platformdirs"})),
    **dict.fromkeys(PARTS, Layer(LEAVES | PARTS, FAMILY_LIBRARIES | CORE_LIBRARIES, loaders=True)),
    "serving": Layer(LEAVES | PARTS | {"serving"}, CORE_LIBRARIES, loaders=True),
    "rollouts": Layer(LEAVES | PARTS | {"serving", "rollouts"}, CORE_LIBRARIES, loaders=True),
    "service": Layer(SERVICE, CORE_LIBRARIES, loaders=True),
    "logs": Layer(LEAVES, frozenset({"orjson"})),
    "http": Layer(
        SERVICE | {"http", "metrics", "views"},
        frozenset(
            {"pydantic", "pydantic_core", "starlette", "uvicorn", "httptools", "orjson", "numpy", "pyarrow"}
        ),
        loaders=True,
    ),
    "metrics": Layer(
        SERVICE | {"metrics"}, frozenset({"prometheus_client", "orjson", "numpy"}), loaders=True
    ),
    "views": Layer(SERVICE | {"views"}, NO_LIBRARY, loaders=True),
    "gauges": Layer(SERVICE | {"views", "http", "metrics"}, NO_LIBRARY),
    "pools": Layer(NO_LIBRARY, NO_LIBRARY),
    "upkeep": Layer(SERVICE, NO_LIBRARY),
    "persistence": Layer(LEAVES | PARTS, NO_LIBRARY, loaders=True),
    "api": Layer(LEAVES | PARTS | {"api"}, frozenset({"numpy", "pandas"}), loaders=True),
}
EVERYTHING = frozenset(
    {"app", "upkeep", "views", "pools", "server", "cli", "__main__", "__init__", "demo", "commands"}
)


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    name: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def imports(file: Path, package: str) -> Iterator[Import]:
    """Every imported dotted name, absolute; `from a import b` gives `a.b`."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from walk(child, in_function)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Import(file, node.lineno, f"{base}.{alias.name}", in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False)


def modules(root: str) -> list[tuple[Path, str]]:
    """(file, dotted module) of a package."""
    found = []
    for file in sorted((ROOT / root).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append((file, ".".join(parts)))
    return found


def package_of(file: Path, dotted: str) -> str:
    return dotted.removesuffix(".__init__") if file.name == "__init__.py" else dotted.rpartition(".")[0]


def first_below(dotted: str) -> str:
    """The part after `gateway.`: `gateway.registries.file.X` is `registries`."""
    return [*dotted.split("."), "__init__"][1]


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def broken_rules(file: Path, dotted: str) -> list[str]:
    """What one module imports against the table."""
    found = []
    own = first_below(dotted)
    for item in imports(file, package_of(file, dotted)):
        top = item.name.split(".")[0]
        if top == "__future__":
            continue
        if dotted.startswith("loaders"):
            if top == "gateway":
                found.append(f"{item}: loaders never imports gateway")
            elif not item.in_function and top not in STDLIB and top not in ("numpy", "loaders"):
                found.append(f"{item} at import time: loaders imports numpy and the standard library alone")
            found += sibling_rule(item, dotted)
            continue
        if top in FORBIDDEN:
            found.append(f"{item}: nothing in gateway imports {top}")
        if top == "onnxruntime":
            found.append(f"{item}: onnxruntime only through loaders.flavors.onnx")
        found += sibling_rule(item, dotted)
        if own in EVERYTHING:
            continue
        layer = LAYERS.get(own)
        if layer is None:
            found.append(f"{item}: {dotted} has no row in this test's table; add it")
            continue
        if top == "gateway":
            target = first_below(item.name)
            below = ".".join(item.name.split(".")[1:3])
            if target not in (own, "__version__") and not {target, below} & layer.gateway:
                found.append(f"{item}: {own} may not import gateway.{target}")
        elif top == "loaders":
            if not layer.loaders:
                found.append(f"{item}: {own} may not import loaders")
        elif top not in STDLIB and top not in layer.libraries:
            found.append(f"{item}: {own} may not import {top}")
    return found


def sibling_rule(item: Import, dotted: str) -> list[str]:
    """Members of a family of interchangeable parts never know each other."""
    for family, members in MEMBERS.items():
        if not dotted.startswith(family + ".") or not item.name.startswith(family + "."):
            continue
        member = dotted.removeprefix(family + ".").split(".")[0]
        target = item.name.removeprefix(family + ".").split(".")[0]
        if member != target and {member, target} <= members:
            return [f"{item}: {member} and {target} are siblings of a family"]
    return []


MEMBERS = {
    "gateway.registries": frozenset(REGISTRIES) | {"file", "listed", "mlflow"},
    "gateway.runners": frozenset({"inline", "process"}),
    "loaders.flavors": frozenset(path.partition(":")[0].removeprefix(".") for path in FLAVORS.values()),
}
"""The families and their interchangeable modules; what else stands in a family's folder is part of one."""

ALL = modules("gateway") + modules("loaders")


@pytest.mark.parametrize(("file", "dotted"), ALL, ids=[dotted for _, dotted in ALL])
def test_a_module_imports_only_what_its_row_allows(file: Path, dotted: str) -> None:
    assert broken_rules(file, dotted) == []


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("gateway/serving/ledger.py", "import yaml", "serving may not import yaml"),
        (
            "gateway/serving/ledger.py",
            "from gateway import service",
            "serving may not import gateway.service",
        ),
        ("gateway/names.py", "def f():\n    import httpx", "names may not import httpx"),
        ("gateway/service.py", "import pickle", "nothing in gateway imports pickle"),
        (
            "gateway/app.py",
            "def f():\n    from sklearn import datasets",
            "nothing in gateway imports sklearn",
        ),
        ("gateway/cli.py", "import torch", "nothing in gateway imports torch"),
        ("gateway/http/predict.py", "import prometheus_client", "http may not import prometheus_client"),
        ("gateway/registries/file.py", "from . import mlflow", "siblings of a family"),
        ("gateway/artifacts/cache.py", "import starlette", "artifacts may not import starlette"),
        ("gateway/runners/inline.py", "import onnxruntime", "onnxruntime only through"),
        ("gateway/new.py", "import json", "has no row"),
        ("loaders/package.py", "from gateway.names import parse_uri", "loaders never imports gateway"),
        ("loaders/package.py", "import yaml", "at import time"),
        (
            "loaders/flavors/onnx.py",
            "def f():\n    from loaders.flavors.sklearn import x",
            "siblings of a family",
        ),
    ],
)
def test_a_forbidden_import_is_found(
    place: str, source: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for sibling in ("gateway/registries/mlflow.py", "loaders/flavors/sklearn.py", place):
        (tmp_path / sibling).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / sibling).touch()
    file = tmp_path / place
    file.write_text(source, encoding="utf-8")
    found = broken_rules(file, ".".join(Path(place).with_suffix("").parts))
    assert any(complaint in line for line in found), found


def test_what_only_type_checkers_see_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "loaders" / "batch.py"
    file.parent.mkdir()
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\n", encoding="utf-8"
    )
    assert broken_rules(file, "loaders.batch") == []
