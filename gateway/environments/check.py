"""The check of a package against an interpreter: does it match the environment in which the package was made?

Four verdicts, from best to worst: `same` (equal in every important part), `compatible` (different only in
unimportant parts), `differs`, `missing`. Each comparison has both versions and a sentence. Pure: takes facts
and installed versions, returns comparisons. The table of units says, per library, up to which part versions
must be equal, and why; the README shows it.
"""

from __future__ import annotations

import enum
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from gateway.environments.facts import Facts
from gateway.environments.interpreters import named, supported
from gateway.environments.lock import MLFLOW, parsed_line, pins


class Verdict(enum.IntEnum):
    """The result of one comparison. The verdict on a package is the worst one of its comparisons."""

    SAME = 0
    COMPATIBLE = 1
    DIFFERS = 2
    MISSING = 3

    def __str__(self) -> str:
        return self.name.lower()


class Unit(enum.Enum):
    """The part of a version up to which two versions must be equal."""

    MAJOR = "major"
    MINOR = "major.minor"
    NEWER = "equal or newer"
    ANY = "any"


UNITS: Final[dict[str, tuple[Unit, str]]] = {
    "scikit-learn": (Unit.MINOR, "its pickles hold private attributes that change with each minor release"),
    "xgboost": (Unit.MINOR, "defaults and pickled state change with minor releases"),
    "lightgbm": (Unit.MINOR, "pickled state and the handling of categories change with minor releases"),
    "catboost": (Unit.MINOR, "its format and its handling of features change with minor releases"),
    "statsmodels": (Unit.MINOR, "its pickles hold private attributes"),
    "torch": (Unit.MINOR, "whole modules are pickled with the private state of their classes"),
    "tensorflow": (Unit.MINOR, "saved graphs name operations of their release"),
    "keras": (Unit.MINOR, "saved layers hold the arguments of their release"),
    "prophet": (Unit.MINOR, "the form of its JSON depends on the release"),
    "spacy": (Unit.MINOR, "pipelines name the minor release they need"),
    "transformers": (Unit.MINOR, "the form of a pipeline's answers changes with minor releases"),
    "sentence-transformers": (Unit.MAJOR, "saved modules are read across minor releases"),
    "onnxruntime": (Unit.NEWER, "a graph names its operator set; later runtimes read earlier ones"),
    "pandas": (Unit.MAJOR, "text columns and missing values change with major releases"),
    "numpy": (Unit.MAJOR, "scalars, promotion and pickled names change with major releases"),
    "scipy": (Unit.ANY, "estimators use it through their own framework"),
    "cloudpickle": (Unit.ANY, "each release reads what the others write"),
    "typing-extensions": (Unit.ANY, "it only adds names"),
    "setuptools": (Unit.ANY, "models do not use it"),
}
"""Per distribution: the unit in which versions must be equal, and why. For other distributions that the
model's code imports: the major version, or for 0.x releases the minor version."""

OTHER: Final = "interfaces change with major releases"
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "xgboost": ("xgboost", "xgboost-cpu"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "torch": ("torch",),
}
_FRAMEWORK: Final = {
    "sklearn": "scikit-learn", "xgboost": "xgboost", "lightgbm": "lightgbm", "catboost": "catboost",
    "statsmodels": "statsmodels", "pytorch": "torch", "onnx": "onnxruntime",
}  # fmt: skip
_LAST_PANDAS_2: Final = Version("3.11")
_PANDAS: Final = ((datetime(2026, 1, 21, tzinfo=UTC), 3), (datetime(2023, 4, 3, tzinfo=UTC), 2))
_NUMPY: Final = ((datetime(2024, 6, 16, tzinfo=UTC), 2),)
"""The days of major releases, the newest first. Before each day the previous major version was current."""


@dataclass(frozen=True, slots=True)
class Installed:
    """An interpreter: Python's full version, and the versions of its distributions by canonical name."""

    python: str
    versions: Mapping[str, str]

    @property
    def minor(self) -> tuple[int, int]:
        major, minor, *_ = self.python.split(".")
        return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison: the version that the package was made with, and the version here (None: missing)."""

    subject: str
    verdict: Verdict
    wanted: str
    found: str | None
    sentence: str

    def to_json(self) -> dict[str, str | None]:
        return {
            "subject": self.subject,
            "verdict": str(self.verdict),
            "wanted": self.wanted,
            "found": self.found,
            "sentence": self.sentence,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """The result of checking a package against an interpreter. `byte_code`: the package holds byte code of
    another Python, which must never be executed there."""

    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    byte_code: bool

    @property
    def satisfied(self) -> bool:
        """Whether the package may run there as if it were in its own environment."""
        return self.verdict <= Verdict.COMPATIBLE

    @property
    def reasons(self) -> list[str]:
        """The sentences about what differs or is missing; empty if the check is satisfied."""
        return [f.sentence for f in self.comparisons if f.verdict > Verdict.COMPATIBLE]

    @property
    def sentence(self) -> str | None:
        """What is wrong, in one sentence with both versions; None where it is satisfied."""
        return "; ".join(self.reasons) or None

    def to_json(self) -> dict[str, object]:
        comparisons = [comparison.to_json() for comparison in self.comparisons]
        return {"verdict": str(self.verdict), "sentence": self.sentence, "findings": comparisons}


def here() -> Installed:
    """This interpreter."""
    return _here(tuple(sys.path))


@lru_cache(maxsize=8)
def _here(_path: tuple[str, ...]) -> Installed:
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and (canonical := canonicalize_name(name)) not in versions:
            versions[canonical] = distribution.version
    return Installed(platform.python_version(), versions)


def check(facts: Facts, place: Installed) -> Check:
    """Compares the facts of a package with an interpreter."""
    comparisons = [_python(facts, place), *_requirements(facts, place)]
    if facts.old_xgboost and (found := _version("xgboost", place)) and Version(found) >= Version("3.1"):
        wanted = facts.frameworks.get("xgboost", "an XGBoost before 3.1")
        sentence = f"xgboost: its file has the binary format of {wanted}; {found} here does not read it"
        comparisons.append(Comparison("xgboost format", Verdict.DIFFERS, wanted, found, sentence))
    byte_code = bool(facts.byte_code) and facts.minor != place.minor
    return Check(max(f.verdict for f in comparisons), tuple(comparisons), byte_code)


def _python(facts: Facts, place: Installed) -> Comparison:
    wanted = facts.python or "an unknown version"
    said = f"Python: the package was made with {wanted}, here is {place.python}"
    if facts.minor == place.minor:
        return Comparison("Python", Verdict.SAME, wanted, place.python, said)
    if facts.byte_code:
        why = f"{said}; it holds byte code ({facts.byte_code[0]}), which runs on its own minor version only"
        return Comparison("Python", Verdict.DIFFERS, wanted, place.python, why)
    if not supported(place.minor):
        why = f"{said}; model processes run on Python 3.8 to 3.13"
        return Comparison("Python", Verdict.DIFFERS, wanted, place.python, why)
    fine = f"{said}; it holds no byte code, so any supported version does"
    return Comparison("Python", Verdict.COMPATIBLE, wanted, place.python, fine)


def _requirements(facts: Facts, place: Installed) -> list[Comparison]:
    there = {"python_version": named(place.minor), "python_full_version": place.python}
    markers = {line: parsed_line(line).marker for line in facts.requirements}
    specifiers = pins(line for line, marker in markers.items() if marker is None or marker.evaluate(there))
    framework = _FRAMEWORK.get(facts.flavor)
    counted: dict[str, str | SpecifierSet] = {}
    for name, specifier in specifiers.items():
        if name in MLFLOW:
            if facts.mlflow is not None:
                counted[name] = specifier
        elif name == framework or _counts(name, facts):
            counted[name] = specifier
    for name, version in facts.frameworks.items():
        if name == framework or facts.imports(name) or facts.flavor == "mlflow":
            counted[name] = version
    comparisons = [_compared(name, wanted, place) for name, wanted in sorted(counted.items())]
    comparisons += _unnamed(facts, place, counted)
    if framework is not None and framework not in counted:
        comparisons.append(_compared(framework, SpecifierSet(), place))
    if facts.estimator and "scikit-learn" not in counted and "scikit-learn" not in place.versions:
        comparisons.append(_compared("scikit-learn", SpecifierSet(), place))
    if facts.mlflow is not None and not counted.keys() & MLFLOW and "mlflow" not in place.versions:
        sentence = f"mlflow: it is needed ({facts.mlflow}), and is not installed here"
        wanted = facts.mlflow_version or "any version"
        comparisons.append(Comparison("mlflow", Verdict.MISSING, wanted, None, sentence))
    return comparisons


def _counts(name: str, facts: Facts) -> bool:
    """Returns True if a requirement other than the flavor's framework is compared."""
    if name == "pandas":
        return facts.text and facts.frames
    if name == "numpy":
        return facts.custom
    if name in ("scipy", "cloudpickle", "setuptools", "packaging", "matplotlib", "pyarrow"):
        return facts.custom and facts.imports(name)
    return facts.imports(name) or facts.flavor == "mlflow"


def _unnamed(facts: Facts, place: Installed, counted: Mapping[str, object]) -> list[Comparison]:
    """Compares pandas and numpy for packages that do not name them: with the versions of the package's
    day."""
    comparisons = []
    wanted = {}
    if facts.created is not None and facts.text and facts.frames and "pandas" not in counted:
        major = next((number for day, number in _PANDAS if facts.created >= day), 1)
        if facts.mlflow_version is not None and Version(facts.mlflow_version) < _LAST_PANDAS_2:
            major = min(major, 2)  # mlflow's own bound at that time
        wanted["pandas"] = major
    if facts.created is not None and facts.custom and "numpy" not in counted and facts.imports("numpy"):
        wanted["numpy"] = next((number for day, number in _NUMPY if facts.created >= day), 1)
    for name, major in wanted.items():
        found = _version(name, place)
        said = f"{name}: the package does not name it; when the package was made it was {major}.x"
        if found is None:
            sentence = f"{said}, and it is not installed here"
            comparisons.append(Comparison(name, Verdict.MISSING, f"{major}.x", None, sentence))
        else:
            equal = Version(found).major == major
            verdict = Verdict.COMPATIBLE if equal else Verdict.DIFFERS
            because = "" if equal else f"; {UNITS[name][1]}"
            sentence = f"{said}, here is {found}{because}"
            comparisons.append(Comparison(name, verdict, f"{major}.x", found, sentence))
    return comparisons


def _compared(name: str, wanted: str | SpecifierSet, place: Installed) -> Comparison:
    found = _version(name, place)
    unit, why = UNITS.get(name, (Unit.MAJOR, OTHER))
    pinned = wanted if isinstance(wanted, str) else _pin(wanted)
    shown = pinned or str(wanted) or "any version"
    if found is None:
        sentence = f"{name}: the package needs {shown}, and it is not installed here"
        return Comparison(name, Verdict.MISSING, shown, None, sentence)
    said = f"{name}: the package was made with {shown}, here is {found}"
    if pinned is None:
        fits = isinstance(wanted, str) or wanted.contains(found, prereleases=True)
        verdict = Verdict.SAME if fits else Verdict.DIFFERS
        return Comparison(name, verdict, shown, found, said if fits else f"{said}; {why}")
    if pinned == found or pinned.partition("+")[0] == found.partition("+")[0]:
        return Comparison(name, Verdict.SAME, shown, found, said)
    verdict = _in_unit(unit, pinned, found)
    if verdict is Verdict.DIFFERS:
        rule = "" if unit is Unit.NEWER else f" ({unit.value} must be equal)"
        return Comparison(name, verdict, shown, found, f"{said}; {why}{rule}")
    return Comparison(name, verdict, shown, found, said)


def _in_unit(unit: Unit, wanted: str, found: str) -> Verdict:
    try:
        one, other = Version(wanted), Version(found)
    except InvalidVersion:
        return Verdict.SAME if wanted == found else Verdict.DIFFERS
    if unit is Unit.ANY:
        return Verdict.COMPATIBLE
    if unit is Unit.NEWER:
        return Verdict.COMPATIBLE if other >= one else Verdict.DIFFERS
    minors = (one.major, one.minor) == (other.major, other.minor)
    if unit is Unit.MINOR:
        return Verdict.SAME if minors else Verdict.DIFFERS
    if one.major != other.major or (one.major == 0 and not minors):
        return Verdict.DIFFERS
    return Verdict.SAME if minors else Verdict.COMPATIBLE


def _pin(specifier: SpecifierSet) -> str | None:
    """The version that a specifier pins; None if it pins none."""
    exact = [part.version for part in specifier if part.operator in ("==", "===")]
    return exact[0] if len(exact) == 1 and not exact[0].endswith("*") else None


def _version(name: str, place: Installed) -> str | None:
    names: Iterable[str] = _NAMES.get(name, (name,))
    return next((place.versions[n] for n in names if n in place.versions), None)
