"""The contract of a flavor: it saves, recognises, loads and calls the models of one framework.

1.  A flavor is an object with the attributes and methods of `Flavor`; there is no base class.
2.  Creating it imports only numpy and the standard library. `save` and `load` import its framework, so that
    a process pays only for the frameworks that it uses.
3.  `accepts` returns True for a live object of this flavor, and imports no framework: an object of a
    framework that is not imported cannot exist.
4.  `save` writes the files into an existing directory and returns the flavor's entries for `MLmodel`. MLflow
    itself must be able to load the package, with equal predictions.
5.  `load` reads only below `package.path` (every path through `Package.inside`) and returns a `Predictor`.
    `config` contains the overrides already. Errors of the framework pass through. `threads` is the maximum
    number of threads of a prediction, for frameworks that fix it at load; None: all processors.
6.  `Predictor.predict` receives an enforced `Batch` and returns the framework's own answer. Only one thread
    calls it at a time. It never changes the batch.
7.  `Predictor.merges` is True only if the answer for a row does not depend on the other rows.
8.  `trust` is "data" if loading executes nothing from the package, else "code".
9.  `memory_factor` is the bytes in memory per byte on disk: a first estimate, replaced by a measurement.
10. Without its framework a flavor raises `MissingFramework`, which names the package to install.
11. `mlflow_names` is True if models of this flavor may use mlflow's own names. The stand-in for mlflow is
    then active if mlflow is not installed.
12. `stateless` is True only if no answer depends on earlier predictions. A stateless model answers its
    example in place before it serves, any other model in a throw-away fork of its process.
13. `options` names the options of `save`. It receives only these and `shipped`, the modules in `code/`.
14. `lists_are_arrays` is True if its models read a list as numpy's array of it. A list as the example of a
    package then means that array.
15. A predictor may have `stated()`: returns the signature that the model file states, None if it states too
    little. A model file without an `MLmodel` uses it as its signature (`loaders/bare.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from loaders.compat.pythons import dataclass

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.signature import Signature

Trust = Literal["code", "data"]

# `true` under this key of a package's metadata declares that the model answers each row independently. A
# flavor cannot know this about a model that is code.
MERGES_KEY: Final = "gateway.batch"


class MissingFramework(ImportError):
    """The library of a flavor is not installed here."""

    def __init__(self, flavor: str, distribution: str) -> None:
        super().__init__(
            f"models of the flavor {flavor} need the package {distribution}: pip install {distribution}"
        )
        self.flavor = flavor
        self.distribution = distribution


class Predictor(Protocol):
    """A loaded model."""

    @property
    def merges(self) -> bool: ...

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """The result of `Flavor.save`: the entries under `flavors:` by name (including `python_function`), and
    the pip requirements for loading (without versions; the caller pins them to the installed ones).
    `signature`: declared by the model itself, for a package saved without a signature and an example."""

    flavors: dict[str, dict[str, Any]]
    requirements: tuple[str, ...]
    signature: Signature | None = None


class Flavor(Protocol):
    """See the numbered sentences above; `tests/contracts/test_flavors.py` has one test for each."""

    name: str
    loader_modules: tuple[str, ...]
    trust: Trust
    memory_factor: float
    mlflow_names: bool
    stateless: bool
    lists_are_arrays: bool
    options: tuple[str, ...]

    def accepts(self, model: object) -> bool: ...

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved: ...

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Predictor: ...
