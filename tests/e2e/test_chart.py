"""The Helm chart: rendered by Helm, validated as Kubernetes does, and equal to what kustomize builds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import configuration, quantities
from tests.conftest import needs
from tests.support.charts import CHART, COMPONENTS, KUSTOMIZE, UPLOAD, built, files, objects, rendered

pytestmark = pytest.mark.all

VERSION = "1.37"
#: Kinds that Kubernetes itself does not know.
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
EVERYTHING: dict[str, Any] = {
    "admin": True,
    "grpc": True,
    "routing": True,
    "peers": {"secret": "peers", "key": "shared"},
    "upload": True,
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "tokenSecret": "scrape"},
    "networkPolicy": {
        "enabled": True,
        "ingressFrom": [{"namespaceSelector": {}}],
        "adminFrom": [{"podSelector": {"matchLabels": {"role": "operator"}}}],
    },
    "cache": {"sharedClaim": "cache"},
    "secrets": ["tokens"],
    "settings": {"admin_key_file": "/secrets/tokens/key"},
    "env": {"AWS_REGION": "eu-central-1"},
    "imagePullSecrets": ["images"],
    "serviceAccountName": "models",
    "podAnnotations": {"team": "fraud"},
    "nodeSelector": {"pool": "models"},
    "tolerations": [{"key": "models", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "models": {"storageClassName": "nfs"},
    "image": {"environments": "/opt/environments"},
    "modelUsers": True,
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "keda": {"keda": {"enabled": True}},
    "fixed": {"autoscaling": {"enabled": False}, "replicas": 3},
    "bucket": {"registry": {"uri": "s3://bucket/registry.yaml"}, "models": {"enabled": False}},
    "nothing more": {
        "networkPolicy": {"enabled": True, "egress": []},
        "settings": {"preload": []},
        "env": {},
    },
    "own claim": {"models": {"existingClaim": "models"}, "service": {"type": "LoadBalancer"}},
}


def of(values: Mapping[str, Any], name: str = "gateway") -> dict[str, Any]:
    """The objects by kind; the Services and ConfigMaps by kind and name."""
    found = objects(rendered(values, name).values())
    return {kind: one for (kind, _), one in found.items()} | {
        f"{kind}/{name}": one for (kind, name), one in found.items()
    }


def pod_of(values: Mapping[str, Any]) -> dict[str, Any]:
    spec = of(values)["Deployment"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def selectors(found: Mapping[tuple[str, str], Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every selector of pods, with the kind of its owner."""
    for (kind, _), one in found.items():
        spec = one.get("spec", {})
        if kind == "Service":
            yield kind, spec["selector"]
        elif kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
            yield kind, spec["selector"]["matchLabels"]
        elif kind == "NetworkPolicy":
            yield kind, spec["podSelector"]["matchLabels"]
            for rule in (*spec["ingress"], *spec["egress"]):
                for peer in (*rule.get("from", ()), *rule.get("to", ())):
                    labels = peer.get("podSelector", {}).get("matchLabels", {})
                    if "app.kubernetes.io/name" in labels:
                        yield kind, labels
        if kind == "Deployment":
            for spread in spec["template"]["spec"]["topologySpreadConstraints"]:
                yield "spread", spread["labelSelector"]["matchLabels"]


def sorted_lists(value: Any) -> Any:
    """With lists of named things in the order of their names: it is of no importance to Kubernetes."""
    if isinstance(value, dict):
        return {key: sorted_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [sorted_lists(item) for item in value]
        if items and all(isinstance(item, dict) and "name" in item for item in items):
            return sorted(items, key=lambda item: item["name"])
        return items
    return value


def test_the_kustomize_files_are_the_chart_s() -> None:
    for path, text in files().items():
        assert (KUSTOMIZE / path).read_text(encoding="utf-8") == text, (
            f"{path} differs: python -m tests.support.charts"
        )


@pytest.mark.parametrize(
    "components",
    [
        (),
        *((name,) for name in COMPONENTS),
        ("monitoring", "admin", "network-policy", "model-users"),
        ("admin", "network-policy", "peers"),
    ],
)
def test_helm_and_kustomize_make_the_same_objects(components: tuple[str, ...], tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    for component in components:
        values |= COMPONENTS[component][0]
    overlay = {
        "resources": [os.path.relpath(KUSTOMIZE, tmp_path)],
        "components": [os.path.relpath(KUSTOMIZE / component, tmp_path) for component in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    assert sorted_lists(built(tmp_path)) == sorted_lists(objects(rendered(values).values()))


def test_the_pod_for_copying_is_the_same_by_both() -> None:
    (one,) = built(KUSTOMIZE / "upload").values()
    assert one == yaml.safe_load(rendered(UPLOAD)["upload"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_rendered_is_valid(case: str) -> None:
    validator = needs("kubernetes_validate")
    for (kind, _), one in objects(rendered(CASES[case]).values()).items():
        if kind not in FOREIGN:
            validator.validate(one, VERSION, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_the_restricted_standard_or_says_why_not(case: str) -> None:
    found = objects(rendered(CASES[case]).values())
    specs = [one["spec"]["template"]["spec"] for (kind, _), one in found.items() if kind == "Deployment"]
    specs += [one["spec"] for (kind, _), one in found.items() if kind == "Pod"]
    for number, spec in enumerate(specs):
        root = bool(CASES[case].get("modelUsers")) and number == 0
        assert spec["securityContext"]["runAsNonRoot"] is not root
        assert spec.get("hostUsers", True) is not root
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"]["drop"] == ["ALL"]
            assert number or container["terminationMessagePolicy"] == "FallbackToLogsOnError"
            assert ("add" in security["capabilities"]) is (root and container["name"] == "gateway")
        volumes = {next(key for key in volume if key != "name") for volume in spec["volumes"]}
        assert volumes <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}


@pytest.mark.parametrize("case", ["defaults", "everything"])
def test_two_releases_in_one_namespace_select_their_own_pods(case: str) -> None:
    one, other = (objects(rendered(CASES[case], name).values()) for name in ("one", "other"))
    assert not one.keys() & other.keys()
    labels = other["Deployment", "other"]["spec"]["template"]["metadata"]["labels"]
    chosen = list(selectors(one))
    assert len({kind for kind, _ in chosen}) >= 4
    for kind, selector in chosen:
        assert not selector.items() <= labels.items(), kind


@pytest.mark.parametrize("components", [(), tuple(reversed(COMPONENTS))])
def test_two_overlays_in_one_namespace_use_their_own_pods(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    """The overlay of deploy/README.md, as it is there, also with every component."""
    text = (KUSTOMIZE.parent / "README.md").read_text(encoding="utf-8")
    overlay = text.partition("```yaml\n# second/kustomization.yaml\n")[2].partition("```")[0]
    assert overlay
    relative = os.path.relpath(KUSTOMIZE, tmp_path)
    taken = yaml.safe_load(overlay.replace("../kubernetes", relative))
    taken["components"] = [f"{relative}/{component}" for component in components]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(taken), encoding="utf-8")
    first, second = built(KUSTOMIZE), built(tmp_path)
    assert not first.keys() & second.keys()
    if components:
        assert second["ScaledObject", "second-gateway"]["spec"]["scaleTargetRef"]["name"] == "second-gateway"
        (container,) = second["Deployment", "second-gateway"]["spec"]["template"]["spec"]["containers"]
        environ = {entry["name"]: entry["value"] for entry in container["env"]}
        assert ("Service", environ["GATEWAY_PEERS"]) in second
        assert {"ServiceMonitor", "NetworkPolicy"} <= {kind for kind, _ in selectors(second)}
    (deployment,) = (one for (kind, _), one in second.items() if kind == "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for kind, selector in selectors(first):
        assert not selector.items() <= labels.items(), kind
    for kind, selector in selectors(second):
        assert selector.items() <= labels.items(), kind


@pytest.mark.parametrize("case", ["defaults", "keda", "everything"])
def test_what_scales_is_not_undone_by_an_apply(case: str) -> None:
    found = of(CASES[case])
    assert "replicas" not in found["Deployment"]["spec"]
    scaler = found["ScaledObject"] if case == "keda" else found["HorizontalPodAutoscaler"]
    assert scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount")) == 2
    assert ("HorizontalPodAutoscaler" in found) is (case != "keda")


def test_a_pod_that_is_not_ready_keeps_no_node_from_draining() -> None:
    budget = of({})["PodDisruptionBudget"]["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_replicas_are_fixed_only_without_a_scaler() -> None:
    found = of(CASES["fixed"])
    assert found["Deployment"]["spec"]["replicas"] == 3
    assert "HorizontalPodAutoscaler" not in found


def test_the_settings_of_the_chart_are_settings(tmp_path: Path) -> None:
    """They are valid, name the registry (so that `gateway models` in the pod finds it), and fit the pod."""
    file = tmp_path / "gateway.yaml"
    for case, values in CASES.items():
        file.write_text(of(values)["ConfigMap/gateway-settings"]["data"]["gateway.yaml"], encoding="utf-8")
        effective = configuration.load({}, {}, file)
        spec = pod_of(values)
        (container,) = spec["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert effective.registry is not None
        if case != "bucket":
            assert effective.registry.rpartition("/")[0] in mounts
        needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + effective.drain_delay
        assert spec["terminationGracePeriodSeconds"] >= needed + effective.drain_timeout + 5
        readiness = container["readinessProbe"]
        assert effective.drain_delay >= readiness["periodSeconds"] * readiness["failureThreshold"]
        asked = quantities.size(container["resources"]["requests"]["ephemeral-storage"])
        assert isinstance(asked, int)
        assert asked >= effective.disk_limit
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        # One state per gateway: it stays on the volume of the pod, whatever the cache does.
        assert not str(effective.state_dir).startswith("/var/cache")
        if case == "everything":
            assert str(effective.cache_dir) in mounts
            assert str(effective.admin_key_file).startswith("/secrets/tokens/")
            assert "/secrets/tokens" in mounts


def test_secrets_are_files_and_nothing_else() -> None:
    (container,) = pod_of(EVERYTHING)["containers"]
    assert all("valueFrom" not in entry for entry in container["env"])
    assert "envFrom" not in container
    readable = {
        mount["name"]: mount["readOnly"] for mount in container["volumeMounts"] if "readOnly" in mount
    }
    assert readable["secret-tokens"] is True


def test_the_settings_change_restarts_the_pods() -> None:
    texts = [rendered({"settings": {"log_level": level}})["deployment"] for level in ("info", "debug")]
    assert texts[0] != texts[1]
    assert rendered({"settings": {"log_level": "info"}})["deployment"] == texts[0]


def test_metrics_are_scraped_where_they_are() -> None:
    for values, port in (({}, "http"), ({"admin": True}, "admin")):
        found = of({"monitoring": {"enabled": True}, **values})
        (endpoint,) = found["ServiceMonitor"]["spec"]["endpoints"]
        services = [one for kind, one in found.items() if kind.startswith("Service/")]
        (named,) = [one for one in services if port in [p["name"] for p in one["spec"]["ports"]]]
        assert endpoint["port"] == port
        assert (
            named["metadata"]["labels"].items()
            >= found["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"imag": {}},
        {"image": {"repositry": "x"}},
        {"replicas": -1},
        {"service": {"type": "Cluster"}},
        {"cache": {"size": "much"}},
        {"secrets": ["not/a/name"]},
        {"settings": {"registry": "elsewhere"}},
        {"registry": {"file": "x" * 1_000_001}},
        {"autoscaling": {"saturation": 0}},
        {"peers": {"secret": "a/b"}},
    ],
)
def test_a_wrong_value_is_refused(wrong: dict[str, Any]) -> None:
    helm = needs("helm_python")
    with pytest.raises(helm.HelmError):
        rendered(wrong)


def test_every_value_is_described_and_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    _compare(schema, values, "")


def _compare(schema: Mapping[str, Any], values: Mapping[str, Any], place: str) -> None:
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) - {"global"} == set(values), place
    for name, one in schema["properties"].items():
        assert one["description"], f"{place}{name}"
        if one.get("additionalProperties") is False and "properties" in one:
            _compare(one, values[name], f"{place}{name}.")


def test_helm_finds_nothing_to_complain_about() -> None:
    helm = needs("helm_python")
    found = helm.lint(str(CHART))
    assert found["errors"] == []
    assert [one["error"] for one in found["messages"] if "icon" not in one["error"]] == []


def test_the_pods_find_each_other_and_share_a_key(tmp_path: Path) -> None:
    """By the name of a Service that selects them, ready or not; through the policy, where there is one."""
    values: dict[str, Any] = {"peers": {"secret": "shared"}, "networkPolicy": EVERYTHING["networkPolicy"]}
    for admin, port in ((False, 8080), (True, 9090)):
        found = of({**values, "admin": admin}, "mine")
        pod = found["Deployment"]["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        environ = {entry["name"]: entry["value"] for entry in container["env"]}
        effective = configuration.load({}, environ, directory=tmp_path)
        assert effective.peers_place == ("mine-peers", port)
        service = found["Service/mine-peers"]["spec"]
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        key = effective.peers_key_file
        assert key is not None
        assert volumes[mounts[str(key.parent)]]["secret"]["secretName"] == "shared"
        policy = found["NetworkPolicy"]["spec"]
        for rules, end in (("ingress", "from"), ("egress", "to")):
            assert any(
                peer.get("podSelector", {}).get("matchLabels") == service["selector"]
                and port in [one["port"] for one in rule["ports"]]
                for rule in policy[rules]
                for peer in rule.get(end, ())
            ), rules
