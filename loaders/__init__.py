"""Logged models: save, load, enforce the signature, predict. Works without the gateway and without mlflow.

Importing this package is cheap: each name is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.inferred import infer_signature
    from loaders.model import Model, load_model, open_model, save_model
    from loaders.package import Package, PackageError
    from loaders.signature import Signature

__all__ = [
    "Model",
    "Package",
    "PackageError",
    "Signature",
    "infer_signature",
    "load_model",
    "open_model",
    "save_model",
]

_HOMES = {
    "Model": "model",
    "load_model": "model",
    "open_model": "model",
    "save_model": "model",
    "Package": "package",
    "PackageError": "package",
    "Signature": "signature",
    "infer_signature": "inferred",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
