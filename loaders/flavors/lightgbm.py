"""LightGBM boosters in LightGBM's text format, and its scikit-learn style models as pickles."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders import environment, pickling
from loaders.flavors.base import MissingFramework, Saved, Trust

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

_BOOSTER: Final = "lightgbm.basic.Booster"


class LightGBM:
    name = "lightgbm"
    loader_modules = ("mlflow.lightgbm",)
    trust: Trust = "code"
    memory_factor = 4.0
    mlflow_names = False
    stateless = True

    def accepts(self, model: object) -> bool:
        lightgbm = sys.modules.get("lightgbm")
        return lightgbm is not None and isinstance(model, (lightgbm.Booster, lightgbm.LGBMModel))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        import lightgbm

        entry = {"lgb_version": lightgbm.__version__}
        if isinstance(model, lightgbm.Booster):
            entry |= {"data": "model.lgb", "model_class": _BOOSTER}
            model.save_model(str(directory / "model.lgb"))
            needed: tuple[str, ...] = ("lightgbm",)
        else:
            kind = f"{type(model).__module__}.{type(model).__qualname__}"
            entry |= {"data": "model.pkl", "model_class": kind, "serialization_format": "cloudpickle"}
            seen = pickling.dump(model, directory / "model.pkl", options.get("shipped", ()))
            needed = ("lightgbm", "scikit-learn", "cloudpickle", *environment.distributions(seen))
        function = {"loader_module": "mlflow.lightgbm", "data": entry["data"]}
        return Saved({"python_function": function, "lightgbm": entry}, needed)

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Boosted:
        try:
            import lightgbm
        except ImportError as error:
            raise MissingFramework(self.name, "lightgbm") from error
        file = package.native_data(self.name)
        if package.flavors.get(self.name, {}).get("model_class", _BOOSTER) == _BOOSTER:
            return Boosted(lightgbm.Booster(model_file=str(file)), threads)
        return Boosted(pickling.load(package, self.name, file, "cloudpickle"), threads)


class Boosted:
    """A loaded booster or model."""

    merges = True

    def __init__(self, model: Any, threads: int | None) -> None:
        self.model = model
        self._options = {} if threads is None else {"num_threads": threads}

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        return self.model.predict(batches.native(batch), **self._options)
