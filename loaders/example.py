"""The input example of a package: reads MLflow's files for it as a request, and writes them from live data.

Knows MLflow's forms (versions 1 to 3) of `input_example.json` and `serving_input_example.json`. Must not know
signatures: enforcement turns the result of `read` into a model's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders.compat.pythons import dataclass, zipped
from loaders.plain import NotPlain, plain

if TYPE_CHECKING:
    from loaders.enforcement import RawInput

MOST_SERVED: Final = 4 << 20
"""The bytes of the largest example that a server reads."""

FILE: Final = "input_example.json"
SERVING_FILE: Final = "serving_input_example.json"

_TYPES: Final = ("dataframe", "ndarray", "json_object", "sparse_matrix_csr", "sparse_matrix_csc")
_MAX_CELLS: Final = 1_000_000


class InvalidExample(ValueError):
    """An input example cannot be read or written. The message says why, and shows no data."""


@dataclass(frozen=True, slots=True)
class ExampleInfo:
    """The entry for the example in `MLmodel` (`saved_input_example_info`). `type` is one of dataframe,
    ndarray, json_object, sparse_matrix_csr, sparse_matrix_csc. `orient`: pandas' name for the form of a
    frame. `params`: the file holds inference params next to the input. `serving_path`: the file with the
    request body."""

    artifact_path: str
    type: str
    orient: str | None = None
    params: bool = False
    serving_path: str | None = None

    @classmethod
    def from_json(cls, info: Any) -> ExampleInfo:
        """From the value in `MLmodel`. Raises InvalidExample."""
        if not isinstance(info, dict) or not isinstance(info.get("artifact_path"), str):
            raise InvalidExample("must name the example's file")
        kind = info.get("type", "dataframe")
        if kind not in _TYPES:
            raise InvalidExample(f"the type {kind!r} is unknown; known: {', '.join(_TYPES)}")
        orient = info.get("pandas_orient")
        if kind == "dataframe" and orient not in (None, "split", "values", "records"):
            raise InvalidExample(f"the orient {orient!r} is unknown; known: split, values, records")
        serving = info.get("serving_input_path")
        params = info.get("params") not in (None, False, "false")
        return cls(info["artifact_path"], kind, orient, params, serving if isinstance(serving, str) else None)

    def to_json(self) -> dict[str, str]:
        """The entry in MLflow's form."""
        info = {"artifact_path": self.artifact_path, "type": self.type}
        if self.orient is not None:
            info["pandas_orient"] = self.orient
        if self.params:
            info["params"] = "true"
        if self.serving_path is not None:
            info["serving_input_path"] = self.serving_path
        return info


def read(info: ExampleInfo, file: Path, most: int | None = None) -> tuple[RawInput, dict[str, Any] | None]:
    """The example in `file` as the payload of a request, and its params or None. Raises InvalidExample, also
    for a file of more than `most` bytes."""
    from loaders.enforcement import RawInput

    if most is not None and file.stat().st_size > most:
        raise InvalidExample(f"{info.artifact_path} is larger than {most >> 20} MiB")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidExample(f"{info.artifact_path} is not JSON: {error}") from None
    params = None
    if info.params:
        if not isinstance(content, dict) or "inputs" not in content:
            raise InvalidExample(f"{info.artifact_path} must hold inputs and params")
        params = content.get("params")
        if params is not None and not isinstance(params, dict):
            raise InvalidExample(f"{info.artifact_path}: params must be an object")
        content = content["inputs"]
    if info.type == "dataframe":
        if isinstance(content, list):
            rows_are_objects = all(isinstance(row, dict) for row in content)
            if rows_are_objects and content:
                return RawInput("dataframe_records", content), params
            return RawInput("dataframe_split", {"data": content}), params
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InvalidExample(f"{info.artifact_path} is not a table in pandas' split form")
        return RawInput("dataframe_split", content), params
    if info.type.startswith("sparse"):
        return RawInput("inputs", _dense(content, info)), params
    if info.type == "ndarray" and isinstance(content, dict) and len(content) == 1:
        # MLflow 2's form of a tensor: a body of TensorFlow Serving.
        for form in ("inputs", "instances"):
            if form in content:
                content = content[form]
                return RawInput("inputs" if form == "inputs" else "instances", content), params
    return RawInput("inputs", content), params


def write(directory: Path, data: Any, params: Mapping[str, Any] | None = None) -> ExampleInfo:
    """Writes live data (a frame, series, array, dict of arrays, sparse matrix, or JSON value) as an example.
    Writes both files and returns the entry for `MLmodel`. Raises InvalidExample."""
    orient = None
    if hasattr(data, "iloc"):
        frame = data if hasattr(data, "columns") else data.to_frame()
        kind = "dataframe"
        content = _split(frame)
        orient = "split" if "columns" in content else "values"
        payload: dict[str, Any] = {"dataframe_split": content}
    elif hasattr(data, "toarray") and hasattr(data, "nnz"):
        kind = "sparse_matrix_csc" if getattr(data, "format", "csr") == "csc" else "sparse_matrix_csr"
        matrix = data if getattr(data, "format", None) in ("csr", "csc") else data.tocsr()
        content = {name: getattr(matrix, name) for name in ("data", "indices", "indptr", "shape")}
        payload = {"inputs": data.toarray()}
    else:
        arrays = list(data.values()) if isinstance(data, dict) else [data]
        tensors = bool(arrays) and all(isinstance(array, np.ndarray) for array in arrays)
        kind = "ndarray" if tensors else "json_object"
        content = data
        payload = {"inputs": data}
    if params is not None:
        content = {"inputs": content, "params": dict(params)}
        payload["params"] = dict(params)
    try:
        text, body = (json.dumps(plain(part, "it"), allow_nan=False) for part in (content, payload))
    except NotPlain as error:
        raise InvalidExample(f"the input example cannot be written as JSON: {error}") from None
    (directory / FILE).write_text(text, encoding="utf-8")
    (directory / SERVING_FILE).write_text(body, encoding="utf-8")
    return ExampleInfo(FILE, kind, orient, params is not None, SERVING_FILE)


def _split(frame: Any) -> dict[str, Any]:
    """pandas' split form, built column by column, so that an error names the column."""
    columns = list(frame.columns)
    cells = []
    for position, name in enumerate(columns):
        column = frame.iloc[:, position]
        if hasattr(column, "sparse"):
            column = column.sparse.to_dense()  # a request can hold only the dense form
        try:
            cells.append(plain(column.tolist(), f"column {name!r}"))
        except NotPlain as error:
            raise InvalidExample(f"the input example cannot be written as JSON: {error}") from None
    rows = [list(row) for row in zipped(*cells)] if cells else [[] for _ in range(len(frame))]
    content: dict[str, Any] = {"data": rows}
    return content if columns == list(range(len(columns))) else {"columns": columns, **content}


def _dense(content: Any, info: ExampleInfo) -> list[Any]:
    """Reads a sparse matrix without scipy."""
    try:
        rows, columns = (int(size) for size in content["shape"])
        if rows < 0 or columns < 0 or rows * columns > _MAX_CELLS:
            raise InvalidExample(f"{info.artifact_path}: the sparse matrix is too large")
        dense = np.zeros((rows, columns), dtype=np.asarray(content["data"]).dtype)
        starts = content["indptr"]
        for major in range(len(starts) - 1):
            part = slice(starts[major], starts[major + 1])
            minor = np.asarray(content["indices"][part], dtype=np.intp)
            if info.type == "sparse_matrix_csr":
                dense[major, minor] = content["data"][part]
            else:
                dense[minor, major] = content["data"][part]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, InvalidExample):
            raise
        raise InvalidExample(f"{info.artifact_path} is not a sparse matrix") from None
    listed: list[Any] = dense.tolist()
    return listed
