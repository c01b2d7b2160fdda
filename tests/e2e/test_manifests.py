"""The Kubernetes manifests: valid, closed, consistent with each other; and the pod they describe, running."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import configuration, quantities, settings
from gateway.registries import document
from tests.conftest import needs
from tests.support.containers import IMAGE, ROOT, Contained, Containers, log_iris

pytestmark = pytest.mark.all

DIRECTORY = ROOT / "deploy" / "kubernetes"
VERSION = "1.37"
FILES = sorted(path.name for path in DIRECTORY.glob("*.yaml") if path.name != "kustomization.yaml")
# What Kubernetes' own standard for restricted pods demands of a container, and a root that stays as it is.
CLOSED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def manifest(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((DIRECTORY / name).read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def pod_spec() -> dict[str, Any]:
    spec = manifest("deployment.yaml")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container() -> dict[str, Any]:
    (only,) = pod_spec()["containers"]
    assert isinstance(only, dict)
    return only


def gateway_settings(directory: Path) -> settings.Settings:
    """The settings of settings.yaml as a gateway reads them."""
    file = directory / "gateway.yaml"
    file.write_text(manifest("settings.yaml")["data"]["gateway.yaml"], encoding="utf-8")
    return configuration.load({}, {}, file)


def validated(file: Path) -> int:
    needs("kubernetes_validate")
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "--kubernetes-version", VERSION]
    return subprocess.run([*command, str(file)], capture_output=True, check=False).returncode


def test_a_misspelt_key_would_be_seen(tmp_path: Path) -> None:
    text = (DIRECTORY / "deployment.yaml").read_text(encoding="utf-8")
    wrong = tmp_path / "deployment.yaml"
    wrong.write_text(text.replace("readOnlyRootFilesystem", "readonlyRootFilesystem"), encoding="utf-8")
    assert validated(wrong) != 0


def test_kustomization_names_every_file() -> None:
    kustomization = manifest("kustomization.yaml")
    assert sorted(kustomization["resources"]) == FILES
    (image,) = kustomization["images"]
    assert container()["image"] == f"{image['name']}:{image['newTag']}"


def test_the_pod_is_closed() -> None:
    spec = pod_spec()
    security = spec["securityContext"]
    users = {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")}
    assert f"USER {users.pop()}:" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert users == set()
    assert container()["securityContext"] == CLOSED
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    writable = {mount["name"] for mount in container()["volumeMounts"] if not mount.get("readOnly")}
    emptied = {volume["name"] for volume in spec["volumes"] if "sizeLimit" in volume.get("emptyDir", {})}
    assert writable == emptied == {"data", "tmp"}


def test_models_under_users_of_their_own_take_no_more_than_that() -> None:
    """The component `model-users` gives what the recipe for the image names, and leaves the rest closed."""
    (patch,) = manifest("model-users/kustomization.yaml")["patches"]
    changed = yaml.safe_load(patch["patch"])["spec"]["template"]["spec"]
    assert changed["hostUsers"] is False
    assert changed["securityContext"] == {"runAsNonRoot": False, "runAsUser": 0, "runAsGroup": 0}
    (only,) = changed["containers"]
    assert only["name"] == container()["name"]
    granted = only["securityContext"]["capabilities"]
    assert granted["drop"] == ["ALL"]
    recipe = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    assert granted["add"] == re.findall(r"--cap-add (\w+)", recipe)


def test_the_cache_fits_into_its_volume(tmp_path: Path) -> None:
    (data,) = (volume["emptyDir"] for volume in pod_spec()["volumes"] if volume["name"] == "data")
    limit = quantities.size(data["sizeLimit"])
    assert isinstance(limit, int)
    assert limit > gateway_settings(tmp_path).disk_limit


def test_they_name_each_other() -> None:
    spec = pod_spec()
    scaled = manifest("horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]["name"]
    assert scaled == manifest("deployment.yaml")["metadata"]["name"]
    ports = {port["name"] for port in container()["ports"]}
    assert {port["targetPort"] for port in manifest("service.yaml")["spec"]["ports"]} <= ports
    named = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(named) == {mount["name"] for mount in container()["volumeMounts"]}
    for name in ("settings", "registry"):
        assert named[name]["configMap"]["name"] == manifest(f"{name}.yaml")["metadata"]["name"]
    claim = named["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("models.yaml")["metadata"]["name"]


def test_the_registry_is_one() -> None:
    text = manifest("registry.yaml")["data"]["registry.yaml"]
    models = document.parse(text.encode(), "yaml", target="registry.yaml", base="/registry")
    (mount,) = (m["mountPath"] for m in container()["volumeMounts"] if m["name"] == "models")
    for model in models.values():
        assert model.aliases
        assert all(version.source.startswith(f"{mount}/") for version in model.versions.values())


class ConfigMap:
    """A mounted ConfigMap, updated as a kubelet does it: a new directory, then one rename of a link."""

    def __init__(self, mounted: Path) -> None:
        self._mounted = mounted
        self._updates = 0

    def update(self, files: dict[str, str]) -> None:
        self._updates += 1
        stamp = self._mounted / f"..2026_01_01_00_00_0{self._updates}.1"
        stamp.mkdir()
        for name, text in files.items():
            (stamp / name).write_text(text, encoding="utf-8")
        self._link(stamp.name, "..data")
        for name in files:
            if not (self._mounted / name).is_symlink():
                self._link(f"..data/{name}", name)
        for old in self._mounted.glob("..2026*"):
            if old != stamp:
                shutil.rmtree(old)

    def _link(self, target: str, name: str) -> None:
        temporary = self._mounted / "..data_tmp"
        temporary.symlink_to(target)
        temporary.rename(self._mounted / name)


def mountpoint(containers: Containers, volume: str) -> Path:
    return Path(containers.podman("volume", "inspect", volume, "--format", "{{.Mountpoint}}").strip())


def of_this_machine(template: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod of a template. Changed: the image's name, and the network, which is this machine's."""
    template["spec"]["hostNetwork"] = True
    (only,) = template["spec"]["containers"]
    only["image"] = IMAGE
    template["metadata"]["name"] = name
    return {"apiVersion": "v1", "kind": "Pod", **template}


def play(containers: Containers, file: Path, *parts: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump_all(parts), encoding="utf-8")
    containers.podman("kube", "play", file)


@pytest.fixture
def pod(containers: Containers, tmp_path: Path) -> Iterator[Contained]:
    """The pod of the Deployment, after its models were copied as the README says."""
    log_iris(tmp_path)
    containers.podman("volume", "create", "gateway-models")
    upload, file = tmp_path / "upload.yaml", tmp_path / "pod.yaml"
    mountpoint(containers, "gateway-models").chmod(0o2775)  # what `fsGroup` does
    shutil.chown(mountpoint(containers, "gateway-models"), 0, 10001)
    play(containers, upload, of_this_machine(manifest("upload/pod.yaml"), "gateway-upload"))
    containers.podman("exec", "gateway-upload-upload", "mkdir", "-p", "/models/iris")
    for version in ("1", "2"):
        # Copies as `kubectl cp` does: tar on both sides.
        with tarfile.open(tmp_path / "copied.tar", "w") as copied:
            copied.add(tmp_path / "models" / "iris" / version, arcname=version)
        containers.podman("cp", tmp_path / "copied.tar", "gateway-upload-upload:/models/iris/copied.tar")
        containers.podman("exec", "gateway-upload-upload", "tar", "xf", "iris/copied.tar", "-C", "iris")
    containers.podman("kube", "play", "--down", upload)
    made = Contained(containers, "gateway-gateway")
    described = of_this_machine(manifest("deployment.yaml")["spec"]["template"], "gateway")
    (only,) = described["spec"]["containers"]
    only["env"] = [{"name": "GATEWAY_PORT", "value": str(made.port)}]
    del only["ports"]
    play(containers, file, manifest("settings.yaml"), manifest("registry.yaml"), described)
    yield made
    containers.podman("kube", "play", "--down", file)


def test_the_pod_runs_and_follows_its_config_map(pod: Contained, containers: Containers) -> None:
    pod.ready()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert httpx.get(pod.url + container()[probe]["httpGet"]["path"]).status_code == 200
    pod.execute("touch", "/opt/gateway/new", fails=True)
    assert "CapBnd:\t0000000000000000" in pod.execute("cat", "/proc/1/status")
    assert pod.predict().json()["model"]["version"] == "1"
    assert "iris" in pod.execute("gateway", "models")
    dry = ("gateway", "promote", "iris@champion", "2", "--dry-run", "--url", pod.url)
    assert "may move to version 2" in pod.execute(*dry)

    config_map = ConfigMap(mountpoint(containers, "gateway-registry"))
    text = manifest("registry.yaml")["data"]["registry.yaml"]
    for version in ("2", "1"):
        changed = text.replace("champion: 1", f"champion: {version}")
        config_map.update({"registry.yaml": changed})
        deadline = time.monotonic() + 120
        while True:
            answer = pod.predict()
            assert answer.status_code == 200, answer.text
            if answer.json()["model"]["version"] == version:
                break
            assert time.monotonic() < deadline, pod.log()
    key = pod.execute("cat", "/var/lib/gateway/state/model-gateway/control.key").strip()
    refused = httpx.put(
        f"{pod.url}/models/iris/aliases/champion",
        json={"version": "2"},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert (refused.status_code, refused.json()["error_code"]) == (409, "REGISTRY_READ_ONLY")
