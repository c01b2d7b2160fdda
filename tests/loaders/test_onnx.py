"""The ONNX flavor beyond the contract: several inputs, narrowing, options, weights next to the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

import loaders
from loaders.batch import Columns, Tensors, Value
from loaders.enforcement import InvalidInput, RawInput, enforce
from loaders.flavors.failures import Unsuitable
from loaders.package import PackageError
from loaders.signature import Signature, TensorSpec
from tests.conftest import needs

FLOAT, LONG = TensorProto.FLOAT, TensorProto.INT64


def graph(inputs: Mapping[str, tuple[int, Sequence[Any]]], output: list[Any], operation: str = "Sum") -> Any:
    """All inputs joined by one operation into the output `y`."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    kind = next(iter(inputs.values()))[0]
    y = helper.make_tensor_value_info("y", kind, output)
    body = helper.make_graph([helper.make_node(operation, list(inputs), ["y"])], "g", infos, [y])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def opened(model: Any, path: Path, **options: Any) -> loaders.Model:
    return loaders.open_model(loaders.save_model(model, path, **{"verify": False, **options}), {})


TWO = {"a": (FLOAT, ["n"]), "b": (FLOAT, ["n"])}
A, B = np.array([1.0, 2.0], np.float32), np.array([10.0, 20.0], np.float32)


def test_several_inputs_are_fed_by_name(tmp_path: Path) -> None:
    model = opened(graph(TWO, ["n"]), tmp_path / "m", verify=False)
    np.testing.assert_array_equal(model._ask(Tensors({"b": B, "a": A}, 2), {})["y"], [11, 22])
    np.testing.assert_array_equal(model._ask(Columns({"b": B, "a": A, "c": A}, 2), {})["y"], [11, 22])
    np.testing.assert_array_equal(model._ask(Value({"a": [1.0], "b": [2.0]}), {})["y"], [3])
    with pytest.raises(ValueError, match="name them: a, b"):
        model._ask(Tensors({"": A}, 2), {})


def test_a_single_input_takes_an_array_or_a_table(tmp_path: Path) -> None:
    model = opened(graph({"x": (FLOAT, ["n", 2])}, ["n", 2]), tmp_path / "m", verify=False)
    matrix = np.stack([A, B], axis=1)
    np.testing.assert_array_equal(model._ask(Tensors({"": matrix}, 2), {})["y"], matrix)
    np.testing.assert_array_equal(model._ask(Value(matrix.tolist()), {})["y"], matrix)
    answer = model._ask(Columns({"a": A, "b": B.astype(np.float64)}, 2), {})
    assert list(answer.columns) == ["y"]
    assert answer["y"].tolist() == matrix.tolist()  # one record a row


TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": LONG,
    "float16": TensorProto.FLOAT16,
    "float32": FLOAT,
    "float64": TensorProto.DOUBLE,
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_the_graphs_own_dtype_decides(tmp_path: Path, dtype: str, signed: bool) -> None:
    package = loaders.save_model(graph({"x": (TYPES[dtype], ["n", 2])}, ["n", 2], "Identity"), tmp_path / "m")
    model = loaders.open_model(package, {})
    signature = package.signature if signed else None
    for form, data in (
        ("inputs", [[1, 2], [3, 4]]),
        ("instances", [{"x": [1, 2]}, {"x": [3, 4]}]),
        ("dataframe_split", {"columns": ["a", "b"], "data": [[1, 2], [3, 4]]}),
    ):
        batch = enforce(signature, RawInput(form, data)).batch  # type: ignore[arg-type]
        answer = model.run(batch, {})
        assert isinstance(answer, (Tensors, Columns))
        assert [list(row) for row in answer.arrays["y"]] == [[1, 2], [3, 4]]
    for wrong in ([["a", "b"]], [[1, None]], [[1e300, 2]], [[1], [2]], [1, 2], [[True, False]]):
        if dtype[0] == "f" and wrong == [[1, None]]:
            continue  # a float may be null
        if dtype == "float64" and wrong == [[1e300, 2]]:
            continue
        with pytest.raises((InvalidInput, Unsuitable)):
            model.run(enforce(signature, RawInput("inputs", wrong)).batch, {})  # type: ignore[arg-type]


def test_integers_out_of_range_are_refused(tmp_path: Path) -> None:
    model = opened(graph({"x": (TensorProto.UINT8, ["n"])}, ["n"], "Identity"), tmp_path / "m")
    with pytest.raises(Unsuitable, match="out of range"):
        model._ask(Tensors({"": np.array([256])}, 1), {})


def test_one_input_per_column_of_rank_two(tmp_path: Path) -> None:
    names = {"a": (FLOAT, ["n", 1]), "b": (FLOAT, ["n", 1])}
    model = opened(graph(names, ["n", 1]), tmp_path / "m")
    for data in ([{"a": 1, "b": 10}, {"a": 2.5, "b": 20}], [{"b": 10, "a": 1}, {"b": 20, "a": 2.5}]):
        for signature in (None, model.signature):
            batch = enforce(signature, RawInput("dataframe_records", data)).batch
            answer = model.run(batch, {})
            assert isinstance(answer, (Tensors, Columns))
            assert answer.arrays["y"].reshape(-1).tolist() == [11, 22.5]
    with pytest.raises(Unsuitable, match="takes the columns a, b"):
        model._ask(Columns({"a": A, "c": B}, 2), {})


@pytest.mark.parametrize("gap", [None, "a"])
def test_text_without_nulls(tmp_path: Path, gap: Any) -> None:
    model = opened(graph({"x": (TensorProto.STRING, ["n"])}, ["n"], "Identity"), tmp_path / "m")
    cells = np.array(["red", gap], dtype=object)
    table = Columns({"x": cells}, 2, None, frozenset(("x",)))
    if gap:
        assert model._ask(table, {})["y"].tolist() == ["red", "a"]
    else:
        with pytest.raises(Unsuitable, match="cannot be null"):
            model._ask(table, {})


def classifier(zipmap: bool) -> Any:
    """A linear classifier, its label and its probabilities."""
    scores = [0.0, 1.0, 1.0, 0.0]
    nodes = [
        helper.make_node(
            "LinearClassifier",
            ["x"],
            ["label", "scores" if zipmap else "probabilities"],
            domain="ai.onnx.ml",
            coefficients=scores,
            intercepts=[0.0, 0.0],
            classlabels_ints=[0, 1],
            post_transform="SOFTMAX",
        )
    ]
    if zipmap:
        nodes.append(
            helper.make_node(
                "ZipMap", ["scores"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
            )
        )
        kind = helper.make_sequence_type_proto(
            helper.make_map_type_proto(LONG, helper.make_tensor_type_proto(FLOAT, []))
        )
        probabilities = helper.make_value_info("probabilities", kind)
    else:
        probabilities = helper.make_tensor_value_info("probabilities", FLOAT, ["n", 2])
    body = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("label", LONG, ["n"]), probabilities],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(body, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("zipmap", [False, True])
def test_a_classifier_answers_one_record_a_row(tmp_path: Path, zipmap: bool) -> None:
    model = opened(classifier(zipmap), tmp_path / "m")
    table = enforce(
        None, RawInput("dataframe_records", [{"a": 0, "b": 5}, {"a": 5, "b": 0}, {"a": 1, "b": 0}])
    )
    answer = model.run(table.batch, {})
    assert isinstance(answer, Columns)
    assert answer.arrays["label"].tolist() == [0, 1, 1]
    first = answer.arrays["probabilities"][0]
    assert len(first) == 2
    assert first[0] > 0.9


def test_an_example_does_not_narrow_what_the_graph_takes(tmp_path: Path) -> None:
    free = graph({"x": (TensorProto.INT32, ["n", "m"])}, ["n", "m"], "Identity")
    package = loaders.save_model(free, tmp_path / "m", input_example=np.array([[1, 2, 3]]))
    assert package.signature is not None
    assert package.signature.inputs == (TensorSpec(np.dtype(np.int32), (-1, -1)),)
    served = loaders.load_model(tmp_path / "m")
    assert served.predict(np.array([[1, 2, 3, 4]], np.int32))["y"].tolist() == [[1, 2, 3, 4]]
    floats = graph({"x": (FLOAT, ["n", 2])}, ["n", 2], "Identity")
    package = loaders.save_model(floats, tmp_path / "f", input_example=np.array([[0.1, 2]]))
    assert package.signature is not None
    assert package.signature.inputs == (TensorSpec(np.dtype(np.float32), (-1, 2)),)
    written = Signature((TensorSpec(np.dtype(np.float32), (-1, 3), "x"),))
    free = graph({"x": (FLOAT, ["n", "m"])}, ["n", "m"], "Identity")
    theirs = loaders.save_model(free, tmp_path / "t", signature=written, verify=False)
    assert theirs.signature == written
    # Whatever wrote the package took an example of three for the shape: the graph knows better.
    opened = loaders.load_model(tmp_path / "t")
    assert opened.signature is not None
    assert opened.signature.inputs == (TensorSpec(np.dtype(np.float32), (-1, -1), "x"),)
    assert opened.predict(np.array([[1, 2, 3, 4]], np.float32))["y"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("written", "declared", "read"),
    [
        ((-1, 3), {"x": (-1, -1)}, (-1, -1)),
        ((-1, 3), {"x": (-1, 3)}, (-1, 3)),
        ((-1, 3), {"x": (-1, 4)}, (-1, 3)),
        ((-1, -1), {"x": (-1, 4)}, (-1, -1)),
        ((3,), {"x": (-1, -1)}, (3,)),
        ((3,), {"other": (-1,), "more": (-1,)}, (3,)),
        ((3,), {}, (3,)),
    ],
)
def test_only_what_the_model_leaves_free_is_widened(written: Any, declared: Any, read: Any) -> None:
    signature = Signature((TensorSpec(np.dtype(np.float32), written, "x"),))
    wider = signature.widened(declared)
    assert wider.inputs == (TensorSpec(np.dtype(np.float32), read, "x"),)
    assert (wider is signature) == (written == read)
    unnamed = Signature((TensorSpec(np.dtype(np.float32), (-1, 3)),)).widened({"x": (-1, -1)})
    assert unnamed.inputs == (TensorSpec(np.dtype(np.float32), (-1, -1)),)


@pytest.mark.parametrize(
    ("inputs", "output", "merges"),
    [
        ({"x": (FLOAT, ["n", 2])}, ["n", 2], True),
        ({"x": (FLOAT, [None, 2])}, [None, 2], True),
        ({"x": (FLOAT, [1, 2])}, [1, 2], False),
        ({"x": (FLOAT, ["n"]), "y0": (FLOAT, ["n"])}, ["n"], True),
        ({"x": (FLOAT, ["n"]), "scale": (FLOAT, [])}, ["n"], False),
        ({"x": (FLOAT, ["n"]), "one": (FLOAT, [1])}, ["n"], False),
    ],
)
def test_it_merges_where_every_first_dimension_is_free(
    tmp_path: Path, inputs: Any, output: Any, merges: bool
) -> None:
    assert opened(graph(inputs, output), tmp_path / "m", verify=False).merges is merges


def test_bytes_and_paths_are_saved_too(tmp_path: Path) -> None:
    model = graph({"x": (FLOAT, ["n"])}, ["n"])
    onnx.save(model, tmp_path / "x.onnx")
    for name, source in (("bytes", model.SerializeToString()), ("path", tmp_path / "x.onnx")):
        loaded = opened(source, tmp_path / name)
        np.testing.assert_array_equal(loaded._ask(Tensors({"": A}, 2), {})["y"], A)


def weighted(tmp_path: Path, location: str) -> Any:
    """y = x + w, the weights in a file of their own."""
    weights = numpy_helper.from_array(np.full(4096, 3, np.float32), "w")
    x = helper.make_tensor_value_info("x", FLOAT, [4096])
    y = helper.make_tensor_value_info("y", FLOAT, [4096])
    body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "w.onnx", save_as_external_data=True, location=location)
    return tmp_path / "w.onnx"


def test_weights_next_to_the_graph_are_saved_with_it(tmp_path: Path) -> None:
    loaded = opened(weighted(tmp_path, "weights.bin"), tmp_path / "m", verify=False)
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(
        loaded._ask(Tensors({"": np.zeros(4096, np.float32)}, None), {})["y"], np.full(4096, 3)
    )


def test_weights_in_their_own_file_are_loaded_and_must_lie_in_the_package(tmp_path: Path) -> None:
    """As MLflow saves large graphs, and as a hostile package would reach for other files."""
    saved = loaders.save_model(graph({"x": (FLOAT, ["n"])}, ["n"]), tmp_path / "m", verify=False)
    source = weighted(tmp_path, "weights.bin")
    source.rename(saved.path / "model.onnx")
    (tmp_path / "weights.bin").rename(saved.path / "weights.bin")
    loaded = loaders.load_model(saved.path)
    np.testing.assert_array_equal(loaded.predict(np.zeros(4096, np.float32))["y"], np.full(4096, 3))

    (saved.path / "weights.bin").rename(tmp_path / "weights.bin")
    proto = onnx.load(saved.path / "model.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../weights.bin"
    (saved.path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Exception, match=r"(?i)external data"):
        loaders.load_model(saved.path)


def changed(path: Path, **entry: Any) -> Path:
    raw = yaml.safe_load((path / "MLmodel").read_text())
    raw["flavors"]["onnx"].update(entry)
    (path / "MLmodel").write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize(
    "providers",
    [
        "CPUExecutionProvider",
        None,
        [],
        ["InventedProvider"],
        [["CUDAExecutionProvider", {"a": 1}], ["CPUExecutionProvider"]],
    ],
)
def test_unavailable_providers_give_way_to_the_processor(tmp_path: Path, providers: Any) -> None:
    saved = loaders.save_model(graph({"x": (FLOAT, ["n"])}, ["n"]), tmp_path / "m", verify=False)
    loaded = loaders.load_model(changed(saved.path, providers=providers))
    np.testing.assert_array_equal(loaded.predict(A)["y"], A)


@pytest.mark.parametrize(
    "entry",
    [
        {"providers": [5]},
        {"onnx_session_options": {"execution_mode": "sideways"}},
        {"onnx_session_options": {"graph_optimization_level": 12345}},
        {"onnx_session_options": {"intra_op_num_threads": "many"}},
        {"onnx_session_options": [1]},
        {"onnx_session_options": {"extra_session_config": [1]}},
        {"onnx_session_options": {"extra_session_config": {"session.initializers_folder_path": "/"}}},
        {"providers": [["TensorrtExecutionProvider", {"trt_extra_plugin_lib_paths": "evil.so"}]]},
        {"providers": [["CPUExecutionProvider", "options"]]},
    ],
)
def test_options_that_are_not_known_are_refused(tmp_path: Path, entry: Any) -> None:
    saved = loaders.save_model(graph({"x": (FLOAT, ["n"])}, ["n"]), tmp_path / "m", verify=False)
    with pytest.raises(PackageError):
        loaders.load_model(changed(saved.path, **entry))


def test_session_options_are_applied_and_threads_are_capped(tmp_path: Path) -> None:
    options = {
        "intra_op_num_threads": 8,
        "inter_op_num_threads": 8,
        "execution_mode": "parallel",
        "graph_optimization_level": 1,
        "extra_session_config": {"session.set_denormal_as_zero": "1"},
    }
    saved = loaders.save_model(
        graph({"x": (FLOAT, ["n"])}, ["n"]), tmp_path / "m", verify=False, session_options=options
    )
    loaded = loaders.open_model(saved, {}, threads=1)
    applied = loaded._predictor._session.get_session_options()  # type: ignore[attr-defined]
    assert applied.intra_op_num_threads == 1
    assert applied.inter_op_num_threads == 1
    assert applied.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert applied.get_session_config_entry("session.intra_op.allow_spinning") == "0"


F4, I8 = np.dtype(np.float32), np.dtype(np.int64)


def test_the_graph_declares_its_inputs_if_there_is_no_other_declaration(tmp_path: Path) -> None:
    """Names, dtypes and shapes, -1 for what is free or symbolic; a scalar input has no axis."""
    inputs: dict[str, tuple[int, list[Any]]] = {
        "a": (FLOAT, ["n", 2]),
        "b": (FLOAT, [None, 2]),
        "scale": (FLOAT, []),
        "one": (FLOAT, [1, 2]),
    }
    saved = loaders.save_model(graph(inputs, ["n", 2]), tmp_path / "m", verify=False, params={"t": 1.5})
    assert saved.signature is not None
    assert saved.signature.inputs == (
        TensorSpec(F4, (-1, 2), "a"),
        TensorSpec(F4, (-1, 2), "b"),
        TensorSpec(F4, (), "scale"),
        TensorSpec(F4, (1, 2), "one"),
    )
    assert saved.signature.outputs == (TensorSpec(F4, (-1, 2), "y"),)
    assert [spec.name for spec in saved.signature.params or ()] == ["t"]
    given = Signature((TensorSpec(F4, (-1, 2)),))
    model = graph({"x": (FLOAT, ["n", 2])}, ["n", 2])
    assert loaders.save_model(model, tmp_path / "given", given).signature == given
    example = loaders.save_model(model, tmp_path / "e", input_example=np.ones((2, 2), np.float32))
    assert example.signature is not None
    assert example.signature.inputs == given.inputs


@pytest.mark.parametrize(("last", "output"), [("m", ["n", "m"]), ("m", []), (2, ["n", None, 2])])
def test_outputs_that_are_in_doubt_are_not_declared(tmp_path: Path, last: Any, output: list[Any]) -> None:
    """Some are stated with a wrong rank here, as in models that people serve."""
    saved = loaders.save_model(graph({"x": (FLOAT, ["n", last])}, output), tmp_path / "m", verify=False)
    assert saved.signature is not None
    assert saved.signature.inputs is not None
    assert saved.signature.outputs is None


def test_a_graph_that_states_too_little_gets_no_signature(tmp_path: Path) -> None:
    unranked = graph({"x": (FLOAT, ["n"])}, ["n"], "Abs")
    unranked.graph.input[0].type.tensor_type.ClearField("shape")
    assert loaders.save_model(unranked, tmp_path / "unranked", verify=False).signature is None
    listed = graph({"x": (FLOAT, ["n"])}, ["n"], "SequenceLength")
    item = helper.make_tensor_type_proto(FLOAT, ["n"])
    listed.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(item))
    listed.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(LONG, []))
    assert loaders.save_model(listed, tmp_path / "listed", verify=False).signature is None
    assert loaders.save_model(b"for a runtime to come", tmp_path / "unknown", verify=False).signature is None


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("inputs", [[1, 2], [3, 4]]),
        ("instances", [[1, 2], [3, 4]]),
        ("inputs", {"x": [[1, 2], [3, 4]]}),
        ("instances", [{"x": [1, 2]}, {"x": [3, 4]}]),
        ("dataframe_records", [{"a": 1, "b": 2}, {"a": 3, "b": 4}]),
        ("dataframe_split", {"columns": ["a", "b"], "data": [[1, 2], [3, 4]]}),
        ("dataframe_split", {"data": [[1, 2], [3, 4]]}),
        ("python", np.array([[1, 2], [3, 4]])),
    ],
)
@pytest.mark.parametrize("width", [2, "m"])
def test_whole_numbers_are_cast_to_what_the_graph_takes(
    tmp_path: Path, form: Any, data: Any, width: Any
) -> None:
    model = opened(graph({"x": (FLOAT, ["n", width])}, ["n", 2]), tmp_path / "m", verify=False)
    enforced = enforce(model.signature, RawInput(form, data))
    assert enforced.warnings == ()
    answer = model.run(enforced.batch, enforced.params)
    assert isinstance(answer, Tensors)
    assert answer.rows == 2
    np.testing.assert_array_equal(answer.arrays["y"], [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("inputs", [[1, "2"]]),
        ("dataframe_records", [{"x": [1, 2]}, {"x": [3, 4, 5]}]),
        ("inputs", [[1, 2, 3]]),
        ("inputs", [1, 2]),
        ("inputs", {"y": [[1, 2]]}),
        ("dataframe_split", {"columns": ["a", "b", "c"], "data": [[1, 2, 3]]}),
        ("dataframe_split", {"columns": ["a"], "data": [[1]]}),
        ("dataframe_split", {"columns": ["a", "b"], "data": []}),
        ("dataframe_split", {"columns": ["a", "b"], "data": [[1, "x"]]}),
    ],
)
def test_what_does_not_fit_the_graph_is_the_callers_fault(tmp_path: Path, form: Any, data: Any) -> None:
    model = opened(graph({"x": (FLOAT, ["n", 2])}, ["n", 2]), tmp_path / "m", verify=False)
    with pytest.raises(InvalidInput):
        enforce(model.signature, RawInput(form, data))


@pytest.mark.all
@pytest.mark.filterwarnings("ignore")  # mlflow warns while it is imported
def test_mlflow_reads_the_signature_of_a_graph(tmp_path: Path) -> None:
    mlflow = needs("mlflow")
    saved = loaders.save_model(graph({"x": (FLOAT, ["n", 2])}, ["n", 2]), tmp_path / "m", verify=False)
    model = mlflow.pyfunc.load_model(str(saved.path))
    assert model.metadata.signature.inputs.to_dict() == [
        {"name": "x", "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": (-1, 2)}}
    ]
    answer = model.predict({"x": np.array([[1, 2]], np.float32)})
    np.testing.assert_array_equal(answer["y"], [[1, 2]])
