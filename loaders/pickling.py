"""Pickles of live models: written so that they load elsewhere, and what they need there.

Classes and functions of modules that are neither installed nor shipped (`__main__`, a notebook, a script's
neighbour, a test) are pickled by value: the place where they load does not have those modules.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

_OURS = __name__.partition(".")[0]


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

    with _by_value(model, set(shipped)), file.open("wb") as handle:
        Pickler(handle).dump(model)
    return seen - {"", "__main__"}


@contextmanager
def _by_value(model: Any, shipped: set[str]) -> Iterator[None]:
    import cloudpickle

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
