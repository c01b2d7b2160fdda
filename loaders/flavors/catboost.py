"""CatBoost models in CatBoost's own formats. Loading executes nothing from the package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders.flavors import stated
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.package import PackageError
from loaders.schema import AnyType, Scalar

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.schema import Type
    from loaders.signature import Signature

_FILE: Final = "model.cb"
_KINDS: Final = ("CatBoost", "CatBoostClassifier", "CatBoostRegressor", "CatBoostRanker")
_FORMATS: Final = ("cbm", "json", "onnx", "coreml")


class CatBoost:
    name = "catboost"
    loader_modules = ("mlflow.catboost",)
    trust: Trust = "data"
    memory_factor = 4.0
    mlflow_names = False
    stateless = True
    lists_are_arrays = True
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        catboost = sys.modules.get("catboost")
        return catboost is not None and isinstance(model, catboost.CatBoost)

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        import catboost

        model.save_model(str(directory / _FILE), format="cbm")
        kind = next(c.__name__ for c in type(model).__mro__ if c.__name__ in _KINDS)
        entry = {
            "data": _FILE,
            "model_type": kind,
            "save_format": "cbm",
            "catboost_version": catboost.__version__,
        }
        function = {"loader_module": "mlflow.catboost", "data": _FILE}
        return Saved({"python_function": function, "catboost": entry}, ("catboost",))

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Boosted:
        try:
            import catboost
        except ImportError as error:
            raise MissingFramework(self.name, "catboost") from error
        entry = package.flavors.get(self.name, {})
        kind, form = entry.get("model_type", "CatBoost"), entry.get("save_format", "cbm")
        for key, value, known in (("model_type", kind, _KINDS), ("save_format", form, _FORMATS)):
            if value not in known:
                raise PackageError(f"catboost.{key}", f"{value!r} is unknown; known: {', '.join(known)}")
        model = getattr(catboost, kind)()
        file = str(package.native_data(self.name))
        model.load_model(file, form)
        if package.bare and "class_params" in model.get_metadata():
            model = catboost.CatBoostClassifier()  # the class that wrote it; its answers are classes
            model.load_model(file, form)
        return Boosted(model, threads)


class Boosted:
    """A loaded model."""

    merges = True

    def __init__(self, model: Any, threads: int | None) -> None:
        self.model = model
        self._options = {} if threads is None else {"thread_count": threads}

    def stated(self) -> Signature | None:
        """Returns the names of its features, with text columns for text features."""
        names = [str(name) for name in self.model.feature_names_ or ()]
        texts = {*self.model.get_text_feature_indices()}
        others = {*self.model.get_cat_feature_indices(), *self.model.get_embedding_feature_indices()}
        if not texts and not others and names == [str(i) for i in range(len(names))]:
            return stated.matrix(len(names))
        kinds: list[Type] = [
            Scalar.string if i in texts else AnyType() if i in others else Scalar.double
            for i in range(len(names))
        ]
        return stated.columns(names, kinds)

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        return self.model.predict(batches.native(batch), **self._options)
