"""Who may import whom: the table of the architecture, enforced on the syntax trees of both packages.

    leaves <- registries, artifacts, environments, runners <- serving <- rollouts <- service, views
           <- http <- app <- server, commands

Every import counts: those inside functions, so that a lazy import is no way around the table, and those under
`if TYPE_CHECKING:`, because a reader follows them too. Every module of `gateway` has a row; a row for one
module goes before the row of its folder. No two modules import each other, on whatever way.

Where a row allows more than its folder's place in the line, the row says why.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.registries import REGISTRIES
from loaders.flavors import FLAVORS

ROOT = Path(__file__).parents[1]
STDLIB = frozenset(sys.stdlib_module_names)

FORBIDDEN = frozenset({"pickle", "cloudpickle", "joblib", "dill", "sklearn", "torch", "mlflow"})
"""What nothing in `gateway` imports, wherever it stands: it executes models, or is a framework."""


@dataclass(frozen=True)
class Row:
    """What a module may import: modules of `gateway` (a folder's name allows all of it), libraries, and
    whether `loaders`."""

    gateway: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()
    loaders: bool = False


def row(*gateway: str | frozenset[str], libraries: str = "", loaders: bool = False) -> Row:
    names = [frozenset({one}) if isinstance(one, str) else one for one in gateway]
    return Row(frozenset().union(*names), frozenset(libraries.split()), loaders)


LEAVES = frozenset(
    {
        "names",
        "patterns",
        "credentials",
        "statelock",
        "database",
        "outbox",
        "usagememory",
        "errors",
        "events",
        "tracing",
        "settings",
        "configuration",
        "quantities",
        "rollout_settings",
        "plugins",
        "state",
        "aliasmemory",
        "cgroup",
        "yamltext",
        "backoff",
        "logs",
        "pools",
        "staging",
        "namedlock",
        "filesystems",
    }
)
PARTS = frozenset({"registries", "artifacts", "environments", "runners"})
# What the layers above know of the parts: a registered version, its verified files, what runs it.
VERSION = frozenset({"registries.base"})
PREPARED = frozenset({"artifacts.packages"})
RUNNER = frozenset({"runners.base", "runners.suspects"})
ROLLOUTS = LEAVES | VERSION | {"registries.resolution"} | PREPARED | {"serving", "rollouts"}
CAPTURE = frozenset({"capture"})

TABLE: dict[str, Row] = {
    "__init__": row("api"),
    "__main__": row("cli"),
    # Leaves know leaves, and only those below them: circles are counted.
    **dict.fromkeys(("names", "patterns", "errors", "events", "tracing"), row(LEAVES)),
    **dict.fromkeys(("backoff", "cgroup", "pools", "staging", "namedlock", "statelock", "database"), row()),
    **dict.fromkeys(("quantities", "credentials", "plugins"), row(LEAVES, libraries="pydantic")),
    "rollout_settings": row(LEAVES, libraries="pydantic"),
    "settings": row(LEAVES, libraries="pydantic platformdirs"),
    "configuration": row(LEAVES, libraries="pydantic"),
    "yamltext": row(libraries="yaml"),
    "filesystems": row(libraries="fsspec"),
    **dict.fromkeys(("outbox", "usagememory"), row("state")),
    **dict.fromkeys(("state", "aliasmemory"), row(LEAVES, libraries="platformdirs")),
    "logs": row(LEAVES, libraries="orjson"),
    # Credentials and callers, without a request.
    "access": row(LEAVES, libraries="jwt httpx orjson"),
    # Parts. None knows another, with these exceptions.
    "registries": row(
        LEAVES, libraries="httpx fsspec yaml orjson pydantic cachetools filelock", loaders=True
    ),
    # Files are those of a registered version; an MLflow server's own artifacts come through its client.
    "artifacts": row(
        LEAVES, VERSION, "registries.mlflow_client",
        libraries="httpx fsspec aiohttp filelock platformdirs cachetools", loaders=True,
    ),
    # `Prepared` carries what the environments have found out about its package.
    "artifacts.packages": row(LEAVES, VERSION, "environments.choose", libraries="cachetools", loaders=True),
    "environments": row(LEAVES, libraries="packaging httpx filelock uv", loaders=True),
    "runners": row(LEAVES, libraries="numpy", loaders=True),
    # Placement reads a package's facts to say where it runs.
    "runners.placement": row(LEAVES, PREPARED, libraries="cachetools", loaders=True),
    # Requests on disk: no model, no process.
    "capture": row(LEAVES, libraries="numpy", loaders=True),
    # A life may give way to others.
    "serving.servable": row(LEAVES, VERSION, PREPARED, RUNNER, "runners.priority", loaders=True),
    "serving.warmup": row(LEAVES, PREPARED, RUNNER, "serving", libraries="cachetools", loaders=True),
    # Lives of versions: no alias, and no registry.
    "serving": row(
        LEAVES, VERSION, PREPARED, RUNNER, "environments.choose", libraries="cachetools numpy", loaders=True
    ),
    "rollouts": row(ROLLOUTS, libraries="cachetools pydantic", loaders=True),
    # It compares answers, value by value.
    "rollouts.agreement": row("rollouts.guards", libraries="numpy", loaders=True),
    # They ask a candidate's queue, as a caller does.
    "rollouts.replay": row(ROLLOUTS, RUNNER, CAPTURE, loaders=True),
    "rollouts.shadow": row(ROLLOUTS, RUNNER, loaders=True),
    # A person's loads need the registry's whole content for patterns.
    "rollouts.residency": row(ROLLOUTS, "registries.watcher"),
    "rollouts.preflight": row(ROLLOUTS, "environments.check", loaders=True),
    # The same gates without a server: a small composition root of its own.
    "rollouts.offline": row(ROLLOUTS, PARTS, CAPTURE, loaders=True),
    # A request's facts: which version answered.
    "record": row(LEAVES, VERSION, "access.principal"),
    "service": row(
        ROLLOUTS, RUNNER, CAPTURE, "record", "unanswered", "access.principal", "access.limits", loaders=True
    ),
    "unanswered": row(LEAVES, RUNNER, "serving", "record", loaders=True),
    "views": row(ROLLOUTS, "peers", "registries.watcher", "registries.document", loaders=True),
    "vitals": row(),
    # Metrics as plain data, and their text.
    "exposition": row(libraries="prometheus_client"),
    "tallies": row("exposition", libraries="numpy"),
    "metrics": row(
        LEAVES, "record", "vitals", "tallies", "exposition", "__version__", loaders=True
    ),
    # HTTP receives parts and never the application: what `views` read, and who carries out the verbs.
    "http": row(
        LEAVES, VERSION, CAPTURE, "record", "service", "views", "metrics", "access", "usage", "spans",
        "__version__", "peers",
        "rollouts.promotions", "rollouts.residency", "registries.watcher", "registries.webhooks",
        "registries.hosted",
        libraries="starlette uvicorn httptools orjson numpy pyarrow pydantic pydantic_core", loaders=True,
    ),
    # The same service over another transport; bodies, tensors and problems are shared with HTTP. `google`:
    # protobuf.
    "grpc": row(
        LEAVES, "record", "service", "http", "__version__",
        libraries="grpc grpc_health google orjson numpy starlette", loaders=True,
    ),
    # Other gateways: what they say of aliases, and how they are asked.
    "peers": row(
        LEAVES, VERSION, "rollouts.verdicts", "exposition", libraries="httpx orjson",
    ),
    # It posts news that others emit.
    "notify": row(LEAVES, libraries="httpx orjson"),
    # Around the composition root: what remembers, measures and looks after the parts.
    "persistence": row(
        LEAVES, VERSION, PREPARED, "artifacts.base", libraries="cachetools", loaders=True
    ),
    "gauges": row(
        "cgroup", "serving", "views", "metrics", "upkeep", "http.connections", "registries.watcher", "peers",
    ),
    "usage": row(LEAVES, VERSION, "record", "serving", "metrics"),
    # OpenTelemetry: requests and loads as spans, and the metrics.
    "otel": row("logs", "__version__", libraries="opentelemetry"),
    "spans": row(LEAVES, "otel", "record", "serving", "__version__", libraries="opentelemetry"),
    "otlpmetrics": row("otel", "metrics", "exposition", "__version__", libraries="opentelemetry"),
    "upkeep": row(LEAVES, PREPARED, "artifacts.cache", "runners", "serving"),
    "app": row(
        LEAVES, PARTS, CAPTURE, "serving", "rollouts", "service", "views", "http", "metrics", "gauges",
        "persistence", "notify", "upkeep", "access", "usage", "spans", "otlpmetrics", "peers",
    ),
    "server": row(LEAVES, PARTS, "app", "http", "grpc", libraries="uvicorn uvloop"),
    # Python's interface: registry and artifacts, without a server.
    "api": row(LEAVES, "registries", "artifacts", libraries="numpy pandas", loaders=True),
    "demo": row("api", "registries", "commands.terminal", loaders=True, libraries="numpy"),
    "commands": row(
        LEAVES, PARTS, CAPTURE, "rollouts", "server", "api", "demo", "http.bodies", "http.answers",
        "access.teams",
        "access.tokens",
        "http.hosting",
        libraries="typer rich httpx orjson numpy", loaders=True,
    ),
    "cli": row(LEAVES, PARTS, "commands", "__version__", libraries="typer click", loaders=True),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    name: str
    in_function: bool
    only_types: bool = False

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def imports(file: Path, package: str) -> Iterator[Import]:
    """Every imported dotted name, absolute; `from a import b` gives `a.b`."""

    def walk(node: ast.AST, in_function: bool, only_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, in_function, only_types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Import(file, node.lineno, f"{base}.{alias.name}", in_function, only_types)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            types = only_types or (guarded and isinstance(node, ast.If) and child in node.body)
            yield from walk(child, inside, types)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False, False)


def modules(root: str) -> list[tuple[Path, str]]:
    """(file, dotted module) of a package."""
    found = []
    for file in sorted((ROOT / root).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append((file, ".".join(parts)))
    return found


def package_of(file: Path, dotted: str) -> str:
    return dotted.removesuffix(".__init__") if file.name == "__init__.py" else dotted.rpartition(".")[0]


def below(dotted: str) -> str:
    """The part after `gateway.`: `gateway.registries.file` is `registries.file`, the package `__init__`."""
    return dotted.partition(".")[2] or "__init__"


def named(module: str, names: Mapping[str, Row] | frozenset[str]) -> str | None:
    """The entry of `names` that a module falls under: its own, else that of a folder above it."""
    parts = module.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in above if name in names), None)


def broken_rules(file: Path, dotted: str) -> list[str]:
    """Returns the imports of a module that the table does not allow."""
    found = []
    for item in imports(file, package_of(file, dotted)):
        top = item.name.split(".")[0]
        if top == "__future__":
            continue
        found += sibling_rule(item, dotted)
        if dotted.startswith("loaders"):
            found += loaders_rule(item, top)
        else:
            found += gateway_rule(item, top, below(dotted))
    return found


def loaders_rule(item: Import, top: str) -> list[str]:
    if top == "gateway":
        return [f"{item}: loaders never imports gateway"]
    late = item.in_function or item.only_types
    if not late and top not in STDLIB and top not in ("numpy", "loaders"):
        return [f"{item} at import time: loaders imports numpy and the standard library alone"]
    return []


def gateway_rule(item: Import, top: str, own: str) -> list[str]:
    if top in FORBIDDEN:
        return [f"{item}: nothing in gateway imports {top}"]
    if top == "onnxruntime":
        return [f"{item}: onnxruntime only through loaders.flavors.onnx"]
    name = named(own, TABLE)
    if name is None:
        return [f"{item}: gateway.{own} has no row in this test's table; add it"]
    allowed = TABLE[name]
    if top == "gateway":
        target = below(item.name)
        family = own.split(".")[0] if "." in own else None
        free = named(target, allowed.gateway) or target.split(".")[0] == family
        return [] if free else [f"{item}: {name} may not import gateway.{target}"]
    if top == "loaders":
        return [] if allowed.loaders else [f"{item}: {name} may not import loaders"]
    if top not in STDLIB and top not in allowed.libraries:
        return [f"{item}: {name} may not import {top}"]
    return []


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
"""The families and their interchangeable modules; the other files in a family's folder are part of one."""

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


def test_what_only_type_checkers_see_counts_in_gateway_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "one.py"
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n"
    file.write_text(source.format("pandas"), encoding="utf-8")
    assert broken_rules(file, "loaders.batch") == []
    file.write_text(source.format("gateway.app"), encoding="utf-8")
    (found,) = broken_rules(file, "gateway.http.predict")
    assert "http may not import gateway.app" in found


def import_graph() -> dict[str, set[str]]:
    """Which module imports which, in both packages."""
    known = {dotted.removesuffix(".__init__") for _, dotted in ALL}
    graph: dict[str, set[str]] = {}
    for file, dotted in ALL:
        own = dotted.removesuffix(".__init__")
        names = {item.name for item in imports(file, package_of(file, dotted))}
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[own] = (targets & known) - {own}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, on whatever way. What nothing left imports, and what
    imports nothing left, is in no circle."""
    left = set(graph)
    while True:
        imported = {target for module in left for target in graph[module]}
        staying = {module for module in left & imported if graph[module] & left}
        if staying == left:
            return [sorted(left)] if left else []
        left = staying


def test_no_module_imports_itself_on_a_way_round() -> None:
    assert circles(import_graph()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_every_row_of_the_table_has_a_module() -> None:
    there = {below(dotted.removesuffix(".__init__")) for _, dotted in ALL if dotted.startswith("gateway")}
    folders = {name.partition(".")[0] for name in there}
    assert TABLE.keys() - there - folders == set()
