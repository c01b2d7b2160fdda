"""Reads requests of the Open Inference Protocol (V2) into arrays by name: JSON and the binary tensor
extension.

A request becomes raw input of the form `tensors`; enforcement checks whether it fits a model. Knows the
protocol's datatypes; must not know routes, models or signatures.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias, TypeGuard

import numpy as np
import orjson

from gateway.errors import Detail, Problem
from gateway.http import bodies, cost, jsonbody
from gateway.http.bodies import ABSENT, Parsed
from loaders.enforcement import InvalidInput, RawInput
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import kind_of, objects
from loaders.enforcement.tensors import cast_leaves
from loaders.enforcement.violations import Faults, shown
from loaders.spelling import counted

Array: TypeAlias = "np.ndarray[Any, Any]"
#: Returns an input's values as little-endian bytes, by its position, its parameters and its path in messages;
#: None if the values are in `data`.
Share: TypeAlias = "Callable[[int, Mapping[str, Any], str], memoryview | None]"

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"),
    "BYTES": np.dtype(object),
}

_HINT: Final = 'send {"inputs": [{"name": …, "shape": […], "datatype": …, "data": […]}]}'
_OUTPUTS: Final = 'send "outputs": [{"name": …}] with each name once, or leave it out for all outputs'

BINARY_SIZE: Final = "binary_data_size"
_ELEMENT_BYTES: Final = 120
#: A JSON part above this size is not parsed to count its tensors' values.
_COUNTED_BYTES: Final = 65_536
#: Maximum length of a dimension of a tensor without values: a model may answer for each position.
_LONGEST_EMPTY: Final = 65_536
_MAX_DIMENSIONS: Final = 32
#: Request parameters of the protocol, its extensions and its clients. All others belong to the model.
_PROTOCOL: Final = frozenset(
    {"binary_data_output", "content_type", "headers", "priority", "timeout"}
    | {"sequence_id", "sequence_start", "sequence_end"}
)


def header_length(headers: Mapping[bytes, bytes]) -> str:
    """Returns the header with the length of the JSON part, in bytes; empty if the whole body is JSON."""
    given = headers.get(b"inference-header-content-length")
    if given is None:
        return ""
    if not given.isdigit() or len(given) > 12:
        raise Problem(
            "MALFORMED_BODY",
            "the header Inference-Header-Content-Length must be a whole number of bytes, 0 or more",
            hint="it is the length of the JSON part, which comes before the binary data",
        )
    return given.decode()


def split(body: bytes, length: str) -> tuple[bytes, memoryview]:
    """Splits a body into the JSON part and the binary data after it. Raises MALFORMED_BODY."""
    if not length:
        return body, memoryview(b"")
    size = int(length)
    if size > len(body):
        raise Problem(
            "MALFORMED_BODY",
            f"Inference-Header-Content-Length is {size}, but the body has {len(body)} bytes",
            hint="it is the length of the JSON part, which comes before the binary data",
        )
    return body[:size], memoryview(body)[size:]


def memory(body: bytes, length: str) -> int:
    """Returns an upper bound of the bytes of memory of the parsed request. Parses nothing."""
    text, binary = split(body, length)
    total = cost.json_bytes(text) + 2 * len(binary)
    if binary and b"BYTES" in text:
        total += _ELEMENT_BYTES * _elements(text, len(binary))
    return total


def _elements(text: bytes, size: int) -> int:
    """Returns the maximum number of BYTES values in the binary data."""
    if len(text) > _COUNTED_BYTES:
        return size // 4
    try:
        inputs = orjson.loads(text)["inputs"]
        counts = [most_texts(one["shape"], size) for one in inputs if one["datatype"] == "BYTES"]
        return min(sum(counts), size // 4)
    except (ValueError, TypeError, KeyError):
        return size // 4  # the parser refuses it


def most_texts(shape: object, size: int) -> int:
    """Returns the maximum number of BYTES values that a tensor of this shape has in `size` bytes: each takes
    at least four. `shape` is as the client sent it: its product is computed only where it is a shape."""
    return min(math.prod(shape), size // 4) if _is_shape(shape) else size // 4


def parse(body: bytes, length: str) -> Parsed:
    """Parses an inference request in JSON with binary data after it. Raises Problem."""
    text, binary = split(body, length)
    document = bodies.decode_object(text, jsonbody.loads, _HINT)
    at = 0

    def share(place: int, parameters: Mapping[str, Any], root: str) -> memoryview | None:
        nonlocal at
        size = parameters.get(BINARY_SIZE)
        if size is None:
            return None
        if type(size) is not int or size < 0:
            message = f"binary_data_size of {root} must be a whole number"
            raise Problem("MALFORMED_BODY", message, hint="it is the number of bytes of this input")
        if at + size > len(binary):
            message = f"binary_data_size of {root} extends past the end of the body"
            hint = "Inference-Header-Content-Length is the length of only the JSON part"
            raise Problem("MALFORMED_BODY", message, hint=hint)
        at += size
        return binary[at - size : at]

    parsed = read(document, share)
    if at != len(binary):
        message = f"{len(binary) - at} bytes of binary data belong to no input"
        raise Problem("MALFORMED_BODY", message, hint="give each binary input its binary_data_size")
    return parsed


def read(document: Mapping[str, Any], share: Share) -> Parsed:
    """Reads an inference request of any transport. `asked` of the result has the request's wishes for the
    answer: `id`, `outputs` as pairs of a name and a flag for binary data, and `binary`, the default of that
    flag. Raises Problem."""
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise _malformed("the request has no list of inputs")
    parameters = _parameters(document, "the request")
    faults = Faults()
    try:
        arrays = _arrays(inputs, share, faults)
    except InvalidInput as error:
        raise refused(error.violations, error.count_text) from None
    if faults.total:
        raise refused(faults.kept, InvalidInput(faults.kept, faults.total).count_text)
    params = {name: value for name, value in parameters.items() if name not in _PROTOCOL}
    asked = {
        "id": _id(document),
        "outputs": _outputs(document),
        "binary": parameters.get("binary_data_output") is True,
    }
    return Parsed(RawInput("tensors", arrays), params or None, ABSENT, asked)


def _malformed(message: str) -> Problem:
    return Problem("MALFORMED_BODY", message, hint=_HINT)


def refused(violations: Sequence[v.Violation], count: str) -> Problem:
    details = [Detail(one.path, one.problem, one.expected, one.got) for one in violations]
    hint = "the model's metadata (GET /v2/models/NAME) has names, datatypes and shapes"
    return Problem("INVALID_INPUT", f"the inputs are invalid: {count}", details=details, hint=hint)


def _id(document: Mapping[str, Any]) -> str | None:
    given = document.get("id")
    if given is not None and not isinstance(given, str):
        raise _malformed("id must be a string")
    return given


def _parameters(owner: Mapping[str, Any], what: str) -> dict[str, Any]:
    given = owner.get("parameters")
    if given is not None and not isinstance(given, dict):
        raise _malformed(f"parameters of {what} must be an object")
    return given or {}


def _outputs(document: Mapping[str, Any]) -> list[list[Any]] | None:
    given = document.get("outputs")
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        raise Problem("MALFORMED_BODY", "outputs must be a list of objects with a name", hint=_OUTPUTS)
    wanted: list[list[Any]] = []
    for place, one in enumerate(given):
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            message = f"outputs[{place}] must be an object with a name"
            raise Problem("MALFORMED_BODY", message, hint=_OUTPUTS)
        binary = _parameters(one, f"outputs[{place}]").get("binary_data")
        wanted.append([one["name"], binary if isinstance(binary, bool) else None])
    names = [name for name, _ in wanted]
    if len(set(names)) < len(names):
        raise Problem("MALFORMED_BODY", "outputs names an output twice", hint=_OUTPUTS)
    return wanted


def _arrays(inputs: list[Any], share: Share, faults: Faults) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for place, one in enumerate(inputs):
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not name:
            raise _malformed(f"inputs[{place}] must be an object with a name")
        root = f"inputs.{shown(name)}"
        parameters = _parameters(one, root)
        raw = share(place, parameters, root)
        if name in arrays:
            faults.add(root, v.DUPLICATE)
            continue
        datatype, shape = one.get("datatype"), one.get("shape")
        if not isinstance(datatype, str) or datatype not in DTYPES:
            faults.add(f"{root}.datatype", v.WRONG_TYPE, ", ".join(DTYPES))
            continue
        if not _is_shape(shape):
            faults.add(f"{root}.shape", v.WRONG_SHAPE, "a list of lengths, each 0 or more")
            continue
        if (raw is None) == ("data" not in one):
            faults.add(root, v.WRONG_FORM, "either data or binary data")
            continue
        before = faults.total
        nulls = _nulls(parameters.get("nulls"), shape, root, faults)
        if raw is None:
            array = _from_json(one["data"], datatype, shape, nulls, root, faults)
        else:
            array = _from_binary(raw, datatype, shape, root, faults)
        is_base64 = parameters.get("content_type") == "base64" and datatype == "BYTES"
        if array is not None and is_base64 and faults.total == before:
            array = _decoded(array, root, faults)
        if array is None or faults.total > before:
            arrays[name] = np.zeros(0)
            continue
        try:
            arrays[name] = _with_nulls(array.reshape(shape), nulls)
        except ValueError:
            faults.add(f"{root}.shape", v.WRONG_SHAPE)
    return arrays


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        return False
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        return False
    return math.prod(shape) > 0 or max(shape, default=0) <= _LONGEST_EMPTY


def _nulls(given: object, shape: Sequence[int], root: str, faults: Faults) -> list[int]:
    """Returns the rows that contain null."""
    if given is None:
        return []
    rows = shape[0] if shape else 0
    if not isinstance(given, list) or not all(type(row) is int and 0 <= row < rows for row in given):
        faults.add(f"{root}.parameters.nulls", v.WRONG_TYPE, "the numbers of the rows that contain null")
        return []
    return sorted(set(given))


def _with_nulls(array: Array, nulls: Sequence[int]) -> Array:
    if not nulls:
        return array
    if array.dtype.kind == "O":
        array = array.copy()
        array[nulls] = None
    elif array.dtype.kind == "f":
        array = array.copy()
        array[nulls] = np.nan
    else:
        mask = np.zeros(array.shape, bool)
        mask[nulls] = True
        array = np.ma.MaskedArray(array, mask=mask)
    return array


_FILL: Final = {"BOOL": False, "BYTES": ""}


def _from_json(
    data: Any, datatype: str, shape: Sequence[int], nulls: Sequence[int], root: str, faults: Faults
) -> Array | None:
    """Returns the values of `data`, flat or nested as in the shape, as a flat array."""
    flat = _flat(data, shape, root, faults)
    if flat is None:
        return None
    if nulls:
        each = math.prod(shape[1:])
        gaps = {row * each + i for row in nulls for i in range(each)}
        fill = _FILL.get(datatype, 0)
        flat = [fill if value is None and i in gaps else value for i, value in enumerate(flat)]
    path = partial("{}.data[{}]".format, root)
    if datatype != "BYTES":
        array: Array = cast_leaves(flat, DTYPES[datatype], "json", faults, path)
        return np.ma.getdata(array)
    for i, value in enumerate(flat):
        if not isinstance(value, str):
            faults.add(partial(path, i), v.NULL if value is None else v.WRONG_TYPE, "string", kind_of(value))
    return objects(flat)


def _flat(data: Any, shape: Sequence[int], root: str, faults: Faults) -> list[Any] | None:
    count = math.prod(shape)
    if not isinstance(data, list):
        if not shape and not isinstance(data, dict):
            return [data]
        faults.add(f"{root}.data", v.WRONG_TYPE, "array", kind_of(data))
        return None
    if not any(type(part) is list for part in data):
        if len(data) != count:
            faults.add(f"{root}.data", v.WRONG_LENGTH, counted(count, "value"), counted(len(data), "value"))
            return None
        return data
    level: list[Any] = [data]
    for length in shape:
        if not all(type(part) is list and len(part) == length for part in level):
            faults.add(f"{root}.data", v.WRONG_SHAPE, f"flat, or nested as shape {list(shape)}")
            return None
        level = list(chain.from_iterable(level))
    if any(type(leaf) is list for leaf in level):
        faults.add(f"{root}.data", v.WRONG_SHAPE, f"flat, or nested as shape {list(shape)}")
        return None
    return level


def _from_binary(
    raw: memoryview, datatype: str, shape: Sequence[int], root: str, faults: Faults
) -> Array | None:
    """Returns the values of raw little-endian bytes as a flat array."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(raw, count, root, faults)
    width = 2 if datatype == "BF16" else DTYPES[datatype].itemsize
    if len(raw) != count * width:
        faults.add(root, v.WRONG_LENGTH, f"{count * width} bytes", f"{len(raw)} bytes")
        return None
    if datatype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    array = np.frombuffer(raw, np.uint8 if datatype == "BOOL" else DTYPES[datatype])
    if datatype == "BOOL":
        if (array > 1).any():
            faults.add(root, v.OUT_OF_RANGE, "bytes 0 and 1")
            return None
        return array.view(np.bool_)
    return array if array.flags.aligned else array.copy()


def _strings(raw: memoryview, count: int, root: str, faults: Faults) -> Array | None:
    """Returns values of type BYTES. Each value follows its length, which takes four bytes."""
    values: list[bytes] = []
    at, end = 0, len(raw)
    while at + 4 <= end and len(values) < count:
        (size,) = struct.unpack_from("<I", raw, at)
        if size > end - at - 4:
            break
        values.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != end or len(values) != count:
        faults.add(root, v.WRONG_LENGTH, f"{count} values, each after its length in four bytes")
        return None
    return objects(values)


def _decoded(array: Array, root: str, faults: Faults) -> Array:
    values = []
    for i, value in enumerate(array):
        try:
            values.append(base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError):
            faults.add(f"{root}.data[{i}]", v.BAD_BASE64, "base64", "string")
            values.append(b"")
    return objects(values)
