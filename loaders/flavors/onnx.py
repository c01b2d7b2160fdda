"""ONNX graphs, run by ONNX Runtime. Loading executes nothing from the package.

The graph's dtypes and ranks decide: a value that can be cast without a change is cast (floats may be
rounded), any other is refused. A dict goes to the inputs by name, a single array to the single input. A table
goes to a single input as a matrix, and to several inputs by column. The answer to a table is a table with one
record per row, in which a wide output is a column of lists. Other answers are arrays by output name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from loaders.batch import Columns, Tensors
from loaders.compat.pythons import zipped
from loaders.flavors import tensors
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.flavors.failures import Unsuitable
from loaders.flavors.warned import ignored
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.signature import Signature, TensorSpec

_FILE: Final = "model.onnx"
_CPU: Final = "CPUExecutionProvider"
_MODES: Final = {"SEQUENTIAL": "ORT_SEQUENTIAL", "PARALLEL": "ORT_PARALLEL"}
_FILES: Final = re.compile(r"(^|[._])((file)?path|file|folder|dir|directory|plugin|lib|library)s?([._]|$)")
_DTYPES: Final = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        **{name: name for name in ("int8", "int16", "int32", "int64", "float16", "bool")},
        **{name: name for name in ("uint8", "uint16", "uint32", "uint64")},
        "float": "float32",
        "double": "float64",
        "string": "object",
    }.items()
}
_SPINNING: Final = "session.intra_op.allow_spinning"


class Onnx:
    name = "onnx"
    loader_modules = ("mlflow.onnx",)
    trust: Trust = "data"
    memory_factor = 2.5
    mlflow_names = False
    stateless = True
    lists_are_arrays = True
    options = (
        "providers",
        "session_options",
    )

    def accepts(self, model: object) -> bool:
        """Accepts a ModelProto, its bytes, or the path of an `.onnx` file."""
        onnx = sys.modules.get("onnx")
        if onnx is not None and isinstance(model, onnx.ModelProto):
            return True
        return isinstance(model, bytes) or (isinstance(model, (str, Path)) and str(model).endswith(".onnx"))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """Options: `providers` (a list of names or [name, options]), `session_options` (MLflow's dict).
        Files with external weights, and graphs above 2 GB, need the package onnx."""
        target = directory / _FILE
        if isinstance(model, bytes):
            target.write_bytes(model)
        elif isinstance(model, (str, Path)):
            _copy(Path(model), target)
        else:
            _write(model, target)
        entry: dict[str, Any] = {"data": _FILE, "providers": options.get("providers", [_CPU])}
        if session_options := options.get("session_options"):
            entry["onnx_session_options"] = dict(session_options)
        function = {"loader_module": "mlflow.onnx", "data": _FILE}
        return Saved({"python_function": function, "onnx": entry}, ("onnxruntime",), _declared(target))

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Graph:
        runtime = _runtime()
        entry = package.flavors.get("onnx", {})
        options = _session_options(runtime, entry.get("onnx_session_options") or {}, threads)
        available = set(runtime.get_available_providers())
        providers = [p for p in _providers(entry) if p[0] in available] or [(_CPU, {})]
        session = runtime.InferenceSession(str(package.data), sess_options=options, providers=providers)
        return Graph(session, package.data)


class _Input(NamedTuple):
    """One input of a graph. `dtype`: None if the input is not an array. `shape`: None if the graph does
    not declare its rank."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tensors.Shape | None


class Graph:
    """A session and its inputs. Merges only if every input and output has a free first dimension."""

    def __init__(self, session: Any, file: Path) -> None:
        self._session = session
        self._file = file
        self._inputs = {node.name: _input(node) for node in session.get_inputs()}
        self._outputs = [node.name for node in session.get_outputs()]
        #: The declared shape of each input; -1 means any length.
        self.declared = {
            name: tuple(-1 if length is None else length for length in taken.shape)
            for name, taken in self._inputs.items()
            if taken.shape is not None
        }
        nodes = [*session.get_inputs(), *session.get_outputs()]
        self.merges = all(node.shape and not isinstance(node.shape[0], int) for node in nodes)

    def stated(self) -> Signature | None:
        """Returns the signature that the graph declares, with the names of inputs and outputs."""
        return _stated(self._session, self._file)

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        results = self._session.run(self._outputs, self._feeds(batch))
        answer = dict(zipped(self._outputs, results))
        if not isinstance(batch, Columns):
            return answer
        records = {name: tensors.records(result, batch.rows) for name, result in answer.items()}
        if any(cells is None for cells in records.values()):
            return answer  # there is not one record per row
        import pandas as pd

        return pd.DataFrame(records)

    def _feeds(self, batch: Batch) -> dict[str, Any]:
        if isinstance(batch, Columns):
            return self._of_table(batch)
        if isinstance(batch, Tensors):
            given: Mapping[str, Any] = batch.arrays
        elif isinstance(batch.value, dict):
            given = {str(name): item for name, item in batch.value.items()}
        else:
            given = {"": batch.value}
        if given.keys() == {""} and "" not in self._inputs:
            if len(self._inputs) != 1:
                raise Unsuitable(f"the graph has several inputs: name them: {', '.join(self._inputs)}")
            given = dict.fromkeys(self._inputs, given[""])
        if missing := [name for name in self._inputs if name not in given]:
            raise Unsuitable(f"the graph also needs {', '.join(missing)}")
        return {name: _fed(taken, given[name]) for name, taken in self._inputs.items()}

    def _of_table(self, table: Columns) -> dict[str, Any]:
        """Returns columns by the names of the inputs, or all columns for a single input."""
        inputs = [*self._inputs.values()]
        known = [(taken, taken.dtype, taken.shape) for taken in inputs]
        if any(dtype is None for _, dtype, _ in known):
            raise Unsuitable(
                "the graph has an input that is not an array: send its inputs by name, not a table"
            )
        named = all(taken.name in table.arrays for taken in inputs)
        one_column = len(inputs) == 1 and (len(table.arrays) == 1 or len(inputs[0].shape or ()) == 1)
        if len(inputs) == 1 and not (named and one_column):
            taken = inputs[0]
            assert taken.dtype is not None
            shape = (None, None) if taken.shape is None else taken.shape
            return {taken.name: tensors.matrix(table, taken.dtype, shape, f"the input {taken.name}")}
        if not named:
            raise Unsuitable(f"the graph takes the columns {', '.join(self._inputs)}")
        return {
            taken.name: tensors.column(
                table, taken.name, dtype, (None,) if shape is None else shape, f"the input {taken.name}"
            )
            for taken, dtype, shape in known
            if dtype is not None
        }


def _input(node: Any) -> _Input:
    # A symbolic dimension is a name, a free one None; some exporters write -1 or 0 for it. A scalar and a
    # tensor of unknown rank look the same, so neither shape is checked here.
    shape = [n if isinstance(n, int) and n > 0 else None for n in node.shape]
    return _Input(node.name, _DTYPES.get(node.type), shape or None)


def _fed(taken: _Input, value: Any) -> Any:
    if taken.dtype is None:
        return value
    name = f"the input {taken.name}"
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError:
        raise Unsuitable(f"{name} has parts of different lengths") from None
    array = tensors.cast(array, taken.dtype, name)
    return array if taken.shape is None else tensors.shaped(array, taken.shape, name)


def _declared(path: Path) -> Signature | None:
    """Returns the signature that the graph in a file states; None if this machine cannot open the file."""
    try:
        runtime = _runtime()
        options = _session_options(runtime, {"graph_optimization_level": 0}, 1)
        session = runtime.InferenceSession(str(path), sess_options=options, providers=[_CPU])
    except Exception:  # noqa: BLE001 - it may be meant for another machine: the runtime has many reasons
        return None
    return _stated(session, path)


def _stated(session: Any, path: Path) -> Signature | None:
    """Returns the signature that a graph states: its inputs' names, dtypes and shapes, with -1 for a free or
    symbolic dimension. Returns None if an input is not a tensor or its rank is unknown.

    No tool verifies the stated outputs, and in real graphs they are often wrong. They are used only if all
    dimensions but the first are fixed; otherwise the signature has no outputs.
    """
    from loaders.signature import Signature

    inputs = [_tensor(node) for node in session.get_inputs()]
    known = [spec for spec in inputs if spec is not None]
    if not known or len(known) < len(inputs):
        return None
    unranked = {spec.name for spec in known if not spec.shape} - _scalars(path)
    if unranked:
        return None
    outputs = [_tensor(node) for node in session.get_outputs()]
    sure = [spec for spec in outputs if spec is not None and spec.shape and -1 not in spec.shape[1:]]
    return Signature(tuple(known), tuple(sure) if len(sure) == len(outputs) else None)


def _tensor(node: Any) -> TensorSpec | None:
    from loaders.signature import TensorSpec

    dtype = _DTYPES.get(node.type)
    if dtype is None:
        return None
    # A symbolic dimension is a name, a free one None; some exporters write -1 or 0 for it.
    return TensorSpec(dtype, tuple(n if isinstance(n, int) and n > 0 else -1 for n in node.shape), node.name)


def _scalars(path: Path) -> set[str | None]:
    """Returns the inputs that are stated to have no axis. ONNX Runtime does not distinguish them from inputs
    of unknown rank; only the package onnx does."""
    try:
        import onnx
    except ImportError:
        return set()
    stated = {
        node.name: node.type.tensor_type
        for node in onnx.load(str(path), load_external_data=False).graph.input
    }
    return {name for name, kind in stated.items() if kind.HasField("shape") and not kind.shape.dim}


def _session_options(runtime: Any, wanted: Any, threads: int | None) -> Any:
    """Reads MLflow's `onnx_session_options`. A session has at most `threads` threads; idle threads sleep."""
    place = "onnx.onnx_session_options"
    if not isinstance(wanted, dict):
        raise PackageError(place, "must be a mapping")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    limit = threads or _processors()
    try:
        options.intra_op_num_threads = min(int(wanted.get("intra_op_num_threads") or limit), limit)
        options.inter_op_num_threads = min(int(wanted.get("inter_op_num_threads") or 1), limit)
        if (level := wanted.get("graph_optimization_level")) is not None:
            # The enumeration itself accepts any number.
            levels = {int(known): known for known in runtime.GraphOptimizationLevel.__members__.values()}
            options.graph_optimization_level = levels[int(level)]
        if mode := wanted.get("execution_mode"):
            options.execution_mode = getattr(runtime.ExecutionMode, _MODES[str(mode).upper()])
        entries = {_SPINNING: "0", **(wanted.get("extra_session_config") or {})}
    except (TypeError, ValueError, KeyError) as error:
        raise PackageError(place, f"has an unknown value: {error}") from error
    _name_no_files(place, entries)
    for key, value in entries.items():
        options.add_session_config_entry(str(key), str(value))
    return options


def _providers(entry: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the declared execution providers. In `MLmodel` an item is a name, or a list of name and
    options."""
    declared = entry.get("providers") or [_CPU]
    providers: list[tuple[str, dict[str, Any]]] = []
    for item in [declared] if isinstance(declared, str) else declared:
        name, *rest = item if isinstance(item, list) and item else [item]
        options = rest[0] if rest else {}
        if not isinstance(name, str) or not isinstance(options, dict):
            raise PackageError("onnx.providers", "must be names, or lists of a name and its options")
        _name_no_files("onnx.providers", options)
        providers.append((name, options))
    return providers


def _name_no_files(place: str, options: Mapping[str, Any]) -> None:
    """Refuses options that would read files, or load libraries, outside the package."""
    for key in options:
        if _FILES.search(str(key).lower()):
            raise PackageError(place, f"the option {key!r} is not allowed: it names a file")


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _copy(source: Path, target: Path) -> None:
    """Copies the graph, with all its weights in one file if possible."""
    try:
        import onnx
    except ImportError:
        target.write_bytes(source.read_bytes())
        try:
            _runtime().InferenceSession(str(target), providers=[_CPU])
        except Exception as error:
            if source.with_name(source.name + ".data").exists() or "external" in str(error).lower():
                raise MissingFramework("onnx (with weights outside its file)", "onnx") from error
            raise
        return
    _write(onnx.load(str(source)), target)


def _write(model: Any, target: Path) -> None:
    import onnx

    external = model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF
    with ignored(DeprecationWarning):
        onnx.save_model(
            model, str(target), save_as_external_data=external, location=_FILE + ".data" if external else None
        )


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingFramework("onnx", "onnxruntime") from error
    return onnxruntime
