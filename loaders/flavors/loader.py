"""Packages that bring their own loader: a module in `code/` whose `_load_pyfunc(path)` returns an object
with `predict`, which is MLflow's public extension point. Its requests are merged only where the package's
metadata says `gateway.batch: true`.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders.compat import standin
from loaders.flavors.base import Saved, Trust
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

MERGES_KEY: Final = "gateway.batch"


class Loader:
    name = "loader"
    loader_modules: tuple[str, ...] = ()
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = True

    def accepts(self, model: object) -> bool:
        """Never by itself: `flavor="loader"` asks for it."""
        return False

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """`model` is the path of the loader's data, a file or directory. Options: `loader_module` (a module
        in `code_paths`), `model_config`."""
        source = Path(model)
        target = directory / "data" / source.name
        target.parent.mkdir()
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
        function = {"loader_module": options["loader_module"], "data": f"data/{source.name}"}
        if config := options.get("model_config"):
            function["config"] = dict(config)
        return Saved({"python_function": function}, ())

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Custom:
        with standin.explained():
            module = importlib.import_module(package.loader_module)
            if not hasattr(module, "_load_pyfunc"):
                raise PackageError("python_function.loader_module", "the module has no _load_pyfunc")
            given = (str(package.data), dict(config)) if config else (str(package.data),)
            model = module._load_pyfunc(*given)
        method = package.text("predict_fn") or "predict"
        if not callable(getattr(model, method, None)):
            raise PackageError("python_function.predict_fn", f"a {type(model).__name__} has no {method}")
        return Custom(getattr(model, method), package)


class Custom:
    """A model of the package's own making, asked by its method with MLflow's `predict(data, params)`."""

    def __init__(self, predict: Callable[..., Any], package: Package) -> None:
        self.merges = package.metadata.get(MERGES_KEY) is True
        self._predict = predict
        try:
            self._takes_params = "params" in inspect.signature(predict).parameters
        except ValueError:
            self._takes_params = False  # compiled code that does not say what it takes

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        # MLflow gives its models None where there are no parameters.
        given = {"params": dict(params) or None} if self._takes_params else {}
        with standin.explained():
            return self._predict(batches.native(batch), **given)
