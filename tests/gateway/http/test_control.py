"""Views and verbs through a real socket, on a registry file of their own."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.served import KEY, ODD_NAME, Reply, Served, path_of, settings

ROW = {"dataframe_records": [{"sl": 5.1, "sw": 3.5, "pl": 1.4, "pw": 0.2}]}
CHAMPION = "/models/iris/aliases/champion"

VERBS = [
    ("PUT", CHAMPION, {"version": "1"}),
    ("DELETE", "/models/iris/aliases/nobody", None),
    ("POST", f"{CHAMPION}/rollback", None),
    ("POST", "/models/iris@champion/load", None),
    ("POST", "/models/iris/versions/1/load", None),
    ("POST", "/models/iris/unload", None),
    ("POST", "/models/iris/versions/1/unload", None),
    ("POST", "/registry/refresh", None),
]
IDS = [f"{method} {path}" for method, path, _ in VERBS]


def copied(registry_file: str, directory: Path) -> str:
    shutil.copytree(Path(registry_file).parent, directory / "registry")
    return str(directory / "registry" / "registry.yaml")


@pytest.fixture
def own(registry_file: str, tmp_path: Path) -> Iterator[Served]:
    """A gateway whose registry a test may change: iris has versions 1 (champion) and 2."""
    with Served(settings(tmp_path), copied(registry_file, tmp_path)) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(registry_file: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with an admin key."""
    directory = tmp_path_factory.mktemp("keyed")
    key_file = directory / "key"
    key_file.write_text(KEY + "\n")
    with Served(settings(directory, admin_key_file=key_file), copied(registry_file, directory)) as served:
        yield served


def refused(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.code


def version_served(server: Served) -> str:
    reply = server.post("/predict/iris@champion", ROW)
    assert reply.status == 200, reply.body
    return str(reply.json["model"]["version"])


# Views


def test_models(server: Served) -> None:
    reply = server.get("/models")
    assert reply.status == 200
    assert reply.json["writable"] is True
    by_name = {model["name"]: model for model in reply.json["models"]}
    assert by_name.keys() == {"iris", "echo", "tensor", ODD_NAME}
    assert by_name["iris"]["aliases"] == {"champion": "1"}
    assert [version["version"] for version in by_name["iris"]["versions"]] == ["1", "2"]
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.headers["x-request-id"]) == 32


def test_one_model_and_one_version(server: Served) -> None:
    assert version_served(server) == "1"
    assert server.get("/models/iris").json["name"] == "iris"
    version = server.get("/models/iris/versions/1").json
    assert (version["state"], version["version"]) == ("READY", "1")
    assert [column["name"] for column in version["signature"]["inputs"]] == ["sl", "sw", "pl", "pw"]
    assert version["bytes"] > 0
    assert "input_example" not in version


def test_names_are_taken_as_they_were_encoded(server: Served) -> None:
    assert server.get(f"/models/{path_of(ODD_NAME)}").json["name"] == ODD_NAME
    assert server.get(f"/models/{path_of(ODD_NAME)}/versions/1").json["name"] == ODD_NAME
    rollout = server.get(f"/rollouts/{path_of(ODD_NAME)}@champion").json
    assert (rollout["name"], rollout["alias"]) == (ODD_NAME, "champion")
    assert server.post(f"/models/{path_of(ODD_NAME)}@champion/load").status == 200


def test_rollouts(server: Served) -> None:
    assert version_served(server) == "1"
    rollout = server.get("/rollouts/iris@champion").json
    assert rollout.keys() >= {
        "desired", "serving", "last_good", "phase", "error", "since", "diverged", "history",
    }  # fmt: skip
    assert (rollout["desired"], rollout["serving"]) == ("1", "1")
    listed = server.get("/rollouts").json["rollouts"]
    assert any(one == {key: rollout[key] for key in one} for one in listed)
    assert rollout["policy"]["canary"]["steps"] == []


def test_lists_in_pages(server: Served) -> None:
    for path, member in (("/models", "models"), ("/rollouts", "rollouts")):
        whole = server.get(path).json
        assert "next" not in whole
        for limit in (1, 2, 1000):
            found: list[Any] = []
            after = ""
            while after is not None:
                page = server.get(f"{path}?limit={limit}{after and f'&after={quote(after)}'}").json
                assert len(page[member]) <= limit
                found += page[member]
                after = page["next"]
            assert [one["name"] for one in found] == [one["name"] for one in whole[member]]
        few = server.get(f"{path}?q=IRI").json[member]
        assert {one["name"] for one in few} == {"iris"}
        assert server.get(f"{path}?q=nothing").json[member] == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=%C2%B2",
        "limit=",
        f"limit=1{5000 * '0'}",
        "limit=0000000001",
        "limit=1&limit=2",
        "page=1",
        "wait",
    ],
)
def test_a_page_that_is_none(server: Served, query: str) -> None:
    for path in ("/models", "/rollouts"):
        assert refused(server.get(f"{path}?{query}")) == (422, "INVALID_INPUT")
    assert refused(server.get("/rollouts?after=iris")) == (422, "INVALID_INPUT")


def test_livez_and_readyz(server: Served) -> None:
    assert server.get("/livez").status == 200
    assert server.get("/readyz").status == 200
    assert server.get("/readyz").json["ready"] is True


def test_metrics_in_both_forms(server: Served) -> None:
    assert version_served(server) == "1"
    plain = server.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    strict = server.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert strict.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in text_string_to_metric_families(strict.body.decode())}
    assert names >= {
        "gateway_requests",
        "gateway_memory_bytes",
        "gateway_loop_lag_seconds",
        "gateway_alias_info",
    }


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/models/nobody", (404, "MODEL_NOT_FOUND")),
        ("/models/iris/versions/99", (404, "VERSION_NOT_FOUND")),
        ("/models/iris/versions/x", (400, "INVALID_REFERENCE")),
        ("/models/iris@champion", (400, "INVALID_REFERENCE")),
        ("/models/a%2fb", (400, "INVALID_REFERENCE")),
        ("/models/%ff", (400, "INVALID_REFERENCE")),
        ("/models/", (404, "NOT_FOUND")),
        ("/models/iris/", (404, "NOT_FOUND")),
        ("/models/iris/versions", (404, "NOT_FOUND")),
        ("/rollouts/iris", (400, "INVALID_REFERENCE")),
        ("/rollouts/iris@nobody", (404, "ALIAS_NOT_FOUND")),
        ("/rollouts/nobody@champion", (404, "MODEL_NOT_FOUND")),
        ("/registry.yaml/x", (404, "NOT_FOUND")),
    ],
)
def test_what_is_not_there(server: Served, path: str, answer: tuple[int, str]) -> None:
    assert refused(server.get(path)) == answer


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/models", {"GET", "HEAD"}),
        ("DELETE", "/models/iris", {"GET", "HEAD"}),
        ("GET", CHAMPION, {"PUT", "DELETE"}),
        ("OPTIONS", CHAMPION, {"PUT", "DELETE"}),
        ("GET", "/registry/refresh", {"POST"}),
        ("PATCH", "/models/iris/load", {"POST"}),
        ("POST", "/metrics", {"GET", "HEAD"}),
    ],
)
def test_methods_that_a_path_does_not_have(server: Served, method: str, path: str, allowed: set[str]) -> None:
    reply = server.request(method, path)
    assert refused(reply) == (405, "METHOD_NOT_ALLOWED")
    assert {name.strip() for name in reply.headers["allow"].split(",")} == allowed


def test_head_of_a_view(server: Served) -> None:
    reply = server.request("HEAD", "/models")
    assert (reply.status, reply.body) == (200, b"")


# Verbs


def test_a_promotion_that_is_waited_for_is_served(own: Served) -> None:
    assert version_served(own) == "1"
    reply = own.request("PUT", f"{CHAMPION}?wait=true", {"version": "2", "expect": "1"})
    assert reply.status == 200, reply.body
    assert version_served(own) == "2"
    back = own.post(f"{CHAMPION}/rollback?wait=true")
    assert back.status == 200, back.body
    assert version_served(own) == "1"


def test_who_made_an_alias_is_in_its_history(own: Served) -> None:
    reply = own.request("PUT", "/models/iris/aliases/canary?wait=true", {"version": "2"})
    assert reply.status == 200, reply.body
    history = own.get("/rollouts/iris@canary").json["history"]
    assert [(served["version"], served["moved_by"]) for served in history] == [("2", "promote")]


def test_a_promotion_is_accepted(own: Served) -> None:
    assert own.request("PUT", CHAMPION, {"version": "2", "force": False}).status == 202
    assert own.get("/models/iris").json["aliases"] == {"champion": "2"}
    assert own.request("PUT", CHAMPION, {"version": "2"}).status == 202, "the same version again"
    assert own.post(f"{CHAMPION}/rollback", {"to": "1"}).status == 202
    assert own.get("/models/iris").json["aliases"] == {"champion": "1"}


def test_a_dry_run_changes_nothing(own: Served) -> None:
    assert own.request("PUT", f"{CHAMPION}?dry_run=true", {"version": "2"}).status == 200
    assert own.get("/models/iris").json["aliases"] == {"champion": "1"}


def test_an_alias_is_made_and_removed(own: Served) -> None:
    path = "/models/iris/aliases/next"
    assert own.request("PUT", path, {"version": "2", "expect": None}).status == 202
    assert own.post("/predict/iris@next", ROW).json["model"]["version"] == "2"
    assert own.request("DELETE", path).status == 200
    assert refused(own.post("/predict/iris@next", ROW)) == (404, "ALIAS_NOT_FOUND")


def test_an_alias_of_an_odd_name(own: Served) -> None:
    path = f"/models/{path_of(ODD_NAME)}/aliases/next?wait=true"
    assert own.request("PUT", path, {"version": "1"}).status == 200
    assert own.get(f"/models/{path_of(ODD_NAME)}").json["aliases"] == {"champion": "1", "next": "1"}


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        (CHAMPION, {"version": "2", "expect": "2"}, (412, "PRECONDITION_FAILED")),
        (CHAMPION, {"version": "2", "expect": None}, (412, "PRECONDITION_FAILED")),
        (CHAMPION, {"version": "99"}, (404, "VERSION_NOT_FOUND")),
        ("/models/nobody/aliases/champion", {"version": "1"}, (404, "MODEL_NOT_FOUND")),
        ("/models/iris/aliases/latest", {"version": "1"}, (400, "INVALID_REFERENCE")),
        ("/models/iris/aliases/a%40b", {"version": "1"}, (400, "INVALID_REFERENCE")),
        ("/models/iris/aliases/a@b", {"version": "1"}, (400, "INVALID_REFERENCE")),
        ("/models/iris@x/aliases/a", {"version": "1"}, (400, "INVALID_REFERENCE")),
        (CHAMPION, None, (422, "INVALID_INPUT")),
        (CHAMPION, {}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": 2}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": None}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": "1.0"}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": "2", "force": "yes"}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": "2", "force": 1}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": "2", "expect": 1}, (422, "INVALID_INPUT")),
        (CHAMPION, {"version": "2", "forse": True}, (400, "MALFORMED_BODY")),
        (CHAMPION, "{", (400, "MALFORMED_BODY")),
        (CHAMPION, "[]", (400, "MALFORMED_BODY")),
        (CHAMPION, "x" * 70_000, (413, "BODY_TOO_LARGE")),
        (f"{CHAMPION}?wait=maybe", {"version": "2"}, (422, "INVALID_INPUT")),
        (f"{CHAMPION}?drry_run=true", {"version": "2"}, (422, "INVALID_INPUT")),
    ],
    ids=lambda value: str(value)[:45],
)
def test_promotions_that_are_refused_change_nothing(
    server: Served, path: str, body: Any, answer: tuple[int, str]
) -> None:
    assert refused(server.request("PUT", path, body)) == answer
    assert server.get("/models/iris").json["aliases"] == {"champion": "1"}


def test_a_refusal_names_the_field(server: Served) -> None:
    typed = server.request("PUT", CHAMPION, {"version": 2}).json
    assert typed["details"] == [
        {"path": "version", "problem": "has the wrong type", "expected": "string", "got": "number"}
    ]
    unknown = server.request("PUT", CHAMPION, {"version": "2", "forse": True}).json
    assert "force" in unknown["hint"]
    flag = server.request("PUT", f"{CHAMPION}?wait=maybe", {"version": "2"}).json
    assert flag["hint"] == "write ?wait=true or ?wait=false"
    assert "?dry_run" in server.request("PUT", f"{CHAMPION}?drry_run=true", {"version": "2"}).json["hint"]


@pytest.mark.parametrize("body", [{"version": "1"}, {"x": 1}])
@pytest.mark.parametrize("path", ["/registry/refresh", "/models/iris/load", "/models/iris/unload"])
def test_verbs_without_fields_take_none(server: Served, path: str, body: dict[str, Any]) -> None:
    assert refused(server.post(path, body)) == (400, "MALFORMED_BODY")


def test_load_and_unload(own: Served) -> None:
    assert own.post("/models/iris/versions/2/load").status == 200
    assert own.get("/models/iris/versions/2").json["state"] == "READY"
    assert own.post("/models/iris/versions/2/unload", {}).status == 200
    assert own.get("/models/iris/versions/2").json["state"] == "UNLOADED"
    assert own.post("/models/iris@champion/load?wait=false").status == 202
    assert own.post("/models/iris/unload?wait=false").status in (200, 202)
    assert version_served(own) == "1"
    assert refused(own.post("/models/nobody/load")) == (404, "MODEL_NOT_FOUND")


def test_refresh_looks_at_the_registry_now(own: Served) -> None:
    assert version_served(own) == "1"
    assert own.post("/registry/refresh").status == 200


# Access


FOREIGN = [
    {"host": "evil.example"},
    {"origin": "http://evil.example"},
    {"x_forwarded_for": "127.0.0.1"},
    {"forwarded": "for=127.0.0.1"},
]
NO_KEY = [{}, {"host": "127.0.0.1"}, {"x_real_ip": "127.0.0.1"}, {"origin": "null"}, *FOREIGN]


@pytest.mark.parametrize("headers", NO_KEY, ids=lambda headers: next(iter(headers), "none"))
@pytest.mark.parametrize(("method", "path", "body"), VERBS, ids=IDS)
def test_without_the_key_no_address_and_no_header_opens_a_verb(
    server: Served, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    reply = server.request(method, path, body, authorization="Bearer wrong", **headers)
    assert refused(reply) == (401, "UNAUTHENTICATED")


def test_the_key_that_the_gateway_made_opens_the_verbs(own: Served) -> None:
    assert own.post("/models/iris/load", authorization="").status == 401
    assert own.post("/models/iris/load", host="gw.example", x_forwarded_for="10.0.0.1").status == 200


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: next(iter(headers)))
def test_views_and_predictions_are_open(server: Served, headers: dict[str, str]) -> None:
    assert server.get("/models", **headers).status == 200
    assert server.post("/predict/iris", ROW, **headers).status == 200


@pytest.mark.parametrize(("method", "path", "body"), VERBS, ids=IDS)
def test_with_a_key_every_verb_needs_it(keyed: Served, method: str, path: str, body: Any) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
        reply = keyed.request(method, path, body, **headers)
        assert refused(reply) == (401, "UNAUTHENTICATED")
        assert reply.headers["www-authenticate"].startswith("Bearer")
    given = keyed.request(method, path, body, authorization=f"Bearer {KEY}", x_forwarded_for="10.0.0.1")
    assert given.status not in (401, 403), given.body


def test_the_input_example_is_for_holders_of_the_key(keyed: Served) -> None:
    path = "/models/iris/versions/1"
    assert "input_example" not in keyed.get(path).json
    assert "input_example" not in keyed.get(path, authorization="Bearer wrong").json
    example = keyed.get(path, authorization=f"Bearer {KEY}").json["input_example"]
    assert "5.1" in json.dumps(example)


def test_verbs_of_rollouts_need_a_rollout_and_control_access(server: Served) -> None:
    for verb in ("pause", "resume", "abort", "finish"):
        reply = server.post(f"/rollouts/iris@champion/{verb}")
        assert (reply.status, reply.json["error_code"]) == (409, "ROLLOUT_REFUSED")
        assert server.post(f"/rollouts/iris@champion/{verb}", authorization="Bearer no").status in (401, 403)
    assert server.post("/rollouts/iris@nobody/abort").json["error_code"] == "ALIAS_NOT_FOUND"
    assert server.post("/rollouts/iris/abort").json["error_code"] == "INVALID_REFERENCE"
    assert server.post("/rollouts/iris@champion/forget").status == 404


@pytest.mark.parametrize("canary", [[], [50, 5], [0], ["many"], [5, 100]])
def test_steps_that_make_no_canary_are_refused(server: Served, canary: list[object]) -> None:
    reply = server.request("PUT", "/models/iris/aliases/champion", {"version": "2", "canary": canary})
    assert (reply.status, reply.json["error_code"]) == (422, "INVALID_INPUT")
    assert server.get("/models/iris").json["aliases"]["champion"] == "1"


def test_a_share_that_is_none_is_refused(server: Served) -> None:
    reply = server.request("PUT", "/models/iris/aliases/champion", {"version": "2", "shadow": 1.5})
    assert (reply.status, reply.json["message"]) == (422, "shadow is not a share")


def test_events_are_streamed_as_they_happen(own: Served) -> None:
    assert own.get("/events").status == 401
    connection = http.client.HTTPConnection("127.0.0.1", own.port, timeout=60)
    connection.request("GET", "/events", headers={"authorization": f"Bearer {own.key}"})
    stream = connection.getresponse()
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.readline() == b": the events of this gateway\n"
    reply = own.request("PUT", "/models/iris/aliases/followed", {"version": "2"})
    assert reply.status in (200, 202)
    lines = {}
    while lines.get("event") != "swapped":
        name, _, value = stream.readline().decode().partition(": ")
        lines[name] = value.strip()
    data = json.loads(stream.readline().partition(b": ")[2])
    assert (data["model"], data["alias"], data["version"]) == ("iris", "followed", "2")
    connection.close()
