"""How a gateway starts: without its registry, and with what another gateway has found out."""

from __future__ import annotations

import http.server
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import gateway
from tests.support.hostile import eventually
from tests.support.served import KEY, Served, settings

ROWS = {"dataframe_records": [{"a": 1.0}]}


def push(registry: str, *columns: str, alias: str | None = None) -> None:
    frame = pd.DataFrame({column: [0.0, 1.0, 2.0] for column in columns})
    model = LinearRegression().fit(frame, [0.0, 1.0, 2.0])
    gateway.log_model(model, "line", registry, input_example=frame, alias=alias, verify=False)


@contextmanager
def document(content: bytes) -> Iterator[tuple[str, list[int]]]:
    """A web server with one registry document; it answers 503 as often as the list has entries left."""
    refusals = [503, 503]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if refusals:
                self.send_response(refusals.pop())
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/registry.yaml", refusals
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_registry_that_is_away_at_the_start_is_queried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with document(b"version: 1\nmodels: {}\n") as (url, refusals):
        refusals += [503] * 2
        with Served(settings(tmp_path, poll_interval=0.05), url) as server:
            first = server.get("/readyz")
            answer = server.post("/predict/line", ROWS)
            assert server.get("/livez").status == 200
            assert eventually(lambda: server.get("/readyz").status == 200)
            metrics = server.get("/metrics").body.decode()
        assert "`gateway config` shows where that comes from" in caplog.text
        if first.status == 503:  # else all four refusals were over before the request
            assert first.json["ready"] is False
        if answer.status == 503:
            assert answer.json["error_code"] == "REGISTRY_UNAVAILABLE"
        assert refusals == []
    [count] = re.findall(r"^gateway_registry_errors_total (\S+)", metrics, re.M)
    assert float(count) == 4  # each failure, though the reason is the same


def test_a_registry_file_that_does_not_exist_ends_the_start(tmp_path: Path) -> None:
    server = Served(settings(tmp_path), str(tmp_path / "nowhere.yaml"))
    with pytest.raises(AssertionError) as error, server:
        pass
    assert "does not exist" in str(error.value)


def test_a_new_gateway_without_state_serves_what_another_found_to_be_good(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    push(registry, "a", alias="champion")
    push(registry, "a", "b")
    with Served(settings(tmp_path / "one", poll_interval=0.05), registry) as one:
        assert one.post("/predict/line", ROWS).headers["x-model-version"] == "1"
        file = Path(registry)
        file.write_text(re.sub(r"champion: ['\"]?1['\"]?", "champion: 2", file.read_text()))
        assert eventually(lambda: one.get("/rollouts/line@champion").json["verdict"])
        assert one.post("/predict/line", ROWS).headers["x-model-version"] == "1"
        with Served(settings(tmp_path / "two", preload=["*"]), registry) as two:
            early = two.get("/metrics").body.decode()
            assert two.post("/predict/line", ROWS).headers["x-model-version"] == "1"
            assert eventually(lambda: two.get("/readyz").status == 200)
            seen = two.get("/rollouts/line@champion").json
    assert (seen["desired"], seen["phase"], seen["diverged"]) == ("2", "refused", True)
    assert 'gateway_alias_diverged{alias="champion",model="line"} 1.0' in early
    assert "b is required now" in seen["verdict"]["reason"]


def test_status_has_a_line_for_each_difference(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    push(registry, "a", alias="champion")
    file = Path(registry)
    file.write_text(re.sub(r"champion: ['\"]?1['\"]?", "champion: 9", file.read_text()))
    with Served(settings(tmp_path, preload=["line@champion", "nobody", "fraud-*"]), registry) as server:
        assert eventually(lambda: len(server.get("/readyz").json["preload_errors"]) == 2)
        command = [sys.executable, "-m", "gateway", "status", "--url", f"http://127.0.0.1:{server.port}"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "line@champion should serve version 9, but serves no version: " in told
    assert "preload: models:/nobody is not loaded: there is no model 'nobody'" in told
    assert "preload: fraud-* matches no model that has the alias champion" in told


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    push(registry, "a", alias="champion")
    push(registry, "a", "b")
    key = tmp_path / "key"
    key.write_text(KEY)
    file = Path(registry)
    file.chmod(0o444)
    with Served(settings(tmp_path, admin_key_file=key), registry) as server:
        sent = {"authorization": f"Bearer {KEY}"}
        path = "/models/line/aliases/champion?dry_run=true"
        before = server.get("/rollouts/line@champion").json
        state = sqlite3.connect(tmp_path / "state" / "state.db")
        tables = ("measurement", "scan", "first_digest", "history", "rollout", "alias")
        kept = [state.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
        refused = server.request("PUT", path, {"version": "2"}, **sent)
        forced = server.request("PUT", path, {"version": "2", "force": True}, **sent)
        assert server.get("/rollouts/line@champion").json == before
        assert "gateway_swaps_total{" not in server.get("/metrics").body.decode()
        metrics = server.get("/metrics").body.decode()
        assert not re.search(r"^gateway_(loads|unloads)_total", metrics, re.MULTILINE)
        assert "gateway_load_seconds_count{" not in metrics
        assert kept == [state.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
        state.close()
        assert server.get("/models/line/versions/2").json["state"] == "UNLOADED"
        wet = server.request("PUT", path.partition("?")[0], {"version": "2"}, **sent)
    assert (refused.status, refused.code) == (409, "ROLLOUT_REFUSED")
    assert forced.status == 200
    assert "b is required now" in forced.json["forced_past"][0]
    assert [check["check"] for check in forced.json["checks"]][-1] == "load, warm-up and example"
    assert wet.code == "REGISTRY_READ_ONLY"


def test_a_version_without_a_digest_is_held_to_its_first_load(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry.yaml")
    push(registry, "a", alias="champion")
    file = Path(registry)
    file.write_text(re.sub(r'digest: "[^"]*", ', "", file.read_text()))
    with Served(settings(tmp_path), registry) as server:
        assert server.post("/predict/line", ROWS).status == 200
    for path in (tmp_path / "cache").rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(tmp_path / "cache")
    with (tmp_path / "models/line/1/MLmodel").open("a") as package:
        package.write("# touched\n")
    with Served(settings(tmp_path), registry) as server:
        answer = server.post("/predict/line", ROWS)
    assert answer.code == "MODEL_UNAVAILABLE"
    assert "changed since they were first loaded" in answer.json["message"]
