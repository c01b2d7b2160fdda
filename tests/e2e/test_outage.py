"""Registry and artifact store go away together under traffic, and the gateway is restarted meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pandas as pd
import pytest

import loaders
from tests.support.mlflow_server import Server
from tests.support.object_store import BUCKET, ObjectStore
from tests.support.running import Running, Scaled, running
from tests.support.tcp_proxy import HANG, PASS, REFUSE, Proxy, proxy
from tests.support.traffic import FACTORS, served, traffic, until

pytestmark = pytest.mark.all
MODELS = (
    "out-loaded",
    "out-stored",
    "out-absent",
)  # in memory, only on disk, not here when the outage begins

PATIENCE = {"GATEWAY_POLL_INTERVAL": "300ms", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}

MoveAlias = Callable[[str, str], None]


def put_packages(store: ObjectStore, place: str, directory: Path) -> None:
    """Two versions of a model, answering x times their factor, at `PLACE/1` and `PLACE/2` in the bucket."""
    files = store.files()
    for number, factor in FACTORS.items():
        package = directory / number
        loaders.save_model(Scaled(factor), package, input_example=pd.DataFrame({"x": [1.0, 2.0]}))
        files.put(str(package), f"{BUCKET}/{place}/{number}", recursive=True)


@contextmanager
def in_mlflow(server: Server, behind: Proxy) -> Iterator[tuple[str, MoveAlias]]:
    """The registry is an MLflow server, whose versions lie in the store."""
    for name in MODELS:
        server.call("POST", "registered-models/create", name=name)
        for number in FACTORS:
            source = f"s3://{BUCKET}/outage/{number}"
            server.call("POST", "model-versions/create", name=name, source=source)

    def move(name: str, number: str) -> None:
        server.call("POST", "registered-models/alias", name=name, alias="champion", version=number)

    for name in MODELS:
        move(name, "1")
    yield behind.url, move
    for name in MODELS:
        server.remove(name)


def unload(server: Running, name: str) -> None:
    answer = httpx.post(f"{server.url}/models/{name}/unload", headers=server.key, timeout=60)
    assert answer.json()["state"] == "UNLOADED", answer.text


def without_registry(server: Running, before: float) -> float:
    """What must be seen of an outage, and what must not. Returns the age of what the registry said last."""
    until(lambda: server.metric("gateway_registry_errors_total") > 0)
    until(lambda: server.metric("gateway_registry_age_seconds") > before)
    ready = httpx.get(f"{server.url}/readyz")
    shown = ready.json()
    assert (ready.status_code, shown["ready"]) == (200, True)
    assert shown["registry"]["error"]
    assert shown["registry"]["age_seconds"] > before
    assert served(server, "out-stored") == "1"  # cold, and on disk
    unload(server, "out-stored")
    return float(shown["registry"]["age_seconds"])


def test_registry_and_store_go_away_under_traffic(
    mlflow_server: Server, object_store: ObjectStore, tmp_path: Path
) -> None:
    put_packages(object_store, "outage", tmp_path / "packages")
    with ExitStack() as stack:
        store = stack.enter_context(proxy(object_store.port))
        tracking = stack.enter_context(proxy(mlflow_server.port))
        environ = object_store.environ(store.port) | PATIENCE
        registry, move = stack.enter_context(in_mlflow(mlflow_server, tracking))

        def breaks(fault: str) -> None:
            store.breaks(fault)
            tracking.breaks(fault)

        with running(tmp_path, "--registry", registry, **environ) as gateway:
            assert [served(gateway, name) for name in ("out-loaded", "out-stored")] == ["1", "1"]
            unload(gateway, "out-stored")
            with traffic(gateway.url, "out-loaded") as before:
                breaks(REFUSE)
                age = without_registry(gateway, 0.5)
                answer = gateway.predict("out-absent", [{"x": 1.0}])
                assert (answer.status_code, answer.json()["error_code"]) == (503, "REGISTRY_UNAVAILABLE")
                assert answer.headers["retry-after"]
                until(lambda: before.answers > 50)
            assert before.failures == []
        breaks(HANG)
        move("out-loaded", "2")
        with running(tmp_path, "--registry", registry, **environ) as gateway:
            with traffic(gateway.url, "out-loaded") as after:
                without_registry(gateway, age)
                assert served(gateway, "out-loaded") == "1"
                command = [sys.executable, "-m", "gateway", "status", "--url", gateway.url]
                told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
                assert "registry error: " in told.stdout
                breaks(PASS)
                until(lambda: served(gateway, "out-loaded") == "2")
                until(lambda: served(gateway, "out-absent") == "1")
                until(lambda: after.answers > 50)
            assert after.failures == []
            until(lambda: gateway.metric("gateway_registry_age_seconds") < 1.0)
            until(lambda: httpx.get(f"{gateway.url}/readyz").json()["registry"]["error"] is None)
