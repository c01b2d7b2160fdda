"""The requirement lines of a package, read strictly, and the lock made from them.

Accepts only lines of the form `name[extras] specifier; marker`. Refuses everything that says where to install
from (index options, URLs, paths, version control, editable installs), and names the line: only the operator
chooses an index, because a package may come from a stranger. Pure: `resolve` does the resolving.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from loaders import environment as environments
from loaders.package import MAX_SIDE_BYTES
from loaders.yamltext import parse_yaml

if TYPE_CHECKING:
    from gateway.environments.interpreters import Minor
    from loaders.package import Package

PYPROJECT_LOCK: Final = "uv.lock"
CONSTRAINTS: Final = "constraints.txt"
MLFLOW: Final = frozenset({"mlflow", "mlflow-skinny", "mlflow-tracing"})
_MAX_BYTES: Final = 4 << 20
_MAX_LINE: Final = 2_000
_MAX_NESTED: Final = 20
_MAX_DOTS: Final = 200  # reading a key takes time quadratic in its parts

#: Distributions that mlflow needs but models do not. They are left out of the resolution, so that only
#: mlflow's bounds on the models' own distributions remain.
MLFLOW_ONLY: Final = (
    "aiohttp", "alembic", "azure-storage-file-datalake", "boto3", "cachetools", "click", "databricks-cli",
    "databricks-sdk", "docker", "entrypoints", "fastapi", "flask", "flask-cors", "gitpython",
    "google-cloud-storage", "graphene", "gunicorn", "huey", "importlib-metadata", "jinja2", "markdown",
    "opentelemetry-api", "opentelemetry-proto", "opentelemetry-sdk", "prometheus-flask-exporter", "pydantic",
    "python-dotenv", "querystring-parser", "requests", "skops", "sqlalchemy", "sqlparse", "starlette",
    "uvicorn", "waitress",
)  # fmt: skip

_FORMS: Final = (
    (r"(-e|--editable)\b", "an editable install"),
    (r"(-r|--requirement)\b", "another file of requirements"),
    (
        r"(-i|--index-url|--extra-index-url|-f|--find-links|--no-index|--trusted-host|--pre|--prefer-binary"
        r"|--no-binary|--only-binary|--require-hashes|--use-feature)\b",
        "an index option",
    ),
    (r"--?[A-Za-z]", "an option"),
    (r"(git|hg|svn|bzr)\+", "a version control reference"),
    (r"[A-Za-z][A-Za-z0-9+.-]*://", "a URL"),
    (r"(\.{0,2}[/\\]|~|[A-Za-z]:[/\\])", "a path"),
    (r"\S+\.(whl|tar\.gz|zip|tar\.bz2)\b", "a path"),
    (r"file:", "a path"),
)
#: Control characters, and all that ends a line for Python, pip or uv.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class LockError(Exception):
    """A package's requirements cannot be used. The message names the line and the reason."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requirements of a package's environment, before they are resolved.

    `requirements`: lines. `constraints`: lines that bound versions. `hashes`: by `name==version`, the hashes
    that the package's own lock allows. `created`: the time as of which versions are resolved, None for now.
    `python`: the version that the package was made with, None if unknown. `exact`: byte code needs exactly
    that minor version. `mlflow`: the mlflow version that wrote the package, whose bounds apply.
    `keeps_mlflow`: mlflow is installed.
    """

    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    hashes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    created: datetime | None = None
    python: Minor | None = None
    exact: bool = False
    mlflow: str | None = None
    keeps_mlflow: bool = False

    @property
    def key(self) -> str:
        """Equal for packages with equal requirements and hashes: they share one resolution."""
        hashes = sorted((name, sorted(files)) for name, files in self.hashes.items())
        parts = [
            sorted(self.requirements), sorted(self.constraints), hashes,
            None if self.created is None else self.created.isoformat(),
            self.python, self.exact, self.mlflow, self.keeps_mlflow,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def union(wishes: Sequence[Wanted], python: Minor) -> Wanted | None:
    """What meets several wishes at once on a Python: all their requirements, as of the latest day. None where
    two of them pin a package to different versions, or allow different files of it."""
    pinned: dict[str, str] = {}
    hashes: dict[str, frozenset[str]] = {}
    for wanted in wishes:
        for name, specifier in pins(wanted.requirements).items():
            exact = _exact(specifier)
            if exact is not None and pinned.setdefault(name, exact) != exact:
                return None
        for name, allowed in wanted.hashes.items():
            both = hashes.get(name, allowed) & allowed
            if allowed and not both:
                return None
            hashes[name] = both
    days = [wanted.created for wanted in wishes if wanted.created is not None]
    writers = [wanted.mlflow for wanted in wishes if wanted.mlflow is not None]
    return Wanted(
        tuple(dict.fromkeys(line for wanted in wishes for line in wanted.requirements)),
        tuple(dict.fromkeys(line for wanted in wishes for line in wanted.constraints)),
        hashes,
        max(days) if len(days) == len(wishes) else None,
        python,
        any(wanted.exact for wanted in wishes),
        max(writers, key=Version) if writers else None,
        any(wanted.keeps_mlflow for wanted in wishes),
    )


def _exact(specifier: SpecifierSet) -> str | None:
    exact = [part.version for part in specifier if part.operator in ("==", "===")]
    return exact[0] if len(exact) == 1 and not exact[0].endswith("*") else None


@dataclass(frozen=True, slots=True)
class Lock:
    """A resolved environment. `packages`: versions by canonical name. `python`: its minor version. `hashes`:
    the SHA-256 of the wheels by name. `text`: the `pylock.toml`. `dated`: whether the versions are as of the
    package's day."""

    python: Minor
    platform: str
    packages: Mapping[str, str]
    hashes: Mapping[str, frozenset[str]]
    text: str
    dated: bool = True

    @property
    def key(self) -> str:
        """The name of the environment's directory. It depends on the content, not on the file's
        formatting."""
        content = [list(self.python), self.platform, sorted(self.packages.items())]
        content.append(sorted((name, sorted(hashes)) for name, hashes in self.hashes.items()))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def satisfies(self, other: Lock) -> bool:
        """Whether everything that runs in `other` runs here: the same Python, and every package of `other` in
        the same version, from files that `other` allows too."""
        return (
            (self.python, self.platform) == (other.python, other.platform)
            and all(self.packages.get(name) == version for name, version in other.packages.items())
            and all(
                not hashes or not self.hashes.get(name) or self.hashes[name] <= hashes
                for name, hashes in other.hashes.items()
            )
        )


def lines(text: str, place: str) -> tuple[list[str], bool]:
    """The requirements in a file in pip's format, and whether it names `constraints.txt`, which MLflow writes
    next to it. Raises LockError, which names the line and why it is refused."""
    found: list[str] = []
    constrained = False
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        bare = re.sub(r"(^|\s)#.*$", "", line).strip()
        if not bare:
            continue
        if re.fullmatch(rf"(-c|--constraint)[ =]*{re.escape(CONSTRAINTS)}", bare):
            constrained = True
            continue
        found.append(_line(bare, place))
        if len(found) > environments.MOST_LINES:
            raise LockError(f"its {place} has more than {environments.MOST_LINES:,} requirements")
    return found, constrained


def readable(found: Iterable[str]) -> list[str]:
    """The lines that name a library. They suffice to compare versions, even if other lines are refused."""
    kept = []
    for line in found:
        try:
            kept.append(_line(line, ""))
        except LockError:
            continue
    return kept


def pin(name: str, version: str, place: str) -> str:
    """The line `name==version`, from two texts of a package. Raises LockError if it would say anything else:
    uv reads every line of a requirement file, options included."""
    try:
        Version(version)
    except ValueError:
        raise LockError(_refused(f"{name}=={version}", place, "not a pinned version")) from None
    return _line(f"{name}=={version.strip()}", place)


def checked(line: str) -> str:
    """The line, just before it is written to a file for uv. Raises LockError if it could be an option or
    several lines."""
    if not re.match(r"[A-Za-z0-9]", line) or _CONTROL.search(line):
        raise LockError(_refused(line, "requirements", "not a requirement"))
    return line


@lru_cache(maxsize=1024)
def parsed_line(line: str) -> Requirement:
    """The requirement of a line. Packages of a registry name the same few. Treat it as read-only. Raises
    ValueError."""
    return Requirement(line)


@lru_cache(maxsize=1024)
def _line(bare: str, place: str) -> str:
    if _CONTROL.search(bare) or len(bare) > _MAX_LINE or bare.count("(") > _MAX_NESTED:
        raise LockError(_refused(bare, place, "not a requirement"))
    for pattern, what in _FORMS:
        if re.match(pattern, bare, re.IGNORECASE):
            raise LockError(_refused(bare, place, what))
    if re.search(r"\s--[a-z]", bare):
        raise LockError(_refused(bare, place, "a requirement with an option"))
    try:
        requirement = parsed_line(bare)
        if requirement.marker is not None:
            requirement.marker.evaluate()  # some markers compare what cannot be compared
    except (ValueError, RecursionError):
        raise LockError(_refused(bare, place, "not a requirement")) from None
    if requirement.url is not None:
        what = "a version control reference" if "+" in requirement.url.partition(":")[0] else "a URL"
        raise LockError(_refused(bare, place, what))
    return str(requirement)


def _refused(line: str, place: str, what: str) -> str:
    shown = re.sub(r"(?<=://)[^\s/@]+@", "…@", line)
    shown = shown if len(shown) <= 120 else shown[:117] + "…"
    return (
        f"the line {shown!r} of its {place} is {what}; the gateway installs only lines of the form"
        " name[extras] specifier; marker"
    )


def required(package: Package) -> tuple[list[str], list[str]]:
    """(requirements, constraints) of a package: `requirements.txt`, else the pip part of `conda.yaml`. Raises
    LockError and PackageError."""
    file = environments.REQUIREMENTS
    if (package.path / file).exists():
        found, constrained = lines(_text(package, file), file)
        bounds: list[str] = []
        if constrained and (package.path / CONSTRAINTS).exists():
            bounds, _ = lines(_text(package, CONSTRAINTS), CONSTRAINTS)
        return found, bounds
    if (package.path / environments.CONDA).exists():
        content = parse_yaml(package.content(environments.CONDA), environments.CONDA)
        dependencies = content.get("dependencies") if isinstance(content, dict) else None
        for item in dependencies if isinstance(dependencies, list) else []:
            if isinstance(item, dict) and isinstance(item.get("pip"), list):
                text = "\n".join(str(line) for line in item["pip"])
                return lines(text, f"{environments.CONDA} (pip)")[0], []
    return [], []


def shipped_lock(package: Package) -> tuple[list[str], dict[str, frozenset[str]]]:
    """The content of a shipped `uv.lock`: versions as constraints, and hashes. Raises LockError if a package
    in it has its own source: only the operator chooses sources."""
    if not (package.path / PYPROJECT_LOCK).exists():
        return [], {}
    text = _text(package, PYPROJECT_LOCK, _MAX_BYTES)
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise LockError(f"its {PYPROJECT_LOCK} has a line with more than {_MAX_DOTS} dots")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise LockError(f"its {PYPROJECT_LOCK} is not valid TOML: {str(error)[:200]}") from None
    entries = content.get("package", [])
    versions: dict[str, set[str]] = {}
    hashes: dict[str, frozenset[str]] = {}
    for entry in entries if isinstance(entries, list) else []:
        name, version, source = _entry(entry)
        if "registry" not in source:
            if source.keys() & {"virtual", "editable"} and source.get(next(iter(source))) == ".":
                continue  # the project itself
            kind = next(iter(source), "an empty source")
            raise LockError(
                f"its {PYPROJECT_LOCK} takes {name} from {kind}, not from an index;"
                " a lock in a package may give versions and hashes only"
            )
        versions.setdefault(name, set()).add(version)
        files = entry.get("wheels", [])
        found = {str(f.get("hash", "")).removeprefix("sha256:") for f in files if isinstance(f, dict)}
        hashes[f"{name}=={version}"] = frozenset(found - {""})
    # A lock with two versions of a package (for two platforms) does not say which is ours.
    pinned = [
        pin(name, next(iter(found)), PYPROJECT_LOCK) for name, found in versions.items() if len(found) == 1
    ]
    return sorted(pinned), hashes


def _entry(entry: Any) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise LockError(f"its {PYPROJECT_LOCK} has a package without a name")
    source = entry.get("source")
    name = canonicalize_name(entry["name"])
    return name, str(entry.get("version", "")), source if isinstance(source, dict) else {}


def parsed(text: str, python: Minor, platform: str, *, dated: bool) -> Lock:
    """The lock in a `pylock.toml`. Raises LockError."""
    try:
        content = tomllib.loads(text)
        packages: dict[str, str] = {}
        hashes: dict[str, frozenset[str]] = {}
        for entry in content["packages"]:
            name = canonicalize_name(entry["name"])
            packages[name] = str(entry["version"])
            hashes[name] = frozenset(
                digest
                for wheel in entry.get("wheels", [])
                if (digest := wheel.get("hashes", {}).get("sha256"))
            )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise LockError(f"cannot read the lock: {error!r}") from None
    return Lock(python, platform, packages, hashes, text, dated)


def merged(locks: Sequence[Lock]) -> Lock:
    """One lock that satisfies all of them. They must not disagree about a version or a file (`plan` ensures
    that)."""
    first = locks[0]
    entries: dict[str, dict[str, Any]] = {}
    files: dict[str, frozenset[str]] = {}
    for lock in locks:
        for entry in tomllib.loads(lock.text)["packages"]:
            name = canonicalize_name(entry["name"])
            if name not in entries or lock.hashes[name] < files[name]:
                entries[name], files[name] = entry, lock.hashes[name]
    head = {k: v for k, v in tomllib.loads(first.text).items() if k != "packages"}
    text = _toml({**head, "packages": [entries[name] for name in sorted(entries)]})
    return parsed(text, first.python, first.platform, dated=all(lock.dated for lock in locks))


def restricted(lock: Lock, hashes: Mapping[str, frozenset[str]]) -> Lock:
    """The lock with only the wheels that the model package's own lock allows. Raises LockError if it allows
    no wheel of a package."""
    allowed = {name: hashes.get(f"{name}=={version}") for name, version in lock.packages.items()}
    narrowed = {name for name, files in allowed.items() if files and lock.hashes[name] - files}
    for name in narrowed:
        if not lock.hashes[name] & (allowed[name] or frozenset()):
            raise LockError(
                f"{name}=={lock.packages[name]}: the files of the index differ from those in the package's"
                f" {PYPROJECT_LOCK}"
            )
    if not narrowed:
        return lock
    content = tomllib.loads(lock.text)
    for entry in content["packages"]:
        if (name := canonicalize_name(entry["name"])) in narrowed:
            files = allowed[name] or frozenset()
            entry["wheels"] = [w for w in entry["wheels"] if w.get("hashes", {}).get("sha256") in files]
    return parsed(_toml(content), lock.python, lock.platform, dated=lock.dated)


def created(package: Package) -> datetime | None:
    """When the package was written, in UTC; None if unknown."""
    text = (package.utc_time_created or "").strip()
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        return None


def pins(requirements: Iterable[str]) -> dict[str, SpecifierSet]:
    """The specifiers by canonical name, from lines that `lines` has read. Of several lines, all count."""
    found: dict[str, SpecifierSet] = {}
    for requirement in map(parsed_line, requirements):
        name = canonicalize_name(requirement.name)
        found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def _text(package: Package, name: str, most: int = MAX_SIDE_BYTES) -> str:
    return package.content(name, most).decode("utf-8-sig", errors="replace")


def _toml(value: Mapping[str, Any]) -> str:
    """The value as TOML; supports only the types that a pylock contains."""
    out = [f"{key} = {_inline(item)}" for key, item in value.items() if key != "packages"]
    for entry in value["packages"]:
        out.append("\n[[packages]]")
        out += [f"{key} = {_inline(item)}" for key, item in entry.items()]
    return "\n".join(out) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value)
