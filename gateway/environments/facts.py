"""Facts about the environment in which a package was made, read from its files without executing anything.

Python's version, requirements, the flavor's own version fields, byte code in pickles, the modules that its
code imports, and whether its loader needs the real mlflow. `check` compares them with an interpreter.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from gateway.environments import lock, pickles
from gateway.environments.interpreters import Minor, minor_of
from loaders import environment as environments
from loaders import flavors
from loaders.compat import standin
from loaders.files import names
from loaders.flavors.lightgbm import BOOSTER
from loaders.package import PackageError
from loaders.schema import ColSpec
from loaders.yamltext import parse_yaml

if TYPE_CHECKING:
    from loaders.package import Package

#: Flavor in MLmodel -> (its distribution, its field for the version).
VERSION_FIELDS: Final = {
    "sklearn": ("scikit-learn", "sklearn_version"),
    "xgboost": ("xgboost", "xgb_version"),
    "lightgbm": ("lightgbm", "lgb_version"),
    "catboost": ("catboost", "catboost_version"),
    "statsmodels": ("statsmodels", "statsmodels_version"),
    "pytorch": ("torch", "pytorch_version"),
    "prophet": ("prophet", "prophet_version"),
    "spacy": ("spacy", "spacy_version"),
    "keras": ("keras", "keras_version"),
    "tensorflow": ("tensorflow", "tensorflow_version"),
    "sentence_transformers": ("sentence-transformers", "sentence_transformers_version"),
    "transformers": ("transformers", "transformers_version"),
}
#: Distributions whose modules have other names.
MODULES: Final = {
    "scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL", "opencv-python": "cv2",
    "opencv-python-headless": "cv2", "beautifulsoup4": "bs4", "python-dateutil": "dateutil",
    "xgboost-cpu": "xgboost", "tensorflow-cpu": "tensorflow", "protobuf": "google.protobuf",
    "python-dotenv": "dotenv", "msgpack-python": "msgpack", "scikit-image": "skimage",
    "sentence-transformers": "sentence_transformers", "psycopg2-binary": "psycopg2",
}  # fmt: skip
_DISTRIBUTIONS: Final = {
    "sklearn": "scikit-learn", "xgboost": "xgboost", "lightgbm": "lightgbm", "catboost": "catboost",
    "statsmodels": "statsmodels", "pytorch": "torch", "onnx": "onnxruntime", "python": "cloudpickle",
}  # fmt: skip
"""The modules that a flavor's loader imports."""
_CODE_MODULES: Final = frozenset({"_make_function", "subimport", "_make_skel_func"})
# A syntax tree takes some 600 times the bytes of its source, and making one holds the interpreter's lock.
_PARSED_BYTES: Final = 64 << 10
_ALL_PARSED_BYTES: Final = 1 << 20
_LONGEST_CHAIN: Final = 20
_MOST_MODULES: Final = 100_000
_LONGEST_VERSION: Final = 100
# `\s` would match line ends too: quadratic in empty lines.
_IMPORT: Final = re.compile(r"^[ \t]*(?:import|from)[ \t]+([A-Za-z_][\w.]*)", re.MULTILINE)
_COMPILED: Final = re.compile(r"(?:\.cpython-(\d)(\d+)[^/]*\.so|\.pyc)\Z")


@dataclass(frozen=True, slots=True)
class Facts:
    """`python`: the full version, "" if unknown. `requirements`: its lines, in the form that `lock` reads.
    `refused`: why they may not be installed, or None. `frameworks`: versions by distribution, from the
    flavor's own fields. `byte_code`: the files with byte code. `modules`: what its code and pickles import.
    `custom`: it runs its own code. `mlflow`: why it needs the real mlflow, or None. `text`: its model gets
    frames that may hold text. `old_xgboost`: it has XGBoost's binary format. `estimator`: a class of another
    framework that needs scikit-learn. `bare`: a model file, which does not describe its environment."""

    flavor: str
    python: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    hashes: dict[str, frozenset[str]]
    refused: str | None
    frameworks: dict[str, str]
    byte_code: tuple[str, ...]
    modules: frozenset[str]
    custom: bool
    mlflow: str | None
    mlflow_version: str | None
    frames: bool
    text: bool
    old_xgboost: bool
    estimator: bool
    created: datetime | None
    bare: bool = False

    @property
    def minor(self) -> Minor | None:
        return minor_of(self.python)

    def imports(self, distribution: str) -> bool:
        """Returns True if its code or its pickles import a module of a distribution."""
        module = MODULES.get(distribution, distribution.replace("-", "_"))
        return module in self.modules or module.partition(".")[0] in self.modules


def wanted(facts: Facts, *, as_of: datetime | None) -> lock.Wanted:
    """The requirements of the package's own environment: its own without mlflow (unless its loader needs it),
    and those that it uses without naming them. Raises LockError with the line that may not be installed."""
    if facts.refused is not None:
        raise lock.LockError(facts.refused)
    named = lock.pins(facts.requirements)
    lines = [line for line in facts.requirements if not _is_mlflow(line)]
    lines += [
        lock.pin(name, version.partition("+")[0], "MLmodel")
        for name, version in facts.frameworks.items()
        if name not in named
    ]
    also = ["numpy", "setuptools"]
    also += ["pandas"] if facts.frames else []
    also += ["cloudpickle"] if "cloudpickle" in facts.modules else []
    also += [_DISTRIBUTIONS[facts.flavor]] if facts.flavor in _DISTRIBUTIONS else []
    also += ["scikit-learn"] if facts.estimator else []
    lines += [name for name in dict.fromkeys(also) if name not in named and name not in facts.frameworks]
    if facts.mlflow is not None:
        exact = lock.pin("mlflow", facts.mlflow_version, "MLmodel") if facts.mlflow_version else "mlflow"
        given = [line for line in facts.requirements if _is_mlflow(line)]
        # A bare `mlflow` would be the newest version of that day, not the one that wrote the package.
        lines += [line for line in given if str(*lock.pins([line]).values())] or [exact]
    return lock.Wanted(
        requirements=tuple(lines),
        constraints=facts.constraints,
        hashes=facts.hashes,
        created=as_of,
        python=facts.minor,
        exact=bool(facts.byte_code),
        mlflow=facts.mlflow_version,
        keeps_mlflow=facts.mlflow is not None,
    )


def _is_mlflow(line: str) -> bool:
    return not lock.MLFLOW.isdisjoint(lock.pins([line]))


def read(package: Package) -> Facts:
    """Reads a package's facts. Blocks, for large pickles some seconds. Raises PackageError and OSError."""
    requirements: list[str] = []
    constraints: list[str] = []
    hashes: dict[str, frozenset[str]] = {}
    refused = None
    try:
        requirements, constraints = lock.required(package)
        versions, hashes = lock.shipped_lock(package)
        constraints += versions
    except lock.LockError as error:
        refused = str(error)
        requirements = lock.readable(environments.read(package).requirements)
    try:
        flavor = flavors.find(package).name
    except PackageError:
        flavor = "mlflow"
    budget = pickles.Budget()
    named = {file: pickles.read(package.path / file, budget) for file in _pickles(package)}
    byte_code = [file for file, what in named.items() if what.byte_code] + list(_compiled(package))
    globals_ = {entry for what in named.values() for entry in what.globals}
    texts = {text for what in named.values() for text in what.texts}
    modules = {module.partition(".")[0] for module, _ in globals_}
    imported, beyond = _of_sources(package)
    modules |= imported
    if any(name in _CODE_MODULES for _, name in globals_):
        # Functions pickled by value name their imports as plain text.
        modules |= {text.partition(".")[0] for text in texts if re.fullmatch(r"[A-Za-z_][\w.]*", text)}
    custom = flavor in ("python", "loader", "mlflow") or bool(byte_code)
    frames, text = _frames(package, flavor)
    return Facts(
        flavor=flavor,
        python=_python(package),
        requirements=tuple(requirements),
        constraints=tuple(constraints),
        hashes=hashes,
        refused=refused,
        frameworks=_frameworks(package, flavor),
        byte_code=tuple(byte_code),
        modules=frozenset(modules),
        custom=custom,
        mlflow=_mlflow(package, flavor, globals_, texts, beyond),
        mlflow_version=_plain_version(package.mlflow_version),
        frames=frames,
        text=text,
        old_xgboost=_old_xgboost(package, flavor),
        estimator=".sklearn." in str(package.flavors.get(flavor, {}).get("model_class", "")),
        created=lock.created(package),
        bare=package.bare is not None,
    )


def _python(package: Package) -> str:
    """From `MLmodel`, else `python_env.yaml`, else `conda.yaml`."""
    if (version := package.text("python_version")) is not None:
        return version[:_LONGEST_VERSION]
    for file, find in ((environments.PYTHON_ENV, _of_virtualenv), (environments.CONDA, _of_conda)):
        if (package.path / file).exists():
            content = parse_yaml(package.content(file), file)
            if isinstance(content, dict) and (version := find(content)):
                return version
    return ""


def _of_virtualenv(content: dict[str, object]) -> str:
    return str(content.get("python") or "")[:_LONGEST_VERSION]


def _of_conda(content: dict[str, object]) -> str:
    dependencies = content.get("dependencies")
    for item in dependencies if isinstance(dependencies, list) else []:
        if isinstance(item, str) and (match := re.fullmatch(r"python\s*=+\s*(\d+\.\d+(?:\.\d+)?)", item)):
            return match[1]
    return ""


def _frameworks(package: Package, flavor: str) -> dict[str, str]:
    found = {}
    for name, (distribution, field) in VERSION_FIELDS.items():
        version = package.flavors.get(name, {}).get(field)
        if isinstance(version, str) and version:
            found[distribution] = version[:_LONGEST_VERSION]
    return found


def _pickles(package: Package) -> Iterator[str]:
    if package.bare is not None:  # its directory may hold other things
        if package.bare.lower().endswith((".pkl", ".joblib")):
            yield package.bare
        return
    stated = _stated_pickles(package)
    for relative, file in names(package.path):
        name = relative.rpartition("/")[2]
        if (pickles.is_pickle(name) or relative in stated) and not os.path.islink(file):
            yield relative


def _stated_pickles(package: Package) -> frozenset[str]:
    """The files that its loader unpickles, whatever their names."""
    names = [package.text("python_model"), package.text("model_path")]
    names.append(package.flavors.get("sklearn", {}).get("pickled_model"))
    lightgbm = package.flavors.get("lightgbm", {})
    if lightgbm.get("model_class", BOOSTER) != BOOSTER:
        names.append(lightgbm.get("data"))
    return frozenset(posixpath.normpath(name) for name in names if isinstance(name, str))


def _code(package: Package) -> Iterator[tuple[str, Path]]:
    """Yields (path in the package, file) of the modules in the package."""
    if package.code is not None:
        below = PurePosixPath(package.code.relative_to(package.path))
        for relative, file in names(package.path):
            if below in PurePosixPath(relative).parents:
                yield relative, Path(file)


def _compiled(package: Package) -> Iterator[str]:
    """Yields compiled modules in `code/`, which have no source."""
    return (relative for relative, _ in _code(package) if _COMPILED.search(relative))


def _sources(package: Package) -> Iterator[str]:
    """Yields the source files that its loader imports: its own code, and a model saved as code."""
    places = [file for relative, file in _code(package) if relative.endswith(".py")]
    if path := package.text("model_code_path"):
        name = path.replace("\\", "/").rpartition("/")[2]
        places.append(package.path / name)
    for source in environments.sources(file for file in places if not file.is_symlink()):
        yield source.decode("utf-8", errors="replace")


def _of_sources(package: Package) -> tuple[frozenset[str], str | None]:
    """Returns the modules that its sources import, and the first name of mlflow in them that the stand-in for
    mlflow does not have. One source is in memory at a time. Beyond the limits on what is parsed, every import
    of mlflow is taken for one that the stand-in does not have."""
    imported: set[str] = set()
    beyond = None
    known = standin.names()
    left = _ALL_PARSED_BYTES
    for source in _sources(package):
        found = {match.partition(".")[0] for match in _IMPORT.findall(source)}
        if len(imported) < _MOST_MODULES:
            imported |= found
        if beyond is not None or "mlflow" not in source:
            continue
        if len(source) <= min(_PARSED_BYTES, left):
            left -= len(source)
            beyond = _beyond(source, known)
        elif "mlflow" in found:
            beyond = "mlflow"
    return frozenset(imported), beyond


def _frames(package: Package, flavor: str) -> tuple[bool, bool]:
    """Returns whether its model receives frames, and whether these may contain text."""
    inputs = None if package.signature is None else package.signature.inputs
    if inputs is None:
        return flavor != "onnx", flavor != "onnx"
    columns = [spec for spec in inputs if isinstance(spec, ColSpec)]
    plain = {"boolean", "integer", "long", "float", "double", "datetime", "binary"}
    return bool(columns), any(str(spec.type) not in plain for spec in columns)


def _old_xgboost(package: Package, flavor: str) -> bool:
    """Whether it has XGBoost's format before JSON and UBJSON, which 3.1 and later do not read."""
    if flavor != "xgboost":
        return False
    data = package.native_data("xgboost")
    if not data.is_file() or pickles.is_pickle(data.name):
        return False
    with data.open("rb") as handle:
        return handle.read(1) != b"{"


def _plain_version(text: str | None) -> str | None:
    """The version if an index can have it; None for a development version."""
    return text if text and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){1,5}", text) else None


def _mlflow(
    package: Package, flavor: str, globals_: set[tuple[str, str]], texts: set[str], beyond: str | None
) -> str | None:
    if flavor == "mlflow":
        return f"models of {package.loader_module} are loaded by mlflow"
    if flavor not in ("python", "loader"):
        return None
    known = standin.names()
    for module, name in sorted(globals_):
        if module.partition(".")[0] == "mlflow" and name.partition(".")[0] not in known.get(module, ()):
            return f"its pickle names {module}.{name}"
    by_value = any(name in _CODE_MODULES for _, name in globals_)
    if by_value and "subimport" in {name for _, name in globals_} and "mlflow" in texts:
        return "its code imports mlflow"
    return None if beyond is None else f"its code uses {beyond}"


def _beyond(source: str, known: Mapping[str, frozenset[str]]) -> str | None:
    """The first name of mlflow in a source file that the stand-in for mlflow does not have."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "mlflow" if "mlflow" in {name.partition(".")[0] for name in _IMPORT.findall(source)} else None
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mlflow":
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in known:
                    aliases[alias.asname or alias.name] = full
                elif alias.name not in known.get(module, ()):
                    return full
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "mlflow":
                    if alias.name not in known:
                        return alias.name
                    aliases[alias.asname or "mlflow"] = alias.name if alias.asname else "mlflow"
    for node in ast.walk(tree):
        chain = _chain(node)
        if chain and chain[0] in aliases:
            place = aliases[chain[0]]
            for name in chain[1:]:
                if f"{place}.{name}" in known:
                    place = f"{place}.{name}"
                    continue
                if name not in known[place]:
                    return f"{place}.{name}"
                break
    return None


def _chain(node: ast.AST) -> list[str]:
    """The names of an expression such as `a.b.c`; empty for a longer one, whose parts come by themselves."""
    names: list[str] = []
    while isinstance(node, ast.Attribute) and len(names) < _LONGEST_CHAIN:
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if names and isinstance(node, ast.Name) else []
