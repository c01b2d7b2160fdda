"""Loading on demand through a real gateway: one load however many ask, and room made by measured need."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway.registries import open_registry
from gateway.registries.base import Move
from tests.support.running import Running, log_scaled, running

MB = 1_000_000


def together(
    server: Running, requests: list[tuple[str, float]], at_once: int, refused: list[str] | None = None
) -> list[httpx.Response]:
    """The answers, in order. With `refused`, callers that find no room are listed there and come again."""
    with httpx.Client(base_url=server.url, timeout=120) as client, ThreadPoolExecutor(at_once) as pool:

        def ask(asked: tuple[str, float]) -> httpx.Response:
            name, x = asked
            while True:
                answer = client.post(f"/predict/{name}", json={"dataframe_records": [{"x": x}]})
                if refused is None or "CAPACITY_EXCEEDED" not in answer.text:
                    return answer
                refused.append(name)

        return list(pool.map(ask, requests))


def test_promise_6_a_hundred_cold_requests_cause_one_load(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 3.0, alias="champion")
    with running(tmp_path) as server:
        answers = together(server, [("scaled", float(n)) for n in range(100)], 100)
        assert [a.status_code for a in answers] == [200] * 100
        assert [a.json()["predictions"] for a in answers] == [[3.0 * n] for n in range(100)]
        assert server.metric("gateway_loads_total", model="scaled", result="success") == 1
        assert server.metric("gateway_loads_total", model="scaled") == 1


def test_promise_6_a_caller_that_hangs_up_does_not_cancel_the_load(tmp_path: Path) -> None:
    log_scaled(tmp_path / "registry.yaml", "scaled", 3.0, alias="champion")
    with running(tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = b'{"dataframe_records":[{"x":1.0}]}'
        head = b"POST /predict/scaled HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        for _ in range(5):
            with socket.create_connection((host, int(port))) as caller:
                caller.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert server.predict("scaled", [{"x": 2.0}]).json()["predictions"] == [6.0]
        assert server.metric("gateway_loads_total", model="scaled") == 1


@pytest.mark.parametrize(("isolation", "requests"), [("inline", 2000), ("process", 300)])
def test_promise_7_two_hundred_models_in_room_for_ten(tmp_path: Path, isolation: str, requests: int) -> None:
    """Requests, Zipf (exponent 1.5: one in four loads) over 200 models: all answered, accounted bytes never
    above the limit."""
    models = 200
    registry = tmp_path / "registry.yaml"
    packed = log_scaled(registry, "m0", 1.0, alias="champion", ballast=2 * MB)
    document: dict[str, Any] = {"version": 1, "models": {}}
    for n in range(models):
        document["models"][f"m{n}"] = {
            "versions": {1: {"source": packed.source, "digest": packed.digest}},
            "aliases": {"champion": 1},
        }
    import yaml

    registry.write_text(yaml.safe_dump(document))
    with running(tmp_path, GATEWAY_ISOLATION=isolation) as probe:
        assert probe.predict("m0", [{"x": 1.0}]).status_code == 200
        one = probe.metric("gateway_model_bytes", model="m0")
        shared = 0.0
        while isolation == "process" and not shared:
            time.sleep(0.1)  # until it is measured
            shared = probe.metric("gateway_memory_bytes", state="resident") - one
    limit = int(one * 10.5 + shared)
    weights = np.arange(1, models + 1) ** -1.5
    rng = random.Random(7)
    chosen = rng.choices(range(models), weights=list(weights), k=requests)
    # The first server measured this digest; the second starts without that knowledge.
    settings = {
        "GATEWAY_ISOLATION": isolation,
        "GATEWAY_MEMORY_LIMIT": str(limit),
        "GATEWAY_STATE_DIR": str(tmp_path / "s2"),
    }
    with running(tmp_path, **settings) as server:
        seen: list[float] = []
        done = threading.Event()

        def watch() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not done.wait(0.25):
                    text = client.get("/metrics").text
                    found = re.findall(r"^gateway_memory_bytes{[^}]*} (\S+)$", text, re.MULTILINE)
                    seen.append(sum(map(float, found)))

        watching = threading.Thread(target=watch)
        watching.start()
        refused: list[str] = []
        try:
            answers = together(server, [(f"m{n}", float(n)) for n in chosen], 16, refused)
        finally:
            done.set()
            watching.join()
        wrong = [a.text for a in answers if a.status_code != 200]
        assert wrong == []
        assert [a.json()["predictions"] for a in answers] == [[float(n)] for n in chosen]
        assert max(seen) <= limit
        assert len(seen) > 5
        for counted in ("gateway_eviction_age_seconds_count", "gateway_evictions_for_total"):
            assert server.metric(counted) > 50
        assert server.metric("gateway_unloads_total", reason="evicted") > 50
        hits, misses = (server.metric(f"gateway_cache_{what}_total") for what in ("hits", "misses"))
        assert requests <= hits + misses <= requests + len(refused)
        assert len(refused) < requests / 10, (
            "on a busy machine a load may wait for room for too long, now and then"
        )
        assert 0 < server.metric("gateway_loads_total", result="success") <= misses


def test_promise_5_nothing_is_deserialised_before_its_digest_was_right(tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    logged = log_scaled(registry, "scaled", 2.0, alias="champion")
    trap = tmp_path / "executed"
    pickled = next(Path(logged.source).glob("**/*.pkl"))
    pickled.chmod(0o644)
    pickled.write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    with running(tmp_path) as server:
        answer = server.predict("scaled", [{"x": 1.0}])
        assert answer.status_code == 503
        assert answer.json()["error_code"] == "MODEL_UNAVAILABLE"
        assert "digest" in answer.json()["message"]
        assert str(tmp_path) not in answer.text
        assert answer.headers["retry-after"]
        log_scaled(registry, "other", 5.0, alias="champion")
        httpx.post(f"{server.url}/registry/refresh", headers=server.key).raise_for_status()
        assert server.predict("other", [{"x": 1.0}]).json()["predictions"] == [5.0]
    assert not trap.exists()


def test_promise_3_without_registry_and_store_a_loaded_model_answers(tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    log_scaled(registry, "scaled", 2.0, alias="champion")
    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 1.0}]).status_code == 200
        registry.rename(tmp_path / "away.yaml")
        (tmp_path / "models").rename(tmp_path / "models-away")
        assert httpx.post(f"{server.url}/registry/refresh", headers=server.key).status_code == 503
        assert server.predict("scaled", [{"x": 2.0}]).json()["predictions"] == [4.0]
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert server.metric("gateway_registry_errors_total") >= 1
    # Restarted in the outage: what was fetched serves again.
    with running(tmp_path, "--registry", str(registry)) as server:
        assert server.predict("scaled", [{"x": 3.0}]).json()["predictions"] == [6.0]


def test_changes_of_the_registry_are_followed_from_any_writer(tmp_path: Path) -> None:
    registry = tmp_path / "registry.yaml"
    for factor in (2.0, 3.0):
        log_scaled(registry, "scaled", factor)
    open_registry(str(registry)).move(Move("scaled", "champion", "1"))
    with running(tmp_path) as server:
        assert server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [2.0]
        registry.write_text(registry.read_text().replace("champion: 1", "champion: 2"))
        end = time.monotonic() + 60
        while server.predict("scaled", [{"x": 1.0}]).json()["predictions"] != [3.0]:
            assert time.monotonic() < end, "the move was not seen"
        registry.write_text("version: 1\nmodels: {scaled: {vers")
        assert httpx.post(f"{server.url}/registry/refresh", headers=server.key).status_code == 503
        assert server.predict("scaled", [{"x": 1.0}]).json()["predictions"] == [3.0]
