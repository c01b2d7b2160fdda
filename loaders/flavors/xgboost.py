"""XGBoost boosters and scikit-learn style models, in XGBoost's own formats (ubj, json, the old binary).

Loading executes nothing from the package: the class that it names must be XGBoost's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import environment
from loaders.flavors import categories, stated
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.package import PackageError
from loaders.schema import AnyType, Scalar

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.schema import Type
    from loaders.signature import Signature

_FILE: Final = "model.ubj"
#: The types of features that are not numbers. A feature of integers accepts any number.
_TYPES: Final[Mapping[str, Type]] = {"i": Scalar.boolean, "c": AnyType()}


class XGBoost:
    name = "xgboost"
    loader_modules = ("mlflow.xgboost",)
    trust: Trust = "data"
    memory_factor = 4.0
    mlflow_names = False
    stateless = True
    lists_are_arrays = True
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        xgboost = sys.modules.get("xgboost")
        return xgboost is not None and isinstance(model, (xgboost.Booster, xgboost.XGBModel))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """Saves the model. A class derived from one of XGBoost's is saved as that class."""
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
        # Several distributions contain the library: xgboost, xgboost-cpu.
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
            raise PackageError("xgboost.model_class", f"{named!r} is not a model class of XGBoost")
        model = kind()
        file = package.native_data(self.name)
        # XGBoost guesses the format of a file from its ending, but reads it from bytes.
        model.load_model(bytearray(file.read_bytes()) if file.suffix.lower() == ".bst" else file)
        booster = model if isinstance(model, xgboost.Booster) else model.get_booster()
        if threads is not None:
            booster.set_param({"nthread": threads})
        return Boosted(model, xgboost, _categories(booster))


class Boosted:
    """A loaded booster or model. Passes the params that its `predict` accepts, as MLflow does."""

    merges = True

    def __init__(self, model: Any, xgboost: Any, categorical: Mapping[int, Sequence[Any] | None]) -> None:
        self.model = model
        self._categories = categorical
        self._matrix = xgboost.DMatrix if isinstance(model, xgboost.Booster) else None
        self._known = set(inspect.signature(model.predict).parameters)

    def stated(self) -> Signature | None:
        """Returns the names and types of its features, if they had names in training."""
        booster = self.model if self._matrix is not None else self.model.get_booster()
        if booster.feature_names is None:
            return None if self._categories else stated.matrix(booster.num_features())
        kinds: list[Type] = [_TYPES.get(kind, Scalar.double) for kind in booster.feature_types or ()]
        for i, known in self._categories.items():
            kinds[i] = stated.of_categories(known)
        return stated.columns(booster.feature_names, kinds or [Scalar.double] * len(booster.feature_names))

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        data = categories.native(batch, self._categories)
        given = {name: value for name, value in params.items() if name in self._known}
        if self._matrix is not None:
            data = self._matrix(data, enable_categorical=bool(self._categories))
        return self.model.predict(data, **given)


def _categories(booster: Any) -> dict[int, Sequence[Any] | None]:
    """Returns the categories of the categorical columns, by position. XGBoost 3.1 and later keeps them for
    frames, but not for arrays of codes. It returns them if pyarrow is installed, and maps the categories of
    the input to its own."""
    places = [i for i, kind in enumerate(booster.feature_types or ()) if kind == "c"]
    if not places or not hasattr(booster, "get_categories"):
        return {}
    try:
        kept = booster.get_categories(export_to_arrow=True).to_arrow()
    except ImportError:
        return dict.fromkeys(places)
    return {i: kept[i][1].to_pylist() for i in places if kept[i][1] is not None}
