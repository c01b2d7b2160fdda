"""Fitted statsmodels results, in the pickles that statsmodels writes.

Time series models use MLflow's form of input: one row with the columns `start` and `end`. Requests are merged
only if the package's metadata has `gateway.batch: true`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loaders import batch as batches
from loaders.flavors.base import MERGES_KEY, MissingFramework, Saved, Trust

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package

_FILE: Final = "model.statsmodels"


class Statsmodels:
    name = "statsmodels"
    loader_modules = ("mlflow.statsmodels",)
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = False
    stateless = False
    lists_are_arrays = False
    options: tuple[str, ...] = ()

    def accepts(self, model: object) -> bool:
        results = sys.modules.get("statsmodels.base.model")
        wrapped = sys.modules.get("statsmodels.base.wrapper")
        return (results is not None and isinstance(model, results.Results)) or (
            wrapped is not None and isinstance(model, wrapped.ResultsWrapper)
        )

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        import statsmodels

        model.save(str(directory / _FILE))
        entry = {"data": _FILE, "statsmodels_version": statsmodels.__version__}
        function = {"loader_module": "mlflow.statsmodels", "data": _FILE}
        return Saved({"python_function": function, "statsmodels": entry}, ("statsmodels",))

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Results:
        try:
            from statsmodels.iolib.smpickle import load_pickle
            from statsmodels.tsa.base.tsa_model import TimeSeriesModel
        except ImportError as error:
            raise MissingFramework(self.name, "statsmodels") from error
        model = load_pickle(str(package.native_data(self.name)))
        series = isinstance(model.model, TimeSeriesModel)
        return Results(model, series, not series and package.metadata.get(MERGES_KEY) is True)


class Results:
    """Loaded results. `series` is True for a time series model."""

    def __init__(self, model: Any, series: bool, merges: bool) -> None:
        self.model = model
        self.merges = merges
        self._series = series

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        data = batches.native(batch)
        if not self._series:
            return self.model.predict(data)
        if len(data) != 1 or not {"start", "end"} <= set(data.columns):
            raise ValueError("a time series model takes one row with the columns start and end")
        return self.model.predict(start=data["start"].iloc[0], end=data["end"].iloc[0])
