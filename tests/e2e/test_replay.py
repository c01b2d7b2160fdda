"""Capture and replay on a real server: a version that is fine on its example and wrong for one row in twenty
is found by the requests of yesterday, before any caller gets it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.running import Running, running
from tests.support.shell import Done, Shell
from tests.support.traffic import until

REQUESTS = 120
SETTINGS = {
    "GATEWAY_CAPTURE": json.dumps({"share": 1, "redact": ["SSN"]}),
    "GATEWAY_ROLLOUT": json.dumps({"replay": {"requests": 100, "agreement": 0.98}}),
}


class Doubled:
    """Doubles x. With `wrong` it is off for one value in twenty, which is not in its example."""

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong

    def predict(self, model_input: Any) -> Any:
        x = model_input["x"]
        return (x * (2 + (self.wrong & (x % 20 == 7)))).to_numpy()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("replay")
    registry = directory / "registry.yaml"
    for number, wrong in enumerate((False, True, False), 1):
        gateway.log_model(
            Doubled(wrong), "double", str(registry), input_example=pd.DataFrame({"x": [2.0], "ssn": ["a"]}),
            verify=False, metadata={"number": number},
        )  # fmt: skip
        gateway.log_model(
            Doubled(wrong), "plain", str(registry), input_example=pd.DataFrame({"x": [2.0]}), verify=False,
            metadata={"number": number},
        )  # fmt: skip
    opened = open_registry(str(registry))
    for name in ("double", "plain"):
        opened.move(Move(name, "champion", "1"))
    with running(directory, **SETTINGS) as served:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for number in range(REQUESTS):
                row = {"x": float(number)}
                for name, body in (("plain", row), ("double", {**row, "ssn": f"secret-{number}"})):
                    sent = {"dataframe_records": [body]}
                    assert client.post(f"/predict/{name}@champion", json=sent).status_code == 200
        until(lambda: all(one["requests"] == REQUESTS for one in captures(served).values()))  # by a thread
        for name in ("plain", "double"):  # they are counted after they were written
            until(lambda name=name: captured(served, name) == REQUESTS)
        yield served


@pytest.fixture
def shell(server: Running, tmp_path: Path) -> Shell:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    state, cache = server.directory / "state", server.directory / "cache"
    return Shell(
        tmp_path,
        {
            **environment, **SETTINGS, "GATEWAY_STATE_DIR": str(state), "GATEWAY_CACHE_DIR": str(cache),
            "GATEWAY_ENVIRONMENTS__BUILD": "never",
            "GATEWAY_REGISTRY": str(server.directory / "registry.yaml"),
        },
    )  # fmt: skip


def run(shell: Shell, *arguments: object, code: int = 0) -> Done:
    done = shell.gateway(*arguments)
    assert done.code == code, (done.out, done.err)
    assert "Traceback" not in done.err
    return done


def captures(server: Running) -> dict[str, dict[str, Any]]:
    found = httpx.get(f"{server.url}/captures", headers=server.key).json()["captures"]
    return {f"{one['model']}/{one['version']}": one for one in found}


def captured(server: Running, model: str) -> float:
    return server.metric("gateway_captured_requests_total", model=model, result="kept")


def kept(server: Running) -> tuple[str, dict[str, Any], list[str], list[Any]]:
    """What a dry run must leave as it is: the registry, the rollouts, the metrics of models, the state."""
    measured = ("gateway_model_bytes",)  # of the version in service, now
    models = [
        line
        for line in httpx.get(f"{server.url}/metrics").text.splitlines()
        if re.match(r'gateway_\w+\{.*model="(plain|double)"', line) and not line.startswith(measured)
    ]
    with contextlib.closing(sqlite3.connect(server.directory / "state" / "state.db")) as state:
        tables = ("measurement", "scan", "first_digest", "history", "rollout", "alias")
        rows = [state.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    rollouts = httpx.get(f"{server.url}/rollouts").json()
    return (server.directory / "registry.yaml").read_text(), rollouts, models, rows


@pytest.mark.parametrize("where", ["gateway", "here"])
def test_a_dry_run_says_what_the_replay_says_and_leaves_nothing_behind(
    server: Running, shell: Shell, where: str
) -> None:
    at = ("--url", server.url) if where == "gateway" else ()
    before = kept(server)
    told = run(shell, "promote", "plain@champion", "2", "--dry-run", *at, code=1)
    assert "plain/2 may not replace plain/1: replay: 5 of 100 requests got another answer" in told.err
    assert "agreement 0.9500, wanted 0.98" in told.err
    told = run(shell, "promote", "plain@champion", "3", "--dry-run", *at)
    assert "all checks passed\n  replay: 0 of 100 requests got another answer" in told.out
    assert "replay: 100 equal, 0 within the tolerance, 0 different of 100" in told.out
    assert "captured requests" in told.err  # a check like the others
    # Requests with a redacted column are not replayed: too few are left, and too few are no pass.
    told = run(shell, "promote", "double@champion", "3", "--dry-run", *at)
    assert "all checks passed; the rollout would be held" in told.out
    assert "too few captured requests: 0 of 100 were replayed; 120 more have a redacted column" in told.out
    for was, now in zip(before, kept(server), strict=True):
        assert now == was


def test_a_dry_run_over_http_has_the_numbers(server: Running) -> None:
    def asked(name: str, version: str) -> httpx.Response:
        return httpx.put(
            f"{server.url}/models/{name}/aliases/champion?dry_run=true", headers=server.key,
            json={"version": version}, timeout=60,
        )  # fmt: skip

    refused = asked("plain", "2")
    assert (refused.status_code, refused.json()["error_code"]) == (409, "ROLLOUT_REFUSED")
    assert refused.json()["details"] == [
        {"path": "replay.agreement", "problem": "is too low", "expected": "0.98", "got": "0.95"},
        {"path": "replay.output", "problem": "5 of 100 values differ"},
    ]
    passed = asked("plain", "3").json()
    assert (passed["accepted"], passed["dry_run"]) == (True, True)
    replay = passed["replay"]
    assert (replay["outcome"], replay["agreement"], replay["exact"], replay["requests"]) == (
        "passed", 1.0, 100, 100,
    )  # fmt: skip
    thin = asked("double", "3").json()["replay"]
    assert (thin["outcome"], thin["requests"], thin["requests_wanted"]) == ("thin", 0, 100)
    assert thin["not_replayed"]["redacted"] == REQUESTS


def test_a_version_that_is_wrong_for_one_row_in_twenty_is_refused_unseen(
    server: Running, shell: Shell
) -> None:
    assert captures(server)["plain/1"]["replayable"] == REQUESTS
    told = run(shell, "promote", "plain@champion", "2", "--wait", "--url", server.url, code=1)
    assert "5 of 100 requests got another answer: agreement 0.9500, wanted 0.98" in told.err
    assert "plain@champion serves version 1" in told.err
    view = httpx.get(f"{server.url}/rollouts/plain@champion").json()
    replay = view["rollout"]["evidence"]["replay"]
    assert (view["phase"], view["serving"]) == ("refused", "1")
    assert (replay["requests"], replay["differ"], replay["exact"]) == (100, 5, 95)
    assert len(replay["examples"]) == 5
    assert server.metric("gateway_rollout_requests_total", model="plain", arm="candidate") == 0
    (refused,) = [one for one in server.events("SwapRefused") if one["model"] == "plain"]
    assert "agreement 0.9500" in refused["reason"]
    shown = run(shell, "rollout", "plain@champion", "--url", server.url).out
    assert "replay: 95 equal, 0 within the tolerance, 5 different of 100" in shown
    # The requests that differ can be looked up, with control access.
    exported = [json.loads(line) for line in run(shell, "capture", "export", "plain/1").out.splitlines()]
    different = {one["id"]: one for one in exported if one["id"] in replay["examples"]}
    assert {one["input"]["dataframe_split"]["data"][0][0] % 20 for one in different.values()} == {7}
    # The same move behind the gateway's back.
    open_registry(str(server.directory / "registry.yaml")).move(Move("plain", "champion", "1"))
    httpx.post(f"{server.url}/registry/refresh", headers=server.key)
    open_registry(str(server.directory / "registry.yaml")).move(Move("plain", "champion", "2"))
    httpx.post(f"{server.url}/registry/refresh", headers=server.key)
    for _ in range(5):
        assert server.predict("plain@champion", [{"x": 3.0}]).json()["predictions"] == [6.0]
    assert server.metric("gateway_rollout_requests_total", model="plain", arm="candidate") == 0


def test_a_version_that_answers_the_same_is_promoted(server: Running, shell: Shell) -> None:
    told = run(shell, "promote", "plain@champion", "3", "--wait", "--url", server.url)
    assert "replay: 0 of 100 requests got another answer" in told.err
    assert server.predict("plain@champion", [{"x": 7.0}]).headers["x-model-version"] == "3"


def test_check_replays_in_ci(server: Running, shell: Shell) -> None:
    asked = ("check", "models:/plain/2", "--against", "plain@champion", "--replay")
    open_registry(str(server.directory / "registry.yaml")).move(Move("plain", "champion", "1"))
    here = run(shell, *asked, code=1)
    assert "may not replace plain/1: replay: 5 of 100 requests got another answer" in here.out
    there = run(shell, *asked, "--url", server.url, "--output", "json", code=1)
    (report,) = json.loads(there.out)["reports"]
    assert report["replay"]["differ"] == 5
    run(shell, "capture", "export", "plain/1", "--form", "frames", "--file", "captured")
    told = run(shell, "capture", "export", "plain/1", "--file", "lines", "--output", "json").json()
    lines = (shell.directory / "lines").read_text().splitlines()
    assert (told["file"], told["requests"]) == ("lines", len(lines))
    assert stat.S_IMODE((shell.directory / "captured").stat().st_mode) == 0o600
    good = run(shell, "check", "models:/plain/3", *asked[2:], "--captures", "captured")
    assert "100 equal" in good.out
    (shell.directory / "captured").write_bytes(b"nothing of the kind, and long enough")
    bad = run(shell, *asked, "--captures", "captured", code=1)
    assert "cannot read the captured requests of captured" in bad.err


def test_redacted_columns_are_on_no_disk_and_their_requests_are_not_replayed(
    server: Running, shell: Shell
) -> None:
    found = captures(server)["double/1"]
    assert (found["requests"], found["replayable"]) == (REQUESTS, 0)
    file = server.directory / "state" / "captures.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"secret-" not in file.read_bytes()
    exported = run(shell, "capture", "export", "double", "--url", server.url).out.splitlines()
    assert "secret-" not in "".join(exported)
    assert json.loads(exported[0])["redacted"] == ["ssn"]
    told = run(shell, "promote", "double@champion", "3", "--wait", "--url", server.url, code=1)
    assert (
        f"too few captured requests: 0 of 100 were replayed; {REQUESTS} more have a redacted column"
        in told.err
    )
    assert "held" in told.err
    run(shell, "rollout", "abort", "double@champion", "--url", server.url)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/captures"), ("GET", "/captures/double"), ("GET", "/captures/double/versions/1"),
        ("DELETE", "/captures/double"), ("DELETE", "/captures"),
    ],
)  # fmt: skip
def test_captures_need_control_access(server: Running, method: str, path: str) -> None:
    answer = httpx.request(method, server.url + path)
    assert (answer.status_code, answer.json()["error_code"]) == (401, "UNAUTHENTICATED")
    assert "double" in str(captures(server))


@pytest.mark.parametrize("query", ["?last=0", "?last=x", "?form=pickle", "?other=1", "?last=3"])
def test_a_wrong_query_is_said(server: Running, query: str) -> None:
    answer = httpx.get(f"{server.url}/captures/double{query}", headers=server.key)
    assert answer.status_code == 422
    assert answer.json()["error_code"] == "INVALID_INPUT"


def test_drop_by_the_command(server: Running, shell: Shell) -> None:
    listed = run(shell, "capture", "list").out.splitlines()
    assert any(line.split()[:3] == ["double/1", str(REQUESTS), "0"] for line in listed)
    assert "deleted" in run(shell, "capture", "drop", "double/1", "--url", server.url).out
    assert "double/1" not in captures(server)
    for command in (["drop", "double/1"], ["export", "dobule", "--url", server.url]):
        told = run(shell, "capture", *command, code=1).err
        assert f"no requests of {command[1]} are captured" in told
        assert "captured: plain/1" in told
    run(shell, "capture", "drop", code=2)
    assert "deleted" in run(shell, "capture", "drop", "--all").out
    assert captures(server) == {}
    assert "no captured requests" in run(shell, "capture", "list").out
