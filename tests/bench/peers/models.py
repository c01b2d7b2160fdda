"""The models that every server gets, and the packages that the gateway and MLflow make of them.

    models.py train KIND named|array COUNT DIRECTORY    with the environment `plain`
    models.py package DIRECTORY                         with the environment `gateway`
    models.py mlflow DIRECTORY                          with the environment `mlflow` or `mlserver`

`train` writes `m0.pkl`, … (or `m0.onnx`), `rows.json` with distinct rows, and `answers.json` with what each
model itself says to them. Fits differ, and so do the classes that they name: an answer tells which model gave
it. A model is fitted on arrays, or on frames whose columns are `named`: then each row has the names too.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from apps.fitted import COLUMNS

ROWS = 256
WIDTHS = (512, 2048, 2048, 10)


def frame(rows: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(COLUMNS))


def train(kind: str, named: bool, count: int, directory: Path) -> None:
    chance = np.random.default_rng(0)
    if kind == "mlp":
        rows, answers = _mlp(directory, chance)
    else:
        rows, answers = _classifiers(kind, named, count, directory, chance)
    values: list[Any] = rows.tolist()
    if named:
        values = [dict(zip(COLUMNS, row, strict=True)) for row in values]
    (directory / "rows.json").write_text(json.dumps(values))
    (directory / "answers.json").write_text(json.dumps(answers))


def _classifiers(kind: str, named: bool, count: int, directory: Path, chance: Any) -> tuple[Any, list[Any]]:
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    near = x[chance.integers(0, len(x), ROWS)]
    rows = np.round(near + chance.normal(0, 0.05, near.shape), 4)  # distinct, and neighbours of any class
    answers = []
    for i in range(count):
        drawn = chance.choice(len(x), 120)
        model = (
            RandomForestClassifier(100, random_state=i)
            if kind == "forest"
            else LogisticRegression(max_iter=2000)
        )
        given = frame if named else np.asarray
        model.fit(given(x[drawn]), y[drawn] + 3 * i)
        (directory / f"m{i}.pkl").write_bytes(pickle.dumps(model))
        answers.append(model.predict(given(rows)).tolist())
    return rows, answers


def _mlp(directory: Path, chance: Any) -> tuple[Any, list[Any]]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, last = [], [], "x"
    for i in range(len(WIDTHS) - 1):
        scale = (2 / WIDTHS[i]) ** 0.5
        matrix = (chance.normal(0, scale, (WIDTHS[i], WIDTHS[i + 1]))).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        weights.append(numpy_helper.from_array(np.full(WIDTHS[i + 1], 0.01, np.float32), f"b{i}"))
        output = "y" if i == len(WIDTHS) - 2 else f"z{i}"
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [output]))
        last = output
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"h{i}"]))
            last = f"h{i}"
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "mlp",
        [tensor("x", TensorProto.FLOAT, ["n", WIDTHS[0]])],
        [tensor("y", TensorProto.FLOAT, ["n", WIDTHS[-1]])],
        weights,
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, directory / "m0.onnx")
    rows = np.round(chance.random((ROWS, WIDTHS[0])), 4).astype(np.float32)
    session = onnxruntime.InferenceSession(directory / "m0.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(None, {"x": rows})[0]
    return rows.astype(np.float64).round(4), [answers.tolist()]


def loaded(file: Path) -> Any:
    if file.suffix == ".pkl":
        return pickle.loads(file.read_bytes())
    import onnx

    return onnx.load(str(file))


def files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("m*.pkl"), *directory.glob("m*.onnx")])


def example(directory: Path, file: Path) -> Any:
    rows = json.loads((directory / "rows.json").read_text())[:3]
    if isinstance(rows[0], dict):
        return frame([list(row.values()) for row in rows])
    return np.array(rows, np.float32 if file.suffix == ".onnx" else np.float64)


def package(directory: Path) -> None:
    import loaders

    entries = {}
    for file in files(directory):
        place = directory / "packages" / file.stem
        loaders.save_model(loaded(file), place, input_example=example(directory, file), verify=False)
        entries[file.stem] = {"versions": {"1": {"source": str(place)}}, "aliases": {"champion": "1"}}
    (directory / "registry.json").write_text(json.dumps({"models": entries}))


def save_for_mlflow(directory: Path) -> None:
    import mlflow
    from mlflow.models import infer_signature

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # that a pickle is code is known here

    for file in files(directory):
        model, given = loaded(file), example(directory, file)
        place = str(directory / "mlflow" / file.stem)
        if file.suffix == ".pkl":
            signature = infer_signature(given, model.predict(given))
            # Without a list of requirements MLflow imports each model in a process of its own to find them.
            needs = ["scikit-learn"]
            mlflow.sklearn.save_model(
                model, place, signature=signature, serialization_format="pickle", pip_requirements=needs
            )
        else:
            signature = infer_signature(given, np.zeros((3, WIDTHS[-1]), np.float32))
            single = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
            mlflow.onnx.save_model(
                model,
                place,
                signature=signature,
                onnx_session_options=single,
                pip_requirements=["onnxruntime"],
            )


def main() -> None:
    match sys.argv[1:]:
        case ["train", kind, form, count, directory]:
            train(kind, form == "named", int(count), Path(directory))
        case ["package", directory]:
            package(Path(directory))
        case ["mlflow", directory]:
            save_for_mlflow(Path(directory))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
