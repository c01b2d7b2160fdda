"""Loads a Python model saved by model-gateway, for any server that follows MLflow's `python_function`.

A package contains a copy of this file (`code/model_gateway_python.py`). So it needs only the standard library
and cloudpickle, and PyYAML if a server calls `_load_pyfunc`. Its behaviour must not change between releases,
because packages of any age can be in one process.
"""

from __future__ import annotations

import bz2
import gzip
import inspect
import lzma
import os
import typing
from typing import Any

COMPRESSIONS: dict[str | None, Any] = {None: open, "gzip": gzip.open, "bzip2": bz2.open, "lzma": lzma.open}


class Context:
    """The context that a model's `load_context` and `predict` receive: its files by name, its
    configuration."""

    def __init__(self, artifacts: dict[str, str], model_config: dict[str, Any] | None) -> None:
        self.artifacts = artifacts
        self.model_config = model_config


class Adapter:
    """Calls a model (an object with `predict`, or a function) according to its Python signature: passes a
    context if there is an argument for it, params if an argument is named `params`, and a list if its type
    hint is a list and the data is a frame."""

    def __init__(self, model: Any, context: Context) -> None:
        self.model = model
        self._call = model.predict if hasattr(model, "predict") else model
        self._context = context
        names = list(inspect.signature(self._call).parameters)
        self.takes_params = "params" in names
        self.takes_context = "context" in names or len([n for n in names if n not in ("self", "params")]) == 2
        self._hint = _input_hint(self._call, names, self.takes_context)

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        if typing.get_origin(self._hint) is list and hasattr(data, "iloc"):
            data = listed(data, typing.get_args(self._hint)[0])
        given = (self._context, data) if self.takes_context else (data,)
        return self._call(*given, params=params) if self.takes_params else self._call(*given)


def unpickled(path: str, compression: str | None) -> Any:
    """The object in a cloudpickle file; `compression` is a key of `COMPRESSIONS`."""
    import cloudpickle

    with COMPRESSIONS[compression](path, "rb") as file:
        return cloudpickle.load(file)


def adapted(model: Any, artifacts: dict[str, str], config: dict[str, Any] | None) -> Adapter:
    """The model, ready to predict: calls its `load_context` if it has one."""
    context = Context(artifacts, config)
    if hasattr(model, "load_context"):
        model.load_context(context)
    return Adapter(model, context)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> Adapter:
    import yaml

    with open(os.path.join(path, "MLmodel"), encoding="utf-8") as file:
        entry = yaml.safe_load(file)["flavors"]["python_function"]
    artifacts = {name: os.path.join(path, a["path"]) for name, a in entry.get("artifacts", {}).items()}
    model = unpickled(os.path.join(path, entry["python_model"]), entry.get("python_model_compression"))
    return adapted(model, artifacts, model_config or {})


def _input_hint(call: Any, names: list[str], takes_context: bool) -> Any:
    position = 1 if takes_context else 0
    target = call if inspect.isroutine(call) else type(call).__call__
    try:
        return typing.get_type_hints(target).get(names[position]) if len(names) > position else None
    except (NameError, TypeError, AttributeError):
        return None  # a hint that cannot be resolved counts as no hint


def listed(frame: Any, item: Any) -> list[Any]:
    """A frame as the list that a model with the hint `list[item]` expects: its rows as dicts if `item` is a
    mapping or a class, else the values of its first column (for text: of its first text column)."""
    if item is dict or typing.get_origin(item) is dict or hasattr(item, "model_fields"):
        if list(frame.columns) == [0]:
            return list(frame.iloc[:, 0])
        return list(frame.to_dict(orient="records"))
    position = 0
    if item is str and len(frame):
        first = [isinstance(value, str) for value in frame.iloc[0]]
        position = first.index(True) if True in first else 0
    values: list[Any] = frame.iloc[:, position].tolist()
    return values
