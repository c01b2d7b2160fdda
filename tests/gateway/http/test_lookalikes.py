"""The routes of other model servers, through a real socket, with real models behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Served, settings

ROWS = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]
NAMED = [dict(zip(("sl", "sw", "pl", "pw"), row, strict=True)) for row in ROWS]


@pytest.mark.parametrize("path", ["iris", "iris@champion", "iris/versions/1", "iris/labels/champion"])
@pytest.mark.parametrize("rows", [ROWS, NAMED], ids=["positions", "names"])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", None])
def test_v1_predicts(server: Served, path: str, rows: Any, content_type: str | None) -> None:
    body = {"instances": rows}
    reply = server.request("POST", f"/v1/models/{path}:predict", body, content_type)
    assert reply.status == 200, reply.body
    assert reply.json["predictions"] == server.post("/predict/iris", {"instances": NAMED}).json["predictions"]
    assert reply.headers["x-model-version"] == "1"
    assert ("warnings" in reply.json) is (rows is ROWS)


def test_an_escaped_colon_is_a_colon(server: Served) -> None:
    assert server.post("/v1/models/iris%3Apredict", {"instances": NAMED}).status == 200


def test_v1_says_whether_a_model_is_ready(server: Served) -> None:
    told = server.get("/v1/models/iris").json
    assert (told["name"], told["ready"]) == ("iris", True)
    assert told["model_version_status"][0]["state"] == "AVAILABLE"
    assert "iris" in server.get("/v1/models").json["models"]
    assert server.get("/v1/models/nothing").status == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models/iris:predict", {"instances": [[1, 2]]}, 400),
        ("/v1/models/iris:predict", {"instances": [["1", 2, 3, 4]]}, 400),
        ("/v1/models/iris:predict", {}, 400),
        ("/v1/models/nothing:predict", {"instances": ROWS}, 404),
        ("/v1/models/iris/labels/nothing:predict", {"instances": ROWS}, 404),
        ("/v1/models/iris@a/labels/b:predict", {"instances": ROWS}, 400),
        ("/v1/models/iris/labels/%ff:predict", {"instances": ROWS}, 400),
    ],
)
def test_v1_errors_have_the_member_error(server: Served, path: str, body: Any, status: int) -> None:
    reply = server.post(path, body)
    assert reply.status == status
    assert reply.json["error"] == reply.json["message"]
    if body == {"instances": [[1, 2]]}:
        assert '{"instances": [{"sl": …' in reply.json["hint"]


def test_endpoints_answer_as_mlflow_does(server: Served) -> None:
    rows = [["5.1", 3.5, 1.4, 0.2]]
    reply = server.post("/endpoints/iris/invocations", {"instances": rows})
    assert (reply.status, reply.headers["x-model-warnings"]) == (200, "lenient-cast")
    told = server.get("/api/2.0/endpoints/iris").json
    assert (told["name"], told["endpoint_url"]) == ("iris", "/endpoints/iris/invocations")
    assert "iris" in [one["name"] for one in server.get("/api/2.0/endpoints/").json["endpoints"]]
    assert server.get("/api/2.0/endpoints/nothing").status == 404


def test_elsewhere_positions_are_taken_only_if_the_operator_allows_it(
    server: Served, registry_file: str, tmp_path: Path
) -> None:
    assert server.post("/predict/iris", {"instances": ROWS}).status == 422
    assert server.post("/invocations", {"instances": ROWS}).status == 400
    models: Any = {"iris": {"positional": True}}
    with Served(settings(tmp_path, models=models), registry_file) as served:
        reply = served.post("/predict/iris", {"instances": ROWS})
        assert reply.json["predictions"] == [0, 2]
        assert "by position" in reply.json["warnings"][0]
        assert served.post("/predict/iris", {"instances": [[1, 2]]}).status == 422
        large = served.post("/predict/iris", {"instances": ROWS * 10_000})
        assert "by position" in large.json["warnings"][0]
