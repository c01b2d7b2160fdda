"""Converts messages of the protocol to the documents that `v2_inputs` reads, and from those of `v2_outputs`.

A request becomes the document of the same request in JSON, with the values of each input as little-endian
bytes: `raw_input_contents` unchanged, typed contents converted. `v2_inputs` interprets the values and checks
their shape. Must not know calls or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import orjson
from google.protobuf.message import DecodeError

from gateway.errors import Problem
from gateway.grpc import inference_pb2 as pb
from gateway.http import v2_inputs, v2_outputs
from gateway.http.bodies import Parsed
from loaders.enforcement import violations as v
from loaders.enforcement.scalars import objects
from loaders.enforcement.violations import Violation, shown
from loaders.spelling import counted

#: The field of typed contents by datatype, and the type of its values.
_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i4"),
    "INT16": ("int_contents", "<i4"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u4"),
    "UINT16": ("uint_contents", "<u4"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", "O"),
}
#: Parameters that are lists in JSON, and text here, because the protocol's parameters are scalars.
_LISTS: Final = frozenset({"nulls"})


class Request:
    """A ModelInferRequest as a document. `raws`: the values of each input. `typed`: it has typed contents, so
    the caller expects an answer in that form. Raises Problem."""

    def __init__(self, body: bytes) -> None:
        message = parsed(pb.ModelInferRequest, body)
        self.model: str = message.model_name
        self.version: str = message.model_version
        self.document: dict[str, Any] = {
            "id": message.id or None,
            "parameters": _parameters(message.parameters),
            "inputs": [
                {
                    "name": one.name,
                    "datatype": one.datatype,
                    "shape": list(one.shape),
                    "parameters": _parameters(one.parameters),
                }
                for one in message.inputs
            ],
            "outputs": [
                {"name": one.name, "parameters": _parameters(one.parameters)} for one in message.outputs
            ],
        }
        self.typed = not message.raw_input_contents
        self.raws = _typed(message.inputs) if self.typed else _raw(message)

    @property
    def texts(self) -> int:
        """Returns the maximum number of BYTES values in it. Each becomes a separate object."""
        total = 0
        for one, raw in zip(self.document["inputs"], self.raws, strict=True):
            if one["datatype"] == "BYTES" and raw is not None:
                total += v2_inputs.most_texts(one["shape"], len(raw))
        return total

    def read(self) -> Parsed:
        """Returns the request as untyped raw input. Raises Problem."""
        return v2_inputs.read(self.document, lambda place, parameters, root: self.raws[place])

    def as_body(self) -> tuple[bytes, str]:
        """Returns the request as a body of V2 over HTTP with binary data, and the length of its JSON part."""
        inputs = []
        for one, raw in zip(self.document["inputs"], self.raws, strict=True):
            size = {} if raw is None else {"binary_data_size": len(raw)}
            inputs.append({**one, "parameters": {**one["parameters"], **size}})
        text = orjson.dumps({**self.document, "inputs": inputs})
        return b"".join([text, *(raw for raw in self.raws if raw is not None)]), str(len(text))


def parsed(kind: Any, body: bytes) -> Any:
    """Parses a message of a type. Raises MALFORMED_BODY."""
    try:
        return kind.FromString(body)
    except DecodeError:
        name = kind.DESCRIPTOR.name
        raise Problem("MALFORMED_BODY", f"the message is not a {name}", hint="see inference.proto") from None


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        value = None if choice is None else getattr(parameter, choice)
        if name in _LISTS and isinstance(value, str):
            with suppress(ValueError):  # reported when it is read
                value = orjson.loads(value)
        values[name] = value
    return values


def _raw(message: Any) -> list[memoryview | None]:
    raws = [memoryview(raw) for raw in message.raw_input_contents]
    typed = [one.name for one in message.inputs if one.HasField("contents") and one.contents.ListFields()]
    if typed:
        name = shown(typed[0])
        raise Problem(
            "MALFORMED_BODY",
            f"the request has raw_input_contents and the input {name} has contents too",
            hint="send all inputs raw, or all typed",
        )
    if len(raws) != len(message.inputs):
        raise Problem(
            "MALFORMED_BODY",
            f"raw_input_contents has {counted(len(raws), 'entry')} for "
            f"{counted(len(message.inputs), 'input')}",
            hint="send one for each input, in their order",
        )
    return list(raws)


def _typed(inputs: Sequence[Any]) -> list[memoryview | None]:
    """Returns the typed contents of each input as little-endian bytes; None if its datatype is unknown or has
    no field. Raises INVALID_INPUT."""
    faults: list[Violation] = []
    raws: list[memoryview | None] = []
    for one in inputs:
        root = f"inputs.{shown(one.name)}.contents"
        if one.datatype not in _FIELDS:
            raws.append(None)
            continue
        field, wire = _FIELDS[one.datatype]
        others = [found.name for found, _ in one.contents.ListFields() if found.name != field]
        if others:
            faults.append(Violation(root, v.WRONG_FORM, field, others[0]))
        values = getattr(one.contents, field)
        if one.datatype == "BYTES":
            output = v2_outputs.Output("", "BYTES", objects(list(values)))
            raws.append(memoryview(v2_outputs.little_endian(output)))
            continue
        array = np.fromiter(values, wire, len(values))
        dtype = v2_inputs.DTYPES[one.datatype]
        narrow = array.astype(dtype, copy=False)
        if dtype.itemsize < array.itemsize and not np.array_equal(narrow, array):
            faults.append(Violation(root, v.OUT_OF_RANGE, one.datatype))
        raws.append(memoryview(narrow.tobytes()))
    if faults:
        raise v2_inputs.refused(faults, v.InvalidInput(faults).count_text)
    return raws


def response(
    about: Mapping[str, Any],
    found: Sequence[v2_outputs.Output],
    asked: Mapping[str, Any],
    *,
    typed: bool,
    limit: int,
) -> bytes:
    """Returns a ModelInferResponse. `about`: model, version, id and parameters. `typed`: use typed contents
    if each output has a field for them. Raises Problem."""
    chosen = [output for output, _ in v2_outputs.chosen(found, asked)]
    typed = typed and all(output.datatype in _FIELDS for output in chosen)
    message = pb.ModelInferResponse(
        model_name=about["model_name"], model_version=about["model_version"], id=about.get("id", "")
    )
    _set(message.parameters, about.get("parameters", {}))
    size = 0
    for output in chosen:
        one = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.array.shape)
        if output.nulls:
            _set(one.parameters, {"nulls": orjson.dumps(output.nulls).decode()})
        if output.content_type:
            _set(one.parameters, {"content_type": output.content_type})
        raw = v2_outputs.little_endian(output)
        size += len(raw)
        if size > limit:
            raise v2_outputs.too_large(limit)
        if typed:
            field, _ = _FIELDS[output.datatype]
            getattr(one.contents, field).extend(output.array.reshape(-1).tolist())
        else:
            message.raw_output_contents.append(raw)
    return bytes(message.SerializeToString())


def _set(parameters: Any, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        parameters[name].string_param = value
