"""PyTorch modules: whole pickled modules (`model.pth`) and exported programs (`model.pt2`).

Input and output follow MLflow's pytorch flavor. A frame becomes a float32 matrix, and its answer is a frame
with the columns 0, 1, …. A single array is passed unchanged, several arrays by name. Params are keyword
arguments. A dict or tuple of tensors becomes arrays by name.
Requests are merged only if the package's metadata has `gateway.batch: true`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders import batch as batches
from loaders import environment, pickling
from loaders.batch import Columns, Tensors
from loaders.compat.pythons import zipped
from loaders.flavors import tensors
from loaders.flavors.base import MERGES_KEY, MissingFramework, Saved, Trust
from loaders.flavors.failures import Unsuitable
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.signature import Signature

_PICKLED: Final = "model.pth"
_EXPORTED: Final = "model.pt2"
# MLflow imports the module named in this file; torch's default module reads files that torch wrote.
_PICKLE_INFO: Final = "pickle_module_info.txt"
_PICKLE_MODULE: Final = "mlflow.pytorch.pickle_module"


class PyTorch:
    name = "pytorch"
    loader_modules = ("mlflow.pytorch",)
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = False
    stateless = False
    lists_are_arrays = True
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        """Accepts a module, or an exported program (`torch.export.export`)."""
        torch = sys.modules.get("torch")
        if torch is None:
            return False
        return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        import cloudpickle
        import torch

        data = directory / "data"
        data.mkdir()
        needed: tuple[str, ...] = ("torch",)
        if isinstance(model, torch.export.ExportedProgram):
            torch.export.save(model, data / _EXPORTED)
        else:
            kinds = {kind for part in model.modules() for kind in type(part).__mro__}
            with pickling.Local(options.get("shipped", ())) as local:
                for kind in kinds:
                    local.add(kind)
                torch.save(model, data / _PICKLED, pickle_module=cloudpickle)
            (data / _PICKLE_INFO).write_text(_PICKLE_MODULE, encoding="utf-8")
            roots = {kind.__module__.partition(".")[0] for kind in kinds}
            needed += ("cloudpickle", *environment.distributions(roots))
        function = {
            "loader_module": "mlflow.pytorch",
            "data": "data",
            "pickle_module_name": _PICKLE_MODULE,
            "config": {"device": None},
        }
        entry = {"model_data": "data", "pytorch_version": str(torch.__version__)}
        return Saved({"python_function": function, "pytorch": entry}, needed)

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Module:
        try:
            import torch
        except ImportError as error:
            raise MissingFramework(self.name, "torch") from error
        device = config.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        data = package.data
        relative = data.relative_to(package.path)
        if (exported := exported_program(package)) is not None:
            program = torch.export.load(exported)
            return Module(program.module(), torch, device, _merges(package), program)
        if (data / _PICKLED).exists():
            file = package.inside((relative / _PICKLED).as_posix())
            # A whole module is a pickle of classes, which torch's restricted reader refuses.
            model = torch.load(file, map_location=device, weights_only=False)
            model.eval()
        else:
            raise PackageError(relative.as_posix(), f"contains neither {_PICKLED} nor {_EXPORTED}")
        return Module(model, torch, device, _merges(package))


def exported_program(package: Package) -> Path | None:
    """Returns the package's exported program file; None if there is a pickled module, which is preferred, or
    neither. Raises PackageError for a link that leaves the package."""
    data = package.data
    if data.is_file():
        return data
    if (data / _PICKLED).exists() or not (data / _EXPORTED).exists():
        return None
    return package.inside((data / _EXPORTED).relative_to(package.path).as_posix())


def _called(program: Any) -> tuple[list[str], int, list[str]]:
    """Returns how to call an exported program: its inputs in order, the number of positional inputs, the
    keywords of the others. Empty for a module, and for a program with tensors inside lists or dicts."""
    if program is None:
        return [], 0, []
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    called = program.call_spec.in_spec
    # torch before 2.10 has only a list of the parts.
    child = getattr(called, "child", None) or called.children_specs.__getitem__
    positional, keywords = child(0), child(1)
    if (
        called.num_leaves != positional.num_children + keywords.num_children
        or len(names) != called.num_leaves
    ):
        return [], 0, []
    return names, positional.num_children, [str(key) for key in keywords.context or ()]


def _merges(package: Package) -> bool:
    return package.metadata.get(MERGES_KEY) is True


class Module:
    """A loaded module on its device."""

    def __init__(self, model: Any, torch: Any, device: str, merges: bool, program: Any = None) -> None:
        self.model = model
        self._program = program
        #: The inputs in order, and the number of positional ones: an exported program accepts no other call.
        self._order, self._positional, self._keywords = _called(program)
        self.merges = merges
        self._torch = torch
        self._device = device
        floats = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
        self._float = floats[0] if floats else torch.float32
        self._as_floats: set[tuple[str, ...]] = set()

    def stated(self) -> Signature | None:
        """Returns the inputs of an exported program, with their dtypes and shapes. None for a module, and if
        an input is not a tensor with a numpy dtype."""
        from loaders.schema import TensorSpec
        from loaders.signature import Signature

        if not self._order:
            return None
        nodes = {node.name: node.meta.get("val") for node in self._program.graph.nodes}
        specs = []
        for name in self._order:
            value = nodes.get(name)
            if not isinstance(value, self._torch.Tensor) or value.dtype == self._torch.bfloat16:
                return None
            dtype = self._torch.empty(0, dtype=value.dtype).numpy().dtype
            # A free dimension is a symbol, not an integer.
            shape = tuple(length if type(length) is int else -1 for length in value.shape)
            specs.append(TensorSpec(dtype, shape, name))
        return Signature(tuple(specs)) if specs else None

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        data = batches.native(batch)
        if isinstance(batch, Columns):
            given = {"": data.to_numpy(dtype=np.float32)}
        elif isinstance(batch, Tensors):
            given = batch.arrays
        else:
            given = data if isinstance(data, dict) else {"": data}
        inputs = {name: self._tensor(item) for name, item in given.items()}
        with self._torch.no_grad():
            answer = self._outputs(self._asked(inputs, params))
        if not isinstance(batch, Columns):
            return answer
        import pandas as pd

        if isinstance(answer, np.ndarray):
            return pd.DataFrame(answer, index=data.index)
        cells = {name: tensors.records(item, batch.rows) for name, item in answer.items()}
        return (
            answer if any(cell is None for cell in cells.values()) else pd.DataFrame(cells, index=data.index)
        )

    def _tensor(self, value: Any) -> Any:
        try:
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
        except ValueError:
            raise Unsuitable("a tensor has parts of different lengths") from None
        if isinstance(array, np.ma.MaskedArray) or array.dtype.kind not in "biufc":
            raise Unsuitable("a PyTorch model accepts only numbers, without nulls")
        # A batch may be in read-only memory, which torch does not support.
        array = array if array.flags.writeable else array.copy()
        return self._torch.from_numpy(array).to(self._device)

    def _asked(self, inputs: dict[str, Any], params: Mapping[str, Any]) -> Any:
        """Calls the module. Numbers from JSON have 64 bits, and whole numbers are integers. If the module
        refuses them, calls it again with the dtype of its parameters."""
        kinds = tuple(str(tensor.dtype) for tensor in inputs.values())
        if kinds not in self._as_floats:
            try:
                return self._call(inputs, params)
            except RuntimeError as error:
                if all(tensor.dtype in (self._float, self._torch.bool) for tensor in inputs.values()):
                    raise
                first = error
            try:
                answer = self._call(self._floats(inputs), params)
            except Exception:  # noqa: BLE001 - then it was not the numbers' type
                raise first from None
            self._as_floats.add(kinds)
            return answer
        return self._call(self._floats(inputs), params)

    def _floats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tensor if tensor.dtype == self._torch.bool else tensor.to(self._float)
            for name, tensor in inputs.items()
        }

    def _call(self, inputs: dict[str, Any], params: Mapping[str, Any]) -> Any:
        if inputs.keys() == {""}:
            return self.model(inputs[""], **params)
        if self._order and inputs.keys() == set(self._order):
            arguments = [inputs[name] for name in self._order]
            named = dict(zipped(self._keywords, arguments[self._positional :]))
            return self.model(*arguments[: self._positional], **named, **params)
        known = inspect.signature(self.model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
        if anything or inputs.keys() <= known.keys():
            return self.model(**inputs, **params)
        if len(inputs) == 1:
            return self.model(*inputs.values(), **params)
        raise Unsuitable(f"the module accepts {', '.join(known)}")

    def _outputs(self, answer: Any) -> Any:
        """Returns one array, or several by name; the parts of a tuple are output_0, output_1, …"""
        if isinstance(answer, self._torch.Tensor):
            answer = answer.cpu()
            return (answer.float() if answer.dtype == self._torch.bfloat16 else answer).numpy()
        if isinstance(answer, (tuple, list)):
            if len(answer) == 1:
                return self._outputs(answer[0])
            names = getattr(answer, "_fields", None) or [f"output_{i}" for i in range(len(answer))]
            answer = dict(zipped(names, answer))
        if not isinstance(answer, Mapping):
            raise TypeError(f"a PyTorch model must answer with tensors, not a {type(answer).__name__}")
        arrays = {str(name): self._outputs(item) for name, item in answer.items()}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError("a PyTorch model must answer with one tensor for each name")
        return arrays
