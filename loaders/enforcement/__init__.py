"""Enforcement: turns raw input and a signature into a batch, or reports every violation.

The same rules apply to all forms of MLflow's scoring protocol: the same data gets the same result in every
form. `strict` refuses casts that change a value. `mlflow` casts and refuses as MLflow 3 does. `warn` answers
as `mlflow` does, and warns about the values that `strict` refuses.

Each mode is a module: `strict`, `mlflow`, and, for models without a schema, `untyped` and `type_hints`. This
module chooses the mode and limits nesting. Must not know HTTP, JSON text or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from loaders.batch import Batch, Columns, Tensors
from loaders.enforcement import named, whole
from loaders.enforcement import violations as v
from loaders.enforcement.mlflow import lenient
from loaders.enforcement.params import enforce_params
from loaders.enforcement.strict import plan_of, quick_doubles, strict
from loaders.enforcement.tables import CsvTable, too_large
from loaders.enforcement.type_hints import hinted
from loaders.enforcement.untyped import untyped
from loaders.enforcement.violations import (
    MAX_COUNTED,
    MAX_KEPT,
    Faults,
    InvalidInput,
    Violation,
    shown,
)
from loaders.enforcement.whole import Whole
from loaders.signature import Signature
from loaders.spelling import counted

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = [
    "CsvTable",
    "Enforced",
    "InvalidInput",
    "Mode",
    "RawInput",
    "Rules",
    "Violation",
    "Whole",
    "enforce",
]

Form = Literal[
    "dataframe_split",
    "dataframe_records",
    "inputs",
    "instances",
    "csv",
    "arrow",
    "tensors",
    "whole",
    "python",
]
Mode = Literal["strict", "warn", "mlflow"]
#: Signature, mode, whether the signature was made from type hints, whether rows are read by position.
Rules: TypeAlias = "tuple[Signature | None, Mode, bool, bool]"

BY_POSITION = "rows without column names were taken by position"

_SHOWN_NAMES = 20
_SCALARS = frozenset((bool, int, float, str, type(None)))
#: Maximum nesting of lists and objects where the signature sets no limit.
_MAX_DEPTH = 100


class RawInput(NamedTuple):
    """Parsed input whose types are not checked yet.

    The type of `data` depends on `form`. csv: a `CsvTable`. arrow: a pyarrow table or record batch. tensors:
    a dict of arrays by name (see `named`). whole: a `Whole`, a body that is one value. python: any object,
    for example a frame, series, array, sparse matrix, dict, list or scalar. Other forms: the parsed JSON
    value of the key with the form's name.
    """

    form: Form
    data: Any


class Enforced(NamedTuple):
    """The input for the model. `warnings` name ignored columns and params, but no params of tensors for a
    model that has none, and in the mode `warn` the violations of `strict`. `lenient` is True if `strict`
    would have refused the input."""

    batch: Batch
    params: dict[str, Any]
    warnings: tuple[str, ...] = ()
    lenient: bool = False


def enforce(
    signature: Signature | None,
    raw: RawInput,
    params: object = None,
    mode: Mode = "strict",
    *,
    type_hints: bool = False,
    positional: bool = False,
) -> Enforced:
    """Returns the checked batch and params for a model. Raises InvalidInput with all violations.

    `type_hints`: the signature comes from Python type hints (MLflow's `is_signature_from_type_hint`), and the
    model receives the list of `inputs` unchanged. `positional`: accepts `instances` that are rows without
    names, if each row has one value per column of the signature.
    """
    if params is None and signature is not None and not (signature.params or positional or type_hints):
        # Every mode gives the same result for numbers under the declared names.
        plan = plan_of(signature)
        if plan.doubles and (quick := quick_doubles(plan, raw.form, raw.data)) is not None:
            return Enforced(quick, {})
    faults = Faults()
    of_tensors = raw.form == "tensors"
    if raw.form == "whole":
        raw = RawInput("tensors", whole.tensors(signature, raw.data))
    specs = None if signature is None else signature.params
    checked: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()
    if specs or params is not None:
        checked, ignored = enforce_params(specs, params, faults)
        # Clients of tensor protocols send parameters of their own to any model.
        if ignored and (specs or not of_tensors):
            warnings = (_ignored("params", ignored),)
    if positional and signature is not None and (rows := _by_position(signature, raw)) is not None:
        raw = RawInput("instances", rows)
        warnings = (BY_POSITION, *warnings)
    of_params = faults.total
    extras: list[Any] = []
    batch: Batch | None
    is_lenient = False
    if signature is None or signature.inputs is None:
        batch = named.untyped(raw.data) if raw.form == "tensors" else untyped(raw.form, raw.data, faults)
    elif type_hints:
        batch = hinted(signature.inputs[0], raw.form, raw.data, faults)
    elif mode == "mlflow":
        batch, is_lenient = _as_mlflow(signature, raw, faults, extras)
    elif mode == "warn" and not faults.total:
        refused: list[str] = []
        try:
            batch, refused = _warned(signature, raw, extras)
        except InvalidInput as error:
            batch, faults.kept, faults.total = None, error.violations, error.total
        is_lenient = bool(refused)
        warnings = (*refused, *warnings)
    else:
        batch = strict(signature, raw.form, raw.data, faults, extras)
    if faults.total or batch is None:
        if positional and signature is not None and (uneven := _uneven(signature, raw)):
            raise InvalidInput(faults.kept[:of_params] + uneven, of_params + len(uneven))
        raise InvalidInput(faults.kept, faults.total)
    free = signature is None or signature.inputs is None or type_hints or plan_of(signature).open
    if free and _is_too_deep(_free(batch)):
        raise InvalidInput([Violation("data" if raw.form == "python" else raw.form, v.TOO_DEEP)])
    if checked and not _SCALARS.issuperset(map(type, checked.values())) and _is_too_deep(checked):
        raise InvalidInput([Violation("params", v.TOO_DEEP)])
    if extras:
        warnings = (_ignored("columns" if isinstance(batch, Columns) else "inputs", extras), *warnings)
    return Enforced(batch, checked, warnings, is_lenient)


def _by_position(signature: Signature, raw: RawInput) -> list[dict[Any, Any]] | None:
    """Returns the rows with the signature's names; None if they have names or another length."""
    plan, rows = plan_of(signature), raw.data
    if raw.form != "instances" or not plan.named or not plan.columns or not isinstance(rows, list):
        return None
    if not rows or not all(type(row) is list and len(row) == len(plan.names) for row in rows):
        return None
    return [dict(zip(plan.names, row, strict=True)) for row in rows]


def _uneven(signature: Signature, raw: RawInput) -> list[Violation]:
    """Returns the rows without names that have not one value per column; empty if there are other rows, or
    if a list may be the value of the only column."""
    plan, rows = plan_of(signature), raw.data
    if raw.form != "instances" or not plan.named or not plan.columns or not isinstance(rows, list):
        return []
    if not all(type(row) is list for row in rows) or (len(plan.names) == 1 and not plan.scalar_only):
        return []
    wanted = counted(len(plan.names), "value")
    return [
        Violation(f"instances[{i}]", v.WRONG_LENGTH, wanted, counted(len(row), "value"))
        for i, row in enumerate(rows)
        if len(row) != len(plan.names)
    ][:MAX_COUNTED]


def _free(batch: Batch) -> Any:
    """Returns the parts of a batch whose nesting the signature does not limit."""
    if isinstance(batch, Columns):
        free = [a for name, a in batch.arrays.items() if a.dtype.kind == "O" and name not in batch.texts]
        return [array.tolist() for array in free]
    if isinstance(batch, Tensors):
        return [array.tolist() for array in batch.arrays.values() if array.dtype.kind == "O"]
    return batch.value


def _is_too_deep(value: Any) -> bool:
    """Returns True if lists and objects are nested deeper than the wire and most models support.
    Walks level by level without recursion, so that code that runs later may recurse."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inside: dict[int, Any] = {}
        for part in level:
            if isinstance(part, list | tuple | dict):
                for child in part.values() if isinstance(part, dict) else part:
                    if isinstance(child, list | tuple | dict):
                        inside[id(child)] = child
        if not inside:
            return False
        level = list(inside.values())
    return True


def _warned(signature: Signature, raw: RawInput, extras: list[Any]) -> tuple[Batch, list[str]]:
    """Returns the batch of mode `strict`, or that of mode `mlflow` with strict's violations as warnings.

    Raises strict's InvalidInput if both modes refuse.
    """
    faults = Faults()
    try:
        batch = strict(signature, raw.form, raw.data, faults, extras)
        if batch is None or faults.total:
            raise InvalidInput(faults.kept, faults.total)
        return batch, []
    except InvalidInput as refused:
        extras.clear()
        batch = _lenient(signature, raw, Faults(), extras)
        if batch is None:
            raise
        return batch, [f"strict would refuse: {violation}" for violation in refused.violations]


def _as_mlflow(
    signature: Signature, raw: RawInput, faults: Faults, extras: list[Any]
) -> tuple[Batch | None, bool]:
    """Returns MLflow's batch, and True if strict would have refused the input."""
    plan = plan_of(signature)
    if plan.doubles and (quick := quick_doubles(plan, raw.form, raw.data)) is not None:
        return quick, False  # both modes give the same result for numbers under the declared names
    refused = Faults()
    batch = _lenient(signature, raw, refused, extras)
    found = _refused_by_strict(signature, raw)
    if batch is None or refused.total:
        # The first refusal ends MLflow's cast: strict names all fields, with what they expect.
        told = found if found.kept else refused
        faults.kept = (faults.kept + told.kept)[:MAX_KEPT]
        faults.total += max(told.total, 1)
        return None, False
    return batch, found.total > 0


def _refused_by_strict(signature: Signature, raw: RawInput) -> Faults:
    """Returns what strict refuses."""
    found = Faults()
    try:
        if strict(signature, raw.form, raw.data, found, []) is None:
            found.total = max(found.total, 1)
    except InvalidInput as error:
        found.kept, found.total = error.violations, error.total
    return found


def _lenient(signature: Signature, raw: RawInput, faults: Faults, extras: list[Any]) -> Batch | None:
    specs = signature.inputs or ()
    if raw.form == "dataframe_split" and isinstance(raw.data, dict):
        large = too_large(raw.data.get("columns"))
        if large is not None:  # pandas compares names by their hashes, too
            faults.add(f"dataframe_split.columns[{large}]", v.OUT_OF_RANGE, "string")
            return None
    if raw.form != "tensors":
        return lenient(specs, raw.form, raw.data, faults, extras)
    plan = plan_of(signature)
    if plan.tensors:
        data: Any = named.inputs(raw.data, plan.tensors, faults)
        data = data if plan.named else data.get("")
    else:
        table = named.table(raw.data, plan.columns, faults)
        data = None if table is None else named.frame(table)
    return None if faults.total else lenient(specs, "python", data, faults, extras)


def _ignored(what: str, names: Sequence[object]) -> str:
    listed = ", ".join(shown(name) for name in names[:_SHOWN_NAMES])
    rest = len(names) - _SHOWN_NAMES
    return f"ignored {what} that are not in the signature: {listed}" + (
        f" and {rest} more" if rest > 0 else ""
    )
