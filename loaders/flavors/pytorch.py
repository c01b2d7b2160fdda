"""PyTorch modules: whole pickled modules (`model.pth`) and exported programs (`model.pt2`).

Input and output as MLflow's pytorch flavor has them: a frame becomes a float32 matrix and is answered with
a frame of columns 0, 1, …; an array is given as it is; params are keyword arguments; one tensor comes out.
Requests are merged only where the package's metadata says `gateway.batch: true`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders import batch as batches
from loaders import environment, pickling
from loaders.batch import Columns
from loaders.flavors.base import MERGES_KEY, MissingFramework, Saved, Trust
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

_PICKLED: Final = "model.pth"
_EXPORTED: Final = "model.pt2"
# MLflow imports the module that this file names; torch's own default reads what it wrote.
_PICKLE_INFO: Final = "pickle_module_info.txt"
_PICKLE_MODULE: Final = "mlflow.pytorch.pickle_module"


class PyTorch:
    name = "pytorch"
    loader_modules = ("mlflow.pytorch",)
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = False
    stateless = False

    def accepts(self, model: object) -> bool:
        """A module, or an exported program (`torch.export.export`)."""
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
        if (data / _PICKLED).exists():
            file = package.inside((relative / _PICKLED).as_posix())
            # A whole module is a pickle of classes: torch's restricted reader refuses them.
            model = torch.load(file, map_location=device, weights_only=False)
            model.eval()
        elif (data / _EXPORTED).exists():
            model = torch.export.load(package.inside((relative / _EXPORTED).as_posix())).module()
        else:
            raise PackageError(relative.as_posix(), f"holds neither {_PICKLED} nor {_EXPORTED}")
        return Module(model, torch, device, package.metadata.get(MERGES_KEY) is True)


class Module:
    """A loaded module on its device."""

    def __init__(self, model: Any, torch: Any, device: str, merges: bool) -> None:
        self.model = model
        self.merges = merges
        self._torch = torch
        self._device = device

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        data = batches.native(batch)
        if isinstance(data, dict | list):
            raise TypeError("a PyTorch model takes one table or one array")
        array = data.to_numpy(dtype=np.float32) if isinstance(batch, Columns) else np.asarray(data)
        with self._torch.no_grad():
            # A batch may be read-only memory, which torch cannot hold.
            tensor = self._torch.from_numpy(array if array.flags.writeable else array.copy())
            answer = self.model(tensor.to(self._device), **params)
        if not isinstance(answer, self._torch.Tensor):
            raise TypeError(f"a PyTorch model must answer with one tensor, not a {type(answer).__name__}")
        result = answer.cpu().numpy()
        if not isinstance(batch, Columns):
            return result
        import pandas as pd

        return pd.DataFrame(result, index=data.index)
