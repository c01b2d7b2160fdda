"""The stand-in for mlflow: the check of type hints, and the loader that is saved with Python models."""

from __future__ import annotations

import datetime
import shutil
import sys
from pathlib import Path
from typing import Any, Optional, Union

import pandas as pd
import pydantic
import pytest
import yaml

import loaders
from loaders import package, pickling
from loaders.compat import shipped, standin, type_hints
from loaders.compat.type_hints import Mismatch, checked, supported
from tests.contracts.test_flavors import in_blocked


class Person(pydantic.BaseModel):
    name: str
    age: int
    friend: Optional[Person] = None  # noqa: UP045


NOON = datetime.datetime(2024, 1, 2, 12)


@pytest.mark.parametrize(
    ("hint", "data", "expected"),
    [
        (list[int], [1, 2], [1, 2]),
        (list[str], [], []),
        (list[float], [1.5], [1.5]),
        (list[bytes], [b"a", "YWI=\n"], [b"a", b"ab"]),
        (list[datetime.datetime], [NOON, "2024-01-02T12:00:00"], [NOON, NOON]),
        (list[Any], [1, "a", None], [1, "a", None]),
        (list[list[str]], [["a"]], [["a"]]),
        (list[dict[str, int]], [{"a": 1}], [{"a": 1}]),
        (list[Optional[int]], [1, None], [1, None]),  # noqa: UP045
        (list[int | None], [1, None], [1, None]),
        (list[Union[int, str]], [1, "a", 2.5], [1, "a", 2.5]),  # noqa: UP007
        (list[Person], [{"name": "A", "age": 1}], [Person(name="A", age=1)]),
        (
            list[Person],
            [Person(name="A", age=1), {"name": "B", "age": 2, "friend": {"name": "C", "age": 3}}],
            [Person(name="A", age=1), Person(name="B", age=2, friend=Person(name="C", age=3))],
        ),
    ],
)
def test_data_that_fits_a_hint_passes(hint: Any, data: Any, expected: Any) -> None:
    assert supported(hint)
    assert checked(data, hint) == expected


@pytest.mark.parametrize(
    ("hint", "data", "place"),
    [
        (list[int], 5, "input"),
        (list[int], ["1"], "input[0]"),
        (list[int], [1, 2.0], "input[1]"),
        (list[float], [1], "input[0]"),
        (list[str], [None], "input[0]"),
        (list[bytes], ["*"], "input[0]"),
        (list[datetime.datetime], ["yesterday"], "input[0]"),
        (list[list[str]], [["a", 1]], "input[0][1]"),
        (list[dict[str, int]], [{"a": "x"}], "input[0].a"),
        (list[dict[str, int]], [{1: 1}], "input[0]"),
        (list[dict[str, int]], [[]], "input[0]"),
        (list[int | None], ["a"], "input[0]"),
        (list[Person], [{"name": "A", "age": "1"}], "input[0].age"),
        (list[Person], [{"name": "A"}], "input[0].age"),
        (list[Person], ["A"], "input[0]"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_its_place_and_without_its_value(
    hint: Any, data: Any, place: str
) -> None:
    with pytest.raises(Mismatch) as raised:
        checked(data, hint)
    assert str(raised.value).startswith(f"{place}: ")
    assert "yesterday" not in str(raised.value)


@pytest.mark.parametrize(
    "hint", [int, list, dict[str, int], pd.DataFrame, list[pd.DataFrame], list[dict[int, int]]]
)
def test_other_hints_are_not_checked(hint: Any) -> None:
    assert not supported(hint)


def test_a_decorated_function_checks_its_input() -> None:
    @standin.pyfunc
    def total(model_input: list[int], params: Any = None) -> int:
        return sum(model_input)

    assert total([1, 2]) == 3
    assert total(model_input=[1, 2]) == 3
    assert total(pd.DataFrame({"x": [1, 2]})) == 3
    with pytest.raises(standin.MlflowException, match=r"model_input\[1\]"):
        total([1, "2"])
    assert standin.pyfunc(total) is total


def test_a_subclass_checks_the_input_of_its_predict() -> None:
    class Model(standin.PythonModel):
        def predict(self, context: Any, model_input: list[str], params: Any = None) -> Any:  # type: ignore[override]
            return model_input

    assert Model().predict(None, ["a"]) == ["a"]
    with pytest.raises(standin.MlflowException):
        Model().predict(None, [1])


@pytest.mark.parametrize(
    ("hint", "frame", "expected"),
    [
        (list[str], pd.DataFrame({"n": [1, 2], "t": ["a", "b"]}), ["a", "b"]),
        (list[int], pd.DataFrame({"n": [1, 2], "t": ["a", "b"]}), [1, 2]),
        (list[str], pd.DataFrame({"t": []}), []),
        (list[dict[str, Any]], pd.DataFrame({"n": [1], "t": ["a"]}), [{"n": 1, "t": "a"}]),
        (list[dict[str, Any]], pd.DataFrame({0: [{"n": 1}]}), [{"n": 1}]),
    ],
)
def test_a_frame_becomes_the_list_that_a_hint_wants(hint: Any, frame: pd.DataFrame, expected: Any) -> None:
    def model(model_input: Any) -> Any:
        return model_input

    model.__annotations__["model_input"] = hint
    adapter = shipped.Adapter(model, shipped.Context({}, None))
    assert adapter.predict(frame) == expected


@pytest.mark.parametrize(
    ("predict", "expected"),
    [
        (lambda model_input: ("x", model_input), ("x", 1)),
        (lambda model_input, params: (model_input, params), (1, {"k": 2})),
        (lambda context, model_input: (context.model_config, model_input), ({"c": 3}, 1)),
        (lambda anything, model_input, params=None: (anything.artifacts, params), ({"f": "p"}, {"k": 2})),
    ],
)
def test_a_model_is_called_as_its_arguments_ask(predict: Any, expected: Any) -> None:
    adapter = shipped.Adapter(predict, shipped.Context({"f": "p"}, {"c": 3}))
    assert adapter.predict(1, {"k": 2}) == expected


def test_the_shipped_loader_needs_nothing_of_this_project(tmp_path: Path) -> None:
    """As a server of MLflow packages would use it: from `code/`, by `_load_pyfunc`."""

    class Model:
        def load_context(self, context: Any) -> None:
            self.text = Path(context.artifacts["f"]).read_text()

        def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
            return self.text, context.model_config, model_input, params

    (tmp_path / "f.txt").write_text("content")
    saved = loaders.save_model(
        Model(), tmp_path / "m", artifacts={"f": tmp_path / "f.txt"}, model_config={"c": 1}
    )
    code = saved.path / "code" / "model_gateway_python.py"
    assert "loaders" not in code.read_text()
    assert "gateway" not in code.read_text().replace("model-gateway", "").replace("model_gateway_python", "")
    namespace: dict[str, Any] = {}
    exec(compile(code.read_text(), str(code), "exec"), namespace)
    model = namespace["_load_pyfunc"](str(saved.path), {"c": 2})
    assert model.predict(5, {"k": 1}) == ("content", {"c": 2}, 5, {"k": 1})


@pytest.mark.parametrize(("name", "opened"), [("gzip", "gzip"), ("bzip2", "bz2"), ("lzma", "lzma")])
def test_compressed_pickles_are_read(tmp_path: Path, name: str, opened: str) -> None:
    import importlib

    saved = loaders.save_model(len, tmp_path / "m", input_example="a")
    pickled = saved.path / "python_model.pkl"
    with importlib.import_module(opened).open(tmp_path / "compressed", "wb") as file:
        file.write(pickled.read_bytes())
    shutil.move(tmp_path / "compressed", pickled)
    raw = yaml.safe_load((saved.path / "MLmodel").read_text())
    raw["flavors"]["python_function"]["python_model_compression"] = name
    (saved.path / "MLmodel").write_text(yaml.safe_dump(raw))
    loaders.load_model(saved.path)


def test_a_hinted_function_of_mlflow_2_is_given_a_list(tmp_path: Path) -> None:
    """MLflow 2 stored such functions unwrapped, with a signature like any other model's."""

    def shouted(model_input: list[str]) -> list[str]:
        return [text.upper() for text in model_input]

    model = standin.FunctionModel()
    model.func = shouted
    shouted.__annotations__ = {"model_input": list[str]}
    pickling.dump(model, tmp_path / "python_model.pkl")
    signature = loaders.infer_signature(["a"])
    entry = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}
    saved = package.write(tmp_path, {"python_function": entry}, signature=signature)
    requests = [
        {"form": "inputs", "data": ["a", "b"]},
        {"form": "dataframe_split", "data": {"data": [["c"]]}},
    ]
    (answers,) = in_blocked(["mlflow"], [{"package": str(saved.path), "requests": requests}])
    assert answers == [["A", "B"], ["C"]]


def test_the_stand_in_is_not_left_behind() -> None:
    before = sys.modules.get("mlflow")
    standin.modules()
    assert sys.modules.get("mlflow") is before


def test_the_module_type_hints_names_what_it_knows() -> None:
    assert set(type_hints.SCALARS) == {int, str, bool, float, bytes, datetime.datetime}
