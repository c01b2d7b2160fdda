"""Models that are Python code.

`Python`: objects with `predict`, functions, MLflow's PythonModels, and models saved as code. `Loader`:
packages that contain their own loader. `MLflow`: models that only mlflow loads.

Objects and functions are saved with a small loader in `code/`, so that any server of MLflow packages loads
them by the public `loader_module` convention. MLflow's PythonModels are saved in MLflow's form. mlflow loads
its own packages if it is installed; otherwise the stand-in does.

A custom model's answer for a row may depend on the other rows, so its requests are merged only if the
package's metadata has `gateway.batch: true`.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders import environment, pickling
from loaders.compat import shipped, standin
from loaders.flavors.base import MERGES_KEY, MissingFramework, Saved, Trust
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

SHIPPED: Final = "model_gateway_python"
_PICKLED: Final = "mlflow.pyfunc.model"
_CODE: Final = "mlflow.pyfunc.loaders.code_model"
_FILE: Final = "python_model.pkl"


class Python:
    name = "python"
    loader_modules = (SHIPPED, _PICKLED, _CODE)
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = True
    stateless = False
    lists_are_arrays = False
    options = ("artifacts", "model_config")

    def accepts(self, model: object) -> bool:
        """Accepts an object with `predict`, a function, or the path of a `.py` file that calls
        `set_model`."""
        if isinstance(model, (str, Path)):
            return str(model).endswith(".py")
        return callable(getattr(model, "predict", None)) or inspect.isroutine(model)

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """Options: `artifacts` (name -> file or directory), `model_config` (a dict)."""
        function: dict[str, Any] = {}
        if config := options.get("model_config"):
            function["config"] = dict(config)
        if artifacts := options.get("artifacts"):
            function["artifacts"] = _copied(artifacts, directory)
        if isinstance(model, (str, Path)):
            file = Path(model)
            shutil.copyfile(file, directory / file.name)
            function.update({"loader_module": _CODE, "model_code_path": file.name})
            return Saved({"python_function": function}, ("mlflow",))
        import cloudpickle

        seen = pickling.dump(model, directory / _FILE, options.get("shipped", ()))
        function.update({"python_model": _FILE, "cloudpickle_version": cloudpickle.__version__})
        needed = ("cloudpickle", *environment.distributions(seen))
        if _is_python_model(model):
            function["loader_module"] = _PICKLED
            return Saved({"python_function": function}, ("mlflow", *needed))
        code = directory / "code"
        code.mkdir(exist_ok=True)
        shutil.copyfile(shipped.__file__, code / f"{SHIPPED}.py")
        function.update({"loader_module": SHIPPED, "code": "code"})
        return Saved({"python_function": function}, needed)

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Custom:
        if package.loader_module != SHIPPED and not standin.absent():
            # Checked first, because MLflow follows these paths without a check.
            _ = _code_file(package) if package.loader_module == _CODE else _pickle(package)
            loader = importlib.import_module(package.loader_module)
            given = (str(package.data), dict(config)) if config else (str(package.data),)
            return Custom(loader._load_pyfunc(*given).predict, package)
        with standin.explained():
            if package.loader_module == _CODE:
                file = _code_file(package)
                model = standin.run(file, f"model_{file.stem}", dict(config) or None)
            else:
                model = _unpickled(package)
                if isinstance(model, standin.FunctionModel):
                    model = model.func  # its type hint determines its input
            artifacts = {name: str(path) for name, path in package.artifacts.items()}
            # As in MLflow, a model without a configuration receives None.
            given_config = dict(config) or (None if package.loader_module != SHIPPED else {})
            return Custom(shipped.adapted(model, artifacts, given_config).predict, package)


class Loader:
    """Packages with their own loader: a module in `code/` whose `_load_pyfunc(path)` returns an object with
    `predict`. This is MLflow's public extension point."""

    name = "loader"
    loader_modules: tuple[str, ...] = ()
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = True
    stateless = False
    lists_are_arrays = False
    options = ("loader_module", "model_config")

    def accepts(self, model: object) -> bool:
        """Never accepts: the caller must choose it with `flavor="loader"`."""
        return False

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """Saves `model`, the path of the loader's data (a file or directory). Options: `loader_module` (a
        module in `code_paths`), `model_config`."""
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


class MLflow:
    """Models that only mlflow's own loaders load (`mlflow.spacy`, `mlflow.prophet` and others), in an
    environment with mlflow. The last choice."""

    name = "mlflow"
    loader_modules: tuple[str, ...] = ()
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = False
    stateless = False
    lists_are_arrays = False
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        """Never accepts: mlflow itself saves these models."""
        return False

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        raise ValueError("models of mlflow's other flavors are saved by mlflow itself")

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Custom:
        if standin.absent():
            raise MissingFramework(package.loader_module.partition(".")[2], "mlflow")
        try:
            loader = importlib.import_module(package.loader_module)
        except ModuleNotFoundError as error:
            if not package.loader_module.startswith(error.name or "?"):
                raise  # the loader exists, but its framework is missing
            problem = f"the installed mlflow has no {package.loader_module}"
            raise PackageError("python_function.loader_module", problem) from error
        given = (str(package.data), dict(config)) if config else (str(package.data),)
        return Custom(loader._load_pyfunc(*given).predict, package)


class Custom:
    """A model defined by the package's own code. Called as in MLflow: `predict(data, params)`."""

    def __init__(self, predict: Callable[..., Any], package: Package) -> None:
        self.merges = package.metadata.get(MERGES_KEY) is True
        self._predict = predict
        try:
            self._takes_params = "params" in inspect.signature(predict).parameters
        except ValueError:
            self._takes_params = False  # compiled code without a readable signature

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        # As in MLflow, a model without params receives None.
        given = {"params": dict(params) or None} if self._takes_params else {}
        with standin.explained():
            return self._predict(batches.native(batch), **given)


def _unpickled(package: Package) -> Any:
    file = _pickle(package)
    compression = package.text("python_model_compression")
    if compression not in shipped.COMPRESSIONS:
        raise PackageError("python_function.python_model_compression", f"{compression!r} is unknown")
    try:
        import cloudpickle  # noqa: F401
    except ImportError as error:
        raise MissingFramework("python", "cloudpickle") from error
    return shipped.unpickled(str(file), compression)


def _pickle(package: Package) -> Path:
    name = package.text("python_model")
    if name is None:
        raise PackageError("python_function.python_model", "is missing: it must name the model's file")
    return package.inside(name)


def _code_file(package: Package) -> Path:
    """Returns the model's code file. `model_code_path` is a path on the machine that logged the model; only
    its last part is used here."""
    path = package.text("model_code_path")
    if path is None:
        raise PackageError("python_function.model_code_path", "is missing: it must name the model's file")
    return package.inside(path.replace("\\", "/").rpartition("/")[2])


def _is_python_model(model: object) -> bool:
    return any(c.__name__ == "PythonModel" and c.__module__ == _PICKLED for c in type(model).__mro__)


def _copied(artifacts: Mapping[str, Any], directory: Path) -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = {}
    for name, source in artifacts.items():
        source = Path(source)
        relative = Path("artifacts", source.name)
        if (directory / relative).exists():
            relative = Path("artifacts", str(len(entries)), source.name)
        (directory / relative).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, directory / relative, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, directory / relative)
        entries[name] = {"path": relative.as_posix(), "uri": relative.as_posix()}
    return entries
