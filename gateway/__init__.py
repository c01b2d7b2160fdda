"""Serves the models of a registry over HTTP. For Python users: `log_model`, `load_model`, `push`.

Importing this package is cheap: each name is imported on first use.

Where to start reading: `service` (the life of a prediction), `serving.servable` (the life of a loaded model),
`serving.ledger` (memory), `rollouts.aliases` (which version answers). The folders, from what knows least to
what knows most: `registries` (which versions exist), `artifacts` (their files), `environments` (their
Python), `runners` (their processes), `serving` (loaded models), `rollouts` (aliases, gates, promotions,
canaries), `views` (what people see), `http` and `grpc` (protocols), `commands` (the command line). `app`
builds all of it.
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
