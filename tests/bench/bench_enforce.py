"""Measures what enforcement costs in addition to parsing, per form.

    python tests/bench/bench_enforce.py

Prints the best of several repetitions: microseconds for one row of four doubles, milliseconds for 1,000
rows of 30 columns (doubles, longs and text in turn) and for a tensor of the same size.
"""

from __future__ import annotations

import random
import timeit
from collections.abc import Callable

import numpy as np
import pandas as pd

from loaders.enforcement import CsvTable, RawInput, enforce
from loaders.signature import ColSpec, ParamSpec, Scalar, Signature, TensorSpec


def best(run: Callable[[], object], number: int) -> float:
    """Seconds of one run."""
    return min(timeit.repeat(run, number=number, repeat=9)) / number


def one_row() -> dict[str, tuple[Signature, RawInput]]:
    names = ["sepal length", "sepal width", "petal length", "petal width"]
    row = [5.1, 3.5, 1.4, 0.2]
    named = Signature(tuple(ColSpec(Scalar.double, name) for name in names))
    with_params = Signature(named.inputs, None, (ParamSpec("threshold", Scalar.double, 0.5),))
    tensor = Signature((TensorSpec(np.dtype(np.float64), (-1, 4)),))
    record = dict(zip(names, row, strict=True))
    return {
        "dataframe_split": (named, RawInput("dataframe_split", {"columns": names, "data": [row]})),
        "dataframe_split, params": (
            with_params,
            RawInput("dataframe_split", {"columns": names, "data": [row]}),
        ),
        "dataframe_records": (named, RawInput("dataframe_records", [record])),
        "inputs columns": (named, RawInput("inputs", {name: [cell] for name, cell in record.items()})),
        "inputs record": (named, RawInput("inputs", record)),
        "instances": (named, RawInput("instances", [record])),
        "inputs tensor": (tensor, RawInput("inputs", [row])),
    }


def thousand_rows() -> dict[str, tuple[Signature, RawInput]]:
    random.seed(7)
    kinds = [Scalar.double, Scalar.long, Scalar.string]
    names = [f"column {i}" for i in range(30)]
    named = Signature(tuple(ColSpec(kinds[i % 3], name) for i, name in enumerate(names)))
    columns = [
        [
            random.gauss(0, 1)
            if i % 3 == 0
            else random.randrange(10**6)
            if i % 3 == 1
            else f"text {random.random()}"
            for _ in range(1000)
        ]
        for i in range(30)
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    by_name = dict(zip(names, columns, strict=True))
    frame = pd.DataFrame(by_name)
    matrix = [[random.gauss(0, 1) for _ in range(30)] for _ in range(1000)]
    tensor = Signature((TensorSpec(np.dtype(np.float32), (-1, 30)),))
    found = {
        "dataframe_split": (named, RawInput("dataframe_split", {"columns": names, "data": rows})),
        "dataframe_records": (
            named,
            RawInput("dataframe_records", [dict(zip(names, row, strict=True)) for row in rows]),
        ),
        "inputs columns": (named, RawInput("inputs", by_name)),
        "csv": (
            named,
            RawInput("csv", CsvTable(names, [[str(cell) for cell in column] for column in columns])),
        ),
        "python frame": (named, RawInput("python", frame)),
        "inputs tensor": (tensor, RawInput("inputs", matrix)),
        "python tensor": (tensor, RawInput("python", np.array(matrix, np.float32))),
    }
    try:
        import pyarrow as pa
    except ImportError:
        print("no pyarrow here: the Arrow form is left out")
    else:
        found["arrow"] = (named, RawInput("arrow", pa.table(by_name)))
    return found


def main() -> None:
    print("one row of 4 doubles (µs)")
    for name, (signature, raw) in one_row().items():
        print(f"  {name:24} {best(lambda s=signature, r=raw: enforce(s, r), 5000) * 1e6:8.2f}")  # type: ignore[misc]
    print("1,000 rows of 30 columns (ms)")
    for name, (signature, raw) in thousand_rows().items():
        print(f"  {name:24} {best(lambda s=signature, r=raw: enforce(s, r), 20) * 1e3:8.3f}")  # type: ignore[misc]


if __name__ == "__main__":
    main()
