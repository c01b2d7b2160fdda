"""Serves the models of a registry over HTTP. For Python users: `log_model`, `load_model`, `push`.

Importing this package is cheap: each name is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.api import ModelVersion, load_model, log_model, push

__version__ = "0.1.0"
__all__ = ["ModelVersion", "load_model", "log_model", "push"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from gateway import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
