"""Behind a real nginx as people write it: `proxy_pass` alone, which rewrites Host and adds no header."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.running import Running, log_scaled, running
from tests.support.shell import free_port

BODY = {"dataframe_records": [{"x": 1.5}]}


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        (pytest.fail if os.environ.get("GATEWAY_TEST_ALL") else pytest.skip)(f"needs {name}")
    return str(found)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("behind")
    for factor in (2.0, 3.0):
        log_scaled(directory / "registry.yaml", "scaled", factor, alias="champion" if factor == 2.0 else None)
    with running(directory) as made:
        yield made


@pytest.fixture(scope="module")
def nginx(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, place, port = tool("nginx"), tmp_path_factory.mktemp("nginx"), free_port()
    temporary = "".join(
        f"{kind}_temp_path {place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = place / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {server.url}; }} }} }}\n"
    )
    process = subprocess.Popen([program, "-e", str(place / "error.log"), "-c", str(config)])
    end = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, (place / "error.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def test_control_calls_through_a_proxy_need_the_key(nginx: str, server: Running) -> None:
    path = "/models/scaled/aliases/champion"
    for headers in ({}, {"Host": "127.0.0.1"}, {"Authorization": "Bearer wrong"}):
        for refused in (
            httpx.put(nginx + path, json={"version": "2"}, headers=headers),
            httpx.post(f"{nginx}/models/scaled/unload", headers=headers),
        ):
            assert (refused.status_code, refused.json()["error_code"]) == (401, "UNAUTHENTICATED")
    assert httpx.post(f"{nginx}/predict/scaled", json=BODY, timeout=60).json()["predictions"] == [3.0]
    url = f"{nginx}{path}?wait=true"
    moved = httpx.put(url, json={"version": "2"}, headers=server.key, timeout=60)
    assert (moved.status_code, moved.json()["serving"]) == (200, "2")
    assert "target" not in httpx.get(f"{nginx}/readyz").json()["registry"]


def test_curl_that_offers_http2_is_answered(server: Running) -> None:
    curl = [tool("curl"), "-sS", "--http2", "-H", "Content-Type: application/json", "-d", json.dumps(BODY)]
    urls = [f"{server.url}/predict/scaled/versions/1"] * 2  # on one connection
    done = subprocess.run([*curl, *urls], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count('"predictions":[3.0]') == 2, done.stdout
