"""Gateways of one installation: each at a loopback address of its own, behind one DNS name, over one document
that none of them can write."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.running import Running
from tests.support.shell import free_port
from tests.support.traffic import until

NAME = "peers.test"
KEY = "the secret of the peers, 2026"


def private_hosts() -> None:
    """Skips where a process may not have a file of host names of its own."""
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount")


class Installation:
    """Gateways at 127.0.0.2 and after it. `NAME` has the addresses that the file `hosts` gives, which each of
    them has in the place of /etc/hosts."""

    def __init__(self, directory: Path, registry: Path, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.hosts = directory / "hosts"
        self.key_file = directory / "peers.key"
        self.key_file.write_text(KEY + "\n")
        self.document = directory / "registry.yaml"
        self._content = yaml.safe_load(registry.read_text())
        self._settings = settings
        self._publish()
        self.running: dict[int, Running] = {}
        self.port = free_port()

    def _publish(self) -> None:
        """The document is replaced at once, and nobody may write it."""
        fresh = self.directory / "fresh.yaml"
        fresh.write_text(yaml.safe_dump(self._content))
        fresh.chmod(0o444)
        fresh.replace(self.document)

    def move(self, name: str, version: str) -> None:
        """A person edits the document: there, an alias is a version and nothing else."""
        self._content["models"][name]["aliases"]["champion"] = version
        self._publish()

    def list_addresses(self, *numbers: int) -> None:
        """What the name resolves to. Written in place: the file is mounted in each process."""
        lines = "".join(f"{address(number)} {NAME}\n" for number in numbers)
        with self.hosts.open("w") as file:
            file.write(lines + "127.0.0.1 localhost\n")

    def start(self, *numbers: int, **environ: str) -> None:
        for number in numbers:
            place = self.directory / str(number)
            place.mkdir(exist_ok=True)
            settings = {
                "GATEWAY_PEERS": NAME,
                "GATEWAY_PEERS_KEY_FILE": str(self.key_file),
                "GATEWAY_REGISTRY": str(self.document),
                "GATEWAY_ARTIFACT_SOURCES": "",
                **self._settings,
                **environ,
            }
            settings = {key: value for key, value in settings.items() if value}
            mounted = [
                "unshare",
                "-m",
                "sh",
                "-c",
                'mount --bind "$0" /etc/hosts && exec "$@"',
                str(self.hosts),
            ]
            arguments = ["--host", address(number), "--port", str(self.port)]
            self.running[number] = Running(place, arguments, settings, port=None, before=mounted)

    def view(self, number: int, reference: str) -> dict[str, Any]:
        shown: dict[str, Any] = httpx.get(
            f"{self.running[number].url}/rollouts/{reference}", timeout=60
        ).json()
        return shown

    def peers(self, number: int) -> dict[str, Any]:
        shown: dict[str, Any] = httpx.get(f"{self.running[number].url}/rollouts", timeout=60).json()["peers"]
        return shown

    def meet(self, *numbers: int, among: int) -> None:
        """Waits until each of these has heard `among` peers."""
        for number in numbers:
            until(lambda number=number: self.peers(number)["reached"] == among)  # type: ignore[misc]

    def stop(self) -> None:
        for server in self.running.values():
            server.stop()


def address(number: int) -> str:
    return f"127.0.0.{number}"


def policy(**rollout: Any) -> dict[str, str]:
    return {"GATEWAY_ROLLOUT": json.dumps(rollout), "PATH": os.environ["PATH"]}
