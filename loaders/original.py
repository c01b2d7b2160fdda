"""Calls the live object given to `save_model` as its framework documents, without the conversions of this
package. So a fault of these conversions shows as a difference between the original and the saved package.

Knows how each flavor's objects predict. Must not know packages, and must not import frameworks: an object of
a framework that is not imported cannot exist.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.compat.pythons import zipped

if TYPE_CHECKING:
    from typing import TypeAlias

Ask: TypeAlias = "Callable[[Any, Mapping[str, Any]], Any]"
"""Calls the original with data and params; gives the framework's own result. Raises what the model raises."""


def asker(model: Any, flavor: str, options: Mapping[str, Any]) -> Ask | None:
    """Returns a function that predicts with a live object. `options`: the options with which it is saved.
    None if there are only files (a `.py` file, a loader's data, an ONNX graph with external weights)."""
    if isinstance(model, (str, Path)):
        return None
    if flavor in _ASKERS:
        return _ASKERS[flavor](model, options)
    method = getattr(model, options.get("predict_fn", "predict"), None)
    return None if method is None else lambda data, params: method(data)


def same_kind(given: Any, model_input: Any) -> bool:
    """Whether the model's input has the same kind as the caller's data. If not (a dict that becomes a frame),
    the original gets the model's input."""
    return _kind(given) == _kind(model_input)


def _kind(data: Any) -> str:
    if hasattr(data, "iloc"):
        return "frame" if hasattr(data, "columns") else "series"
    if isinstance(data, np.ndarray) or (hasattr(data, "toarray") and hasattr(data, "nnz")):
        return "array"
    return type(data).__name__


def _xgboost(model: Any, options: Mapping[str, Any]) -> Ask:
    xgboost = sys.modules["xgboost"]
    known = set(inspect.signature(model.predict).parameters)

    def ask(data: Any, params: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in params.items() if name in known}
        if isinstance(model, xgboost.Booster):
            data = xgboost.DMatrix(data, enable_categorical=True)
        return model.predict(data, **given)

    return ask


def _statsmodels(model: Any, options: Mapping[str, Any]) -> Ask:
    series = sys.modules.get("statsmodels.tsa.base.tsa_model")

    def ask(data: Any, params: Mapping[str, Any]) -> Any:
        if series is not None and isinstance(model.model, series.TimeSeriesModel):
            return model.predict(start=data["start"].iloc[0], end=data["end"].iloc[0])
        return model.predict(data)

    return ask


def _pytorch(model: Any, options: Mapping[str, Any]) -> Ask:
    torch = sys.modules["torch"]

    def ask(data: Any, params: Mapping[str, Any]) -> Any:
        framed = hasattr(data, "iloc")
        arrays = data if isinstance(data, Mapping) else {"": data.to_numpy(np.float32) if framed else data}
        exported = isinstance(model, torch.export.ExportedProgram)
        trained = not exported and model.training
        module = model.module() if exported else model.eval()
        try:
            with torch.no_grad():
                device = next((p.device for p in module.parameters()), "cpu")
                given = {name: torch.from_numpy(np.array(array)).to(device) for name, array in arrays.items()}
                answer = module(given[""], **params) if given.keys() == {""} else module(**given, **params)
                answer = _arrays(answer)
        finally:
            if trained:
                model.train()
        if not framed:
            return answer
        import pandas as pd

        if isinstance(answer, dict) and any(array.ndim != 1 for array in answer.values()):
            raise TypeError("a table was answered with arrays of several dimensions")
        return pd.DataFrame(answer, index=data.index)

    return ask


def _arrays(answer: Any) -> Any:
    """Tensors as arrays: several by name, those of a tuple as output_0, output_1 and so on."""
    if hasattr(answer, "detach"):
        tensor = answer.detach().cpu()
        return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    if isinstance(answer, (tuple, list)):
        if len(answer) == 1:
            return _arrays(answer[0])
        names = getattr(answer, "_fields", None) or [f"output_{place}" for place in range(len(answer))]
        answer = dict(zipped(names, answer))
    return {str(name): _arrays(part) for name, part in answer.items()}


def _onnx(model: Any, options: Mapping[str, Any]) -> Ask | None:
    import onnxruntime

    content = model if isinstance(model, bytes) else None
    if content is None:
        if model.ByteSize() >= 2**31 - 1:
            return None
        content = model.SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            content, sess_options=settings, providers=["CPUExecutionProvider"]
        )
    except Exception:  # noqa: BLE001 - its weights lie elsewhere, or it is meant for another machine
        return None
    inputs = {node.name: node.type for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]

    def ask(data: Any, params: Mapping[str, Any]) -> Any:
        if isinstance(data, np.ndarray) and len(inputs) == 1:
            data = dict.fromkeys(inputs, data)
        if not isinstance(data, Mapping):
            raise TypeError("an ONNX graph takes arrays")
        feeds = {name: np.asarray(data[name]) for name in inputs}
        for name, array in feeds.items():
            if inputs[name] == "tensor(float)" and array.dtype == np.float64:
                feeds[name] = array.astype(np.float32)
        return dict(zipped(names, session.run(names, feeds)))

    return ask


def _python(model: Any, options: Mapping[str, Any]) -> Ask:
    from loaders.compat import shipped

    artifacts = {name: str(path) for name, path in (options.get("artifacts") or {}).items()}
    config = dict(options.get("model_config") or {})
    adapted = shipped.adapted(_twin(model), artifacts, config)
    return lambda data, params: adapted.predict(data, params=dict(params) or None)


def _twin(model: Any) -> Any:
    """An object with the same attributes, so that the attributes set by `load_context` do not appear in the
    original. Not made with `copy`, which copies only what a pickle would hold. Returns the object itself if
    that is not possible."""
    try:
        twin = object.__new__(type(model))
        vars(twin).update(vars(model))
    except TypeError:
        return model  # a function, or a class not written in Python
    return twin


_ASKERS: Final[dict[str, Callable[[Any, Mapping[str, Any]], Ask | None]]] = {
    "xgboost": _xgboost,
    "statsmodels": _statsmodels,
    "pytorch": _pytorch,
    "onnx": _onnx,
    "python": _python,
}
