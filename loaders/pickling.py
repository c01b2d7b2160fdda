"""Pickles of live models: written so that they load elsewhere, what they need there, and read again.

Classes and functions of modules that are neither installed nor shipped (`__main__`, a notebook, a script's
neighbour, a test) are pickled by value: the place where they load does not have those modules.
"""

from __future__ import annotations

import pickle
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from loaders.flavors.base import MissingFramework
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.package import Package

FORMATS: Final = ("pickle", "cloudpickle", "skops")
_OURS: Final = __name__.partition(".")[0]


def dump(model: Any, file: Path, shipped: Iterable[str] = ()) -> set[str]:
    """Writes `model` with cloudpickle and returns the top-level modules that its pickle refers to.
    `shipped`: top-level modules that travel with the package."""
    import cloudpickle

    seen: set[str] = set()

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> None:
            # Asked about every object before it is pickled: a place to look, nothing is made persistent.
            if isinstance(value, ModuleType):
                seen.add(value.__name__.partition(".")[0])
            elif isinstance(value, type | FunctionType):
                seen.add((value.__module__ or "").partition(".")[0])

    with by_value(model, shipped), file.open("wb") as handle:
        Pickler(handle).dump(model)
    return seen - {"", "__main__"}


def load(package: Package, flavor: str, file: Path, default: str) -> Any:
    """The estimator in `file`, by the flavor's `serialization_format` (one of `FORMATS`). Raises
    PackageError for another format, MissingFramework, and whatever unpickling raises."""
    entry = package.flavors.get(flavor, {})
    form = entry.get("serialization_format", default)
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise PackageError(f"{flavor}.serialization_format", f"{form!r} is not known; known: {known}")
    if form == "skops":
        trusted = entry.get("skops_trusted_types") or []
        return skops(flavor).load(file, trusted=[str(name) for name in trusted])
    if form == "cloudpickle":
        try:
            import cloudpickle  # noqa: F401  what unpickling imports
        except ImportError as error:
            raise MissingFramework(flavor, "cloudpickle") from error
    with file.open("rb") as handle:
        return pickle.load(handle)


def skops(flavor: str) -> Any:
    """The module `skops.io`. Raises MissingFramework."""
    try:
        import skops.io
    except ImportError as error:
        raise MissingFramework(flavor, "skops") from error
    return skops.io


@contextmanager
def by_value(model: Any, shipped: Iterable[str]) -> Iterator[None]:
    """Within it, cloudpickle writes the model's own local classes by value."""
    import cloudpickle

    shipped = set(shipped)
    kind = model if isinstance(model, type | FunctionType) else type(model)
    owners = [kind, *getattr(kind, "__mro__", ())]
    names = {getattr(owner, "__module__", None) for owner in owners}
    modules = [
        sys.modules[name] for name in names if name in sys.modules and _is_local(sys.modules[name], shipped)
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_local(module: ModuleType, shipped: set[str]) -> bool:
    """Whether a module exists only where this process was started."""
    root = module.__name__.partition(".")[0]
    file = getattr(module, "__file__", None)
    if file is None or root in shipped or root in {_OURS, "__main__", *sys.stdlib_module_names}:
        return False
    installed = (Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib"))
    return not any(Path(file).resolve().is_relative_to(place) for place in installed)
