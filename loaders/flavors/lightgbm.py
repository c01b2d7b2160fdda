"""LightGBM boosters in LightGBM's text format, and its scikit-learn style models as pickles."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import environment, pickling
from loaders.compat.pythons import zipped
from loaders.flavors import categories, stated
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.schema import ColSpec, Scalar

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.schema import Type
    from loaders.signature import Signature

BOOSTER: Final = "lightgbm.basic.Booster"


class LightGBM:
    name = "lightgbm"
    loader_modules = ("mlflow.lightgbm",)
    trust: Trust = "code"
    memory_factor = 4.0
    mlflow_names = False
    stateless = True
    lists_are_arrays = True
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        lightgbm = sys.modules.get("lightgbm")
        return lightgbm is not None and isinstance(model, (lightgbm.Booster, lightgbm.LGBMModel))

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        import lightgbm

        entry = {"lgb_version": lightgbm.__version__}
        if isinstance(model, lightgbm.Booster):
            entry.update({"data": "model.lgb", "model_class": BOOSTER})
            model.save_model(str(directory / "model.lgb"))
            needed: tuple[str, ...] = ("lightgbm",)
        else:
            kind = f"{type(model).__module__}.{type(model).__qualname__}"
            entry.update({"data": "model.pkl", "model_class": kind, "serialization_format": "cloudpickle"})
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
        if package.flavors.get(self.name, {}).get("model_class", BOOSTER) == BOOSTER:
            model = lightgbm.Booster(model_file=str(file))
            return Boosted(model, threads, _categories(model, package))
        model = pickling.load(package, self.name, file, "cloudpickle")
        return Boosted(model, threads, _categories(model.booster_, package))


class Boosted:
    """A loaded booster or model."""

    merges = True

    def __init__(
        self, model: Any, threads: int | None, categorical: Mapping[int, Sequence[Any] | None]
    ) -> None:
        self.model = model
        self._categories = categorical
        self._options = {} if threads is None else {"num_threads": threads}

    def stated(self) -> Signature | None:
        """Returns the features' names (a booster trained on arrays has none) and types (a booster keeps only
        those of categories)."""
        booster = getattr(self.model, "booster_", self.model)
        names = [str(name) for name in booster.feature_name()]
        if names == [f"Column_{i}" for i in range(len(names))]:
            return None if self._categories else stated.matrix(len(names))
        if booster.pandas_categorical and not self._categories:
            return None  # it is unknown which columns are categorical
        kinds: list[Type] = [Scalar.double] * len(names)
        for i, known in self._categories.items():
            kinds[i] = stated.of_categories(known)
        return stated.columns(names, kinds)

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        return self.model.predict(categories.native(batch, self._categories), **self._options)


def _categories(booster: Any, package: Package) -> dict[int, Sequence[Any] | None]:
    """Returns the categories of the columns with pandas' category type, by position. A booster keeps them in
    order, without the columns: the features' ranges identify a used column, the signature an unused one."""
    known = booster.pandas_categorical
    if not known:
        return {}
    head = booster.model_to_string(num_iteration=1).partition("feature_infos=")[2].partition("\n")[0]
    places = {i for i, info in enumerate(head.split(" ")) if info != "none" and not info.startswith("[")}
    inputs = package.signature.inputs if package.signature is not None else None
    if len(places) < len(known):
        places |= {
            i
            for i, spec in enumerate(inputs or ())
            if isinstance(spec, ColSpec) and spec.type is Scalar.string
        }
    return dict(zipped(sorted(places), known)) if len(places) == len(known) else {}
