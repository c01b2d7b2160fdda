"""Forms (`multipart/form-data`): the model is given what the same value is as a body of its own, and what is
no valid form is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import gateway
from gateway.errors import Problem
from gateway.http import multipart
from loaders.schema import Scalar
from loaders.signature import ParamSpec, Signature
from tests.gateway.http.test_wholebodies import PICTURES, PNG, SIGNATURES, npy, telling
from tests.support.served import Served, settings

KIND = "multipart/form-data; boundary=X-b"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("forms")
    registry = str(directory / "registry.yaml")
    for name, signature in SIGNATURES.items():
        gateway.log_model(telling(), name, registry, signature=signature, alias="champion", verify=False)
    with_params = Signature(SIGNATURES["string"].inputs, None, (ParamSpec("size", Scalar.long, 3),))
    gateway.log_model(telling(), "params", registry, signature=with_params, alias="champion", verify=False)
    with Served(settings(directory), registry) as running:
        yield running


def part(content: bytes, head: str = 'Content-Disposition: form-data; name="file"') -> bytes:
    return b"--X-b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--X-b--\r\n"


@pytest.mark.parametrize(
    ("model", "file", "answer"),
    [
        ("binary", ("p.png", PNG, "image/png"), [repr(PNG)]),
        ("binary", ("p.bin", PNG + b"\r\n--X", "application/octet-stream"), [repr(PNG + b"\r\n--X")]),
        ("binary", ("p.pdf", PNG, "application/pdf"), [repr(PNG)]),
        ("string", ("t.txt", "ñ名".encode(), "text/plain"), ["'ñ名'"]),
        ("string", ("t.md", b"", "text/markdown"), ["''"]),
        ("tensor", ("p.npy", npy(PICTURES), "application/octet-stream"), ["float32 [2, 4, 3] 276.0"] * 2),
        ("tensor", ("p", npy(PICTURES), "application/x-npy"), ["float32 [2, 4, 3] 276.0"] * 2),
        (
            "tensor",
            ("p.raw", PICTURES.tobytes(), "application/octet-stream"),
            ["float32 [2, 4, 3] 276.0"] * 2,
        ),
    ],
)
def test_a_file_of_a_form_is_the_input(served: Served, model: str, file: Any, answer: list[str]) -> None:
    sent = httpx.Request("POST", "http://x/", files={"any name": file})
    body = sent.read()
    found = served.request("POST", f"/predict/{model}", body, sent.headers["content-type"])
    assert (found.status, found.json.get("predictions")) == (200, answer)


def test_a_field_of_a_form_is_text(served: Served) -> None:
    found = served.request("POST", "/predict/string", form(part(b"hello")), KIND)
    assert (found.status, found.json["predictions"]) == (200, ["'hello'"])


def test_params_are_a_part(served: Served) -> None:
    params = 'Content-Disposition: form-data; name="params"'
    found = served.request("POST", "/predict/params", form(part(b"a"), part(b'{"size": 5}', params)), KIND)
    assert found.status == 200
    wrong = served.request("POST", "/predict/params", form(part(b"a"), part(b'{"size": "x"}', params)), KIND)
    assert (wrong.status, wrong.code) == (422, "INVALID_INPUT")
    for text in (b"[1]", b"{", b'{"a": "' + b"a" * 70_000 + b'"}'):
        refused = served.request("POST", "/predict/params", form(part(b"a"), part(text, params)), KIND)
        assert (refused.status, refused.code) == (400, "MALFORMED_BODY")


def test_curl_sends_a_file(served: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "p.png").write_bytes(PNG)
    url = f"http://127.0.0.1:{served.port}/predict/binary"
    done = subprocess.run(
        ["curl", "-s", "-F", f"file=@{tmp_path}/p.png", url], capture_output=True, text=True, check=True
    )
    assert "predictions" in done.stdout


@pytest.mark.parametrize("model", ["two", "number"])
def test_models_of_other_inputs_take_no_form(served: Served, model: str) -> None:
    refused = served.request("POST", f"/predict/{model}", form(part(b"1")), KIND)
    assert (refused.status, refused.code) == (415, "UNSUPPORTED_MEDIA_TYPE")


HEAD = 'Content-Disposition: form-data; name="file"'
MALFORMED = {
    "nothing": b"",
    "no boundary": b"hello",
    "only the end": b"--X-b--\r\n",
    "no end": part(b"a"),
    "cut in the head": b"--X-b\r\nContent-Disp",
    "no empty line": b"--X-b\r\n" + HEAD.encode() + b"\r\n--X-b--",
    "two inputs": form(part(b"a"), part(b"b")),
    "four parts": form(*[part(b"a")] * 4),
    "a name twice": form(part(b"a", HEAD + '; name="other"')),
    "no name": form(part(b"a", "Content-Disposition: form-data")),
    "an attachment": form(part(b"a", 'Content-Disposition: attachment; name="file"')),
    "no disposition": form(part(b"a", "Content-Type: text/plain")),
    "a head twice": form(part(b"a", HEAD + "\r\n" + HEAD)),
    "a folded head": form(part(b"a", 'Content-Disposition: form-data;\r\n name="file"')),
    "base64": form(part(b"YQ==", HEAD + "\r\nContent-Transfer-Encoding: base64")),
    "another charset": form(part(b"a", HEAD + "\r\nContent-Type: text/plain; charset=utf-16")),
    "a long head": form(part(b"a", HEAD + "\r\nX: " + "a" * 5000)),
    "something behind it": form(part(b"a")) + b"more",
    "a boundary within a line": part(b"a") + b"--X-bmore\r\n" + b"--X-b--",
    "lines end with LF": form(part(b"a")).replace(b"\r\n", b"\n"),
    "a text that is not UTF-8": form(part(b"\xff")),
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_a_body_that_is_not_a_form_is_refused(served: Served, kind: str) -> None:
    refused = served.request("POST", "/predict/string", MALFORMED[kind], KIND)
    assert (refused.status, refused.code) == (400, "MALFORMED_BODY"), refused.json


@pytest.mark.parametrize(
    "header",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=a b c ; charset=utf-8",
        b"multipart/form-data; boundary=" + b"a" * 71,
        b'multipart/form-data; boundary="a"b',
        b"multipart/form-data; boundary=a; boundary=b",
        b"multipart/form-data; boundary=\xff",
        b"multipart/form-dataX; boundary=a",
    ],
)
def test_a_header_without_one_boundary_is_refused(header: bytes) -> None:
    with pytest.raises(Problem) as info:
        multipart.boundary(header)
    assert info.value.code == "UNSUPPORTED_MEDIA_TYPE"


def test_a_boundary_may_be_quoted() -> None:
    assert multipart.boundary(b'Multipart/Form-Data; BOUNDARY="a b?"') == "a b?"


def test_a_form_of_many_boundaries_is_read_no_further_than_its_fourth_part() -> None:
    body = part(b"") * 100_000
    with pytest.raises(Problem, match="too many parts"):
        multipart.parts(body, "X-b")


def test_what_a_large_part_costs_is_counted(served: Served) -> None:
    file = part(np.zeros(2_000_000, np.uint8).tobytes(), HEAD + "\r\nContent-Type: image/png")
    assert served.request("POST", "/predict/binary", form(file), KIND).status == 200
    assert served.gateway.parts.bodies.held == 0
