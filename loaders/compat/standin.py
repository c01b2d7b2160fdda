"""The stand-in for mlflow: the names that saved Python models use, for environments without mlflow.

A pickled `PythonModel` refers to its base class and a few helpers by name. A model saved as code imports
`mlflow.pyfunc.PythonModel`, `mlflow.models.set_model` and `ModelConfig`. These names are enough to load such
a model and to predict. Other names need the real mlflow, and the error says so. The list of names comes from
packages written by MLflow 1 to 3 (read with pickletools); no code is copied.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from loaders.compat import type_hints
from loaders.compat.shipped import Context

_MARK: Final = "__stands_in_for_mlflow__"


class MlflowNeeded(ImportError):
    """A model uses more of mlflow than the stand-in has."""


class MlflowException(Exception):
    """`mlflow.exceptions.MlflowException`, with the arguments that models use."""

    def __init__(self, message: object = "", error_code: object = None, **_: object) -> None:
        super().__init__(str(message))
        self.message = str(message)
        self.error_code = error_code


class FuncInfo(NamedTuple):
    """Metadata that a wrapped `predict` carries."""

    input_type_hint: Any
    input_param_name: str


class TypeHints:
    """`mlflow.models.signature._TypeHints`."""

    def __init__(self, input_: Any = None, output: Any = None) -> None:
        self.input = input_
        self.output = output


class Opaque:
    """A class whose instances are in pickles but not used by loading (signatures, schema types)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class PythonModel:
    """`mlflow.pyfunc.PythonModel`: the base class of custom models."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "predict" in cls.__dict__:
            cls.predict = pyfunc(cls.__dict__["predict"])  # type: ignore[method-assign]

    def load_context(self, context: Any) -> None:
        """Models override it to open their files once."""

    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        raise MlflowException(f"{type(self).__name__} has no predict method")


def pyfunc(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mlflow.pyfunc.utils.pyfunc`: checks the input against the function's type hint, if it has one."""
    names = [name for name in inspect.signature(function).parameters if name != "params"]
    if getattr(function, "_is_pyfunc", False) or not names:
        return function
    try:
        hint = typing.get_type_hints(function).get(names[-1])
    except (NameError, TypeError):
        return function  # as MLflow: a hint that cannot be resolved is not checked
    if not type_hints.supported(hint):
        return function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = validate_model_input(args, kwargs, len(names) - 1, hint, names[-1])
        return function(*args, **kwargs)

    wrapper._is_pyfunc = True  # type: ignore[attr-defined]
    return wrapper


class FunctionModel(PythonModel):
    """`mlflow.pyfunc.model._FunctionPythonModel`: a function saved as a model; pickles restore `func`."""

    func: Callable[[Any], Any]

    def predict(self, model_input: Any, params: Any = None) -> Any:  # type: ignore[override]
        return self.func(model_input)


def validate_model_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, hint: Any, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A `predict` that MLflow has wrapped calls this first. Returns its arguments with the checked input."""
    from loaders.compat.shipped import listed

    def valid(data: Any) -> Any:
        if typing.get_origin(hint) is list and hasattr(data, "iloc"):
            data = listed(data, typing.get_args(hint)[0])
        try:
            return type_hints.checked(data, hint, name)
        except type_hints.Mismatch as error:
            raise MlflowException(f"the input does not fit the model's type hint: {error}") from None

    if name in kwargs:
        return args, {**kwargs, name: valid(kwargs[name])}
    if len(args) > position:
        return (*args[:position], valid(args[position]), *args[position + 1 :]), kwargs
    return args, kwargs


def absent() -> bool:
    """Returns True if the real mlflow is not installed."""
    present = sys.modules.get("mlflow")
    if present is not None:
        return hasattr(present, _MARK)
    try:
        return importlib.util.find_spec("mlflow") is None
    except (ValueError, KeyError):
        return True  # a model of another thread just put the stand-in there, or took it out


def modules() -> dict[str, ModuleType]:
    """Creates modules under mlflow's names, to put into `sys.modules` while a model loads or predicts."""
    schema = {
        name: type(name, (Opaque,), {})
        for name in (
            "Schema", "ColSpec", "TensorSpec", "TensorInfo", "DataType", "ParamSchema", "ParamSpec",
            "Array", "Object", "Property", "Map", "AnyType", "SparkMLVector",
        )
    }  # fmt: skip
    signature = {"_TypeHints": TypeHints, "ModelSignature": type("ModelSignature", (Opaque,), {})}
    code: dict[str, Any] = {}

    def set_model(model: Any) -> None:
        code["model"] = model

    class ModelConfig:
        """`mlflow.models.ModelConfig`: from it a model's code reads its configuration."""

        def __init__(self, *, development_config: Any = None) -> None:
            config = code.get("config") or development_config
            if not config:
                raise FileNotFoundError("the model's code reads a model config, but the package has none")
            if isinstance(config, (str, Path)):
                from loaders.yamltext import parse_yaml

                config = parse_yaml(Path(config).read_bytes(), Path(config).name)
            self.config: dict[str, Any] = config

        def to_dict(self) -> dict[str, Any]:
            return self.config

        def get(self, key: str) -> Any:
            return self.config[key]

    base = {"PythonModel": PythonModel, "PythonModelContext": Context}
    contents: dict[str, dict[str, Any]] = {
        "mlflow": {"MlflowException": MlflowException},
        "mlflow.exceptions": {"MlflowException": MlflowException},
        "mlflow.models": {
            "set_model": set_model,
            "ModelConfig": ModelConfig,
            "ModelSignature": signature["ModelSignature"],
        },
        "mlflow.models.model": {"set_model": set_model, "_code": code},
        "mlflow.models.model_config": {"ModelConfig": ModelConfig},
        "mlflow.models.signature": signature,
        "mlflow.pyfunc": base,
        "mlflow.pyfunc.model": {**base, "_FunctionPythonModel": FunctionModel},
        "mlflow.pyfunc.utils": {"pyfunc": pyfunc},
        "mlflow.pyfunc.utils.data_validation": {
            "pyfunc": pyfunc,
            "FuncInfo": FuncInfo,
            "_validate_model_input": validate_model_input,
        },
        "mlflow.types": schema,
        "mlflow.types.schema": schema,
    }
    made = {name: _module(name, names) for name, names in contents.items()}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


@functools.lru_cache(maxsize=1)
def names() -> Mapping[str, frozenset[str]]:
    """Returns the names that each module of the stand-in defines."""
    return {
        module: frozenset(name for name in vars(content) if not name.startswith("__"))
        for module, content in modules().items()
    }


def run(file: Path, name: str, config: dict[str, Any] | None) -> Any:
    """Executes a model saved as code, as the module `name`, and returns the object that it passed to
    `set_model`. The stand-in must be active."""
    code = sys.modules["mlflow.models.model"]._code
    code.clear()
    code["config"] = config
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if "model" not in code:
        raise ImportError(f"{file.name} did not call mlflow.models.set_model()")
    model = code["model"]
    return model if hasattr(model, "predict") else pyfunc(model)


@contextmanager
def explained() -> Iterator[None]:
    """Converts the failure of a model that needs more of mlflow than the stand-in has into MlflowNeeded."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "mlflow":
            raise _needed(error.name or "mlflow", error) from error
        raise
    except AttributeError as error:
        place = getattr(error, "obj", None)  # the object that lacks it, from Python 3.10 on
        if isinstance(place, ModuleType) and hasattr(place, _MARK):
            raise _needed(f"{place.__name__}.{getattr(error, 'name', '')}", error) from error
        raise


def _needed(what: str, error: Exception) -> MlflowNeeded:
    return MlflowNeeded(f"the model uses {what}: install mlflow with pip install mlflow ({error})")


def _module(name: str, names: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, "A stand-in for some of mlflow's names.")
    module.__dict__.update(names)
    module.__dict__[_MARK] = True
    module.__path__ = []
    return module
