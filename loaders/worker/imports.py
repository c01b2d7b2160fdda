"""What a package's own code can import while it runs: the modules it ships, and the stand-in for mlflow.

Two packages in one process may ship different modules of one name, and neither may see the other's. So the
modules of a package are in `sys.modules`, and its directory is on `sys.path`, only while that package
loads or predicts; between its turns this module keeps them. Turns of packages that ship code exclude each
other in a process. Where the process belongs to one model (`private`), its modules simply stay.

Limits of sharing a process: another thread that imports a module of the same name during a turn gets the
package's; a thread that the package itself started finds its modules only during a turn; and a package
cannot replace a module of the standard library or of this project, which are in use.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from loaders.compat.pythons import standard_library

_TURN: Final = threading.RLock()
# In a worker this package lives under a private name, so that a model may ship a package of our name.
_OURS: Final = frozenset({__name__.partition(".")[0]})


class Imports:
    """The imports of one package. `code`: the directory it ships, if any. `stand_ins`: makes modules that
    it must find under names that nothing here provides."""

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it, the package's imports are in force. Turns of one package may be nested."""
        if self._directory is None and not self._stand_ins:
            yield
            return
        with _TURN:
            self._enter()
            try:
                yield
            finally:
                self._leave()

    def close(self) -> None:
        """Forgets the package's modules: they are freed with the last object that uses them."""
        with _TURN:
            if self._private and self._entered:
                self._entered = 1
                self._private = False
                self._leave()
            self._modules.clear()
            if self._directory is not None:
                sys.path_importer_cache.pop(self._directory, None)

    def _enter(self) -> None:
        self._entered += 1
        if self._entered > 1:
            return
        if self._directory is not None:
            sys.path.insert(0, self._directory)
            importlib.invalidate_caches()
        for name in [name for name in sys.modules if self._owns(name)]:
            self._displaced[name] = sys.modules.pop(name)
        sys.modules.update(self._modules)

    def _leave(self) -> None:
        if self._private:
            return
        self._entered -= 1
        if self._entered:
            return
        self._modules = {name: sys.modules.pop(name) for name in list(sys.modules) if self._owns(name)}
        sys.modules.update(self._displaced)
        self._displaced.clear()
        if self._directory in sys.path:
            sys.path.remove(self._directory)

    def _owns(self, name: str) -> bool:
        root = name.partition(".")[0]
        return root in self._roots or (bool(self._stand_ins) and root == "mlflow")


def _shipped(code: Path) -> Iterator[str]:
    """The top-level names that a directory of modules provides."""
    for entry in code.iterdir():
        name = entry.name.partition(".")[0]
        if name.isidentifier() and (entry.is_dir() or entry.suffix in (".py", ".pyc", ".so", ".pyd")):
            yield name
