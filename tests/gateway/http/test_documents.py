"""OpenAPI documents and pages: valid by an independent validator, true to the routes, safe, and made once."""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gateway
from gateway.http.control import Control
from gateway.http.documents import Documents, openapi, service
from gateway.names import Reference
from gateway.record import RequestRecord
from loaders.enforcement import RawInput, enforce
from loaders.signature import Array, ColSpec, Map, Object, ParamSpec, Property, Scalar, Signature, TensorSpec
from tests.conftest import needs
from tests.support.served import ODD_NAME, Served, path_of, settings

NESTED = Object((Property("a", Scalar.long), Property("b", Array(Scalar.string), required=False)))
SIGNATURES: dict[str, Signature | None] = {
    "none": None,
    "table": Signature(
        inputs=tuple(ColSpec(kind, f"c_{kind}", kind is not Scalar.string) for kind in Scalar),
        outputs=(ColSpec(Scalar.long),),
        params=(ParamSpec("t", Scalar.double, 0.5), ParamSpec("l", Scalar.long, [1], (-1,))),
    ),
    "nested": Signature(inputs=(ColSpec(NESTED, "o"), ColSpec(Map(Scalar.double), "m"))),
    "unnamed": Signature(inputs=(ColSpec(Scalar.string),), outputs=(ColSpec(Scalar.double, "x"),)),
    "tensor": Signature(inputs=(TensorSpec(np.dtype(np.float32), (-1, 3)),)),
    "tensors": Signature(
        inputs=(
            TensorSpec(np.dtype(np.int8), (-1, 2), "a"),
            TensorSpec(np.dtype(np.str_), (-1,), "b"),
        ),
        outputs=(TensorSpec(np.dtype(np.float64), (-1,), "y"), TensorSpec(np.dtype(bool), (-1,), "z")),
    ),
}


def validate(document: Any) -> None:
    needs("openapi_spec_validator").validate(document)


def test_the_documents_of_all_kinds_of_signatures_are_valid() -> None:
    for signature in SIGNATURES.values():
        validate(openapi.model("m", "1", "a", signature, reference=Reference("m"), up="../.."))
    validate(service.document())


@pytest.mark.parametrize("kind", list(SIGNATURES))
def test_made_up_bodies_are_what_the_schemas_say_and_what_enforcement_takes(kind: str) -> None:
    jsonschema = needs("jsonschema")
    signature = SIGNATURES[kind]
    made = openapi.made_up(signature)
    assert bool(made) == (kind not in ("none", "unnamed"))
    for form, value in made.items():
        jsonschema.validate({form: value}, openapi.body(signature))
        enforce(signature, RawInput(form, value), None, "strict")


def test_every_control_route_is_in_the_document(server: Served) -> None:
    told = {(route.method.upper(), re.sub(r"\{\w+\}", "{}", route.path)) for route in service.routes()}
    for route in Control(server.gateway.parts)._router.routes:
        path = re.sub(r"\{\w+\}", "{}", route.path)
        for method in route.methods - {"HEAD"}:
            assert (method, path) in told, (method, route.path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose names are code, if a page does not escape them."""
    directory = tmp_path_factory.mktemp("documents")
    registry = str(directory / "registry.yaml")
    evil = "<script>alert(1)</script>"
    signature = Signature(
        inputs=(ColSpec("double", evil), ColSpec("double", "it's")),
        params=(ParamSpec("p", Scalar.string, evil),),
    )

    class Sum:
        def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
            return model_input.sum(axis=1).to_numpy()

    name = 'a "b" <i>&amp;'
    gateway.log_model(Sum(), name, registry, signature=signature, alias="champion", verify=False)
    with Served(settings(directory), registry) as running:
        yield running


def test_pages_escape_what_models_name(served: Served) -> None:
    name = path_of('a "b" <i>&amp;')
    for path in ("/docs", f"/models/{name}/docs", f"/models/{name}/versions/1/docs"):
        page = served.get(path)
        assert page.status == 200
        text = page.body.decode()
        assert "<script>alert" not in text
        assert "<i>" not in text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_a_page_and_all_that_it_loads_come_from_here(server: Served) -> None:
    for path in ("/docs", "/models/iris/docs", "/models/iris/versions/1/docs"):
        text = server.get(path).body.decode()
        assert "://" not in text
        for found in re.findall(r'(?:src|href)="([^"#]+)"', text):
            place = Path(path).parent / found
            resolved = posixpath.normpath("/" + str(place.as_posix()).lstrip("/"))
            assert server.get(resolved).status == 200, (path, found, resolved)


def test_documents_of_models(server: Served) -> None:
    for name in ("iris", "tensor", "echo", path_of(ODD_NAME)):
        for reference in (name, f"{name}@champion", f"{name}/versions/1"):
            answer = server.get(f"/models/{reference}/openapi.json")
            assert answer.status == 200
            validate(answer.json)
            assert f"/predict/{reference}" in answer.json["paths"]
    assert server.get("/models/nothing/openapi.json").code == "MODEL_NOT_FOUND"
    assert server.post("/models/iris/openapi.json").code == "METHOD_NOT_ALLOWED"
    validate(server.get("/openapi.json").json)


def test_the_examples_of_a_document_are_answered(server: Served) -> None:
    content = server.get("/models/iris/openapi.json").json["paths"]
    bodies = content["/predict/iris"]["post"]["requestBody"]["content"]
    for form, example in bodies["application/json"]["examples"].items():
        assert server.post("/predict/iris", example["value"]).status == 200, form
    table = bodies["text/csv"]["example"]
    assert server.request("POST", "/predict/iris", table, "text/csv").status == 200
    second = content["/v2/models/iris/infer"]["post"]["requestBody"]["content"]["application/json"]
    assert server.post("/v2/models/iris/infer", second["example"]).status == 200


def test_the_saved_example_only_with_the_key(server: Served) -> None:
    def examples(**headers: str) -> set[str]:
        path = server.get("/models/iris/openapi.json", **headers).json["paths"]["/predict/iris"]
        return set(path["post"]["requestBody"]["content"]["application/json"]["examples"])

    assert "saved" not in examples()
    key = f"Bearer {server.key}"
    assert "saved" in examples(authorization=key)
    page = server.get("/models/iris/docs", authorization=key)
    assert "saved" in page.body.decode()
    assert "private" in page.headers["cache-control"]
    assert "saved" not in server.get("/models/iris/docs").body.decode()


def test_a_document_is_made_once_for_each_version_and_has_a_tag(server: Served) -> None:
    first = server.get("/models/iris/openapi.json")
    tag = first.headers["etag"]
    again = server.get("/models/iris/openapi.json", if_none_match=f'"other", W/{tag}')
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert server.get("/models/iris/versions/2/openapi.json").headers["etag"] != tag
    documents = Documents(server.gateway.parts)
    made: list[Any] = []
    original = documents._document

    async def counted(*given: Any) -> dict[str, Any]:
        made.append(given)
        return await original(*given)

    documents._document = counted  # type: ignore[method-assign]

    async def ask() -> None:
        for _ in range(3):
            await documents._find(RequestRecord(), b"/models/iris/openapi.json")

    asyncio.run_coroutine_threadsafe(ask(), server.loop).result(30)
    assert len(made) == 1


def test_a_document_is_made_off_the_event_loop(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature may have a hundred thousand columns."""
    loops: list[Any] = []
    original = openapi.model

    def watched(*given: Any, **named: Any) -> Any:
        loops.append(asyncio._get_running_loop())
        return original(*given, **named)

    monkeypatch.setattr(openapi, "model", watched)
    documents = Documents(server.gateway.parts)
    find = documents._find(RequestRecord(), b"/models/iris/openapi.json")
    asyncio.run_coroutine_threadsafe(find, server.loop).result(30)  # type: ignore[arg-type]
    assert loops == [None]


def test_the_form_is_one_of_those_that_are_shown(server: Served) -> None:
    text = server.get("/models/iris/docs").body.decode()
    for body in re.findall(r'data-type="application/json" data-body="([^"]+)"', text):
        json.loads(body.replace("&quot;", '"').replace("&#x27;", "'"))
