"""Scikit-learn estimators and pipelines: pickle, cloudpickle and skops files.

The `trusted` list of a skops file comes with the package, so it gives no protection: this flavor's trust is
"code" for every format.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loaders import batch as batches
from loaders import environment, pickling
from loaders.batch import Columns, Tensors, Value
from loaders.compat.pythons import zipped
from loaders.flavors import stated
from loaders.flavors.base import MissingFramework, Saved, Trust
from loaders.flavors.failures import Unsuitable
from loaders.flavors.warned import recorded
from loaders.package import PackageError
from loaders.schema import AnyType, ColSpec, Scalar

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.package import Package
    from loaders.schema import Type
    from loaders.signature import Signature

_TEXTS: Final = 'send {"inputs": ["…", "…"]}'
_NO_TABLE: Final = f"the model takes a list of texts, not a table: {_TEXTS}"
_NO_TEXTS: Final = f"the model takes a list that contains only texts: {_TEXTS}"
_LOG_AGAIN: Final = (
    "; its signature declares a table: log it again with numpy.array of texts as the input example"
)
_MAX_PARTS: Final = 1_000
_SAME: Final[set[tuple[type, str]]] = set()
"""The classes, with a method, of which one gave an array and a frame the same answer in this process."""
_PARAMS: Final[dict[type, tuple[str, ...]]] = {}
_SAVED: Final = ("pickle", "cloudpickle", "skops")
_METHODS: Final = ("predict", "predict_proba", "predict_log_proba", "predict_joint_log_proba", "score")


class Sklearn:
    name = "sklearn"
    loader_modules = ("mlflow.sklearn",)
    trust: Trust = "code"
    memory_factor = 2.0
    mlflow_names = False
    stateless = True
    lists_are_arrays = True
    options = (
        "serialization_format",
        "predict_fn",
    )

    def accepts(self, model: object) -> bool:
        base = sys.modules.get("sklearn.base")
        return base is not None and isinstance(model, base.BaseEstimator) and hasattr(model, "predict")

    def save(self, model: Any, directory: Path, options: Mapping[str, Any]) -> Saved:
        """Options: `serialization_format` (cloudpickle, pickle or skops), `predict_fn`."""
        import sklearn

        form = options.get("serialization_format", "cloudpickle")
        predict_fn = options.get("predict_fn", "predict")
        if form not in _SAVED:
            known = ", ".join(_SAVED)
            raise ValueError(f"the serialization format {form!r} is unknown; known: {known}")
        if predict_fn not in _METHODS or not hasattr(model, predict_fn):
            raise ValueError(f"a {type(model).__name__} cannot predict with {predict_fn!r}")
        file = "model.skops" if form == "skops" else "model.pkl"
        needed: tuple[str, ...] = ("scikit-learn",)
        entry = {"pickled_model": file, "serialization_format": form, "sklearn_version": sklearn.__version__}
        if form == "skops":
            skops = pickling.skops(self.name)
            skops.dump(model, directory / file)
            entry["skops_trusted_types"] = skops.get_untrusted_types(file=directory / file)
            needed += ("skops",)
        elif form == "pickle":
            with (directory / file).open("wb") as handle:
                pickle.dump(model, handle)
        else:
            seen = pickling.dump(model, directory / file, options.get("shipped", ()))
            needed += ("cloudpickle", *environment.distributions(seen))
        function = {"loader_module": "mlflow.sklearn", "model_path": file, "predict_fn": predict_fn}
        return Saved({"python_function": function, "sklearn": entry}, needed)

    def load(self, package: Package, config: Mapping[str, Any], threads: int | None = None) -> Estimator:
        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise MissingFramework(self.name, "scikit-learn") from error
        entry = package.flavors.get(self.name, {})
        predict_fn = package.text("predict_fn") or "predict"
        if predict_fn not in _METHODS:
            raise PackageError("python_function.predict_fn", f"{predict_fn!r} is not a prediction method")
        file = package.data
        if not file.is_file():
            # MLflow 1 named the file only in the flavor's own entry, or used the default name.
            file = package.inside(package.text("model_path") or str(entry.get("pickled_model", "model.pkl")))
        model = pickling.load(package, self.name, file, "pickle")
        if not hasattr(model, predict_fn):
            raise PackageError("python_function.predict_fn", f"a {type(model).__name__} has no {predict_fn}")
        inputs = package.signature.inputs if package.signature is not None else None
        return Estimator(model, predict_fn, any(isinstance(spec, ColSpec) for spec in inputs or ()))


class Estimator:
    """A loaded estimator and the method to call. `score` gives one answer for all rows.

    Tables become frames, as in MLflow. If an estimator only checks a frame's column names and converts it to
    an array, it receives the array instead, because that conversion takes most of the time of a small call.
    """

    def __init__(self, model: Any, method: str, declares_table: bool = False) -> None:
        self.model = model
        self._declares_table = declares_table
        self.merges = method != "score"
        self._predict = getattr(model, method)
        self._takes_texts = self.merges and self._iterates()
        self._gap = None if _knows_none(model) else math.nan
        self._names: list[str] | None = None
        plain = _without_names(model)
        if plain is not None and self.merges:
            self._predict_array = getattr(plain, method)
            names = list(model.feature_names_in_)
            # A pack holds many of a class. If all that was fitted is numbers and texts, the class decides.
            kind = (type(model), method) if all(map(_is_plain, vars(model).values())) else None
            if kind in _SAME or self._same_of_arrays(names):
                self._names = names
                if kind is not None:
                    _SAME.add(kind)

    @property
    def known(self) -> dict[str, Any]:
        return known_values(self.model)

    def stated(self) -> Signature | None:
        """Returns columns of numbers, by the names or the width of the fit, if the estimator answers numbers.
        A category known to an encoder gives the type of its column; the types of other columns are then
        unknown."""
        names = [str(name) for name in getattr(self.model, "feature_names_in_", ())]
        width = getattr(self.model, "n_features_in_", None)
        if self._takes_texts or not (names or isinstance(width, int)):
            return None
        numbers = self._answers_numbers(names, len(names) or int(width or 0))
        if not names:
            return stated.matrix(int(width or 0)) if numbers else None
        known = self.known
        kinds: list[Type] = []
        for name in names:
            if isinstance(known.get(name), str):
                kinds.append(Scalar.string)
            else:
                kinds.append(Scalar.double if numbers else AnyType())
        return stated.columns(names, kinds)

    def _answers_numbers(self, names: list[str], width: int) -> bool:
        """Returns True if it answers two made-up rows of numbers and known categories."""
        rows = np.outer([0.5, 1.0], np.linspace(0.5, 1.5, width))
        data: Any = rows
        if names:
            known = self.known
            arrays = {
                name: np.array([known[name]] * 2, dtype=object) if isinstance(known.get(name), str) else row
                for name, row in zipped(names, rows.T)
            }
            data = batches.native(Columns(arrays, 2))
        try:
            with recorded():
                self._predict(data)
        except Exception:  # noqa: BLE001 - then its columns are of another type
            return False
        return True

    def predict(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        if self._takes_texts:
            return self._of_texts(batch)
        if self._names is not None and isinstance(batch, Columns) and list(batch.arrays) == self._names:
            arrays = list(batch.arrays.values())
            # Only for columns of the same type: an encoder reads column by column, and large integers would
            # lose digits if they became floats because of other columns.
            kinds = {array.dtype for array in arrays if type(array) is np.ndarray}
            if len(kinds) == 1 and arrays[0].dtype.kind in "fi" and set(map(type, arrays)) == {np.ndarray}:
                return self._predict_array(np.array(arrays).T)  # pandas' memory layout
        return self._predict(batches.native(batch, gap=self._gap))

    def _of_texts(self, batch: Batch) -> Any:
        # Such a model would read the names of a mapping, too.
        if isinstance(batch, Columns) or _is_named(batch):
            raise Unsuitable(_NO_TABLE + (_LOG_AGAIN if self._declares_table else ""))
        data = batches.native(batch)
        try:
            return self._predict(data)
        except Exception as error:
            # A custom model may also accept lists of words.
            if _are_texts(data):
                raise
            raise Unsuitable(_NO_TEXTS) from error

    def _iterates(self) -> bool:
        """Returns True if the model takes a list of texts, for example a pipeline that begins with a
        vectorizer. Such a model reads a frame as the list of its column names, so for a frame of two made-up
        rows with one column it gives one answer."""
        if hasattr(self.model, "n_features_in_"):
            return False
        rows = np.array(["made", "up"], dtype=object)
        table = Columns({"text": rows}, len(rows), None, frozenset(("text",)))
        try:
            with recorded():
                answer = self._predict(batches.native(table))
                return (np.shape(answer)[:1], np.shape(self._predict(rows))[:1]) == ((1,), (2,))
        except Exception:  # noqa: BLE001 - then it is another kind of model
            return False

    def _same_of_arrays(self, names: list[str]) -> bool:
        """Returns True if made-up rows get the same answer as an array and as a frame, without a warning."""
        rows = np.outer([0.0, 1.0, -0.5, 3.0], np.linspace(0.5, 1.5, len(names)))
        table = Columns(dict(zipped(names, rows.T)), len(rows))
        try:
            with recorded() as warned:
                of_frame = self._predict(batches.native(table))
                of_array = self._predict_array(rows.copy(order="F"))
        except Exception:  # noqa: BLE001 - it then gets frames, and the caller gets its error
            return False
        if warned or type(of_frame) is not np.ndarray or type(of_array) is not np.ndarray:
            return False
        return of_frame.dtype == of_array.dtype and np.array_equal(of_frame, of_array)


def _are_texts(data: Any) -> bool:
    if isinstance(data, np.ndarray):
        data = data.tolist()
    return isinstance(data, list) and len(data) > 0 and all(isinstance(text, (str, bytes)) for text in data)


def _is_named(batch: Batch) -> bool:
    if isinstance(batch, Tensors):
        return "" not in batch.arrays
    return isinstance(batch, Value) and isinstance(batch.value, dict)


def _knows_none(model: Any) -> bool:
    """Returns True if an encoder inside was fitted on a frame with None, not NaN, for missing values. Older
    pandas makes such frames from JSON or a database. For such an encoder NaN is an unknown category."""
    found = False
    left: list[Any] = [model]
    seen: set[int] = set()
    while left:
        part = left.pop()
        if id(part) in seen or len(seen) > _MAX_PARTS:
            continue
        seen.add(id(part))
        if isinstance(part, (list, tuple)):
            left += part[:_MAX_PARTS]
        elif isinstance(part, dict):
            left += list(part.values())[:_MAX_PARTS]
        elif isinstance(part, np.ndarray):
            continue
        elif hasattr(part, "get_params") and hasattr(part, "__dict__"):
            fitted = vars(part)
            categories_ = fitted.get("categories_")
            for categories in categories_ if isinstance(categories_, list) else ():
                kinds = {type(one) for one in categories[-2:]}  # missing values are last, None before NaN
                if float in kinds and categories[-1] != categories[-1]:
                    return False
                found = found or type(None) in kinds
            left += [value for name, value in fitted.items() if not name.startswith("_")]
    return found


def known_values(model: Any) -> dict[str, Any]:
    """Returns, by column, a category that an encoder inside was fitted on. It may refuse any other."""
    found: dict[str, Any] = {}
    left: list[tuple[Any, Any]] = [(model, None)]
    for _ in range(_MAX_PARTS):
        if not left:
            break
        part, columns = left.pop()
        named = getattr(part, "feature_names_in_", None)
        columns = columns if named is None else named
        kept = getattr(part, "categories_", None)
        if isinstance(kept, list) and columns is not None and len(kept) == len(columns):
            for column, categories in zip(columns, kept):
                first = np.asarray(categories)[:1].tolist()
                if first and isinstance(first[0], (str, int, float)) and first[0] == first[0]:
                    found[str(column)] = first[0]
        for _, fitted, chosen in getattr(part, "transformers_", ()):
            given = chosen if isinstance(chosen, (list, np.ndarray)) else [chosen]
            left.append((fitted, given if all(isinstance(name, str) for name in given) else None))
        left += [(step, columns) for _, step in getattr(part, "steps", ())]
        best = getattr(part, "best_estimator_", None)
        left += [] if best is None else [(best, columns)]
    return found


def _without_names(model: Any) -> Any | None:
    """Returns a shallow copy that accepts arrays although the estimator was fitted on a frame. None if the
    estimator may use a frame's columns: for all except scikit-learn's own estimators, and for those that
    contain other estimators."""
    from sklearn.pipeline import Pipeline

    if type(model).__module__.partition(".")[0] != "sklearn" or not hasattr(model, "feature_names_in_"):
        return None
    if type(model) is Pipeline:
        steps = [(name, step if isinstance(step, str) else _plain_step(step)) for name, step in model.steps]
        if any(step is None for _, step in steps):
            return None
        plain = copy.copy(model)
        plain.steps = steps
        return plain
    return _plain_step(model)


def _plain_step(estimator: Any) -> Any | None:
    if type(estimator).__module__.partition(".")[0] != "sklearn":
        return None
    if not all(_is_plain(getattr(estimator, name)) for name in _params(estimator)):
        return None
    plain = copy.copy(estimator)
    vars(plain).pop("feature_names_in_", None)
    return plain


def _params(estimator: Any) -> tuple[str, ...]:
    """The names of an estimator's parameters, which scikit-learn reads from a signature each time."""
    kind = type(estimator)
    if kind not in _PARAMS:
        _PARAMS[kind] = tuple(estimator.get_params(deep=False))
    return _PARAMS[kind]


def _is_plain(value: Any) -> bool:
    """Returns False for an estimator, a function, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(item is None or isinstance(item, (str, int, float)) for item in value)
    return not callable(value) and not hasattr(value, "fit")
