"""Loads this package under a private name, so that a model may contain its own package called `loaders`.

Run by path, with the Python of the model's environment:

    python …/loaders/worker/bootstrap.py MODULE ARGUMENTS     runs `main(json.loads(ARGUMENTS))` of a
    module in this directory, for example `zygote`

The directories of this file are not added to `sys.path`. Modules of this package write
`from loaders.batch import …` as usual. Loaded here, they are `_gateway_loaders.batch`, and their imports of
`loaders`, including lazy ones, resolve to the private name. `import loaders` in other code is not changed.
Standard library only.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Python put this file's directory first. Its modules would hide other modules of the same names.
    del sys.path[0]

import builtins
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Final

PUBLIC: Final = "loaders"
PRIVATE: Final = "_gateway_loaders"


class _Loader(SourceFileLoader):
    """Gives each module its own `__import__`, the function that import statements call."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the private package and its submodules, only in the directory of the package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, *below = fullname.split(".")
        if root != PRIVATE:
            return None
        place = Path(__file__).resolve().parents[1].joinpath(*below)
        package = (place / "__init__.py").is_file()
        file = place / "__init__.py" if package else place.with_suffix(".py")
        if not file.is_file():
            return None
        return spec_from_file_location(
            fullname,
            file,
            loader=_Loader(fullname, str(file)),
            submodule_search_locations=[str(place)] if package else None,
        )


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,  # noqa: A002  (the names of the builtin's parameters)
    locals: Mapping[str, object] | None = None,  # noqa: A002
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    if level == 0 and (name == PUBLIC or name.startswith(PUBLIC + ".")):
        name = PRIVATE + name[len(PUBLIC) :]
    return builtins.__import__(name, globals, locals, fromlist or (), level)


def main(arguments: Sequence[str]) -> None:
    sys.meta_path.insert(0, _Finder())
    module, options = arguments
    entry: Any = importlib.import_module(f"{PRIVATE}.worker.{module}")
    entry.main(json.loads(options))


if __name__ == "__main__":
    main(sys.argv[1:])
