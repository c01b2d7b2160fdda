"""An image built and run without a daemon: mmdebstrap makes the base, buildah the image, podman runs it.

Everything lies in a directory of its own. Nothing is pulled; packages come from where apt and pip of this
machine get theirs. `python -m tests.support.containers DIRECTORY` builds ahead: tests find it by the
environment variable IMAGE_UNDER_TEST.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import gateway
from tests.support.shell import free_port

ROOT = Path(__file__).parents[2]
TOOLS = ("mmdebstrap", "buildah", "podman", "runc", "catatonit")
BASE, IMAGE = "localhost/base", "localhost/model-gateway"
PATIENCE = 120.0
#: The image is built in the background, while other tests use the machine.
BUILD_SECONDS = 2400.0
# Inside another container, limits cannot be raised to podman's defaults, and there is no systemd.
ENGINE = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
SAMPLE = {"sepal_length": 5.9, "sepal_width": 3.2, "petal_length": 4.8, "petal_width": 1.8}


def tool(name: str) -> str:
    """A command of this environment or this machine, or a skip; where GATEWAY_TEST_ALL is set, a failure."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        reason = f"needs the command {name}, which is not installed here"
        if os.environ.get("GATEWAY_TEST_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Containers:
    """podman and buildah, with storage of their own under `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._storage = ("--root", str(directory / "storage"), "--runroot", str(directory / "run"))
        conf = directory / "containers.conf"
        conf.write_text(ENGINE, encoding="utf-8")
        self._environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "STORAGE_DRIVER": "overlay",
            "CONTAINERS_CONF": str(conf),
            "TMPDIR": str(directory),
        }

    def podman(self, *arguments: object, fails: bool = False, both: bool = False) -> str:
        """What it printed, to stdout or to both. `fails`: it must."""
        return self._run("podman", *self._storage, *arguments, fails=fails, both=both)

    def build(self) -> None:
        """The base and, from the Dockerfile, the image on it."""
        base = self._directory / "base.tar"
        debian = ("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,ca-certificates")
        self._run(*debian, "--dpkgopt=force-unsafe-io", "bookworm", base)
        self.podman("import", base, BASE)
        base.unlink()
        labels = ("VERSION=1.2.3", "REVISION=abc", "CREATED=2026-01-01T00:00:00Z")
        arguments = [f"--build-arg={argument}" for argument in (f"BASE={BASE}", *labels)]
        secrets = [f"--secret=id={name},src={file}" for name, file in self._pip().items()]
        bud = ("buildah", *self._storage, "bud", "--format=docker", *arguments, *secrets)
        self._run(*bud, "--tag", IMAGE, ROOT)

    def close(self) -> None:
        self.podman("pod", "rm", "--all", "--force", "--time", 0)
        self.podman("rm", "--all", "--force", "--time", 0)
        subprocess.run(["umount", str(self._directory / "storage" / "overlay")], check=False)
        shutil.rmtree(self._directory)

    def _pip(self) -> dict[str, Path]:
        """This machine's configuration of pip as the build's secrets, but for what only this machine's disk
        has."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        found: dict[str, str] = {}
        for line in listed.stdout.splitlines():
            name, _, value = line.partition("=")
            found[name.rpartition(".")[2]] = ast.literal_eval(value)
        secrets = {}
        if certificate := found.pop("cert", os.environ.get("SSL_CERT_FILE")):
            secrets["ca"] = Path(certificate)
        wanted = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
        kept = {name: found[name] for name in wanted if name in found and "file:" not in found[name]}
        if secrets:
            kept["cert"] = "/run/secrets/ca"
        file = secrets["pip.conf"] = self._directory / "pip.conf"
        lines = [f"{name} = {value}" for name, value in kept.items()]
        file.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
        return secrets

    def _run(self, *command: object, fails: bool = False, both: bool = False) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert (done.returncode != 0) == fails, (
            f"{command}\n{done.stdout[-3000:]}\n{(done.stderr or '')[-3000:]}"
        )
        return done.stdout


@dataclass
class Contained:
    """A container with a gateway in it, on a port of this machine."""

    containers: Containers
    name: str
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> None:
        """Returns when it may take traffic."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        return self.containers.podman("logs", self.name, both=True)

    def execute(self, *command: object, fails: bool = False, **environment: object) -> str:
        """What a command in the container printed. `fails`: it must."""
        given = [f"--env={name}={value}" for name, value in environment.items()]
        return self.containers.podman("exec", *given, self.name, *command, fails=fails)

    def inspect(self) -> dict[str, Any]:
        (found,) = json.loads(self.containers.podman("inspect", self.name))
        assert isinstance(found, dict)
        return found

    def processes(self) -> list[dict[str, str]]:
        """Of the container: `pid` inside, `hpid` on this machine, `user`, `args`."""
        fields = ["pid", "hpid", "user", "args"]
        lines = self.containers.podman("top", self.name, *fields).splitlines()[1:]
        return [dict(zip(fields, line.split(maxsplit=3), strict=True)) for line in lines]

    def predict(self, reference: str = "iris") -> httpx.Response:
        return httpx.post(
            f"{self.url}/predict/{reference}", json={"dataframe_records": [SAMPLE]}, timeout=PATIENCE
        )


def log_iris(directory: Path) -> None:
    """A registry file with two versions of a real model: champion is 1, challenger is 2. Whoever runs in a
    container can read it."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    features, target = load_iris(return_X_y=True, as_frame=True)
    features.columns = list(SAMPLE)
    registry = str(directory / "registry.yaml")
    models = {
        "champion": LogisticRegression(max_iter=500),
        "challenger": RandomForestClassifier(n_estimators=10, random_state=0),
    }
    for alias, model in models.items():
        model.fit(features, target)
        gateway.log_model(
            model, name="iris", registry=registry, input_example=features.head(3), alias=alias, verify=False
        )
    directory.chmod(0o755)


if __name__ == "__main__":
    ahead = Path(sys.argv[1])
    ahead.mkdir(parents=True)
    Containers(ahead).build()
