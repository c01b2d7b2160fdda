"""Pickles of live models: writes them so that they load elsewhere, finds the modules they need, reads them.

Pickles classes and functions by value if their module is neither installed nor shipped (`__main__`, a
notebook, a module next to a script, a test), because that module does not exist where the pickle is loaded.
Must not know registries or the gateway.
"""

from __future__ import annotations

import pickle
import sys
import sysconfig
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from loaders.compat.pythons import is_below, standard_library
from loaders.flavors.base import MissingFramework
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.package import Package

FORMATS: Final = ("pickle", "cloudpickle", "skops", "joblib")
_OURS: Final = __name__.partition(".")[0]
#: cloudpickle has one list of such modules for the process, so only one thread at a time changes it.
_TURN: Final = threading.RLock()


def dump(model: Any, file: Path, shipped: Iterable[str] = ()) -> set[str]:
    """Writes `model` with cloudpickle and returns the top-level modules that its pickle refers to.
    `shipped`: top-level modules that travel with the package."""
    import cloudpickle

    seen: set[str] = set()

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> None:
            # Called for every object before it is pickled: only inspects it, makes nothing persistent.
            if isinstance(value, (ModuleType, type, FunctionType)):
                seen.add(_module(value).partition(".")[0])
                local.add(value)

    with Local(shipped) as local, file.open("wb") as handle:
        Pickler(handle).dump(model)
    return seen - {"", "__main__"}


def load(package: Package, flavor: str, file: Path, default: str) -> Any:
    """The estimator in `file`, by the flavor's `serialization_format` (one of `FORMATS`). Raises
    PackageError for another format, MissingFramework, and whatever unpickling raises."""
    entry = package.flavors.get(flavor, {})
    form = entry.get("serialization_format", default)
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise PackageError(f"{flavor}.serialization_format", f"{form!r} is unknown; known: {known}")
    if form == "skops":
        trusted = entry.get("skops_trusted_types")
        if trusted is None and package.bare:
            # The operator allows formats that execute code: any other policy names the types.
            trusted = skops(flavor).get_untrusted_types(file=file)
        return skops(flavor).load(file, trusted=[str(name) for name in trusted or []])
    if form == "joblib":
        try:
            import joblib
        except ImportError as error:
            raise MissingFramework(flavor, "joblib") from error
        return joblib.load(file)
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


class Local:
    """A context in which cloudpickle pickles the objects of local modules by value, after `add` of a
    value."""

    def __init__(self, shipped: Iterable[str] = ()) -> None:
        self._elsewhere = {*shipped, _OURS, "__main__", *standard_library()}
        self._decided: set[str] = set()
        self._modules: list[ModuleType] = []

    def __enter__(self) -> Local:
        _TURN.acquire()
        return self

    def add(self, value: ModuleType | type | FunctionType) -> None:
        import cloudpickle

        name = _module(value)
        root = name.partition(".")[0]
        module = sys.modules.get(name)
        if name in self._decided or root in self._elsewhere or module is None:
            return
        self._decided.add(name)
        file = getattr(module, "__file__", None)
        if file is None:
            return  # built in, or a directory without its own code
        if _is_installed(root, Path(file).resolve()):
            self._elsewhere.add(root)
        elif name not in cloudpickle.list_registry_pickle_by_value():  # the caller's own entry stays
            cloudpickle.register_pickle_by_value(module)
            self._modules.append(module)

    def __exit__(self, *_: object) -> None:
        try:
            import cloudpickle

            for module in self._modules:
                cloudpickle.unregister_pickle_by_value(module)
        finally:
            _TURN.release()


def _module(value: ModuleType | type | FunctionType) -> str:
    return value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""


def _is_installed(root: str, file: Path) -> bool:
    """Whether a file of the top-level module `root` belongs to an installed distribution."""
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    if any(is_below(file, place) for place in places):
        return True
    for name in metadata.packages_distributions().get(root, ()):
        if is_below(file, Path(str(metadata.distribution(name).locate_file(""))).resolve()):
            return True
    return False
