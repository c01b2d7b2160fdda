"""The contract of a flavor: how one framework's models are saved, found, loaded and asked.

1.  A flavor is an object that has the attributes and methods of `Flavor`; there is nothing to inherit.
2.  Making it imports nothing but numpy and the standard library. Its framework is imported inside
    `save` and `load`, so that a process pays only for what it serves.
3.  `accepts` says whether a live object is this flavor's without importing a framework: an object of a
    framework that is not imported cannot exist.
4.  `save` writes the files into a directory that exists and returns the flavor's entries for `MLmodel`,
    so that MLflow itself loads the package and gives equal predictions.
5.  `load` reads only below `package.path` (every path through `Package.inside`), with the overrides
    already merged into `config`, and returns a `Predictor`. It raises what the framework raises. `threads`
    is how many threads one prediction may use, for frameworks that fix it at load; None: all processors.
6.  `Predictor.predict` is given a `Batch` that was enforced and returns the framework's own answer.
    It is called by one thread at a time and never changes the batch.
7.  `Predictor.merges` is True only if the answer to a row does not depend on the other rows.
8.  `trust` is "data" if loading executes nothing that the package brought, else "code".
9.  `memory_factor` is how many bytes a loaded model takes for each byte on disk: a first guess, replaced
    by a measurement.
10. Without its framework a flavor raises `MissingFramework`, which names the package to install.
11. `mlflow_names` is True if models of this flavor may refer to mlflow's own names, so that the stand-in
    must be in force where mlflow is not installed.
12. `stateless` is True only if no answer depends on earlier predictions: such a model answers its
    example in place before it serves, any other in a throw-away fork of its process.
13. `options` names what `save` takes; it is given no others, but `shipped`: the modules in `code/`.
14. `lists_are_arrays` is True if its models read a list as the array that numpy makes of it, so that a list
    as the example of a package means that array.
15. A predictor may have `stated()`: the signature that the model file itself states, None where it states
    too little. It is what a model file without an `MLmodel` has in its place (`loaders/bare.py`).
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

# In a package's metadata, `true` under this key says that the model answers each row by itself: what no
# flavor can know of a model that is code.
MERGES_KEY: Final = "gateway.batch"


class MissingFramework(ImportError):
    """The library that a flavor needs is not installed here."""

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
    """What `Flavor.save` wrote: the entries under `flavors:` by name (`python_function` among them) and
    the pip requirements that loading needs (without versions; they are pinned to what is installed).
    `signature`: what the model itself declares, for a package that is given neither one nor an example."""

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
