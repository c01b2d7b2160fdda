"""The table of flavors: finds the flavor that loads a package, and the flavor that saves a live model.

A flavor is named by its dotted path and imported on first use. A live model is offered to the flavors in
order, the most specific first.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.flavors.base import Flavor
    from loaders.package import Package

# The plugin table: name -> "module:class"; a leading dot means a module of this package.
FLAVORS: Final[dict[str, str]] = {
    "onnx": ".onnx:Onnx",
    "xgboost": ".xgboost:XGBoost",
    "lightgbm": ".lightgbm:LightGBM",
    "catboost": ".catboost:CatBoost",
    "statsmodels": ".statsmodels:Statsmodels",
    "pytorch": ".pytorch:PyTorch",
    "sklearn": ".sklearn:Sklearn",
    "python": ".python:Python",
    "loader": ".python:Loader",
    "mlflow": ".python:MLflow",
}


class UnknownFlavor(PackageError):
    """No flavor here loads this package or saves this object."""


@lru_cache(maxsize=None)
def get(name: str) -> Flavor:
    """Returns the flavor of that name. Raises UnknownFlavor."""
    try:
        module, _, attribute = FLAVORS[name].partition(":")
    except KeyError:
        raise UnknownFlavor("flavor", f"{name!r} is unknown; known: {', '.join(FLAVORS)}") from None
    flavor: Flavor = getattr(importlib.import_module(module, __name__), attribute)()
    return flavor


def find(package: Package) -> Flavor:
    """Returns the flavor that loads a package, by its loader module. Raises UnknownFlavor."""
    module = package.loader_module
    flavors = [get(name) for name in FLAVORS]
    for flavor in flavors:
        if module in flavor.loader_modules:
            return flavor
    if package.code is not None and not module.startswith("mlflow."):
        return get("loader")
    if module.startswith("mlflow."):
        return get("mlflow")
    known = ", ".join(sorted(m for flavor in flavors for m in flavor.loader_modules))
    raise UnknownFlavor(
        "python_function.loader_module",
        f"models of {module} cannot be loaded here; known: {known}, and modules that a package ships",
    )


def for_model(model: object) -> Flavor:
    """Returns the flavor that saves a live object. Raises UnknownFlavor, also for a class: save an
    instance."""
    if isinstance(model, type):
        raise UnknownFlavor(
            "model", f"{model.__name__} is a class: give an object of it, {model.__name__}(…)"
        )
    for name in FLAVORS:
        flavor = get(name)
        if flavor.accepts(model):
            return flavor
    raise UnknownFlavor(
        "model",
        f"an object of type {type(model).__name__} cannot be saved: it has no predict method and is not a "
        "function",
    )
