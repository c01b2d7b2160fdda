"""The metadata of the Open Inference Protocol (V2) for the server and its models, equal for each transport.

Knows the protocol's names for states, tensors and types; what a model's state means is `Views`' affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway import __version__
from gateway.http import v2_outputs
from gateway.views.paging import Page
from loaders.schema import AnyType, Array, ColSpec, Scalar, TensorSpec, Type

if TYPE_CHECKING:
    from gateway.names import Reference
    from gateway.views import Views
    from loaders.signature import Signature

SERVER: Final[Mapping[str, Any]] = {
    "name": "model-gateway",
    "version": __version__,
    "extensions": ("binary_tensor_data", "model_repository"),
}

_SCALARS: Final[Mapping[Scalar, str]] = {
    Scalar.boolean: "BOOL",
    Scalar.integer: "INT32",
    Scalar.long: "INT64",
    Scalar.float: "FP32",
    Scalar.double: "FP64",
    Scalar.string: "BYTES",
    Scalar.binary: "BYTES",
    Scalar.datetime: "BYTES",
}
#: The names of our states in the repository index.
_STATES: Final = {"READY": "READY", "LOADING": "LOADING", "DRAINING": "UNLOADING"}


async def metadata(views: Views, reference: Reference) -> dict[str, Any]:
    """A model's versions, inputs and outputs as the protocol describes them. Raises Problem."""
    described = await views.described(reference)
    package = described.prepared.package
    signature = described.prepared.signature
    model = await views.model(described.version.name)
    flavors = sorted(set(package.flavors) - {"python_function"})
    return {
        "name": described.version.name,
        "versions": [version.version for version in model.versions],
        "platform": f"mlflow_{flavors[0] if flavors else 'pyfunc'}",
        "inputs": [] if signature is None else tensors(signature.inputs or (), "input"),
        "outputs": [] if signature is None else tensors(signature.outputs or (), v2_outputs.UNNAMED),
        "parameters": {"version": described.version.version, "alias": described.alias or ""},
    }


async def index(views: Views, reads: Callable[[str], bool] | None, only_ready: bool) -> list[dict[str, str]]:
    """Every version of the models that the caller may read about, with its state; `only_ready`: those that
    answer at once."""
    found: list[dict[str, str]] = []
    async for models in views.models(await views.names(Page(reads=reads))):
        for model in models:
            for version in model.versions:
                state = _STATES.get(version.state, "UNAVAILABLE")
                reason = version.reason or ""
                if version.state == "UNLOADED":
                    reason = "not loaded; the first request loads it"
                if state == "READY" or not only_ready:
                    one = {"name": model.name, "version": version.version}
                    found.append({**one, "state": state, "reason": reason})
    return found


def output_names(signature: Signature | None) -> list[str | None]:
    """The names that a signature gives to outputs, None for one without a name."""
    outputs = () if signature is None or signature.outputs is None else signature.outputs
    return [None if spec.name is None else str(spec.name) for spec in outputs]


def tensors(specs: Sequence[ColSpec | TensorSpec], unnamed: str) -> list[dict[str, Any]]:
    """Inputs or outputs of a signature in the protocol's form. `unnamed`: the name of a single tensor without
    a name. Columns without names have their numbers as names."""
    found = []
    for place, spec in enumerate(specs):
        name = str(place) if len(specs) > 1 else unnamed
        name = name if spec.name is None else str(spec.name)
        if isinstance(spec, TensorSpec):
            datatype = v2_outputs.DATATYPES.get(spec.dtype.str.lstrip("<|=>"), "BYTES")
            found.append({"name": name, "datatype": datatype, "shape": list(spec.shape)})
        else:
            datatype, shape = _of_column(spec.type)
            one: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            if not spec.required:
                one["parameters"] = {"required": False}
            found.append(one)
    return found


def _of_column(kind: Type) -> tuple[str, list[int]]:
    if isinstance(kind, Scalar):
        return _SCALARS[kind], [-1]
    if isinstance(kind, Array) and isinstance(kind.items, Scalar | AnyType):
        return _of_column(kind.items)[0], [-1, -1]
    return "BYTES", [-1]
