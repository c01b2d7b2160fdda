"""Writes answers of the Open Inference Protocol (V2): named outputs as JSON or in the binary tensor
extension.

An answer that does not fit into tensors is the model's failure: `Problem` PREDICTION_FAILED. Knows batches
and the protocol's datatypes; must not know routes or models.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import orjson

from gateway.errors import Detail, Problem
from gateway.http import answers
from gateway.http.v2_inputs import BINARY_SIZE, DTYPES
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.enforcement.scalars import objects
from loaders.enforcement.violations import shown

Array: TypeAlias = "np.ndarray[Any, Any]"

DATATYPES: Final[Mapping[str, str]] = {
    dtype.str.lstrip("<|="): name for name, dtype in DTYPES.items() if name not in ("BF16", "BYTES")
}

#: The name of an output that neither the model nor its signature names.
UNNAMED: Final = "predictions"


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of an answer. `nulls`: the rows that contain null. For BYTES the array contains `bytes`."""

    name: str
    datatype: str
    array: Array
    nulls: tuple[int, ...] = ()
    content_type: str | None = None


def outputs(result: Batch, names: Sequence[str | None] = ()) -> list[Output]:
    """Converts an answer to tensors. `names`: the outputs of the signature, for an answer without names."""
    if isinstance(result, Tensors):
        only = names[0] if len(names) == 1 and names[0] else UNNAMED
        return [_output(name or only, array) for name, array in result.arrays.items()]
    if isinstance(result, Columns):
        return [_output(str(name), array) for name, array in result.arrays.items()]
    return _of_value(result, names[0] if len(names) == 1 and names[0] else UNNAMED)


def _of_value(result: Value, name: str) -> list[Output]:
    value = result.value
    if isinstance(value, dict) and value and all(isinstance(one, np.ndarray) for one in value.values()):
        return [_output(str(key), one) for key, one in value.items()]
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        keys = list(value[0])
        if keys and all(list(row) == keys for row in value):
            return [_output(str(key), _inferred([row[key] for row in value])) for key in keys]
    return [_output(name, _inferred(value if isinstance(value, list) else [value]))]


def _inferred(values: list[Any]) -> Array:
    """Converts a list to an array if all its values have one kind, else to an object array."""
    for kinds, dtype in (((bool,), np.bool_), ((int,), np.int64), ((int, float), np.float64)):
        if values and all(type(value) in kinds for value in values):
            try:
                return np.array(values, dtype)
            except OverflowError:
                break
    return objects(values)


def _output(name: str, array: Array) -> Output:
    nulls: tuple[int, ...] = ()
    if isinstance(array, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(array)
        nulls = tuple(np.flatnonzero(mask if mask.ndim < 2 else mask.any(axis=tuple(range(1, mask.ndim)))))
        array = array.filled(0) if array.dtype.kind != "O" else array.filled(None)
        nulls = tuple(map(int, nulls))
    kind = array.dtype.kind
    if kind in "biuf":
        if array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return Output(name, DATATYPES[array.dtype.str.lstrip("<|=")], array, nulls)
    if kind in "mc":
        message = f"the model's answer cannot be written as a tensor: an array of {array.dtype.name}"
        raise Problem("PREDICTION_FAILED", message)
    if kind == "M":
        values = orjson.loads(answers.encode_now(Tensors({"": array.reshape(-1)}, array.size)))
    else:
        values = array.reshape(-1).tolist()
    if not nulls and array.ndim == 1:
        nulls = tuple(i for i, value in enumerate(values) if value is None)
    content_type = None
    if any(not isinstance(value, str | bytes | None) for value in values):
        content_type = "application/json"
    cells = [_bytes(value, content_type is not None) for value in values]
    return Output(name, "BYTES", objects(cells).reshape(array.shape), nulls, content_type)


def _bytes(value: Any, as_json: bool) -> bytes:
    if as_json:
        return answers.encode_now(Value(value))
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return b"" if value is None else bytes(value)


def encode(
    about: Mapping[str, Any], found: Sequence[Output], asked: Mapping[str, Any], limit: int
) -> tuple[list[bytes], int | None]:
    """Returns the answer's body in parts, and the length of its JSON part if binary data follows. `about`:
    the members before `outputs`. Raises Problem."""
    selected = chosen(found, asked)
    parts: list[bytes] = [orjson.dumps(about)[:-1] + b',"outputs":[']
    binary: list[bytes] = []
    for place, (output, as_binary) in enumerate(selected):
        head: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.array.shape),
        }
        parameters: dict[str, Any] = {"nulls": output.nulls} if output.nulls else {}
        if output.content_type:
            parameters["content_type"] = output.content_type
        data: list[bytes] = []
        if as_binary:
            raw = little_endian(output)
            binary.append(raw)
            parameters[BINARY_SIZE] = len(raw)
        else:
            data, is_base64 = _json(output, limit)
            if is_base64:
                parameters["content_type"] = "base64"
        if parameters:
            head["parameters"] = parameters
        start = orjson.dumps(head)
        parts.append((b"," if place else b"") + (start if as_binary else start[:-1] + b',"data":'))
        if not as_binary:
            parts += [*data, b"}"]
        if sum(map(len, parts)) + sum(map(len, binary)) > limit:
            raise too_large(limit)
    parts.append(b"]}")
    if not binary:
        return parts, None
    text = b"".join(parts)
    return [text, *binary], len(text)


def too_large(limit: int) -> Problem:
    """Returns the Problem for an answer of more than `limit` bytes."""
    return Problem(
        "PREDICTION_FAILED",
        f"the model's answer takes more than {limit} bytes",
        hint="send fewer rows in one request; the operator's limit is the setting max_answer_bytes",
    )


def chosen(found: Sequence[Output], asked: Mapping[str, Any]) -> list[tuple[Output, bool]]:
    """Returns the requested outputs, in their order, and whether each is requested as binary data.
    Raises INVALID_INPUT."""
    by_name = {output.name: output for output in found}
    wanted = asked["outputs"]
    if wanted is None:
        return [(output, asked["binary"]) for output in found]
    unknown = [name for name, _ in wanted if name not in by_name]
    if unknown:
        details = [Detail(f"outputs.{shown(name)}", "is not an output of the model") for name in unknown]
        hint = f"the model's outputs: {', '.join(by_name)}"
        raise Problem("INVALID_INPUT", "the model does not have these outputs", details=details, hint=hint)
    return [(by_name[name], asked["binary"] if binary is None else binary) for name, binary in wanted]


def little_endian(output: Output) -> bytes:
    """Returns the values in the protocol's binary form; each BYTES value follows its length in four bytes."""
    if output.datatype != "BYTES":
        return output.array.tobytes()
    return b"".join(
        part for value in output.array.reshape(-1) for part in (struct.pack("<I", len(value)), value)
    )


def _json(output: Output, limit: int) -> tuple[list[bytes], bool]:
    """Returns the values as a flat JSON array, in parts, and True if they are written as base64."""
    flat = output.array.reshape(-1)
    if output.datatype != "BYTES":
        return answers.encode_large(Tensors({"": flat}, len(flat)), limit), False
    try:
        return answers.encode_large(Value([value.decode() for value in flat]), limit), False
    except UnicodeDecodeError:
        return answers.encode_large(Value(flat.tolist()), limit), True  # bytes are written as base64
