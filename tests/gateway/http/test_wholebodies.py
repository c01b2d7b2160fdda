"""Bodies that are one value: the model is given what the same value is in JSON, or the body is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gateway
from gateway.errors import Problem
from gateway.http import wholebodies
from loaders.signature import ColSpec, Signature, TensorSpec
from tests.support.served import Served, settings


def telling() -> Any:
    """A model that answers what it was given, as text. Its class is local, so that it is pickled by value."""

    class Telling:
        def predict(self, model_input: Any) -> Any:
            import numpy

            if isinstance(model_input, dict):
                (model_input,) = model_input.values()
            if isinstance(model_input, numpy.ndarray):
                total = float(model_input.astype("f8").sum())
                return [f"{model_input.dtype} {list(model_input.shape)} {total}"] * len(model_input)
            return [repr(value) for value in model_input.iloc[:, 0]]

    return Telling()


IMAGE = TensorSpec(np.dtype(np.float32), (-1, 4, 3))
SIGNATURES = {
    "binary": Signature(inputs=(ColSpec("binary", "file"),)),
    "string": Signature(inputs=(ColSpec("string", "text"),)),
    "unnamed": Signature(inputs=(ColSpec("string"),)),
    "tensor": Signature(inputs=(IMAGE,)),
    "named": Signature(inputs=(TensorSpec(np.dtype(np.uint8), (-1, -1), "pixels"),)),
    "two": Signature(inputs=(ColSpec("binary", "a"), ColSpec("binary", "b"))),
    "number": Signature(inputs=(ColSpec("double", "x"),)),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("whole")
    registry = str(directory / "registry.yaml")
    for name, signature in SIGNATURES.items():
        gateway.log_model(telling(), name, registry, signature=signature, alias="champion", verify=False)
    with Served(settings(directory), registry) as running:
        yield running


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version)
    return file.getvalue()


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
PICTURES = np.arange(24, dtype=np.float32).reshape(2, 4, 3)


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "audio/wav", "application/octet-stream"])
def test_a_file_is_one_row_of_a_binary_column(served: Served, kind: str) -> None:
    answer = served.request("POST", "/predict/binary", PNG, kind)
    assert (answer.status, answer.json["predictions"]) == (200, [repr(PNG)])
    record = {"file": base64.b64encode(PNG).decode()}
    assert served.post("/predict/binary", {"dataframe_records": [record]}).json == answer.json


@pytest.mark.parametrize("model", ["string", "unnamed"])
def test_a_text_is_one_row_of_a_string_column(served: Served, model: str) -> None:
    answer = served.request("POST", f"/predict/{model}", "ñ, \n名".encode(), "text/plain; charset=utf-8")
    assert (answer.status, answer.json["predictions"]) == (200, ["'ñ, \\n名'"])
    wrong = served.request("POST", f"/predict/{model}", b"\xff", "text/plain")
    assert (wrong.status, wrong.code) == (400, "MALFORMED_BODY")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_is_the_tensor(served: Served, version: tuple[int, int]) -> None:
    expected = served.post("/predict/tensor", {"inputs": PICTURES.tolist()}).json
    assert expected["predictions"] == ["float32 [2, 4, 3] 276.0"] * 2
    for array in (PICTURES, np.asfortranarray(PICTURES), PICTURES.astype(">f4")):
        sent = npy(array, version)
        assert served.request("POST", "/predict/tensor", sent, "application/x-npy").json == expected
    wrong = served.request("POST", "/predict/tensor", npy(PICTURES[0], version), "application/x-npy")
    assert [one["path"] for one in wrong.json["details"]] == ["inputs"]


def test_octets_are_the_values_of_a_tensor_with_one_free_length(served: Served) -> None:
    kind = "application/octet-stream"
    answer = served.request("POST", "/predict/tensor", PICTURES.tobytes(), kind)
    assert answer.json["predictions"] == ["float32 [2, 4, 3] 276.0"] * 2
    short = served.request("POST", "/predict/tensor", PICTURES.tobytes()[:-1], kind)
    assert (short.status, short.code) == (422, "INVALID_INPUT")
    assert short.json["details"][0]["expected"] == "a multiple of 48 bytes"
    assert served.request("POST", "/predict/named", b"\x01\x02", kind).status == 415  # two free lengths


def test_a_tensor_under_its_name(served: Served) -> None:
    pixels = npy(np.full((1, 5), 3, np.uint8))
    answer = served.request("POST", "/predict/named", pixels, "application/x-npy")
    assert answer.status == 200
    assert served.request("POST", "/invocations", pixels, "application/x-npy", x_model="named").status == 200


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("number", "text/plain"),
        ("number", "image/png"),
        ("two", "application/octet-stream"),
        ("string", "image/png"),
        ("binary", "text/plain"),
        ("binary", "application/x-npy"),
        ("tensor", "image/png"),
        ("tensor", "text/plain"),
    ],
)
def test_models_of_other_inputs_do_not_take_it(served: Served, model: str, kind: str) -> None:
    body = npy([1.0]) if kind.endswith("npy") else b"1"
    refused = served.request("POST", f"/predict/{model}", body, kind)
    assert (refused.status, refused.code) == (415, "UNSUPPORTED_MEDIA_TYPE")


def header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


HUGE = header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n")
HOSTILE = {
    "nothing": b"",
    "text": b"hello",
    "a zip": b"PK\x03\x04",
    "cut": npy(PICTURES)[:-1],
    "longer": npy(PICTURES) + b"\x00",
    "said to be huge": HUGE,
    "no dictionary": header(b"__import__('os')\n"),
    "objects": npy(np.array(["a", None], object)),
    "text values": npy(np.array(["a"])),
    "empty rows without end": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 0)}\n"),
    "negative": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}\n"),
    "twice negative": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-2,-4)}\n") + bytes(64),
    "negative and empty": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 0)}\n"),
    "a boolean length": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}\n") + bytes(8),
    "65 dimensions": header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (%s)}\n" % (b"1," * 65))
    + bytes(8),
    "a text that never ends": header(b"{'descr': '<f8', 'fortr-0 4), }\n"),
    "lines set in unevenly": header(b"  {'descr':\n '<f8'}\n"),
    "brackets without end": header(b"[" * 9000),
    "another version": b"\x93NUMPY\x09\x00" + bytes(20),
    "structured": npy(np.zeros(2, [("a", "i4")])),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_file_that_is_not_an_array_is_refused(kind: str) -> None:
    with pytest.raises(Problem) as info:
        wholebodies.parse_npy(HOSTILE[kind])
    assert info.value.code == "MALFORMED_BODY"


def test_a_large_body_is_taken_as_it_is(served: Served) -> None:
    pictures = np.ones((30_000, 4, 3), np.float32)
    answer = served.request("POST", "/predict/tensor", npy(pictures), "application/x-npy")
    assert answer.json["predictions"][0] == "float32 [30000, 4, 3] 360000.0"
    assert served.gateway.parts.large_bodies.pid is None  # nothing was parsed elsewhere


def test_the_document_of_a_model_lists_what_it_takes(served: Served) -> None:
    def listed(model: str) -> set[str]:
        path = served.get(f"/models/{model}/openapi.json").json["paths"][f"/predict/{model}"]
        kinds = set(path["post"]["requestBody"]["content"])
        return (
            kinds
            - {"application/json", "text/csv", "application/vnd.apache.arrow.stream"}
            - {"application/vnd.apache.parquet"}
        )

    form = "multipart/form-data"
    assert listed("binary") == {"application/octet-stream", "image/*", "audio/*", form}
    assert listed("string") == {"text/plain", form}
    assert listed("tensor") == {"application/octet-stream", "application/x-npy", form}
    assert listed("named") == {"application/x-npy", form}
    assert listed("two") == listed("number") == set()
