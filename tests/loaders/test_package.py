"""The MLmodel directory as data: what is read, what is refused, what a digest covers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import example, package
from loaders.package import Package, PackageError
from loaders.yamltext import parse_yaml
from tests.support.hostile import write_package

MINIMAL: dict[str, Any] = {"flavors": {"python_function": {"loader_module": "mlflow.sklearn"}}}


def write(directory: Path, raw: Any = None, **entries: Any) -> Path:
    """A package directory with that MLmodel; `entries` are added to a minimal one's python_function."""
    directory.mkdir(exist_ok=True)
    if raw is None:
        raw = {"flavors": {"python_function": {"loader_module": "mlflow.sklearn", **entries}}}
    text = raw if isinstance(raw, str) else yaml.safe_dump(raw)
    (directory / "MLmodel").write_text(text)
    return directory


def problem(directory: Path) -> PackageError:
    with pytest.raises(PackageError) as raised:
        package.read(directory)
    assert str(directory) not in str(raised.value), "a message shows no path of the machine"
    return raised.value


MLFLOW_1 = """
artifact_path: model
flavors:
  python_function:
    env: conda.yaml
    loader_module: mlflow.sklearn
    model_path: model.pkl
    python_version: 3.6.10
  sklearn:
    pickled_model: model.pkl
    serialization_format: cloudpickle
    sklearn_version: 0.23.1
run_id: 0123456789abcdef0123456789abcdef
saved_input_example_info:
  artifact_path: input_example.json
  pandas_orient: split
  type: dataframe
signature:
  inputs: '[{"name": "x", "type": "double"}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]'
utc_time_created: 2021-03-04 05:06:07.000008
"""


def test_a_package_of_mlflow_1_is_read(tmp_path: Path) -> None:
    found = package.read(write(tmp_path / "p", MLFLOW_1))
    assert found.loader_module == "mlflow.sklearn"
    assert found.utc_time_created == "2021-03-04 05:06:07.000008", "a time stays the text it is"
    assert found.run_id == "0123456789abcdef0123456789abcdef"
    assert found.model_id is None
    assert found.signature is not None
    assert str(found.signature.inputs) != ""
    assert found.example == example.ExampleInfo("input_example.json", "dataframe", "split")
    assert not found.type_hints


def test_a_package_of_mlflow_3_is_read_with_unknown_fields(tmp_path: Path) -> None:
    raw = {
        **MINIMAL,
        "model_id": "m-" + "0" * 32,
        "mlflow_version": "3.17.2",
        "is_signature_from_type_hint": True,
        "metadata": {"team": "a", 5: "five"},
        "prompts": None,
        "auth_policy": {"system_auth_policy": {}},
        "invented_tomorrow": [1, {"a": None}],
    }
    found = package.read(write(tmp_path / "p", raw))
    assert found.model_id == "m-" + "0" * 32
    assert found.type_hints
    assert found.metadata == {"team": "a", "5": "five"}
    assert found.raw["invented_tomorrow"] == [1, {"a": None}]


def test_a_worker_has_the_same_package_without_yaml(tmp_path: Path) -> None:
    found = package.read(write(tmp_path / "p", MLFLOW_1))
    copied = Package.from_json(json.loads(json.dumps(found.to_json())), found.path)
    assert copied == found


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ("", "MLmodel"),
        ("[1, 2]", "MLmodel"),
        ("just text", "MLmodel"),
        ("a: [", "MLmodel"),
        ("a: b: c", "MLmodel"),
        ("\x00", "MLmodel"),
        ("a: 1\n---\nb: 2", "MLmodel"),
        ("a: !!python/object/apply:os.system [echo]", "MLmodel"),
        ("a: !!binary aGVsbG8=", "MLmodel"),
        ("a: !!set {x}", "MLmodel"),
        ("? [1, 2]\n: 3", "MLmodel"),
        ("&a [*a]", "MLmodel"),
        ("a: " + "[" * 5000, "MLmodel"),
        ("a: " + "9" * 5000, "MLmodel"),
        ("flavors: 5", "flavors"),
        ("run_id: 5", "flavors"),
        ("flavors: {sklearn: {}}", "flavors"),
        ("flavors: {python_function: {}}", "python_function.loader_module"),
        ("flavors: {python_function: {loader_module: [a]}}", "python_function.loader_module"),
        ("flavors: {python_function: {loader_module: a/b}}", "python_function.loader_module"),
        ("flavors: {python_function: {loader_module: a, data: {b: 1}}}", "python_function.data"),
        ("flavors: {python_function: {loader_module: a, code: 7}}", "python_function.code"),
        ("flavors: {python_function: {loader_module: a, config: [1]}}", "python_function.config"),
        ("flavors: {python_function: {loader_module: a, artifacts: {x: y}}}", "python_function.artifacts.x"),
        ("flavors: {python_function: {loader_module: a}}\nmetadata: [1]", "metadata"),
        ("flavors: {python_function: {loader_module: a}}\nsignature: 5", "signature"),
        ("flavors: {python_function: {loader_module: a}}\nsignature: {inputs: '{'}", "signature"),
        (
            "flavors: {python_function: {loader_module: a}}\n"
            "saved_input_example_info: {artifact_path: a, type: b}",
            "saved_input_example_info",
        ),
    ],
)
def test_a_directory_that_is_not_a_package_is_refused_with_its_place(
    tmp_path: Path, raw: str, place: str
) -> None:
    assert problem(write(tmp_path / "p", raw)).place == place


def test_a_directory_without_mlmodel_and_no_directory_are_refused(tmp_path: Path) -> None:
    assert "not a model directory" in str(problem(tmp_path))
    assert str(problem(tmp_path / "absent")) == "absent: there is no such directory"
    (tmp_path / "file").touch()
    assert str(problem(tmp_path / "file")) == "file: is not a directory"


def test_a_model_kept_elsewhere_is_refused_with_the_reason(tmp_path: Path) -> None:
    raw = {**MINIMAL, "metadata": {"mlflow.model.isExternal": True}}
    assert "kept elsewhere" in str(problem(write(tmp_path / "p", raw)))


def test_shared_parts_are_allowed_and_bombs_are_not(tmp_path: Path) -> None:
    shared = "a: &x {k: [1, 2]}\nb: *x\nc: *x"
    assert parse_yaml(shared.encode(), "f") == {name: {"k": [1, 2]} for name in "abc"}
    bomb = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["a0: &a0 {x: 1}"] + [
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)
    ]
    for text in (bomb, merges):
        started = time.monotonic()
        with pytest.raises(PackageError, match="aliases"):
            parse_yaml("\n".join(text).encode(), "f")
        assert time.monotonic() - started < 20


def test_an_mlmodel_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path / "p")
    with (tmp_path / "p" / "MLmodel").open("ab") as file:
        file.truncate(1 << 30)
    assert "larger than" in str(problem(tmp_path / "p"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_plain_data_survives_yaml(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value).encode(), "f") == value


@settings(max_examples=200)
@given(
    st.binary(max_size=300)
    | st.text(alphabet="a:[]{}&*!|>-?'\"\n\t ,#%@`0123456789<", max_size=80).map(str.encode)
)
def test_any_bytes_are_data_or_refused(text: bytes) -> None:
    try:
        value = parse_yaml(text, "f")
    except PackageError:
        return
    json.dumps(value)


OUTSIDE = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "a/..",
    "..",
    "",
    "C:\\x",
    "a\\..\\..\\b",
    "x\0y",
    "absent",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("key", ["data", "code", "artifacts"])
def test_paths_that_leave_the_package_are_refused_when_it_is_read(
    tmp_path: Path, path: str, key: str
) -> None:
    if path == "" and key != "artifacts":
        return  # nothing is named
    (tmp_path / "secret").mkdir()
    entry: Any = {"x": {"path": path}} if key == "artifacts" else path
    problem(write(tmp_path / "p", None, **{key: entry}))


def test_links_inside_are_followed_and_links_that_leave_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    directory = write(tmp_path / "p", None, data="link")
    (directory / "real").write_text("r")
    (directory / "link").symlink_to("real")
    assert package.read(directory).data.read_text() == "r"
    (directory / "link").unlink()
    (directory / "link").symlink_to(tmp_path / "secret")
    assert "leaves the package" in str(problem(directory))
    (directory / "link").unlink()
    (directory / "link").symlink_to("link")
    problem(directory)


def test_an_mlmodel_that_is_a_link_out_of_the_package_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "MLmodel").symlink_to(tmp_path / "other" / "MLmodel")
    assert "leaves the package" in str(problem(tmp_path / "p"))


def test_a_link_to_the_whole_package_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "p", None, data="m")
    (tmp_path / "p" / "m").touch()
    (tmp_path / "current").symlink_to("p")
    assert package.read(tmp_path / "current").data.exists()


# --- digest


def test_the_digest_is_the_one_that_the_contract_describes(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_bytes(b"flavors")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wäights.bin").write_bytes(b"12345")
    lines = [
        f"{hashlib.sha256(b'flavors').hexdigest()} 7 MLmodel\n",
        f"{hashlib.sha256(b'12345').hexdigest()} 5 data/wäights.bin\n",
    ]
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert package.digest(tmp_path) == f"sha256:{expected}"
    assert package.files_bytes(tmp_path) == 12


def test_the_digest_ignores_what_is_not_part_of_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_bytes(b"flavors")
    before = package.digest(tmp_path)
    (tmp_path / "registered_model_meta").write_text("model_name: x")
    (tmp_path / "code" / "__pycache__").mkdir(parents=True)
    (tmp_path / "code" / "__pycache__" / "a.pyc").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    assert package.digest(tmp_path) == before
    (tmp_path / "code" / "registered_model_meta").write_text("x")
    assert package.digest(tmp_path) != before


@pytest.mark.parametrize("change", ["content", "name", "size", "more", "less"])
def test_the_digest_changes_with_the_files(tmp_path: Path, change: str) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    before = package.digest(tmp_path)
    if change == "content":
        (tmp_path / "a").write_bytes(b"3")
    elif change == "name":
        (tmp_path / "a").rename(tmp_path / "c")
    elif change == "size":
        (tmp_path / "a").write_bytes(b"11")
    elif change == "more":
        (tmp_path / "c").touch()
    else:
        (tmp_path / "a").unlink()
    assert package.digest(tmp_path) != before


def test_a_link_inside_counts_as_the_copy_it_becomes(tmp_path: Path) -> None:
    for name in ("linked", "copied"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"1")
    (tmp_path / "linked" / "b").symlink_to("a")
    (tmp_path / "copied" / "b").write_bytes(b"1")
    assert package.digest(tmp_path / "linked") == package.digest(tmp_path / "copied")


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "absent", "directory"])
def test_a_digest_is_refused_where_a_copy_would_not_hold_the_same(tmp_path: Path, target: str) -> None:
    (tmp_path / "x").touch()
    root = tmp_path / "p"
    (root / "directory").mkdir(parents=True)
    (root / "link").symlink_to(target)
    with pytest.raises(PackageError):
        package.digest(root)


def test_a_name_that_could_forge_a_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\nb").touch()
    with pytest.raises(PackageError, match="control characters"):
        package.digest(tmp_path)


# --- the input example


def read_example(tmp_path: Path, content: Any, **info: Any) -> tuple[str, Any, Any]:
    raw = {**MINIMAL, "saved_input_example_info": {"artifact_path": "input_example.json", **info}}
    directory = write(tmp_path / "p", raw)
    (directory / "input_example.json").write_text(json.dumps(content))
    found, params = package.read(directory).example_input()
    assert found is not None
    return found.form, found.data, params


SPARSE = {"data": [1.5, 2.5, 3.5], "indices": [0, 2, 1], "indptr": [0, 2, 3], "shape": [2, 3]}
SPARSE_COLUMNS = {"data": [1.5, 3.5, 2.5], "indices": [0, 1, 0], "indptr": [0, 1, 2, 3], "shape": [2, 3]}
DENSE = [[1.5, 0.0, 2.5], [0.0, 3.5, 0.0]]


@pytest.mark.parametrize(
    ("content", "info", "expected"),
    [
        (
            {"columns": ["a"], "data": [[1]]},
            {"type": "dataframe", "pandas_orient": "split"},
            ("dataframe_split", {"columns": ["a"], "data": [[1]]}, None),
        ),
        (
            {"data": [[1]]},
            {"type": "dataframe", "pandas_orient": "values"},
            ("dataframe_split", {"data": [[1]]}, None),
        ),
        (
            [[1, 2]],
            {"type": "dataframe", "pandas_orient": "values"},
            ("dataframe_split", {"data": [[1, 2]]}, None),
        ),
        (
            [{"a": 1}],
            {"type": "dataframe", "pandas_orient": "records"},
            ("dataframe_records", [{"a": 1}], None),
        ),
        ([[1, 2]], {"type": "ndarray"}, ("inputs", [[1, 2]], None)),
        ({"x": [1], "y": [2]}, {"type": "ndarray"}, ("inputs", {"x": [1], "y": [2]}, None)),
        ({"inputs": [[1]]}, {"type": "ndarray", "format": "tf-serving"}, ("inputs", [[1]], None)),
        ({"instances": [[1]]}, {"type": "ndarray", "format": "tf-serving"}, ("instances", [[1]], None)),
        ({"q": "text"}, {"type": "json_object"}, ("inputs", {"q": "text"}, None)),
        ("text", {"type": "json_object"}, ("inputs", "text", None)),
        (SPARSE, {"type": "sparse_matrix_csr"}, ("inputs", DENSE, None)),
        (SPARSE_COLUMNS, {"type": "sparse_matrix_csc"}, ("inputs", DENSE, None)),
        (
            {"inputs": [[1]], "params": {"k": 2}},
            {"type": "ndarray", "params": "true"},
            ("inputs", [[1]], {"k": 2}),
        ),
    ],
)
def test_every_form_of_example_becomes_the_request_it_stands_for(
    tmp_path: Path, content: Any, info: dict[str, str], expected: Any
) -> None:
    assert read_example(tmp_path, content, **info) == expected


@pytest.mark.parametrize(
    ("content", "info"),
    [
        (5, {"type": "dataframe"}),
        ({"columns": ["a"]}, {"type": "dataframe"}),
        ({"a": 1}, {"type": "ndarray", "params": "true"}),
        ({**SPARSE, "shape": [10**6, 10**6]}, {"type": "sparse_matrix_csr"}),
        ({**SPARSE, "indices": [0, 9, 1]}, {"type": "sparse_matrix_csr"}),
        ([1], {"type": "sparse_matrix_csr"}),
    ],
)
def test_a_malformed_example_is_refused(tmp_path: Path, content: Any, info: dict[str, str]) -> None:
    with pytest.raises(PackageError) as raised:
        read_example(tmp_path, content, **info)
    assert raised.value.place == "saved_input_example_info"


def test_a_relative_directory_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match=r"^no/dir: there is no such directory$"):
        package.read("no/dir")


def test_a_missing_example_file_is_refused_and_no_example_is_none(tmp_path: Path) -> None:
    info = {"artifact_path": "input_example.json", "type": "ndarray"}
    found = package.read(write(tmp_path / "p", {**MINIMAL, "saved_input_example_info": info}))
    with pytest.raises(PackageError):
        found.example_input()
    assert package.read(write(tmp_path / "q")).example_input() == (None, None)


def test_live_data_is_written_as_mlflow_writes_it(tmp_path: Path) -> None:
    import pandas as pd
    from scipy.sparse import csc_matrix

    frame = pd.DataFrame(
        {
            "n": [1, 2],
            "x": [1.5, np.nan],
            "t": ["a", None],
            "w": pd.to_datetime(["2024-01-02", None]),
            "b": [b"\x00", b""],
        }
    )
    info = example.write(tmp_path, frame)
    assert info.to_json() == {
        "artifact_path": "input_example.json",
        "type": "dataframe",
        "pandas_orient": "split",
        "serving_input_path": "serving_input_example.json",
    }
    content = json.loads((tmp_path / "input_example.json").read_text())
    assert content == {
        "columns": ["n", "x", "t", "w", "b"],
        "data": [[1, 1.5, "a", "2024-01-02T00:00:00", "AA=="], [2, None, None, None, ""]],
    }
    assert json.loads((tmp_path / "serving_input_example.json").read_text()) == {"dataframe_split": content}

    assert example.write(tmp_path, pd.DataFrame([[1]]), {"k": np.int64(3)}).params
    assert json.loads((tmp_path / "input_example.json").read_text()) == {
        "inputs": {"data": [[1]]},
        "params": {"k": 3},
    }
    assert json.loads((tmp_path / "serving_input_example.json").read_text())["params"] == {"k": 3}

    assert example.write(tmp_path, {"x": np.zeros((1, 2), np.float32)}).type == "ndarray"
    assert json.loads((tmp_path / "input_example.json").read_text()) == {"x": [[0.0, 0.0]]}

    info = example.write(tmp_path, csc_matrix(np.array(DENSE)))
    assert info.type == "sparse_matrix_csc"
    assert example.read(info, tmp_path / "input_example.json")[0].data == DENSE

    assert example.write(tmp_path, [{"q": "text"}]).type == "json_object"
    with pytest.raises(example.InvalidExample):
        example.write(tmp_path, object())


def test_a_package_one_directory_deeper_is_said(tmp_path: Path) -> None:
    write_package(tmp_path / "run" / "model")
    with pytest.raises(PackageError, match="there is one in model: name that directory"):
        package.read(tmp_path / "run")


@pytest.mark.parametrize("path", ["code\\own_loader.py", ".\\code\\own_loader.py"])
def test_paths_written_on_windows_are_found(tmp_path: Path, path: str) -> None:
    saved = write_package(tmp_path / "p")
    assert saved.inside(path).samefile(saved.path / "code" / "own_loader.py")


@pytest.mark.parametrize(
    "path", ["..\\outside", "code\\..\\..\\outside", "C:\\outside", "\\outside", "\\\\host\\share\\x"]
)
def test_paths_written_on_windows_do_not_leave(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside").write_text("")
    saved = write_package(tmp_path / "p")
    with pytest.raises(PackageError):
        saved.inside(path)
