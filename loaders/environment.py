"""The environment of a model: recorded when it is saved, compared with this one before it is loaded.

The files and their format are MLflow's (`requirements.txt`, `python_env.yaml`, `conda.yaml`). The comparison
reads the metadata of installed distributions and imports none of them. A difference is a mismatch, never an
error, because only loading shows whether it matters. Must not know models.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loaders.compat.pythons import dataclass
from loaders.package import PackageError
from loaders.yamltext import parse_yaml

if TYPE_CHECKING:
    from loaders.package import Package

REQUIREMENTS: Final = "requirements.txt"
PYTHON_ENV: Final = "python_env.yaml"
CONDA: Final = "conda.yaml"
#: The requirements that are compared; each takes some time.
MOST_LINES: Final = 5_000
_MLFLOW: Final = frozenset({"mlflow", "mlflow-skinny", "mlflow-tracing"})
# `\s` would match line ends too: quadratic in empty lines.
_IMPORTS_MLFLOW: Final = re.compile(rb"^[ \t]*(?:import|from)[ \t]+mlflow\b", re.MULTILINE)
_SOURCE_BYTES: Final = 1 << 20
_ALL_SOURCE_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Environment:
    """The Python version and the pip requirements of a model."""

    python: str
    requirements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference between the environment of a model and this one. `found` None: not installed here."""

    subject: str
    wanted: str
    found: str | None

    def __str__(self) -> str:
        return f"{self.subject}: the model was saved with {self.wanted}, here is {self.found or 'none'}"


def capture(requirements: Iterable[str]) -> Environment:
    """The part of this environment that a model needs. Bare names are pinned to the version installed here.
    Other lines, and names that are not installed, stay as they are."""
    lines: dict[str, None] = {}
    for requirement in requirements:
        line = requirement.strip()
        if re.fullmatch(r"[A-Za-z0-9._-]+", line):
            version = _installed(line, tuple(sys.path))
            # A local label such as +cpu names a build that no index offers under that version.
            line = line if version is None else f"{line}=={version.partition('+')[0]}"
        lines[line] = None
    return Environment(platform.python_version(), tuple(lines))


def write(directory: Path, environment: Environment) -> dict[str, str]:
    """Writes the three files and returns the value of `env` in `MLmodel`."""
    import yaml

    requirements = list(environment.requirements)
    (directory / REQUIREMENTS).write_text("".join(line + "\n" for line in requirements), encoding="utf-8")
    python_env = {
        "python": environment.python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": [f"-r {REQUIREMENTS}"],
    }
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={environment.python}", "pip", {"pip": requirements}],
    }
    for name, content in ((PYTHON_ENV, python_env), (CONDA, conda)):
        (directory / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return {"conda": CONDA, "virtualenv": PYTHON_ENV}


def read(package: Package) -> Environment:
    """The requirements of a package: `requirements.txt`, else the pip part of `conda.yaml` (MLflow 1 wrote
    only that). Options such as `-c constraints.txt` are left out. Raises PackageError."""
    python = package.text("python_version") or ""
    if (package.path / REQUIREMENTS).exists():
        text = package.content(REQUIREMENTS).decode("utf-8", errors="replace")
        return Environment(python, tuple(requirement_lines(text)))
    if (package.path / CONDA).exists():
        content = parse_yaml(package.content(CONDA), CONDA)
        return Environment(python, tuple(pip_part(content) or ()))
    return Environment(python, ())


def check(package: Package) -> list[Mismatch]:
    """The differences between this environment and the package's: Python's major.minor, and every requirement
    that applies here. Never raises: a requirement that cannot be compared is a mismatch too.

    The requirement `mlflow`, which MLflow adds to every package, counts only if the package contains code
    that imports it.
    """
    try:
        wanted = read(package)
    except (PackageError, OSError, ImportError) as error:
        return [Mismatch("requirements", f"a list that cannot be read ({error})", None)]
    mismatches = []
    here = platform.python_version()
    if wanted.python.split(".")[:2] != here.split(".")[:2]:
        mismatches.append(Mismatch("Python", wanted.python or "an unknown version", here))
    return mismatches + _compared(wanted.requirements, counts_mlflow=_imports_mlflow(package))


def distributions(modules: Iterable[str]) -> tuple[str, ...]:
    """The installed distributions that provide top-level modules, by name, sorted."""
    known = metadata.packages_distributions()
    return tuple(sorted({name for module in modules for name in known.get(module, ())[:1]}))


def _compared(requirements: Sequence[str], *, counts_mlflow: bool) -> list[Mismatch]:
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return [Mismatch("requirements", "a list that only the package 'packaging' can compare", None)]
    mismatches = []
    for line in requirements:
        try:
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate():
                continue
            if canonicalize_name(requirement.name) in _MLFLOW and not counts_mlflow:
                continue
            found = _installed(requirement.name, tuple(sys.path))
            # An installed pre-release satisfies its pin: installing it was a deliberate choice.
            fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        except (ValueError, RecursionError):
            mismatches.append(Mismatch(line[:200], "a requirement that cannot be compared", None))
            continue
        if not fits:
            wanted = str(requirement.specifier)[:200] or "any version"
            mismatches.append(Mismatch(requirement.name, wanted, found))
    return mismatches


def pip_part(conda: object) -> list[str] | None:
    """The pip requirements of a parsed `conda.yaml`; None if it has none."""
    dependencies = conda.get("dependencies") if isinstance(conda, Mapping) else None
    for item in dependencies if isinstance(dependencies, list) else []:
        if isinstance(item, Mapping) and isinstance(item.get("pip"), list):
            return requirement_lines("\n".join(str(line) for line in item["pip"]))
    return None


def requirement_lines(text: str) -> list[str]:
    """The requirements in pip's format, without comments, options and hashes."""
    lines: list[str] = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        if len(lines) >= MOST_LINES:
            break
        bare = re.sub(r"(^|\s)#.*$", "", line)
        bare = re.split(r"\s--?[a-z]", bare)[0].strip()
        if bare and not bare.startswith("-"):
            lines.append(bare)
    return lines


@lru_cache(maxsize=4096)
def _installed(name: str, _places: tuple[str, ...]) -> str | None:
    """The version of a distribution. Cached, because it parses files and every load calls it."""
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None


def _imports_mlflow(package: Package) -> bool:
    """Whether a source file in the package imports mlflow. A model saved as code does not count: it always
    imports mlflow, with known names."""
    files = () if package.code is None else package.code.rglob("*.py")
    return any(_IMPORTS_MLFLOW.search(source) for source in sources(files))


def sources(files: Iterable[Path]) -> Iterator[bytes]:
    """Yields the beginning of each source file, one at a time: a package may hold files of any size."""
    left = _ALL_SOURCE_BYTES
    for file in files:
        if left > 0 and file.is_file():
            with file.open("rb") as handle:
                source = handle.read(_SOURCE_BYTES)
            left -= len(source)
            yield source
