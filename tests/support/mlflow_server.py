"""A real MLflow tracking server in a process of its own, and what tests do with one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import needs
from tests.support.shell import free_port

SECRET = "of-the-webhook"
_STARTS_WITHIN = 300.0


class Server:
    """`url` of a running server; `call` is its REST interface, without our own client."""

    def __init__(self, directory: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = arguments
        self._environ = dict(environ or {})
        self.auth: tuple[str, str] | None = None

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHONDONTWRITE"))}
        given = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "0",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./artifacts"]
        command += ["--serve-artifacts", "--workers", "1", *self._arguments]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**clean, **given, **self._environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + _STARTS_WITHIN
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).text == "OK":
                    return
            except httpx.HTTPError:
                time.sleep(0.1)  # it has no other way to say that it is there
        self.stop()
        raise AssertionError((self.directory / "log").read_text()[-3000:])

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def call(self, method: str, path: str, **values: Any) -> dict[str, Any]:
        sent: dict[str, Any] = {"params": values} if method == "GET" else {"json": values}
        url = f"{self.url}/api/2.0/mlflow/{path}"
        response = httpx.request(method, url, auth=self.auth, timeout=30, **sent)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def remove(self, name: str) -> None:
        """Deletes a registered model, if there is one."""
        url = f"{self.url}/api/2.0/mlflow/registered-models/delete"
        httpx.request("DELETE", url, json={"name": name}, auth=self.auth, timeout=30)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests: each takes names of its own."""
    needs("mlflow")
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    shutil.copy(server.directory / "mlflow.db", server.directory / "empty.db")
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def another(first: Server, directory: Path, *arguments: str, **environ: str) -> Iterator[Server]:
    """A server of its own, on a copy of the first one's migrated database."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(first.directory / "empty.db", directory / "mlflow.db")
    server = Server(directory, *arguments, environ=environ)
    server.start()
    try:
        yield server
    finally:
        server.stop()
