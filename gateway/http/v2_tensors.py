"""The tensors of the Open Inference Protocol (V2): requests read into arrays by name, answers written.

Knows the protocol's datatypes, its JSON and its binary tensor extension; nothing of routes, models or
signatures. A request becomes raw input of the form `tensors`; whether it fits a model is for enforcement.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
import orjson

from gateway.errors import Detail, Problem
from gateway.http import answers, bodies, cost, jsonbody
from gateway.http.bodies import ABSENT, Parsed
from loaders.batch import Batch, Columns, Tensors, Value
from loaders.enforcement import violations as v
from loaders.enforcement.enforce import InvalidInput, RawInput
from loaders.enforcement.scalars import kind_of, objects
from loaders.enforcement.tensors import cast_leaves
from loaders.enforcement.violations import Faults, shown

Array: TypeAlias = "np.ndarray[Any, Any]"

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
DATATYPES: Final[Mapping[str, str]] = {
    dtype.str.lstrip("<|="): name for name, dtype in DTYPES.items() if name not in ("BF16", "BYTES")
}

#: What an output is called that neither the model nor its signature names.
UNNAMED: Final = "predictions"
_BINARY_SIZE: Final = "binary_data_size"
_ELEMENT_BYTES: Final = 120
#: The longest dimension of a tensor that has no values: a model may answer for each of them.
_LONGEST_EMPTY: Final = 65_536
_MAX_DIMENSIONS: Final = 32
#: Request parameters of the protocol, its extensions and its clients; all others are the model's.
_PROTOCOL: Final = frozenset(
    {"binary_data_output", "content_type", "headers", "priority", "timeout"}
    | {"sequence_id", "sequence_start", "sequence_end"}
)


# ---- requests


def header_length(headers: Mapping[bytes, bytes]) -> str:
    """The length of the JSON part, in bytes, as the header says; empty where the whole body is JSON."""
    given = headers.get(b"inference-header-content-length")
    if given is None:
        return ""
    if not given.isdigit() or len(given) > 12:
        raise Problem(
            "MALFORMED_BODY",
            "the header Inference-Header-Content-Length must be a whole number of bytes, 0 or more",
            hint="it is the length of the JSON part, in front of the binary data",
        )
    return given.decode()


def split(body: bytes, length: str) -> tuple[bytes, memoryview]:
    """The JSON part and the binary data behind it. Raises MALFORMED_BODY."""
    if not length:
        return body, memoryview(b"")
    size = int(length)
    if size > len(body):
        raise Problem(
            "MALFORMED_BODY",
            f"Inference-Header-Content-Length is {size}, but the body has {len(body)} bytes",
        )
    return body[:size], memoryview(body)[size:]


def memory(body: bytes, length: str) -> int:
    """The memory that the parsed request takes, in bytes: an upper bound, told before anything is built."""
    text, binary = split(body, length)
    total = cost.json_bytes(text) + 2 * len(binary)
    if binary and b"BYTES" in text:
        total += _ELEMENT_BYTES * _elements(text, len(binary))
    return total


def _elements(text: bytes, size: int) -> int:
    """How many values of type BYTES the binary data can hold: each takes four bytes at least."""
    try:
        inputs = orjson.loads(text)["inputs"]
        counts = [int(math.prod(one["shape"])) for one in inputs if one["datatype"] == "BYTES"]
        return min(sum(counts), size // 4)
    except (ValueError, TypeError, KeyError):
        return size // 4  # refused when it is parsed


def parse(body: bytes, length: str) -> Parsed:
    """An inference request. `asked` of the result is what the answer needs: `id`, `outputs` as pairs of a
    name and whether it is wanted as binary data, `binary` where that is not said. Raises Problem."""
    text, binary = split(body, length)
    document = bodies.decode_object(text, jsonbody.loads)
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        hint = 'send {"inputs": [{"name": …, "shape": […], "datatype": …, "data": […]}]}'
        raise Problem("MALFORMED_BODY", "the request has no list of inputs", hint=hint)
    parameters = _parameters(document, "the request")
    faults = Faults()
    try:
        arrays = _arrays(inputs, binary, faults)
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


def refused(violations: Sequence[v.Violation], count: str) -> Problem:
    details = [Detail(one.path, one.problem, one.expected, one.got) for one in violations]
    hint = "the model's metadata (GET /v2/models/NAME) has names, datatypes and shapes"
    return Problem("INVALID_INPUT", f"the inputs are not what they say: {count}", details=details, hint=hint)


def _id(document: Mapping[str, Any]) -> str | None:
    given = document.get("id")
    if given is not None and not isinstance(given, str):
        raise Problem("MALFORMED_BODY", "id must be a string")
    return given


def _parameters(owner: Mapping[str, Any], what: str) -> dict[str, Any]:
    given = owner.get("parameters")
    if given is not None and not isinstance(given, dict):
        raise Problem("MALFORMED_BODY", f"parameters of {what} must be an object")
    return given or {}


def _outputs(document: Mapping[str, Any]) -> list[list[Any]] | None:
    given = document.get("outputs")
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        raise Problem("MALFORMED_BODY", "outputs must be a list of objects with a name")
    wanted: list[list[Any]] = []
    for place, one in enumerate(given):
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise Problem("MALFORMED_BODY", f"outputs[{place}] must be an object with a name")
        binary = _parameters(one, f"outputs[{place}]").get("binary_data")
        wanted.append([one["name"], binary if isinstance(binary, bool) else None])
    names = [name for name, _ in wanted]
    if len(set(names)) < len(names):
        raise Problem("MALFORMED_BODY", "outputs names an output twice")
    return wanted


def _arrays(inputs: list[Any], binary: memoryview, faults: Faults) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    at = 0
    for place, one in enumerate(inputs):
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or not name:
            raise Problem("MALFORMED_BODY", f"inputs[{place}] must be an object with a name")
        root = f"inputs.{shown(name)}"
        parameters = _parameters(one, root)
        size = parameters.get(_BINARY_SIZE)
        if size is not None:
            if type(size) is not int or size < 0:
                raise Problem("MALFORMED_BODY", f"binary_data_size of {root} must be a whole number")
            if at + size > len(binary):
                message = f"binary_data_size of {root} goes beyond the body"
                hint = "Inference-Header-Content-Length is the length of the JSON part alone"
                raise Problem("MALFORMED_BODY", message, hint=hint)
            at += size
        if name in arrays:
            faults.add(root, v.DUPLICATE)
            continue
        datatype, shape = one.get("datatype"), one.get("shape")
        if datatype not in DTYPES:
            faults.add(f"{root}.datatype", v.WRONG_TYPE, ", ".join(DTYPES))
            continue
        if not _is_shape(shape):
            faults.add(f"{root}.shape", v.WRONG_SHAPE, "a list of lengths, each 0 or more")
            continue
        if (size is None) == ("data" not in one):
            faults.add(root, v.WRONG_FORM, "either data or binary_data_size")
            continue
        before = faults.total
        nulls = _nulls(parameters.get("nulls"), shape, root, faults)
        if size is None:
            array = _from_json(one["data"], datatype, shape, nulls, root, faults)
        else:
            array = _from_binary(binary[at - size : at], datatype, shape, root, faults)
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
    if at != len(binary):
        message = f"{len(binary) - at} bytes of binary data belong to no input"
        raise Problem("MALFORMED_BODY", message, hint="each binary input says its binary_data_size")
    return arrays


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        return False
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        return False
    return math.prod(shape) > 0 or max(shape, default=0) <= _LONGEST_EMPTY


def _nulls(given: object, shape: Sequence[int], root: str, faults: Faults) -> list[int]:
    """The rows that hold null."""
    if given is None:
        return []
    rows = shape[0] if shape else 0
    if not isinstance(given, list) or not all(type(row) is int and 0 <= row < rows for row in given):
        faults.add(f"{root}.parameters.nulls", v.WRONG_TYPE, "the numbers of the rows that hold null")
        return []
    return given


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
    """The values of `data`, flat or nested as the shape says, as a flat array."""
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
            faults.add(f"{root}.data", v.WRONG_LENGTH, f"{count} values", f"{len(data)} values")
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
    """The values of raw little-endian bytes as a flat array."""
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
    """Values of type BYTES: each has its length in front, in four bytes."""
    values: list[bytes] = []
    at, end = 0, len(raw)
    while at + 4 <= end and len(values) < count:
        (size,) = struct.unpack_from("<I", raw, at)
        if size > end - at - 4:
            break
        values.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != end or len(values) != count:
        faults.add(root, v.WRONG_LENGTH, f"{count} values, each with its length in four bytes in front")
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


# ---- answers


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of an answer. `nulls`: the rows that hold null. Of BYTES the array holds `bytes`."""

    name: str
    datatype: str
    array: Array
    nulls: tuple[int, ...] = ()
    content_type: str | None = None


def outputs(result: Batch, names: Sequence[str | None] = ()) -> list[Output]:
    """An answer as tensors. `names`: the outputs of the signature, for an answer without a name."""
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
    """A list as an array where all its values are of one kind; else as objects."""
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
    """The answer's body in parts, and the length of its JSON part where binary data follows. `about`: the
    members in front of `outputs`. Raises Problem."""
    chosen = _chosen(found, asked)
    parts: list[bytes] = [orjson.dumps(about)[:-1] + b',"outputs":[']
    binary: list[bytes] = []
    for place, (output, as_binary) in enumerate(chosen):
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
            raw = _raw(output)
            binary.append(raw)
            parameters[_BINARY_SIZE] = len(raw)
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
            raise Problem(
                "PREDICTION_FAILED",
                f"the model's answer takes more than {limit} bytes",
                hint="send fewer rows a request; the operator's limit is the setting max_answer_bytes",
            )
    parts.append(b"]}")
    if not binary:
        return parts, None
    text = b"".join(parts)
    return [text, *binary], len(text)


def _chosen(found: Sequence[Output], asked: Mapping[str, Any]) -> list[tuple[Output, bool]]:
    by_name = {output.name: output for output in found}
    wanted = asked["outputs"]
    if wanted is None:
        return [(output, asked["binary"]) for output in found]
    unknown = [name for name, _ in wanted if name not in by_name]
    if unknown:
        details = [Detail(f"outputs.{shown(name)}", "is no output of the model") for name in unknown]
        hint = f"the model's outputs: {', '.join(by_name)}"
        raise Problem("INVALID_INPUT", "the model has not all of these outputs", details=details, hint=hint)
    return [(by_name[name], asked["binary"] if binary is None else binary) for name, binary in wanted]


def _raw(output: Output) -> bytes:
    if output.datatype != "BYTES":
        return output.array.tobytes()
    return b"".join(
        part for value in output.array.reshape(-1) for part in (struct.pack("<I", len(value)), value)
    )


def _json(output: Output, limit: int) -> tuple[list[bytes], bool]:
    """The values as a flat JSON array, in parts; and whether they had to be written as base64."""
    flat = output.array.reshape(-1)
    if output.datatype != "BYTES":
        return answers.encode_large(Tensors({"": flat}, len(flat)), limit), False
    try:
        return answers.encode_large(Value([value.decode() for value in flat]), limit), False
    except UnicodeDecodeError:
        return answers.encode_large(Value(flat.tolist()), limit), True  # bytes are written as base64
