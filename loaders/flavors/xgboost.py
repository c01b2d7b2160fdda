"""XGBoost boosters and scikit-learn style models, in XGBoost's own formats (ubj, json, the old binary).

Loading them executes nothing that the package brought: the class it names is taken from XGBoost alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders import environment
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.package import PackageError

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

_FILE: Final = "model.ubj"


class XGBoost:
    name = "xgboost"
    loader_modules = ("mlflow.xgboost",)
    trust: Trust = "data"
    memory_factor = 4.0
    mlflow_names = False
    stateless = True

    def accepts(self, model: object) -> bool:
        xgboost = sys.modules.get("xgboost")
        return xgboost is not None and isinstance(model, (xgboost.Booster, xgboost.XGBModel))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """A class derived from XGBoost's is saved as the one of XGBoost that it derives from."""
        import xgboost

        model.save_model(directory / _FILE)
        owner = next(c for c in type(model).__mro__ if c.__module__.startswith("xgboost."))
        entry = {
            "data": _FILE,
            "model_class": f"{owner.__module__}.{owner.__qualname__}",
            "model_format": "ubj",
            "xgb_version": xgboost.__version__,
        }
        function = {"loader_module": "mlflow.xgboost", "data": _FILE}
        # The library comes from several distributions: xgboost, xgboost-cpu.
        needed = environment.distributions({"xgboost"}) or ("xgboost",)
        if not isinstance(model, xgboost.Booster):
            needed += ("scikit-learn",)
        return Saved({"python_function": function, "xgboost": entry}, needed)

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Boosted:
        try:
            import xgboost
        except ImportError as error:
            raise MissingFramework(self.name, "xgboost") from error
        named = str(package.flavors.get(self.name, {}).get("model_class", "xgboost.core.Booster"))
        root, _, name = named.rpartition(".")
        kind = getattr(xgboost, name, None) if root.partition(".")[0] == "xgboost" else None
        if not (isinstance(kind, type) and issubclass(kind, (xgboost.Booster, xgboost.XGBModel))):
            raise PackageError("xgboost.model_class", f"{named!r} is no class of XGBoost's models")
        model = kind()
        model.load_model(package.native_data(self.name))
        if threads is not None:
            booster = model if isinstance(model, xgboost.Booster) else model.get_booster()
            booster.set_param({"nthread": threads})
        return Boosted(model, xgboost)


class Boosted:
    """A loaded booster or model. Params that its `predict` takes are handed to it, as MLflow does."""

    merges = True

    def __init__(self, model: Any, xgboost: Any) -> None:
        self.model = model
        self._matrix = xgboost.DMatrix if isinstance(model, xgboost.Booster) else None
        self._known = set(inspect.signature(model.predict).parameters)

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        data = batches.native(batch)
        given = {name: value for name, value in params.items() if name in self._known}
        return self.model.predict(data if self._matrix is None else self._matrix(data), **given)
