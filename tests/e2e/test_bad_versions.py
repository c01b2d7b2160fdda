"""Ten kinds of bad version on a real server, promoted through the gateway and by writing the registry file,
under traffic: each is refused with its reason, and no caller notices. The same after kill -9."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import gateway
import loaders
from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.callers import Callers
from tests.support.hostile import eventually
from tests.support.running import Running, running
from tests.support.traffic import until

GOOD_HERE = "TEST_GOOD_HERE"
"""Set while the packages are written, because writing one answers its example."""

#: Each kind, and what the refusal says.
KINDS = {
    "raises": "RuntimeError: boom",
    "hangs": "did not answer within",
    "exits": "exited with code 3",
    "segfaults": "killed by SIGSEGV",
    "grows without end": "failed on its own example",  # at its limit, or at its timeout on a busy machine
    "fails its example": "ValueError: not this one",
    "wrong output": "as its output schema says: the output is text",
    "incompatible signature": "input y is required now",
    "altered artifact": "digest mismatch",
    "missing package": "ModuleNotFoundError",
}
LIMITS = '{"twice": {"load_timeout": "20s", "timeout": "4s", "memory": "600MB"}}'


class Kind:
    """Doubles x, or does what its kind says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def predict(self, model_input: Any) -> Any:
        kind = "works" if "TEST_GOOD_HERE" in os.environ else self.kind
        if kind == "raises":
            raise RuntimeError("boom")
        if kind == "fails its example" and (model_input["x"] == 2.0).any():
            raise ValueError("not this one")
        if kind == "hangs":
            time.sleep(3600)
        if kind == "exits":
            os._exit(3)
        if kind == "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "grows without end":
            held = []
            while True:
                held.append(bytearray(b"1" * 20_000_000))
        if kind == "wrong output":
            return ["twice"] * len(model_input)
        if kind == "missing package":
            __import__("no_such_package_anywhere")
        return (model_input["x"] * 2).to_numpy()


class Sum(Kind):
    """Needs a column more."""

    def predict(self, model_input: Any) -> Any:
        return (model_input["x"] + model_input["y"]).to_numpy()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    path = directory / "registry.yaml"
    signature = None
    os.environ[GOOD_HERE] = "1"
    try:
        for number, kind in enumerate(("works", *KINDS), 1):
            example = pd.DataFrame({"x": [2.0]})
            model, known = Kind(kind), signature
            if kind == "incompatible signature":
                model, known, example = Sum(kind), None, example.assign(y=1.0)
            made = gateway.log_model(
                model, "twice", str(path), input_example=example, signature=known, verify=False,
                metadata={"number": number},
            )  # fmt: skip
            signature = signature or loaders.load_model(made.source).signature
            if kind == "altered artifact":
                (altered,) = Path(made.source).rglob("*.pkl")
                altered.parent.chmod(0o755)
                altered.chmod(0o644)
                altered.write_bytes(altered.read_bytes() + b"more")
    finally:
        del os.environ[GOOD_HERE]
    open_registry(str(path)).move(Move("twice", "champion", "1"))
    return path


def view_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/rollouts/twice@champion").json()
    return found


def refused_view(server: Running, number: str) -> dict[str, Any]:
    """The view of the alias while this version is refused: a refused load is tried again now and then."""
    views: list[dict[str, Any]] = []

    def refused() -> bool:
        views.append(view_of(server))
        return views[-1]["desired"] == number and views[-1]["phase"] == "refused"

    until(refused, 60.0)
    return views[-1]


def told(server: Running, number: int, reason: str) -> bool:
    """Whether the log says why. It is read by a thread."""
    return any(f"version {number}: " in line and reason in line for line in list(server.lines))


@contextmanager
def hooked(directory: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver of notifications: the setting that names it, and what it got."""
    posted: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    secret = directory / "secret"
    secret.write_text("a secret of the tests, long enough")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            yield json.dumps([{"url": url, "secret_file": str(secret), "on": ["refused"]}]), posted
        finally:
            server.shutdown()


def posts(posted: list[dict[str, Any]], number: int, reason: str) -> bool:
    """Whether a notification says why this version was refused."""
    return any(
        post["data"]["version"] == str(number) and reason in post["data"]["reason"] for post in list(posted)
    )


@pytest.mark.parametrize("by", ["gateway", "file"])
def test_ten_kinds_of_bad_version_are_refused_and_no_caller_notices(
    registry: Path, tmp_path: Path, by: str
) -> None:
    settings = {"GATEWAY_REGISTRY": str(registry), "GATEWAY_MODELS": LIMITS}
    with hooked(tmp_path) as (notify, posted):
        settings["GATEWAY_NOTIFY"] = notify
        _refused_under_traffic(registry, tmp_path, by, settings, posted)


def _refused_under_traffic(
    registry: Path, tmp_path: Path, by: str, settings: dict[str, str], posted: list[dict[str, Any]]
) -> None:
    with running(tmp_path, **settings) as server:
        assert server.predict("twice", [{"x": 1.0}]).status_code == 200
        with Callers(server, "twice") as traffic:
            for number, (kind, reason) in enumerate(KINDS.items(), 2):
                if by == "gateway":
                    refused = httpx.put(
                        f"{server.url}/models/twice/aliases/champion", headers=server.key,
                        json={"version": str(number)}, timeout=120,
                    )  # fmt: skip
                    assert refused.status_code == 409, (kind, refused.text)
                else:
                    open_registry(str(registry)).move(Move("twice", "champion", str(number)))
                view = refused_view(server, str(number) if by == "file" else "1")
                assert (view["phase"], view["serving"]) == ("refused", "1"), kind
                assert reason in view["error"], kind
                assert eventually(lambda: told(server, number, reason)), kind  # noqa: B023 - called at once
                assert eventually(lambda: posts(posted, number, reason)), kind  # noqa: B023
                assert httpx.get(f"{server.url}/readyz").status_code == 200
            traffic.until(20)
        assert set(traffic.seen) == {(200, "1")}
        assert traffic.wrong == []
        assert server.metric("gateway_swaps_total", model="twice", result="refused") >= len(KINDS)
        server.stop(signal.SIGKILL)
    with running(tmp_path, **settings) as server:
        with Callers(server, "twice") as traffic:
            traffic.until(20)
        assert set(traffic.seen) == {(200, "1")}
        if by == "file":
            assert "ModuleNotFoundError" in view_of(server)["error"]
