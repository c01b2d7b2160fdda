"""A loaded model, and the three verbs around it: save, load, open.

Python users call `save_model` and `load_model`. Runners call `open_model`: they have already read and
verified the package, and the gateway enforces inputs. Must not know the gateway.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loaders import batch as batches
from loaders import environment as environments
from loaders import example as examples
from loaders import flavors, keywords, proof, recorded
from loaders import package as packages
from loaders.output import check_size
from loaders.spelling import counted
from loaders.worker.imports import Imports

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.enforcement import Enforced
    from loaders.environment import Mismatch
    from loaders.flavors.base import Flavor, Predictor
    from loaders.package import Package
    from loaders.signature import Signature

Enforcement = Literal["strict", "warn", "mlflow"]


class Model:
    """A model in memory. Only one thread at a time may call it."""

    def __init__(
        self,
        package: Package,
        flavor: Flavor,
        predictor: Predictor,
        imports: Imports,
        enforcement: Enforcement,
    ) -> None:
        self.package = package
        #: The signature of its package, as wide as the model itself; of a bare file what it states itself.
        self.signature = package.signature
        if package.signature is not None:
            self.signature = package.signature.widened(getattr(predictor, "declared", {}))
        elif package.bare is not None:
            self.signature = _stated(predictor)
        self.flavor = flavor
        self._predictor = predictor
        self._imports = imports
        self._enforcement = enforcement
        self.max_answer: int | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        return self.package.metadata

    @property
    def environment(self) -> list[Mismatch]:
        """The differences between this environment and the one in which the model was saved."""
        return environments.check(self.package)

    @property
    def merges(self) -> bool:
        """Whether rows of several requests may share a call (`flavors/base.py`, sentence 7)."""
        return self._predictor.merges

    @property
    def known(self) -> dict[str, Any]:
        """Values that the model knows, by column, for those that take no others: what a made-up row needs.
        Empty where the flavor does not tell."""
        return dict(getattr(self._predictor, "known", {}))

    @property
    def accepted(self) -> Signature | None:
        """The signature if it is another than that of the package, else None."""
        return None if self.signature == self.package.signature else self.signature

    @property
    def input_example(self) -> Any:
        """The saved input example in the form that the model receives (a frame, array, dict or value); None
        without one. Raises InvalidInput if it does not fit the signature."""
        raw, _ = self.package.example_input()
        if raw is None:
            return None
        from loaders.enforcement import enforce

        enforced = enforce(self.signature, raw, None, self._enforcement, type_hints=self.package.type_hints)
        return batches.native(enforced.batch)

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Enforces the signature as the server does, then returns the framework's own result.

        `data`: a frame, series, array, dict of arrays, sparse matrix, or JSON value. Ignored columns and
        unknown params are warnings. Raises InvalidInput, and the exceptions of the model.
        """
        from loaders.enforcement import RawInput, enforce

        raw = RawInput("python", data)
        enforced = enforce(self.signature, raw, params, self._enforcement, type_hints=self.package.type_hints)
        for text in enforced.warnings:
            warnings.warn(text, stacklevel=2)
        return self._ask(enforced.batch, enforced.params)

    def run(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        """Answers an enforced batch with a batch. Raises the exceptions of the model, and AnswerTooLarge."""
        answer = self._ask(batch, params)
        if self.max_answer is not None:
            check_size(answer, self.max_answer)
        return batches.from_result(answer, batch.rows)

    def changed_answer(self) -> list[str]:
        """The places where its answer to its own example differs from the recorded one. Empty if they agree
        or nothing is recorded. Calls the model."""
        example, params = self.package.example_input()
        try:
            known = recorded.read(self.package)
            if known is None or example is None:
                return []
            from loaders.enforcement import enforce

            enforced = enforce(self.signature, example, params, type_hints=self.package.type_hints)
            differing = recorded.differences(known, self.run(enforced.batch, enforced.params))
        except Exception as error:  # noqa: BLE001 - whatever it is: it did not answer as recorded
            return [f"the model does not answer its own example here: {type(error).__name__}: {error}"]
        return [recorded.told(differing)] if differing else []

    def close(self) -> None:
        """Forgets the modules of the package. A closed model must not be called."""
        self._imports.close()

    def _ask(self, batch: Batch, params: Mapping[str, Any]) -> Any:
        with self._imports.turn():
            return self._predictor.predict(batch, params)

    def __repr__(self) -> str:
        return f"<Model {self.package.path.name}: {self.flavor.name}>"


def _stated(predictor: Predictor) -> Signature | None:
    try:
        found: Signature | None = getattr(predictor, "stated", lambda: None)()
        # As its package's would be: written and read once.
        return None if found is None else type(found).from_json(found.to_json())
    except Exception:  # noqa: BLE001 - a file may hold any object, with any names
        return None


def open_model(
    package: Package,
    config: Mapping[str, Any],
    *,
    threads: int | None = None,
    private: bool = False,
    enforcement: Enforcement = "strict",
) -> Model:
    """Loads the model of a package that has been read and verified.

    `config` overrides entries of the package's model config (see `configured`). `threads`: how many threads
    one prediction may use, for frameworks that fix this at load. `private`: this process serves nothing else,
    so the package's modules may stay importable. Raises PackageError, MissingFramework, and the exceptions of
    the framework and of the package's code.
    """
    flavor = flavors.find(package)
    merged, dropped = configured(package, config)
    if dropped:
        warnings.warn(
            f"ignored model_config keys that the model does not declare: {', '.join(dropped)}", stacklevel=2
        )
    stand_ins = None
    if flavor.mlflow_names:
        from loaders.compat import standin

        stand_ins = standin.modules if standin.absent() else None
    # If only data is trusted, a module in the package must not replace a module of the framework.
    code = package.code if flavor.trust == "code" else None
    imports = Imports(code, stand_ins, private=private)
    with imports.turn():
        predictor = flavor.load(package, merged, threads)
    return Model(package, flavor, predictor, imports, enforcement)


def load_model(
    path: str | Path, model_config: Mapping[str, Any] | None = None, enforcement: Enforcement = "strict"
) -> Model:
    """Loads a model directory written by `save_model` or by MLflow 1 to 3, without mlflow.

    `model_config` overrides MLflow's environment variables. Executes the package's code, as unpickling does:
    load only packages that you trust. Raises PackageError, MissingFramework, and the exceptions of the
    framework. Warns if a stateless model's answer to its own example differs from the recorded answer.
    """
    config = {**environment_config(os.environ), **(model_config or {})}
    model = open_model(packages.read(path), config, enforcement=enforcement)
    # Only if a call leaves no state behind, and the model has the config with which it answered.
    if model.flavor.stateless and not config:
        for text in model.changed_answer():
            warnings.warn(text, stacklevel=2)
    return model


def configured(package: Package, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The package's model config with overrides, and the names of the overrides that were dropped because the
    package does not declare them. The merge is shallow, as in MLflow."""
    declared = package.config
    taken = {key: value for key, value in overrides.items() if key in declared}
    return {**declared, **taken}, sorted(key for key in overrides if key not in declared)


def environment_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """The model config in MLflow's environment variables: `MLFLOW_PYFUNC_INFERENCE_CONFIG`, overridden by
    `SERVING_MODEL_CONFIG`, each a JSON object. Raises ValueError."""
    merged: dict[str, Any] = {}
    for name in ("MLFLOW_PYFUNC_INFERENCE_CONFIG", "SERVING_MODEL_CONFIG"):
        if text := environ.get(name):
            try:
                given = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{name} is not JSON: {error}") from None
            if not isinstance(given, dict):
                raise ValueError(f"{name} is not a JSON object")
            merged.update(given)
    return merged


def save_model(
    model: Any,
    path: str | Path,
    signature: Signature | None = None,
    input_example: Any = None,
    metadata: Mapping[str, Any] | None = None,
    requirements: str | Path | Iterable[str] | None = None,
    code_paths: Iterable[str | Path] | None = None,
    params: Mapping[str, Any] | None = None,
    flavor: str | None = None,
    verify: bool = True,
    **options: Any,
) -> Package:
    """Saves a live model as a directory that loads here and in MLflow, and returns its package.

    `input_example`: data that the model can predict, saved with it. The signature is inferred from the
    example and the answer to it, unless given. Without both it is the signature that the model itself
    declares, as ONNX graphs do. A tuple (data, params) is an example with params. `params`: the inference
    params that the model accepts, with their defaults. `requirements`: pip requirements in place of the
    inferred ones. `code_paths`: modules and directories that the model imports, copied to `code/`. `options`
    belong to the flavor. MLflow's names for all of these work too (`keywords`).

    `verify`: a new process loads the saved package once, and its answer to the example is compared with that
    of `model` itself, which predicts twice. The answer is recorded in the package. `verify=False` skips this,
    for models that do not fit into memory twice.

    The directory appears complete or not at all. Raises FileExistsError if it exists and is not empty,
    InvalidInput if the example does not fit a given signature, ValueError with the model's exception if it
    does not answer the example, AnswersDiffer and TrialFailed (both ValueError) from the verification,
    TypeError for an unknown option, and what saving raises. Warns if the number of answers differs from the
    number of rows, which for most models is a mistake in the example.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} already exists and is not an empty directory: give another path, or remove it"
        )
    chosen = flavors.for_model(model) if flavor is None else flavors.get(flavor)
    taken = {"requirements": requirements, "code_paths": code_paths}
    options = keywords.ours(options, taken)
    signature = keywords.signature(signature)
    requirements = keywords.requirements(options.pop("requirements", requirements))
    code_paths = options.pop("code_paths", code_paths)
    if (conda := options.pop("conda_env", None)) is not None:
        if requirements is not None:
            raise TypeError("conda_env and requirements are both given: give only one of them")
        requirements = keywords.of_conda(conda)
    extra = keywords.requirements(options.pop("extra_pip_requirements", None)) or []
    keywords.check(options, chosen.name, chosen.options)
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shipped = _ship(code_paths or (), directory / "code")
        saved = chosen.save(model, directory, {**options, "shipped": shipped})
        entries = {name: dict(entry) for name, entry in saved.flavors.items()}
        function = entries["python_function"]
        if shipped:
            function["code"] = "code"
        needed = list(saved.requirements) if requirements is None else list(requirements)
        example, originals = None, proof.Originals()
        if input_example is not None:
            has_params = isinstance(input_example, tuple) and len(input_example) == 2
            data, given = input_example if has_params else (input_example, None)
            if chosen.lists_are_arrays and not _takes_frames(signature):
                data = _as_array(data)
            example = examples.write(directory, data, given)
            draft = packages.write(directory, entries, metadata=metadata)
            signature, enforced = _answered(draft, signature, data, given, params, saved.signature)
            if verify:
                originals = proof.ask(model, chosen.name, options, data, enforced)
        else:
            signature = saved.signature if signature is None else signature
            if params:
                signature = _with_params(signature, params)
        if requirements is None and _takes_frames(signature):
            needed.append("pandas")
        needed += extra
        environment = environments.capture(needed)
        function["env"] = environments.write(directory, environment)
        function["python_version"] = environment.python
        package = packages.write(directory, entries, signature=signature, metadata=metadata, example=example)
        if verify:
            proof.verify(package, originals)
        _discard_bytecode(directory)
        directory.chmod(_mode(directory))
        if target.exists():
            target.rmdir()
        directory.rename(target)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return packages.read(target)


def _answered(
    draft: Package,
    signature: Signature | None,
    data: Any,
    given: Any,
    params: Mapping[str, Any] | None,
    declared: Signature | None,
) -> tuple[Signature, Enforced]:
    """The signature of a saved model, from an example and the answer of the reloaded model; and the example
    in the form that the model receives."""
    from loaders.enforcement import RawInput, enforce
    from loaders.inferred import infer_signature
    from loaders.signature import Signature, TensorSpec

    if signature is None and declared is not None and (fitting := _as_declared(declared, data)) is not None:
        signature, data = declared, fitting
        if not isinstance(data, Mapping):
            # An array without a name stays an array in the signature.
            (only,) = (spec for spec in declared.inputs or () if isinstance(spec, TensorSpec))
            signature = Signature((replace(only, name=None),), declared.outputs, declared.params)
    known = infer_signature(data, None, params) if signature is None else signature
    if signature is not None and params:
        known = _with_params(signature, params)
    enforced = enforce(known, RawInput("python", data), given)
    model = open_model(draft, {})
    try:
        answer = model._ask(enforced.batch, enforced.params)
    except Exception as error:  # any exception of the model, with advice for the caller
        raise ValueError(
            f"the model does not answer its input_example: {type(error).__name__}: {error} "
            "(the example must have the columns or dimensions that the model expects; "
            "for lists of texts or numbers try numpy.array(...))"
        ) from error
    finally:
        model.close()
    asked, answered = enforced.batch.rows, _rows(answer)
    if asked is not None and asked > 1 and answered is not None and answered != asked:
        warnings.warn(
            f"the model answers its input_example of {counted(asked, 'row')} with "
            f"{counted(answered, 'row')}: check that the example has the form that the model expects. A "
            "frame with one column, for example, is not a list of texts (try numpy.array(...))",
            stacklevel=3,
        )
    if signature is not None:
        return known, enforced
    return infer_signature(data, _as_column(answer, known), params), enforced


def _as_array(data: Any) -> Any:
    """A list of numbers or of texts, and of such lists, as an array; everything else as it is."""
    from loaders.enforcement.untyped import regular

    array = regular(data) if isinstance(data, (list, tuple)) and len(data) else None
    return data if array is None else array


def _as_column(answer: Any, signature: Signature) -> Any:
    """The answer in the form that MLflow declares: if the input has columns, an array with one value per row
    is a column too. So a version logged with one library can replace one logged with the other."""
    from loaders.signature import TensorSpec

    columns = signature.inputs is not None and not isinstance(signature.inputs[0], TensorSpec)
    if not columns or not isinstance(answer, np.ndarray) or answer.ndim != 1:
        return answer
    try:
        import pandas as pd
    except ImportError:
        return answer
    return pd.Series(answer)


def _as_declared(declared: Signature, data: Any) -> Any:
    """An example of arrays, with the dtypes that the model itself declares. None for an example of another
    kind: a table is described by its own columns. Raises Unsuitable if it does not fit."""
    from loaders.flavors import tensors
    from loaders.signature import TensorSpec

    specs = [spec for spec in declared.inputs or () if isinstance(spec, TensorSpec)]
    arrays = data if isinstance(data, Mapping) else {spec.name: data for spec in specs[:1]}
    if not specs or not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        return None
    if not isinstance(data, Mapping) and len(specs) > 1:
        return None
    dtypes = {spec.name: spec.dtype for spec in specs}
    cast = {
        name: tensors.cast(array, dtypes[name], f"the input {name}") if name in dtypes else array
        for name, array in arrays.items()
    }
    return cast if isinstance(data, Mapping) else cast[specs[0].name]


def _rows(answer: Any) -> int | None:
    """Returns an answer's number of rows; None if it is not a table, array or list."""
    batch = batches.from_result(answer, None)
    if isinstance(batch, batches.Value):
        return len(batch.value) if isinstance(batch.value, list) else None
    return batch.rows


def _with_params(signature: Signature | None, params: Mapping[str, Any]) -> Signature:
    from loaders.inferred import infer_signature
    from loaders.signature import Signature

    declared = infer_signature(None, None, params).params
    return (
        Signature(None, None, declared)
        if signature is None
        else Signature(signature.inputs, signature.outputs, declared)
    )


def _takes_frames(signature: Signature | None) -> bool:
    from loaders.signature import ColSpec

    return signature is not None and any(isinstance(spec, ColSpec) for spec in signature.inputs or ())


def _ship(paths: Iterable[str | Path], code: Path) -> tuple[str, ...]:
    """Copies modules and directories into `code/`; returns the top-level names they provide. Raises
    FileNotFoundError, and TypeError for one path in the place of a list."""
    if isinstance(paths, (str, Path)):
        raise TypeError(f"code_paths is a list of paths: write [{str(paths)!r}]")
    names = []
    for item in paths:
        source = Path(item).resolve()
        if not source.exists():
            raise FileNotFoundError(f"code_paths: {item} does not exist: give .py files and directories")
        code.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, code / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, code / source.name)
        names.append(source.name.partition(".")[0])
    return tuple(names)


def _discard_bytecode(directory: Path) -> None:
    for cache in list(directory.rglob("__pycache__")):
        shutil.rmtree(cache)


def _mode(place: Path) -> int:
    """The mode of a new directory. `os.umask` tells it only by changing it, for all threads."""
    sample = place / ".mode"
    sample.mkdir()
    mode = sample.stat().st_mode & 0o777
    sample.rmdir()
    return mode
