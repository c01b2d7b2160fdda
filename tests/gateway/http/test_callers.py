"""The needs of each route: one table, which must contain every route."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from gateway.credentials import Limit
from gateway.http import console, invocations
from gateway.http.documents import service
from tests.gateway.http.test_hostile import GOOD
from tests.support.guarded import TOKENS, bearer, entries, guarded, token
from tests.support.served import Served

Need = Literal["open", "signed", "predict", "read", "list", "control", "operate"]
"""`signed`: its own signature; `list`: a credential, and what it may not read is left out; `operate`: control
of the whole gateway."""

NEEDS: dict[str, Need] = {
    "POST /predict/{}": "predict",
    "POST /predict/{}/versions/{}": "predict",
    "POST /predict": "predict",
    "POST /invocations": "predict",
    "GET /ping": "open",
    "GET /health": "open",
    "GET /version": "open",
    "GET /v2": "open",
    "GET /v2/health/live": "open",
    "GET /v2/health/ready": "open",
    "GET /v2/models/{}": "read",
    "GET /v2/models/{}/ready": "read",
    "POST /v2/models/{}/infer": "predict",
    "POST /v2/models/{}/versions/{}/infer": "predict",
    "POST /v2/repository/index": "list",
    "POST /v2/repository/models/{}/load": "control",
    "POST /v2/repository/models/{}/unload": "control",
    "GET /v1/models": "list",
    "GET /v1/models/{}": "read",
    "POST /v1/models/{}:predict": "predict",
    "POST /endpoints/{}/invocations": "predict",
    "GET /api/2.0/endpoints": "list",
    "GET /api/2.0/endpoints/{}": "read",
    "GET /models": "list",
    "GET /models/{}": "read",
    "GET /models/{}/versions/{}": "read",
    "GET /models/{}/openapi.json": "read",
    "GET /models/{}/docs": "read",
    "PUT /models/{}/aliases/{}": "control",
    "DELETE /models/{}/aliases/{}": "control",
    "POST /models/{}/aliases/{}/rollback": "control",
    "POST /models/{}/load": "control",
    "POST /models/{}/versions/{}/load": "control",
    "POST /models/{}/unload": "control",
    "POST /models/{}/versions/{}/unload": "control",
    "GET /rollouts": "list",
    "GET /rollouts/{}": "read",
    "POST /rollouts/{}/pause": "control",
    "POST /rollouts/{}/resume": "control",
    "POST /rollouts/{}/abort": "control",
    "POST /rollouts/{}/finish": "control",
    "GET /events": "operate",
    "GET /captures": "operate",
    "DELETE /captures": "operate",
    "GET /captures/{}": "control",
    "DELETE /captures/{}": "control",
    "GET /captures/{}/versions/{}": "control",
    "DELETE /captures/{}/versions/{}": "control",
    "POST /registry/refresh": "operate",
    "GET /registry.yaml": "operate",
    "POST /webhooks/mlflow": "signed",
    "GET /livez": "open",
    "GET /readyz": "open",
    "GET /metrics": "operate",
    "GET /usage": "operate",
    "GET /openapi.json": "open",
    "GET /docs": "list",
}


@pytest.fixture(scope="module")
def served(registry_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with guarded(registry_file, tmp_path_factory.mktemp("guarded")) as made:
        yield made


#: Pages, which say a refusal in HTML: `test_pages_of_the_console_leave_out_other_models`.
PAGES = {
    *("GET /", "GET /console/failures", "GET /console/rollouts", "GET /console/rollouts/{}"),
    *("GET /console/sign-in", "POST /console/codes"),
}


def test_every_route_has_its_entry() -> None:
    """The document of the routes is held to the router by a test of its own."""
    word = re.compile(r"{\w+}")
    routes = {f"{route.method.upper()} {word.sub('{}', route.path)}" for route in service.routes()}
    assert routes == NEEDS.keys() | PAGES
    assert {path.decode() for path in invocations.PATHS} <= {route.partition(" ")[2] for route in NEEDS}


@pytest.mark.parametrize("path", [console.HOME, console.FAILURES, console.ROLLOUTS])
def test_pages_of_the_console_need_a_credential_and_leave_out_other_models(
    served: Served, path: bytes
) -> None:
    assert served.get(path.decode()).status == 401
    text = served.get(path.decode(), **bearer("alice")).body.decode()
    assert "echo" not in text
    assert "tensor" not in text
    if path == console.HOME:
        assert "iris" in text
    assert served.get(console.SIGN_IN.decode()).status == 200
    assert served.post(console.CODES.decode()).status == 401
    assert served.post(console.CODES.decode(), **bearer("alice")).status == 200
    assert served.get(f"{console.ROLLOUTS.decode()}/iris@champion", **bearer("alice")).status == 200
    assert served.get(f"{console.ROLLOUTS.decode()}/iris@champion", **bearer("bob")).status == 403
    verb = f"{console.ROLLOUTS.decode()}/iris@champion/abort"
    assert served.post(verb, **bearer("alice")).status == 403


def ask(served: Served, route: str, caller: str | None, model: str = "iris") -> Any:
    method, _, path = route.partition(" ")
    alias = "@champion" if path.startswith("/rollouts/") else ""
    for value in (model + alias, "champion" if "aliases" in path else "1"):
        path = path.replace("{}", value, 1)
    headers = bearer(caller)
    body: object = GOOD
    if path in ("/predict", "/invocations"):
        headers["x_model"] = model
    elif "/infer" in path:
        body = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1.0]}]}
    elif NEEDS[route] in ("control", "operate") and method != "GET" and not path.startswith("/v2"):
        path += "?not=known"  # what is allowed is refused later, and does nothing
        body = {}
    elif NEEDS[route] != "predict":
        body = None
    return served.request("HEAD" if path == "/events" else method, path, body, **headers)


@pytest.mark.parametrize("route", NEEDS)
def test_what_a_route_needs(served: Served, route: str) -> None:
    need = NEEDS[route]
    without = ask(served, route, None)
    if need in ("open", "signed"):
        assert (without.status == 200) == (need == "open"), without.body
        return
    assert without.status == 401
    assert without.headers["www-authenticate"].startswith("Bearer")
    assert ask(served, route, "nobody").status == 401
    allowed = {
        "predict": {"alice", "boss", "admin"},
        "read": {"alice", "op", "boss", "admin"},
        "list": {"alice", "bob", "op", "boss", "admin"},
        "control": {"op", "boss", "admin"},
        "operate": {"boss", "admin"},
    }[need]
    for caller in ("alice", "bob", "op", "boss", "admin"):
        answer = ask(served, route, caller)
        refused = answer.status in (401, 403)
        assert refused == (caller not in allowed), (caller, answer.status, answer.body)
        if refused:
            assert answer.status == 403


@pytest.mark.parametrize(
    "route", [route for route, need in NEEDS.items() if need in ("predict", "read", "control")]
)
def test_a_refusal_does_not_say_whether_the_model_exists(served: Served, route: str) -> None:
    there, absent = (ask(served, route, "bob", model) for model in ("iris", "nope"))
    assert there.status == absent.status == 403

    def said(answer: Any, model: str) -> str:
        text = answer.body.decode().replace(answer.headers["x-request-id"], "ID").replace(model, "MODEL")
        return text + str(
            sorted((k, v) for k, v in answer.headers.items() if k not in ("x-request-id", "date"))
        )

    assert (
        said(there, "iris").replace("'content-length', '", "").split("('date'")[0][:200]
        == said(absent, "nope").replace("'content-length', '", "").split("('date'")[0][:200]
    )


@pytest.mark.parametrize("route", [route for route, need in NEEDS.items() if need == "list"])
def test_lists_leave_out_what_a_caller_may_not_read(served: Served, route: str) -> None:
    for caller, mine, other in (("alice", "iris", "echo"), ("bob", "echo", "iris")):
        text = ask(served, route, caller).body.decode()
        assert mine in text
        assert f">{other}<" not in text
        assert f'"{other}"' not in text
        assert "tensor" not in text.replace("tensors", "").replace("binary_tensor", "")
    assert "echo" in ask(served, route, "boss").body.decode()


def test_an_alias_alone(served: Served) -> None:
    champ = bearer("champ")
    for path, status in {
        "iris": 200, "iris@champion": 200, "iris/versions/1": 403, "iris@challenger": 403,
        "iris%40champion": 403, "IRIS": 403, "iris@Champion": 403, "iris/versions/01": 400,
        "iris%2Fversions%2F1": 400, "%69ris": 200,
    }.items():  # fmt: skip
        assert served.post(f"/predict/{path}", GOOD, **champ).status == status, path
    for alias, status in {"champion": 403, "challenger": 400}.items():
        assert served.request("PUT", f"/models/iris/aliases/{alias}", {"x": 1}, **champ).status == status


def test_header_and_body_name_the_model_that_is_checked(served: Served) -> None:
    alice = bearer("alice")
    assert served.post("/predict", GOOD, x_model="echo", **alice).status == 403
    assert served.post("/predict", GOOD, x_model="models:/iris@champion", **alice).status == 200
    assert served.post("/predict", {**GOOD, "model": "models:/echo"}, **alice).status == 403
    assert served.post("/predict", {**GOOD, "model": "models:/iris"}, **alice).status == 200
    assert served.post("/predict", GOOD, **alice).status == 200, "the default model is checked as well"
    assert served.post("/predict", GOOD, **bearer("bob")).status == 403
    # A header never replaces the path.
    assert served.post("/predict/echo", GOOD, x_model="iris", **alice).status == 403
    assert served.post("/predict/iris", {**GOOD, "model": "models:/echo"}, **alice).status == 400
    target = {"x_amzn_sagemaker_target_model": "echo"}
    assert served.post("/invocations", GOOD, **target, **alice).status == 403
    assert served.post("/predict", GOOD, x_model="models:/m-" + "0" * 32, **alice).status == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"bearer {token('alice')}", 200),
        (f"BEARER  {token('alice')} ", 200),
        (f"Basic {token('alice')}", 401),
        (token("alice"), 401),
        (f"Bearer {token('alice')[:-1]}", 401),
        (f"Bearer {token('alice')}x", 401),
        (f"Bearer {token('ALICE')}", 401),
        (f"Bearer {hashlib.sha256(token('alice').encode()).hexdigest()}", 401),
        ("Bearer", 401),
        ("Bearer " + "x" * 60_000, 401),
        ("Bearer a.b.c", 401),
    ],
)
def test_forms_of_the_header(served: Served, given: str, status: int) -> None:
    answer = served.post("/predict/iris", GOOD, authorization=given)
    assert answer.status == status, answer.body
    assert token("alice")[:-1] not in answer.body.decode()


def test_a_token_in_the_url_or_twice_is_refused(served: Served) -> None:
    for name in ("access_token", "token", "authorization"):
        assert served.post(f"/predict/iris?{name}={token('alice')}", GOOD).status == 401
        assert served.get(f"/models/iris?{name}={token('alice')}").status == 401
        assert served.get(f"/models?{name}={token('alice')}").status in (401, 422)
    body = json.dumps(GOOD).encode()
    for second in (token("boss"), "mgw_wrong", ""):
        with served.connect() as connection:
            head = f"POST /predict/iris HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('alice')}\r\n"
            head += f"authorization: Bearer {second}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer


def test_a_refused_request_is_not_read(served: Served) -> None:
    with served.connect() as connection:
        head = b"POST /predict/iris HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_names_do_not_leak(served: Served) -> None:
    alice = bearer("alice")
    ready = served.get("/readyz").json
    assert (ready["preload_pending"], ready["preload_errors"]) == ([], {})
    near = served.get("/models/irisx", **bearer("bob"))
    assert near.status == 403
    # A name that a pattern covers and that does not exist: no other name is suggested.
    champion = served.post("/predict/iris@nope", GOOD, **alice)
    assert champion.json["hint"] == "aliases of iris: champion"
    assert "echo" not in served.get("/docs", **alice).body.decode()
    tags = {served.get("/docs", **bearer(name)).headers["etag"] for name in ("alice", "bob")}
    assert len(tags) == 2
    assert served.get("/metrics", **alice).status == 403


def test_a_hint_names_no_model_that_the_caller_may_not_know(registry_file: str, tmp_path: Path) -> None:
    TOKENS["wild"] = {"predict": ["iri", "echx"]}
    try:
        with guarded(registry_file, tmp_path) as made:
            answer = made.post("/predict/iri", GOOD, **bearer("wild"))
            assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")
            assert "iris" not in answer.body.decode().replace("iri'", "")
            assert "iris" in made.post("/predict/iri", GOOD, **bearer("admin")).json["hint"]
    finally:
        del TOKENS["wild"]


def test_a_revoked_token_ends_in_the_middle_of_a_connection(registry_file: str, tmp_path: Path) -> None:
    with guarded(registry_file, tmp_path) as made:
        connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)

        def status() -> int:
            connection.request("GET", "/models/iris", headers={"Authorization": f"Bearer {token('alice')}"})
            answer = connection.getresponse()
            answer.read()
            return answer.status

        assert status() == 200
        fresh = tmp_path / "fresh"
        fresh.write_text(entries("bob"))
        fresh.replace(tmp_path / "tokens.json")
        end = time.monotonic() + 90
        while status() != 401:
            assert time.monotonic() < end
        fresh.write_text(entries("bob", "alice"))
        fresh.replace(tmp_path / "tokens.json")
        while status() != 200:
            assert time.monotonic() < end
        fresh.write_text("another-key")
        fresh.replace(tmp_path / "key")
        while made.get("/metrics", **bearer("admin")).status != 401:
            assert time.monotonic() < end
        connection.close()


def test_anonymous_callers_may_predict_where_the_settings_say_so(registry_file: str, tmp_path: Path) -> None:
    with guarded(registry_file, tmp_path, anonymous="predict") as made:
        assert made.post("/predict/echo", GOOD).status != 401
        assert made.get("/models/iris").status == 200
        assert made.post("/predict/iris", GOOD, authorization="Bearer mgw_wrong").status == 401
        assert made.post("/predict/iris", GOOD, **bearer("bob")).status == 403
        hidden = made.post("/predict/iris", "{", **bearer("bob"))
        assert (hidden.status, hidden.headers.get("x-model-version")) == (403, None)
        assert made.get("/metrics").status == 401
        assert made.post("/models/iris/load").status == 401


def test_a_team_has_its_limits_and_its_label(registry_file: str, tmp_path: Path) -> None:
    limits = {"blue": Limit(requests_per_second=0.01), "token:bob": Limit(rows_per_second=0.5)}
    with guarded(registry_file, tmp_path, limits=limits) as made:
        assert made.post("/predict/iris", GOOD, **bearer("blue")).status == 200
        refused = made.post("/predict/iris@champion", GOOD, **bearer("blue"))
        assert (refused.status, refused.code) == (429, "OVERLOADED")
        assert 50 < int(refused.headers["retry-after"]) <= 100
        assert "the team blue" in refused.json["message"]
        assert refused.headers["x-model-version"] == "1"
        assert made.get("/models/iris", **bearer("blue")).status == 200, "only predictions count"
        rows = {"dataframe_records": [{"x": 1.0}] * 100}
        assert [made.post("/predict/echo", rows, **bearer("bob")).status for _ in range(2)] == [200, 429]
        assert made.post("/predict/iris", GOOD, **bearer("alice")).status == 200
        text = made.get("/metrics", **bearer("boss")).body.decode()
        assert 'code="2xx",model="iris",team="blue",version="1"} 1.0' in text
        assert 'code="OVERLOADED",model="iris",team="blue",version="1"} 1.0' in text
        quotas = [quota for known in made.gateway.access._known.values() for quota in known.quotas]
        assert [quota.running for quota in quotas] == [0, 0]


def test_a_caller_over_its_limits_is_refused_before_its_body_is_read(
    registry_file: str, tmp_path: Path
) -> None:
    with guarded(registry_file, tmp_path, limits={"blue": Limit(requests_per_second=0.01)}) as made:
        assert made.post("/predict/iris", GOOD, **bearer("blue")).status == 200
        with made.connect() as connection:
            head = f"POST /predict/iris HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('blue')}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 429")


def test_a_stream_of_events_ends_with_its_credential(registry_file: str, tmp_path: Path) -> None:
    with guarded(registry_file, tmp_path) as made:
        connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
        connection.request("GET", "/events", headers=bearer("boss"))
        stream = connection.getresponse()
        assert stream.status == 200
        fresh = tmp_path / "fresh"
        fresh.write_text(entries("alice"))
        fresh.replace(tmp_path / "tokens.json")
        assert b": the events" in stream.read(), "it is read to its end"
        connection.close()


def test_control_calls_are_written_down(registry_file: str, tmp_path: Path) -> None:
    TOKENS["mover"] = {"control": ["iris@audited", "iris/2"], "predict": ["iris"], "team": "blue"}
    try:
        with guarded(registry_file, tmp_path) as made:
            path, mover = "/models/iris/aliases/audited", bearer("mover")
            for version in ("1", "2"):
                moved = made.request("PUT", f"{path}?wait=true", {"version": version}, **mover)
                assert moved.status == 200, moved.body
            assert made.request("PUT", path, {"version": "9"}, **mover).status == 404
            assert made.request("PUT", f"{path}?token=hush&wait=yes", {"version": "1"}, **mover).status == 422
            assert (
                made.request("PUT", "/models/iris/aliases/champion", {"version": "1"}, **mover).status == 403
            )
            assert made.post("/models/iris/versions/2/unload", **mover).status == 200
            assert made.post("/v2/repository/models/iris/load", **bearer("admin")).status == 200
            assert made.post("/models/iris/load").status == 401
            assert made.post("/models/iris/load", authorization="Bearer mgw_hush").status == 401
            shown = made.get("/rollouts/iris@audited", **mover).json["calls"]
            assert "calls" not in made.get("/rollouts/iris@audited", **bearer("alice")).json
            assert made.request("DELETE", path, **mover).status == 200
        file = tmp_path / "state" / "audit.jsonl"
        assert file.stat().st_mode & 0o777 == 0o600
        text = file.read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        facts = [(line["who"], line["before"], line["after"], line["result"]) for line in lines]
        assert facts == [
            ("token:mover", None, "1", "done"),
            ("token:mover", "1", "2", "done"),
            ("token:mover", "2", "2", "VERSION_NOT_FOUND"),
            ("token:mover", "2", "2", "INVALID_INPUT"),
            ("token:mover", "1", "1", "FORBIDDEN"),
            ("token:mover", "READY", "UNLOADED", "done"),
            ("admin", *([lines[6]["before"]]), "READY", "done"),
            ("token:mover", "2", None, "done"),
        ]
        first = lines[0]
        assert (first["call"], first["team"]) == (f"PUT {path}", "blue")
        assert first["reference"] == "models:/iris@audited"
        assert first["asked"] == {"wait": True, "version": "1"}
        assert [call["after"] for call in shown] == ["1", "2", "2", "2"]
        assert "hush" not in text
        assert not any(token(name) in text for name in TOKENS)
    finally:
        del TOKENS["mover"]


def test_captured_requests_need_control_of_their_model_and_reading_them_is_written_down(
    registry_file: str, tmp_path: Path
) -> None:
    TOKENS["keeper"] = {"control": ["iris"], "predict": ["iris", "echo"]}
    TOKENS["partly"] = {"control": ["iris@champion", "iris/2"]}
    try:
        with guarded(registry_file, tmp_path, capture={"share": 1}) as made:
            keeper, everything = bearer("keeper"), bearer("admin")
            assert made.post("/predict/iris", GOOD, **keeper).status == 200
            for path, caller, status in (
                ("/captures/iris", keeper, 200), ("/captures/iris/versions/1", keeper, 200),
                ("/captures/echo", keeper, 403), ("/captures", keeper, 403), ("/captures", everything, 200),
                ("/captures/iris", bearer("alice"), 403), ("/captures/iris", {}, 401),
                # Here a bare name means every version, and not the default alias.
                ("/captures/iris", bearer("partly"), 403),
                ("/captures/iris/versions/1", bearer("partly"), 403),
                ("/captures/iris/versions/2", bearer("partly"), 200),
            ):  # fmt: skip
                assert made.get(path, **caller).status == status, (path, caller)
            assert made.get("/captures", **everything).json["captures"][0]["requests"] == 1
            assert made.request("DELETE", "/captures/echo", **keeper).status == 403
            refused = made.request("DELETE", "/captures/iris", **bearer("partly"))
            assert refused.status == 403
            assert "all of models:/iris" in refused.json["message"]
            assert made.request("DELETE", "/captures/iris", **keeper).json["dropped"] == 1
        lines = [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]
        calls = [(line["who"], line["call"], line["result"]) for line in lines]
        assert calls[:3] == [
            ("token:keeper", "GET /captures/iris", "done"),
            ("token:keeper", "GET /captures/iris/versions/1", "done"),
            ("token:keeper", "GET /captures/echo", "FORBIDDEN"),
        ]
        assert calls[-1] == ("token:keeper", "DELETE /captures/iris", "done")
    finally:
        del TOKENS["keeper"], TOKENS["partly"]


def test_without_credentials_a_foreign_header_is_ignored(server: Served) -> None:
    assert server.post("/predict/iris", GOOD, authorization="Bearer of-a-proxy").status == 200
    assert server.get("/models", authorization="Basic abc").status == 200
    assert server.get("/metrics").status == 200
    assert server.get("/registry.yaml").status == 200
    assert server.get("/events").status == 401
