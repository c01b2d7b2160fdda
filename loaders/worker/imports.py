"""Imports for a package's own code while it runs: the modules in the package, and the stand-in for mlflow.

Two packages in one process may contain different modules with the same name, and must not see each other's.
So a package's modules are in `sys.modules`, and its directory is on `sys.path`, only while it loads or
predicts (its turn). Between turns this module keeps them. Turns of packages with code exclude each other in a
process. If the process belongs to one model (`private`), the modules stay.

Limits of a shared process: another thread that imports a module of the same name during a turn receives the
package's module. A thread started by the package finds its modules only during a turn. A package cannot
replace a module of the standard library or of this project.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Final

from loaders.compat.pythons import standard_library

_TURN: Final = threading.RLock()
# In a worker this package has a private name, so that a model may contain a package called `loaders`.
_OURS: Final = frozenset({__name__.partition(".")[0]})
_NOTHING: Final = nullcontext()


class Imports:
    """The imports of one package. `code`: its directory of modules, if any. `stand_ins`: makes modules for
    names that this environment does not provide."""

    def __init__(
        self,
        code: Path | None = None,
        stand_ins: Callable[[], dict[str, ModuleType]] | None = None,
        *,
        private: bool = False,
    ) -> None:
        self._directory = None if code is None else str(code)
        shipped = frozenset() if code is None else frozenset(_shipped(code))
        self._roots = shipped - standard_library() - _OURS - (frozenset() if private else {"gateway"})
        self._modules = {} if stand_ins is None else stand_ins()
        self._stand_ins = frozenset(self._modules)
        self._private = private
        self._entered = 0
        self._displaced: dict[str, ModuleType] = {}

    def turn(self) -> AbstractContextManager[None]:
        """Activates the package's imports in the `with` block. Turns of the same package may be nested."""
        return _NOTHING if self._directory is None and not self._stand_ins else self._active()

    @contextmanager
    def _active(self) -> Iterator[None]:
        with _TURN:
            self._enter()
            try:
                yield
            finally:
                self._leave()

    def close(self) -> None:
        """Drops the package's modules; they are freed with the last object that uses them."""
        with _TURN:
            if self._private and self._entered:
                self._entered = 1
                self._private = False
                self._leave()
            self._modules.clear()
            if self._directory is not None:
                sys.path_importer_cache.pop(self._directory, None)

    def _enter(self) -> None:
        if not self._entered:
            if self._directory is not None:
                # Before any change: it calls finders of other libraries, which may fail.
                importlib.invalidate_caches()
                # A new list, here and at the end: an import of another thread walks over the list meanwhile,
                # and misses an entry if those before it move.
                sys.path = [self._directory, *sys.path]
            self._displaced = self._taken_out()
            sys.modules.update(self._modules)
        self._entered += 1

    def _leave(self) -> None:
        if self._private:
            return
        self._entered -= 1
        if self._entered:
            return
        self._modules = self._taken_out()
        sys.modules.update(self._displaced)
        self._displaced.clear()
        if self._directory in sys.path:
            left = sys.path.copy()
            left.remove(self._directory)
            sys.path = left

    def _taken_out(self) -> dict[str, ModuleType]:
        """Removes the modules with names of this package from `sys.modules`. Returns them, by name."""
        taken: dict[str, ModuleType] = {}
        # Other threads import modules, and remove those that fail, meanwhile: hence a copy of the names.
        for name in list(sys.modules):
            if self._owns(name):
                with suppress(KeyError):
                    taken[name] = sys.modules.pop(name)
        return taken

    def _owns(self, name: str) -> bool:
        root = name.partition(".")[0]
        return root in self._roots or (bool(self._stand_ins) and root == "mlflow")


def _shipped(code: Path) -> Iterator[str]:
    """Yields the top-level names that a directory of modules provides."""
    for entry in code.iterdir():
        name = entry.name.partition(".")[0]
        if name.isidentifier() and (entry.is_dir() or entry.suffix in (".py", ".pyc", ".so", ".pyd")):
            yield name
