"""Properties of enforcement: every form gives the same, and nothing but InvalidInput comes out."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import json
import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batch import Columns, Tensors, Value
from loaders.enforcement import CsvTable, InvalidInput, RawInput, enforce
from loaders.inferred import infer_signature
from loaders.signature import (
    AnyType,
    Array,
    ColSpec,
    Map,
    Object,
    ParamSpec,
    Property,
    Scalar,
    Signature,
    SignatureError,
    TensorSpec,
)
from tests.conftest import needs

# --- frames of every dtype that pandas can hold

moments = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2250, 1, 1))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=6)
doubles = st.floats(allow_nan=False) | st.just(math.nan)
singles = st.floats(width=32)
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int8": st.integers(-128, 127),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "float32": singles,
    "float64": doubles,
    "Int64": st.none() | st.integers(-(2**63), 2**63 - 1),
    "Int32": st.none() | st.integers(-(2**31), 2**31 - 1),
    "boolean": st.none() | st.booleans(),
    "Float64": st.none() | st.floats(allow_nan=False),
    "string": st.none() | texts,
    "category": st.sampled_from(["a", "b"]),
    "datetime64[ns]": st.none() | moments,
    "datetime64[s]": moments.map(lambda moment: moment.replace(microsecond=0)),
    "datetime64[ns, UTC]": moments,
    "text": st.none() | texts,
    "bytes": st.binary(max_size=6),
    "dates": st.dates(datetime.date(1700, 1, 1), datetime.date(2250, 1, 1)),
    "list of double": st.lists(st.floats(allow_nan=False), max_size=3),
    "dict": st.fixed_dictionaries({"p": st.integers(-(2**63), 2**63 - 1)}, optional={"q": texts}),
    "timedelta64[ns]": st.timedeltas(datetime.timedelta(0), datetime.timedelta(9)),
    "complex128": st.complex_numbers(allow_nan=False, allow_infinity=False),
    "uint64": st.integers(0, 2**64 - 1),
    "mixed": st.integers() | texts | st.booleans(),
}
OBJECTS = ("text", "bytes", "dates", "list of double", "dict", "mixed")


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(1, 20))
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4))
    columns = {}
    for i, kind in enumerate(kinds):
        cells = draw(st.lists(CELLS[kind], min_size=rows, max_size=rows))
        columns[f"c{i}"] = pd.Series(cells, dtype=object if kind in OBJECTS else kind)  # type: ignore[call-overload]
    return pd.DataFrame(columns)


def jsonable(cell: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(cell, dict):
        return {name: jsonable(item) for name, item in cell.items()}
    if isinstance(cell, list):
        return [jsonable(item) for item in cell]
    if cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode()
    if isinstance(cell, datetime.date):
        return cell.isoformat()
    return cell.item() if isinstance(cell, np.generic) else cell


def celled(cell: Any) -> str | None:
    """A cell as CSV has it."""
    plain = jsonable(cell)
    if plain is None:
        return None
    return (
        plain if isinstance(plain, str) else repr(plain).lower() if isinstance(plain, bool) else repr(plain)
    )


def forms(frame: pd.DataFrame, nested: bool) -> list[RawInput]:
    columns = [[jsonable(cell) for cell in frame[name].tolist()] for name in frame]
    rows = [list(row) for row in zip(*columns, strict=True)]
    records = [dict(zip(frame, row, strict=True)) for row in rows]
    found = [
        RawInput("dataframe_split", {"columns": list(frame), "data": rows}),
        RawInput("dataframe_records", records),
        RawInput("inputs", records),
        RawInput("instances", records),
    ]
    if not nested:
        found.append(RawInput("inputs", dict(zip(frame, columns, strict=True))))
        cells = [[celled(cell) for cell in frame[name].tolist()] for name in frame]
        found.append(RawInput("csv", CsvTable(list(frame), cells)))
    return found


def compared(batch: Any) -> dict[Any, tuple[str, Any]]:
    """Dtypes and cells; NaN and null inside lists are told apart from numbers by their text."""
    assert isinstance(batch, Columns)
    result = {}
    for name, array in batch.arrays.items():
        gaps = np.ma.getmaskarray(array).tolist() if isinstance(array, np.ma.MaskedArray) else None
        cells = array.astype(str).tolist() if array.dtype.kind == "M" else np.asarray(array).tolist()
        if gaps is not None:
            cells = [None if gap else cell for cell, gap in zip(array.data.tolist(), gaps, strict=True)]
        result[name] = (str(array.dtype), repr(cells), gaps)
    return result


@settings(max_examples=100)
@given(frames())
def test_a_frame_gives_the_same_batch_in_every_form(frame: pd.DataFrame) -> None:
    try:
        signature = infer_signature(frame)
    except SignatureError:
        return  # no type describes one of the columns
    specs = [spec for spec in signature.inputs or () if isinstance(spec, ColSpec)]
    wanted = compared(enforce(signature, RawInput("python", frame)).batch)
    nested = any(not isinstance(spec.type, Scalar) for spec in specs)
    infinite = any(
        np.isinf(frame[name].astype(float)).any() for name in frame if frame[name].dtype.kind == "f"
    )
    for raw in forms(frame, nested):
        if infinite and raw.form != "csv":
            continue  # JSON has no infinity
        assert compared(enforce(signature, raw).batch) == wanted, raw.form


@pytest.mark.all
def test_a_frame_gives_the_same_batch_as_an_arrow_table() -> None:
    arrow = needs("pyarrow")

    @settings(max_examples=100)
    @given(frames())
    def check(frame: pd.DataFrame) -> None:
        try:
            signature = infer_signature(frame)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pyarrow's own use of pandas
                table = arrow.Table.from_pandas(frame, preserve_index=False)
        except (SignatureError, arrow.ArrowException):
            return
        # An empty or optional field of a struct is null in Arrow.
        if any(isinstance(spec.type, Object) for spec in signature.inputs or () if isinstance(spec, ColSpec)):
            return
        wanted = compared(enforce(signature, RawInput("python", frame)).batch)
        assert compared(enforce(signature, RawInput("arrow", table)).batch) == wanted
        for batch in table.to_batches():
            assert compared(enforce(signature, RawInput("arrow", batch)).batch) == wanted

    check()


@settings(max_examples=50)
@given(frames())
def test_a_csv_body_that_pandas_wrote_is_read_back(frame: pd.DataFrame) -> None:
    frame = frame.select_dtypes(["int64", "int32", "float64", "bool"])
    if frame.empty or not len(frame.columns):
        return
    header, *lines = list(csv.reader(io.StringIO(frame.to_csv(index=False))))
    cells = [[cell or None for cell in column] for column in zip(*lines, strict=True)]
    signature = infer_signature(frame)
    wanted = compared(enforce(signature, RawInput("python", frame)).batch)
    assert compared(enforce(signature, RawInput("csv", CsvTable(header, [*cells]))).batch) == wanted


# --- anything else

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
anything = st.recursive(
    scalars | st.sampled_from([2**31, 2**63, 10**400, 1e39, "2024-01-01", "YWI=", "2024-01-01T00:00:00Z"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "columns", "data", "index", "0"]), inner, max_size=4)
    ),
    max_leaves=12,
)
tables = st.lists(st.sampled_from(["a", "b", "0"]), max_size=3).flatmap(
    lambda names: st.lists(
        st.lists(
            st.none() | texts | st.sampled_from(["1", "1.5", "true", "9" * 400, "nan", "inf"]), max_size=3
        ),
        max_size=3,
    ).map(lambda cells: CsvTable(names, cells))
)
bodies = (
    st.tuples(
        st.sampled_from(["dataframe_split", "dataframe_records", "inputs", "instances", "python"]), anything
    )
    | st.tuples(
        st.just("dataframe_split"),
        st.fixed_dictionaries(
            {
                "columns": st.just(["a", "b"]),
                "data": st.lists(st.lists(anything, min_size=2, max_size=2), max_size=20),
            }
        ),
    )
    | st.tuples(
        st.sampled_from(["dataframe_records", "inputs", "instances"]),
        st.lists(st.fixed_dictionaries({"a": anything, "b": anything}), max_size=20),
    )
    | st.tuples(st.just("csv"), tables)
    | st.tuples(st.just("python"), frames())
    | st.tuples(
        st.just("python"),
        st.sampled_from(
            [
                np.zeros((2, 2)),
                np.array(["a"]),
                np.array(5),
                np.array([{}]),
                object(),
                b"x",
                1j,
                {1, 2},
                pd.NA,
                pd.NaT,
                np.float32(1),
                (1, 2),
                {1: 2},
                np.zeros((1, 2, 3)),
                pd.DataFrame(),
                pd.Series([], dtype=float),
                np.datetime64("NaT", "s"),
                pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])),
            ]
        ),
    )
)
NESTED = Object((Property("a", Array(Scalar.double)), Property("b", Map(Scalar.datetime), False)))
kinds = st.sampled_from(
    [
        *Scalar,
        AnyType(),
        Array(Scalar.long),
        Array(Array(Scalar.float)),
        NESTED,
        Map(Scalar.binary),
        Array(NESTED),
    ]
)
signatures = (
    st.none()
    | st.tuples(kinds, kinds, st.booleans()).map(
        lambda k: Signature((ColSpec(k[0], "a", k[2]), ColSpec(k[1], "b")))
    )
    | kinds.map(lambda kind: Signature((ColSpec(kind, "a"),)))
    | st.tuples(kinds, kinds).map(lambda k: Signature((ColSpec(k[0]), ColSpec(k[1]))))
    | kinds.map(lambda kind: Signature((ColSpec(kind),)))
    | kinds.map(lambda kind: Signature((ColSpec(kind, 0), ColSpec(kind, 1))))
    | st.tuples(
        st.sampled_from(
            [
                "float32",
                "float16",
                "int8",
                "uint64",
                "bool",
                "str",
                "bytes",
                "object",
                "datetime64[s]",
                "complex64",
                "timedelta64[s]",
            ]
        ),
        st.sampled_from([(), (-1,), (-1, 2), (2, 2), (-1, -1), (-1, 1)]),
        st.booleans(),
    ).map(
        lambda t: Signature(
            (TensorSpec(np.dtype(t[0]), t[1], "a" if t[2] else None),),
            None,
            (ParamSpec("a", Scalar.datetime, None), ParamSpec("b", NESTED, None)),
        )
    )
)


@settings(max_examples=150)
@given(signatures, bodies, anything, st.sampled_from(["strict", "warn", "mlflow"]), st.booleans())
def test_anything_is_taken_or_refused_with_a_path(
    signature: Signature | None, body: tuple[Any, Any], params: Any, mode: Any, hints: bool
) -> None:
    form, data = body
    hints = hints and signature is not None and not isinstance((signature.inputs or [None])[0], TensorSpec)
    refused: InvalidInput | None = None
    try:
        enforced = enforce(signature, RawInput(form, data), params, mode, type_hints=hints)
    except InvalidInput as fault:
        refused = fault
    if refused is not None:
        assert refused.total >= len(refused.violations) > 0
        assert all(violation.path and violation.problem for violation in refused.violations)
        return
    assert isinstance(enforced.batch, Columns | Tensors | Value)
    if isinstance(enforced.batch, Columns):
        assert all(len(array) == enforced.batch.rows for array in enforced.batch.arrays.values())
        assert all(array.ndim == 1 for array in enforced.batch.arrays.values())


@pytest.mark.parametrize("mode", ["strict", "warn", "mlflow"])
def test_deep_nesting_does_not_crash(mode: Any) -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    found: list[Signature | None] = [
        None,
        Signature((ColSpec(AnyType(), "a"),)),
        Signature((ColSpec(NESTED, "a"),)),
        Signature((ColSpec(Array(Scalar.double)),)),
        Signature((TensorSpec(np.dtype(np.float64), (-1, -1)),)),
        Signature(None, None, (ParamSpec("a", Object((Property("a", AnyType()),)), None),)),
    ]
    for signature in found:
        for form in ("inputs", "instances", "dataframe_records", "dataframe_split", "python"):
            for data in (deep, {"a": deep}, [{"a": deep}], {"columns": ["a"], "data": [[deep]]}):
                try:
                    enforce(signature, RawInput(form, data), {"a": {"a": deep}}, mode)  # type: ignore[arg-type]
                except InvalidInput as refused:
                    assert refused.violations  # noqa: PT017 - whether it is refused is not the point


@settings(max_examples=100)
@given(st.lists(anything, max_size=20))
def test_a_long_column_holds_just_its_integers(cells: list[Any]) -> None:
    raw = RawInput("inputs", {"a": cells})
    sound = all(type(cell) is int and -(2**63) <= cell < 2**63 for cell in cells)
    signature = Signature((ColSpec(Scalar.long, "a"),))
    if sound:
        batch = enforce(signature, raw).batch
        assert isinstance(batch, Columns)
        assert batch.arrays["a"].tolist() == cells
    else:
        with pytest.raises(InvalidInput):
            enforce(signature, raw)


@given(st.lists(scalars, max_size=40))
def test_a_double_column_holds_just_its_numbers(cells: list[Any]) -> None:
    raw = RawInput("dataframe_records", [{"a": cell} for cell in cells] or [{"a": 1}])
    signature = Signature((ColSpec(Scalar.double, "a"),))
    if all(cell is None or type(cell) in (int, float) for cell in cells) and all(
        abs(cell or 0) < 2**1023 for cell in cells
    ):
        batch = enforce(signature, raw).batch
        assert isinstance(batch, Columns)
        wanted = [math.nan if cell is None else float(cell) for cell in cells] or [1.0]
        assert json.dumps(batch.arrays["a"].tolist()) == json.dumps(wanted)
    elif any(type(cell) in (str, bool) for cell in cells):
        with pytest.raises(InvalidInput):
            enforce(signature, raw)
