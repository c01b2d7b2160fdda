"""OpenAPI 3.1: the document of one model, made from its signature, and the parts of every document.

Pure: knows the contract's fields, and the forms of bodies. Server URLs are relative to the
document, so that it holds under any path prefix.
Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.errors import STATUS
from gateway.http import arrow, multipart, v2_models, v2_outputs
from gateway.http.documents import shapes
from gateway.http.documents.shapes import Schema
from gateway.names import Reference, url_path
from loaders import madeup
from loaders.schema import ColSpec
from loaders.signature import Signature

_ERROR: Final[Schema] = {
    "type": "object",
    "properties": {
        "error_code": {"type": "string", "enum": sorted(STATUS)},
        "message": {"type": "string"},
        "details": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "problem": {"type": "string"},
                    "expected": {"type": "string"},
                    "got": {"type": "string"},
                },
                "required": ["path", "problem"],
            },
        },
        "hint": {"type": ["string", "null"]},
        "retryable": {"type": "boolean"},
        "request_id": {"type": "string"},
    },
    "required": ["error_code", "message", "details", "hint", "retryable", "request_id"],
}
_SAID: Final[Mapping[str, str]] = {
    "400": "The body or the reference is not valid.",
    "401": "No valid credential.",
    "403": "Not allowed.",
    "404": "The model, version or alias does not exist.",
    "405": "The path does not support this method.",
    "409": "Refused; nothing was changed.",
    "412": "The alias does not point to the expected version.",
    "413": "The body is too large.",
    "415": "The body's media type is not supported.",
    "422": "The input does not fit the signature.",
    "429": "Too many requests are waiting; Retry-After says how long to wait.",
    "500": "The model failed.",
    "502": "The model's process ended.",
    "503": "Not available now; Retry-After says how long to wait.",
    "504": "It took longer than the client or the operator allows.",
}
PREDICTION: Final = ("400", "401", "403", "404", "413", "415", "422", "429", "500", "502", "503", "504")
_V2_TENSOR: Final[Schema] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
    "required": ["name", "datatype", "shape"],
}


#: The values of the largest made-up row in a document.
_MOST_VALUES: Final = 10_000

_FORM: Final[Schema] = {
    "type": "object",
    "properties": {"input": {}, multipart.PARAMS: {"type": "object"}},
    "required": ["input"],
}


def model(
    name: str,
    version: str,
    alias: str | None,
    signature: Signature | None,
    *,
    reference: Reference,
    up: str,
    raw: Sequence[str] = (),
    example: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document of one model. `reference`: what its paths name; `up`: the relative URL from the document
    to the gateway; `raw`: media types that its only input may come in; `example`: its saved input."""
    target = url_path(reference)
    served = f"Version {version}" + (f", which answers for the alias {alias}." if alias else ".")
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": version, "description": served},
        "servers": [{"url": up}],
        "paths": {
            f"/predict/{target}": {
                "post": {
                    "operationId": "predict",
                    "summary": f"Predict with {name}",
                    "parameters": _parameters(),
                    "requestBody": {
                        "required": True,
                        "content": _bodies(signature, raw, example),
                    },
                    "responses": {"200": _answer(signature), **errors(*PREDICTION)},
                }
            },
            f"/v2/models/{target}/infer": {
                "post": {
                    "operationId": "infer",
                    "summary": f"Predict with {name} by the Open Inference Protocol",
                    "parameters": _parameters(),
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": v2_request(signature)},
                    },
                    "responses": {"200": _v2_answer(), **errors(*PREDICTION)},
                }
            },
            f"/v2/models/{target}": {
                "get": {
                    "operationId": "metadata",
                    "summary": "Names, datatypes and shapes of its tensors",
                    "responses": {
                        "200": as_json("The metadata.", {"type": "object"}),
                        **errors("404", "503"),
                    },
                }
            },
        },
        "components": components(),
    }


def _bodies(
    signature: Signature | None, raw: Sequence[str], example: Mapping[str, Any] | None
) -> dict[str, Any]:
    made = made_up(signature)
    examples: dict[str, Any] = {
        form: {"summary": f"{form}, made up", "value": {form: value}} for form, value in made.items()
    }
    if example is not None:
        examples["saved"] = {"summary": "the saved example", "value": dict(example)}
    content: dict[str, Any] = {"application/json": {"schema": body(signature)}}
    if examples:
        content["application/json"]["examples"] = examples
    inputs = None if signature is None else signature.inputs
    if inputs is None or isinstance(next(iter(inputs), None), ColSpec):
        content["text/csv"] = {"schema": {"type": "string"}}
        if isinstance(text := csv(signature), str):
            content["text/csv"]["example"] = text
    if arrow.available():
        content |= {arrow.MEDIA: {}, arrow.PARQUET: {}}
    for kind in raw:
        content[kind] = {"schema": {"type": "string"}} if kind.startswith("text/") else {}
        if kind == multipart.KIND:
            content[kind] = {"schema": _FORM}
    return content


def body(signature: Signature | None) -> Schema:
    """A JSON body: one of the forms, and params."""
    given = () if signature is None or signature.params is None else signature.params
    params = shapes.params(given)
    return {
        "oneOf": [
            {
                "title": form,
                "type": "object",
                "properties": {form: schema, "params": params},
                "required": [form],
            }
            for form, schema in shapes.forms(signature).items()
        ]
    }


def made_up(signature: Signature | None) -> dict[str, Any]:
    """One made-up row in each form that has a place for it."""
    row = madeup.row(signature, most=_MOST_VALUES)
    if row is None or signature is None:
        return {}
    found: dict[str, Any] = {row.form: row.data}
    if row.form == "dataframe_split":
        record = dict(zip(row.data["columns"], row.data["data"][0], strict=True))
        found["dataframe_records"] = [record]
        found["instances"] = [record]
        if not any(isinstance(value, dict | list) for value in record.values()):
            found["inputs"] = {str(column): [value] for column, value in record.items()}
    return found


def csv(signature: Signature | None) -> str | None:
    """A made-up table of one row; None where a cell cannot hold a value."""
    row = made_up(signature).get("dataframe_split")
    if row is None or any(isinstance(value, list | dict) for value in row["data"][0]):
        return None
    cells = [f"{value}".lower() if isinstance(value, bool) else f"{value}" for value in row["data"][0]]
    names = [str(column) for column in row["columns"]]
    if any(set('",\n\r') & set(cell) for cell in (*names, *cells)):
        return None
    return f"{','.join(names)}\n{','.join(cells)}\n"


def v2_example(signature: Signature | None) -> dict[str, Any] | None:
    """A made-up request of the Open Inference Protocol; None where the signature says too little."""
    if signature is None or not signature.inputs:
        return None
    tensors, left = [], _MOST_VALUES
    for one in v2_models.tensors(signature.inputs, "input"):
        if one["datatype"] == "BYTES" and len(one["shape"]) > 1:
            return None
        shape = [1 if length == -1 else length for length in one["shape"]]
        count = math.prod(shape)
        left -= count
        if left < 0:
            return None
        value: Any = {"BOOL": True, "BYTES": "a"}.get(one["datatype"], 1)
        tensors.append(
            {"name": one["name"], "datatype": one["datatype"], "shape": shape, "data": [value] * count}
        )
    return {"inputs": tensors}


def v2_request(signature: Signature | None) -> dict[str, Any]:
    schema: Schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "minItems": 1, "items": _V2_TENSOR},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                    "required": ["name"],
                },
            },
        },
        "required": ["inputs"],
    }
    example = v2_example(signature)
    return {"schema": schema} if example is None else {"schema": schema, "example": example}


def _v2_answer() -> dict[str, Any]:
    schema: Schema = {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": _V2_TENSOR},
        },
        "required": ["model_name", "model_version", "outputs"],
    }
    return as_json(f"The outputs; one without a name is `{v2_outputs.UNNAMED}`.", schema)


def _answer(signature: Signature | None) -> dict[str, Any]:
    schema: Schema = {
        "type": "object",
        "properties": {
            "predictions": shapes.predictions(signature),
            "model": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "version": {"type": "string"},
                    "alias": {"type": ["string", "null"]},
                },
                "required": ["name", "version", "alias"],
            },
            "warnings": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["predictions", "model"],
    }
    return as_json("The model's answer, one prediction per row.", schema)


def _parameters() -> list[dict[str, Any]]:
    return [{"$ref": f"#/components/parameters/{name}"} for name in ("RequestId", "Timeout")]


def components() -> dict[str, Any]:
    return {
        "schemas": {"Error": _ERROR},
        "parameters": {
            "RequestId": {
                "name": "X-Request-Id",
                "in": "header",
                "description": "The id of the request; the answer and the log contain it.",
                "schema": {"type": "string", "maxLength": 128},
            },
            "Timeout": {
                "name": "X-Request-Timeout-Ms",
                "in": "header",
                "description": "The client's deadline, in milliseconds.",
                "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
            },
        },
        "securitySchemes": {
            "key": {
                "type": "http",
                "scheme": "bearer",
                "description": "The admin key; for predictions only if the gateway requires a credential.",
            }
        },
    }


def as_json(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def errors(*statuses: str) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    return {status: as_json(_SAID[status], error) for status in statuses}


def curl(target: str, value: Mapping[str, Any], before: str = "predict/", after: str = "") -> str:
    """The command that asks with a JSON body. `target`: what the path names, between `before` and `after`;
    GATEWAY stands for the URL."""
    text = json.dumps(value).replace("'", "'\\''")
    return f"curl $GATEWAY/{before}{target}{after} --json '{text}'"
