"""The verdict table: every type in every form, ours compared with MLflow's own. Writes VERDICTS.md when run.

    python -m tests.support.verdicts        (needs mlflow and pyarrow)

`tests/loaders/test_verdicts.py` asserts that the committed table is what the code gives.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from loaders.batch import Columns, Tensors
from loaders.enforcement import CsvTable, InvalidInput, Mode, RawInput, enforce
from loaders.enforcement.scalars import is_null
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    Property,
    Scalar,
    Signature,
    TensorSpec,
    Type,
)

TABLE = Path(__file__).with_name("VERDICTS.md")
COLUMN_FORMS = (
    "dataframe_split",
    "dataframe_records",
    "inputs columns",
    "inputs records",
    "instances",
    "csv",
    "arrow",
    "python",
)
TENSOR_FORMS = ("inputs", "instances", "dataframe_split", "csv", "python")
REFUSED = "refused"
IMPOSSIBLE = "–"  # the form cannot hold such data


@dataclass(frozen=True)
class Case:
    """One datum: as JSON, and as Python and CSV have it where that differs."""

    name: str
    value: Any
    python: Any = ...
    text: str | None = ...  # type: ignore[assignment]


@dataclass(frozen=True)
class Cell:
    kind: str
    case: str
    sent: str
    form: str
    ours: str
    mlflow: str
    reason: str


_OBJECT = Object((Property("p", Scalar.long), Property("q", Scalar.string, False)))

# The first case of a type is sound; it fills the row before the one that is looked at.
COLUMNS: dict[Type, list[Case]] = {
    Scalar.boolean: [
        Case("exact", True, text="true"),
        Case("text", "false"),
        Case("integer", 1),
        Case("double", 1.5),
        Case("null", None),
        Case("malformed", "yes"),
    ],
    Scalar.integer: [
        Case("exact", 5, np.int32(5)),
        Case("safe widening", 5, np.int16(5)),
        Case("long", 5),
        Case("fraction", 1.7),
        Case("whole double", 3.0),
        Case("text", "5", text="five"),
        Case("boolean", True, text="true"),
        Case("null", None),
        Case("overflow", 2**31),
    ],
    Scalar.long: [
        Case("exact", 5),
        Case("safe widening", 5, np.int32(5)),
        Case("fraction", 1.7),
        Case("whole double", 3.0),
        Case("text", "5", text="five"),
        Case("boolean", True, text="true"),
        Case("null", None),
        Case("overflow", 2**63),
    ],
    Scalar.float: [
        Case("exact", 1.5, np.float32(1.5)),
        Case("double", 1.5),
        Case("double that rounds", 0.1),
        Case("integer", 2),
        Case("text", "1.5", text="one"),
        Case("boolean", True, text="true"),
        Case("null", None),
        Case("overflow", 1e39),
    ],
    Scalar.double: [
        Case("exact", 1.5),
        Case("safe widening", 1.5, np.float32(1.5)),
        Case("integer", 2),
        Case("text", "1.5", text="one"),
        Case("boolean", True, text="true"),
        Case("null", None),
        Case("object", {"a": 1}, text=None),
    ],
    Scalar.string: [
        Case("exact", "a"),
        Case("integer", 5),
        Case("boolean", True),
        Case("object", {"a": 1}, text=None),
        Case("null", None),
    ],
    Scalar.binary: [
        Case("exact", "YWI=", b"ab"),
        Case("url-safe base64", "-_-_", "-_-_"),
        Case("malformed", "YW", "YW"),
        Case("integer", 5),
        Case("null", None),
    ],
    Scalar.datetime: [
        Case("exact", "2024-01-02T03:04:05", datetime(2024, 1, 2, 3, 4, 5)),
        Case("date", "2024-01-02", datetime(2024, 1, 2).date()),
        Case("Z", "2024-01-02T03:04:05Z", ...),
        Case("text", "2024-01-02T03:04:05"),
        Case("American text", "01/02/2024"),
        Case("integer", 20240102),
        Case("null", None),
        Case("overflow", "3000-01-01", datetime(3000, 1, 1)),
    ],
    Array(Scalar.double): [
        Case("exact", [1.5, 2.5]),
        Case("integers", [1, 2]),
        Case("null item", [1.5, None]),
        Case("text item", ["1.5"]),
        Case("boolean item", [True]),
        Case("empty", []),
        Case("scalar", 1.5),
        Case("null", None),
    ],
    Array(Scalar.long): [
        Case("exact", [1, 2]),
        Case("fraction", [1.5]),
        Case("whole double", [3.0]),
        Case("null item", [1, None]),
    ],
    Array(Scalar.integer): [Case("exact", [7, 8]), Case("overflow", [2**31])],
    Array(Scalar.string): [Case("exact", ["a"]), Case("integer item", [5]), Case("null item", ["a", None])],
    _OBJECT: [
        Case("exact", {"p": 1, "q": "a"}),
        Case("optional field absent", {"p": 1}),
        Case("optional field null", {"p": 1, "q": None}),
        Case("required field null", {"p": None}),
        Case("missing field", {"q": "a"}),
        Case("extra field", {"p": 1, "z": 2}),
        Case("fraction", {"p": 1.7}),
        Case("whole double", {"p": 3.0}),
        Case("text", "a"),
        Case("null", None),
    ],
    Map(Scalar.double): [
        Case("exact", {"a": 1.5}),
        Case("integer", {"a": 7}),
        Case("text", {"a": "1"}),
        Case("null value", {"a": None}),
        Case("empty", {}),
        Case("null", None),
    ],
    AnyType(): [
        Case("exact", "a"),
        Case("object", {"a": 1}),
        Case("null", None),
    ],
}

TENSORS: list[tuple[TensorSpec, list[Case]]] = [
    (
        TensorSpec(np.dtype(np.float32), (-1, 2)),
        [
            Case("exact", [[1.5, 2.5]], np.float32([[1.5, 2.5]])),
            Case("doubles, exact", [[1.5, 2.5]]),
            Case("doubles that round", [[0.1, 0.2]]),
            Case("integers", [[7, 8]]),
            Case("null", [[1.5, None]]),
            Case("text", [[1.5, "2"]]),
            Case("boolean", [[1.5, True]]),
            Case("overflow", [[1.5, 1e39]]),
            Case("shape", [[1.5, 2.5, 3.5]]),
            Case("ragged", [[1.5, 2.5], [1.5]]),
        ],
    ),
    (
        TensorSpec(np.dtype(np.uint8), (-1, 2)),
        [
            Case("exact", [[1, 255]], np.array([[1, 255]], np.uint8)),
            Case("out of range", [[1, 256]]),
            Case("fraction", [[1, 1.7]]),
            Case("null", [[1, None]]),
        ],
    ),
    (
        TensorSpec(np.dtype(np.int64), (-1,)),
        [
            Case("exact", [1, 2]),
            Case("safe widening", [1, 2], np.array([1, 2], np.int32)),
            Case("fraction", [1, 1.7]),
            Case("overflow", [1, 2**63]),
        ],
    ),
    (TensorSpec(np.dtype(np.bool_), (-1,)), [Case("exact", [True, False]), Case("integers", [1, 0])]),
    (
        TensorSpec(np.dtype(str), (-1,)),
        [Case("exact", ["a", "b"]), Case("integer", ["a", 5]), Case("null", ["a", None])],
    ),
]


def column_signature(kind: Type, required: bool) -> Signature:
    return Signature((ColSpec(Scalar.double, "k"), ColSpec(kind, "x", required)))


def raw_columns(cases: tuple[Case, Case], form: str) -> RawInput | None:
    """Two rows in a form; None where the form cannot hold them."""
    cases = deepcopy(cases)  # MLflow changes objects in place
    values = [case.value for case in cases]
    if form == "dataframe_split":
        return RawInput(
            "dataframe_split", {"columns": ["k", "x"], "data": [[0.5, value] for value in values]}
        )
    records = [{"k": 0.5, "x": value} for value in values]
    if form == "dataframe_records":
        return RawInput("dataframe_records", records)
    if form == "inputs records":
        return RawInput("inputs", records)
    if form == "instances":
        return RawInput("instances", records)
    if form == "inputs columns":
        return RawInput("inputs", {"k": [0.5, 0.5], "x": values})
    if form == "csv":
        cells = [_cell(case) for case in cases]
        return None if IMPOSSIBLE in cells else RawInput("csv", CsvTable(["k", "x"], [["0.5", "0.5"], cells]))
    import pandas as pd

    things = [case.value if case.python is ... else case.python for case in cases]
    frame = pd.DataFrame({"k": [0.5, 0.5], "x": _series(things)})
    if form == "python":
        return RawInput("python", frame)
    import pyarrow as pa

    try:
        return RawInput("arrow", pa.Table.from_pandas(frame, preserve_index=False))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _series(things: list[Any]) -> Any:
    import pandas as pd

    if all(isinstance(thing, np.generic) for thing in things):
        return pd.Series(np.array(things))
    return pd.Series(things)


def _cell(case: Case) -> str | None:
    if case.text is not ...:
        return IMPOSSIBLE if case.text is None else case.text
    if case.value is None or isinstance(case.value, str):
        return case.value
    return IMPOSSIBLE if isinstance(case.value, list | dict) else str(case.value)


def raw_tensor(case: Case, form: str) -> RawInput | None:
    rows = case.value
    if form in ("inputs", "instances"):
        return RawInput("inputs" if form == "inputs" else "instances", rows)
    nested = isinstance(rows[0], list)
    if form == "dataframe_split":
        return RawInput("dataframe_split", {"data": rows if nested else [[row] for row in rows]})
    if form == "csv":
        if not nested:
            rows = [[row] for row in rows]
        if len({len(row) for row in rows}) > 1:
            return None
        cells = [
            [None if item is None else str(item) for item in column] for column in zip(*rows, strict=True)
        ]
        return RawInput("csv", CsvTable([f"c{i}" for i in range(len(cells))], cells))
    if case.python is not ...:
        return RawInput("python", case.python)
    try:
        return RawInput("python", np.array(rows))
    except ValueError:
        return None


# --- what is said of it


def ours(signature: Signature, raw: RawInput, mode: Mode = "strict") -> str:
    raw = RawInput(raw.form, deepcopy(raw.data))
    try:
        return shown(enforce(signature, raw, None, mode).batch)
    except InvalidInput:
        return REFUSED


def shown(batch: Any) -> str:
    """The cell that is looked at: its type and value."""
    if isinstance(batch, Columns):
        return _shown_column(batch.arrays["x"])
    if isinstance(batch, Tensors):
        array = batch.arrays[""]
        return f"{array.dtype.name if array.dtype.kind != 'U' else 'str'} {array.tolist()}"
    return repr(batch)


def _shown_column(array: Any) -> str:
    if np.ma.getmaskarray(array)[-1]:
        return f"{array.dtype} null"
    if array.dtype.kind in "mM":
        return str(array[-1])
    item = array[-1]
    if array.dtype.kind == "O":
        return "null" if is_null(item) else repr(_plain(item))
    return f"{array.dtype} {item}"


def _plain(item: Any) -> Any:
    """Without numpy's scalars and arrays inside, which compare equal to Python's."""
    if isinstance(item, np.ndarray | np.generic):
        return _plain(item.tolist())
    if isinstance(item, dict):
        return {name: _plain(value) for name, value in item.items()}
    return [_plain(value) for value in item] if isinstance(item, list) else item


def mlflow_result(signature: Signature, raw: RawInput) -> Any:
    """The model input that the real MLflow makes, as a batch; None where it refuses."""
    from mlflow.models import ModelSignature
    from mlflow.models.utils import _enforce_schema
    from mlflow.pyfunc.scoring_server import infer_and_parse_data, parse_csv_input

    from loaders.enforcement.untyped import untyped
    from loaders.enforcement.violations import Faults

    schema = ModelSignature.from_dict(signature.to_json()).inputs
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            if raw.form == "csv":
                parsed = parse_csv_input(io.StringIO(csv_text(raw.data)), schema)
            elif raw.form == "arrow":
                parsed = raw.data.to_pandas()
            elif raw.form == "python":
                parsed = raw.data
            else:
                parsed = infer_and_parse_data(json.loads(json.dumps({raw.form: raw.data})), schema)
            result = _enforce_schema(parsed, schema)
        except Exception:  # noqa: BLE001 - MLflow refuses with many kinds of exception
            return None
        return untyped("python", result, Faults())


def csv_text(table: CsvTable) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table.columns)
    writer.writerows(zip(*table.cells, strict=True))
    return text.getvalue()


def mlflows(signature: Signature, raw: RawInput) -> str:
    batch = mlflow_result(signature, raw)
    return REFUSED if batch is None else shown(batch)


def subjects() -> Iterator[tuple[str, Signature, Case, str, RawInput | None]]:
    """Everything that the table speaks of: label, signature, case, form, and the input (None: impossible)."""
    for kind, cases in COLUMNS.items():
        for required in (True, False):
            for case in cases:
                if not required and case.name not in ("exact", "null", "null item", "null value"):
                    continue
                for form in COLUMN_FORMS:
                    if form == "arrow" and not _has_arrow():
                        continue
                    if form == "inputs columns" and isinstance(kind, Array | Object | Map):
                        continue  # an object is one record there
                    label = f"{kind}{'' if required else ' (optional)'}"
                    yield (
                        label,
                        column_signature(kind, required),
                        case,
                        form,
                        raw_columns((cases[0], case), form),
                    )
    for spec, cases in TENSORS:
        for case in cases:
            for form in TENSOR_FORMS:
                yield str(spec), Signature((spec,)), case, form, raw_tensor(case, form)


def _has_arrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def our_verdicts() -> dict[tuple[str, str, str], str]:
    return {
        (label, case.name, form): IMPOSSIBLE if raw is None else ours(signature, raw)
        for label, signature, case, form, raw in subjects()
    }


# --- why they differ


def reason(label: str, case: str, form: str, our: str, theirs: str) -> str:
    """Why ours differs from MLflow's; empty: no reason is known, which a test does not let pass."""
    kind = label.removesuffix(" (optional)")
    if our == theirs:
        return ""
    if our == REFUSED:
        return _why_refused(kind, case, form)
    if theirs == REFUSED:
        return _why_accepted(label, kind, case, form)
    return _why_different(kind, case, form)


def _why_refused(kind: str, case: str, form: str) -> str:
    if case in ("fraction", "whole double", "overflow", "out of range"):
        return "MLflow's cast changes the number without a word"
    if "null" in case:
        return "MLflow lets the null through, or makes it something else"
    if case in ("text", "text item", "malformed", "url-safe base64", "American text"):
        return "text is not this type; MLflow guesses"
    return "another type; MLflow converts or passes anything"


def _why_accepted(label: str, kind: str, case: str, form: str) -> str:
    if form == "csv":
        return "CSV text is read by the column's type"
    if case == "null" and label.endswith("(optional)"):
        return "an optional column may have gaps"
    if kind == "datetime":
        return "any ISO 8601 form is a date"
    if form == "instances" and kind.startswith(("array", "object", "map")):
        return "instances are rows in every form"
    if kind.startswith(("array", "object", "map")):
        return "numbers in JSON have no width; null as in a column"
    return "the value is the same in the declared type"


def _why_different(kind: str, case: str, form: str) -> str:
    if "null" in case:
        return "null stays null"
    if kind == "binary":
        return "base64 is decoded in every form"
    if kind.startswith(("array", "any", "object", "map")):
        return "one model input for all forms: lists of Python's numbers"
    return "one model input for all forms"


def cells() -> list[Cell]:
    result = []
    for label, signature, case, form, raw in subjects():
        if raw is None:
            result.append(Cell(label, case.name, _sent(case.value), form, IMPOSSIBLE, IMPOSSIBLE, ""))
            continue
        our, theirs = ours(signature, raw), mlflows(signature, raw)
        why = reason(label, case.name, form, our, theirs)
        result.append(Cell(label, case.name, _sent(case.value), form, our, theirs, why))
    return result


def _sent(value: Any) -> str:
    return json.dumps(value)


HEAD = """# Verdicts

This table lists the verdict of strict enforcement on each type in each form, next to the real MLflow's own
verdict, and why they differ. The value is in a second row, after a valid first one; frames (python, arrow)
hold the Python object of that type. Generated: `python -m tests.support.verdicts`.

| type | case | sent | forms | verdict | MLflow | why they differ |
|---|---|---|---|---|---|---|
"""


def render(found: list[Cell]) -> str:
    groups: dict[tuple[str, ...], list[str]] = {}
    for cell in found:
        key = (cell.kind, cell.case, cell.sent, cell.ours, cell.mlflow, cell.reason)
        groups.setdefault(key, []).append(cell.form)
    lines = []
    for (kind, case, sent, our, theirs, why), forms in groups.items():
        parts = [kind, case, f"`{sent}`", ", ".join(forms), _code(our), _code(theirs), why]
        lines.append("| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |")
    return HEAD + "\n".join(lines) + "\n"


def _code(verdict: str) -> str:
    return verdict if verdict in (REFUSED, IMPOSSIBLE) else f"`{verdict}`"


def committed() -> dict[tuple[str, str, str], str]:
    """Our half of the committed table."""
    result = {}
    for line in TABLE.read_text().split("|---|---|---|---|---|---|---|\n")[1].splitlines():
        kind, case, _, forms, our, _, _ = line[2:-2].split(" | ")
        for form in forms.split(", "):
            result[kind, case, form] = our.strip("`")
    return result


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    TABLE.write_text(render(cells()))
