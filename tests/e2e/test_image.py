"""The image: built on a bare Debian, and run as a cluster runs it, closed where it can be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import gateway
from tests.support.attempts import ATTEMPTS, REFUSED, write_attempts
from tests.support.containers import BASE, IMAGE, ROOT, Contained, Containers, log_iris, tool
from tests.support.shell import free_port

pytestmark = pytest.mark.all

MOST_BYTES = 1_000_000_000
MOST_SECONDS = 30.0
INSTALLED = """
import json
from importlib.metadata import distributions
print(json.dumps([(each.metadata["Name"], each.version) for each in distributions()]))
"""
VICTIM = "/var/lib/gateway/secret/admin.key"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with registry.yaml and its models, readable by everybody."""
    directory = tmp_path_factory.mktemp("registry")
    log_iris(directory)
    attacker = write_attempts(tmp_path_factory.mktemp("attacker") / "p", VICTIM)
    gateway.push(attacker.path, "attacker", "champion", directory / "registry.yaml")
    return directory


@pytest.fixture
def start(containers: Containers, registry: Path) -> Iterator[Callable[..., Contained]]:
    """Starts a container: no capability but those added, no new privileges, nothing to write but its volume
    and /tmp."""
    started: list[str] = []

    def run(*options: str) -> Contained:
        container = Contained(containers, f"gateway-{len(started)}")
        started.append(container.name)
        containers.podman(
            *("run", "--detach", "--name", container.name, "--network=host"),
            *("--cap-drop=all", "--security-opt=no-new-privileges"),
            *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:size=64m"),
            *options,
            *(f"--env=GATEWAY_PORT={container.port}", f"--volume={registry}:/etc/gateway:ro", IMAGE),
        )
        return container

    yield run
    for name in started:
        containers.podman("rm", "--force", "--time", 0, name)


def test_it_answers_and_ends_in_order(
    start: Callable[[], Contained],
    containers: Containers,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    began = time.monotonic()
    container = start()
    container.ready()
    seconds = time.monotonic() - began
    answer = container.predict()
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == {"name": "iris", "version": "1", "alias": "champion"}
    first = time.monotonic() - began
    size = json.loads(containers.podman("image", "inspect", IMAGE))[0]["Size"]
    record_testsuite_property("image_bytes", size)
    record_testsuite_property("seconds_to_ready", round(seconds, 2))
    record_testsuite_property("seconds_to_first_answer", round(first, 2))
    assert size < MOST_BYTES
    assert seconds < MOST_SECONDS
    containers.podman("stop", "--time", 60, container.name)
    assert container.inspect()["State"]["ExitCode"] == 0, container.log()


def test_a_model_runs_in_a_process_of_its_own_and_comes_back(start: Callable[[], Contained]) -> None:
    container = start()
    container.ready()
    assert container.predict().status_code == 200
    processes = container.processes()
    assert {process["user"] for process in processes} == {"gateway"}
    zygote, model = (process for process in processes if "bootstrap.py zygote" in process["args"])
    os.kill(int(model["hpid"]), signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (answer := container.predict()).status_code != 200:
        assert answer.json()["error_code"] == "WORKER_CRASHED"
        assert time.monotonic() < deadline, container.log()
    there = {process["hpid"] for process in container.processes()}
    assert model["hpid"] not in there
    assert zygote["hpid"] in there


def test_it_holds_what_is_needed_and_no_more(start: Callable[[], Contained]) -> None:
    container = start()
    container.ready()
    assert container.execute("id", "-u").strip() == "10001"
    container.execute("touch", "/opt/gateway/new", fails=True)
    container.execute("touch", "/var/lib/gateway/new")
    found = container.execute(
        "sh", "-c", "command -v gcc cc make git pip pip3; ls /run/secrets /etc/pip.conf /src; true"
    )
    assert found == ""
    container.execute("python3", "-m", "pip", "--version", fails=True)
    container.execute("python3", "-c", "import ensurepip", fails=True)
    labels = container.inspect()["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert labels["org.opencontainers.image.created"] == "2026-01-01T00:00:00Z"
    assert labels["org.opencontainers.image.base.name"] == BASE
    # The bill of materials lists exactly what is installed.
    bill = json.loads(container.execute("cat", "/opt/gateway/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {(canonical(part["name"]), part["version"]) for part in bill["components"]}
    installed = json.loads(container.execute("/opt/gateway/bin/python", "-c", INSTALLED))
    assert listed == {(canonical(name), version) for name, version in installed}
    assert ("model-gateway", gateway.__version__) in listed


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


AS_ROOT = (
    "--user=0",
    *(f"--cap-add={name}" for name in ("SETUID", "SETGID", "CHOWN", "KILL", "DAC_OVERRIDE")),
)
LOOK = """
import os, sys
print([line for line in open("/proc/1/limits") if line.startswith(("Max open", "Max cpu", "Max proc"))],
      os.getpriority(os.PRIO_PROCESS, 1), sorted(os.sched_getaffinity(1)), os.sched_getscheduler(1))
for path in (sys.argv[1], os.path.dirname(sys.argv[1])):
    seen = os.stat(path)
    print(seen.st_mode, seen.st_uid, seen.st_gid, seen.st_size, seen.st_mtime_ns, seen.st_ino)
"""


@pytest.mark.parametrize("options", [(), AS_ROOT], ids=["as its user", "as root"])
def test_what_a_model_attempts_against_others_fails(
    start: Callable[..., Contained], options: tuple[str, ...]
) -> None:
    container = start(*options)
    container.ready()
    container.execute(
        "sh", "-c", f"mkdir -p {Path(VICTIM).parent} && echo secret > {VICTIM} && chmod 600 {VICTIM}"
    )
    assert container.predict().status_code == 200  # there is a sibling
    before, processes = container.execute("python3", "-c", LOOK, VICTIM), container.processes()
    wrong = {}
    for name, (wanted, _) in ATTEMPTS.items():
        answer = httpx.post(f"{container.url}/predict/attacker", json={"inputs": [name]}, timeout=60)
        assert answer.status_code == 200, (name, answer.text, container.log())
        (outcome,) = answer.json()["predictions"]
        if wanted == REFUSED and not outcome.startswith("refused"):
            wrong[name] = outcome
    assert wrong == {}
    assert container.execute("python3", "-c", LOOK, VICTIM) == before
    there = {process["hpid"] for process in container.processes()}
    assert {process["hpid"] for process in processes if "bootstrap.py" in process["args"]} <= there
    key = container.execute("cat", "/var/lib/gateway/state/model-gateway/control.key").strip()
    view = httpx.get(
        f"{container.url}/models/attacker/versions/1", headers={"Authorization": f"Bearer {key}"}
    )
    held = view.json()["runner"]["confinement"]
    if options:
        assert held["user"].isdigit(), held
        assert int(held["user"]) != 10001
    else:
        assert held["user"] == "not changed: 10001"
    assert held["capabilities"] == "none"
    assert not held["shared_memory"].startswith("not "), held


def test_the_health_check_tells_the_living_from_the_dead(start: Callable[[], Contained]) -> None:
    container = start()
    container.ready()
    container.containers.podman("healthcheck", "run", container.name)
    kind, *check = container.inspect()["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    container.execute(*check, fails=True, GATEWAY_PORT=free_port())


def test_control_works_from_inside_the_container(start: Callable[[], Contained]) -> None:
    container = start()
    container.ready()
    container.execute("gateway", "load", "iris@challenger", "--url", container.url)
    assert container.predict("iris@challenger").json()["model"]["version"] == "2"


def test_the_dockerfile_follows_the_rules(tmp_path: Path) -> None:
    hadolint = tool("hadolint")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    bad = tmp_path / "Dockerfile"
    bad.write_text(text.replace("# hadolint ignore=DL3008\n", ""), encoding="utf-8")
    for file, code in ((ROOT / "Dockerfile", 0), (bad, 1)):
        done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
