"""The dashboard and the alerts of the chart, evaluated by a real Prometheus over a real gateway."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.errors import STATUS
from tests.support.charts import CHART
from tests.support.containers import tool
from tests.support.running import Running, log_scaled
from tests.support.shell import free_port

pytestmark = pytest.mark.all

ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
#: What Grafana puts into an expression.
VARIABLES = {
    "$namespace": ".*",
    "$job": ".*",
    "$model": ".*",
    "$__rate_interval": "20s",
    "$__range": "1m",
}
MB = 1024**2


def expressions() -> list[tuple[str, str]]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            assert "$" not in text, text
            found.append((f"{panel['title']} {target['refId']}", text))
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    found = group["rules"]
    assert isinstance(found, list)
    return found


class Prometheus:
    """A server that reads one gateway each second."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def close(self) -> None:
        self._client.close()

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, expression: str) -> list[dict[str, Any]]:
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        found = answer["data"]["result"]
        assert isinstance(found, list)
        return found


@pytest.fixture(scope="module")
def gateway_with_traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Room for two of three models; one version that cannot be loaded; refused inputs."""
    directory = tmp_path_factory.mktemp("watched")
    registry = directory / "registry.yaml"
    for name in ("a", "b", "c"):
        log_scaled(registry, name, 2.0, alias="champion", ballast=40 * MB)
    log_scaled(registry, "a", 3.0)
    document = yaml.safe_load(registry.read_text())
    document["models"]["broken"] = {
        "versions": {1: {"source": str(directory / "nothing")}},
        "aliases": {"champion": 1},
    }
    registry.write_text(yaml.safe_dump(document))
    environ = {"GATEWAY_ISOLATION": "inline", "GATEWAY_MEMORY_LIMIT": str(110 * MB)}
    # A peer, for the series of peers: it serves a, too.
    key = directory / "peers.key"
    key.write_text("a key of sixteen or more")
    ports = free_port(), free_port()
    environ |= {"GATEWAY_PEERS_KEY_FILE": str(key), "GATEWAY_REGISTRY": str(registry)}
    made: list[Running] = []
    try:
        for number, own in enumerate(ports):
            place = directory / str(number)
            place.mkdir()
            peer = {"GATEWAY_PEERS": f"127.0.0.1:{ports[1 - number]}"}
            made.append(Running(place, ["--port", str(own)], {**environ, **peer}, port=None))
        assert made[1].predict("a", [{"x": 1.0}]).status_code == 200
        yield made[0]
    finally:
        for server in made:
            server.stop()


def traffic(server: Running) -> None:
    for name in ("a", "b", "c", "broken"):
        server.predict(name, [{"x": 1.0}])
    server.predict("a", [{"x": "text"}])


@pytest.fixture(scope="module")
def prometheus(
    gateway_with_traffic: Running, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    place, port = tmp_path_factory.mktemp("prometheus"), free_port()
    target = gateway_with_traffic.url.removeprefix("http://")
    labels = {"namespace": "models", "pod": "gateway-1"}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "gateway", "static_configs": [{"targets": [target], "labels": labels}]}
        ],
    }
    (place / "prometheus.yml").write_text(yaml.safe_dump(config))
    arguments = [f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data"]
    arguments += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen([tool("prometheus"), *arguments])
    served, end = Prometheus(f"http://127.0.0.1:{port}"), time.monotonic() + 120
    try:
        while not served.ready():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield served
    finally:
        served.close()
        process.terminate()
        process.wait(30)


#: What this traffic does not do: no rollout, no crash, no failed read of the registry.
UNUSED = {"Crashes A", "Candidate and service A", "Rollouts in progress A"}


def test_every_expression_of_the_dashboard_has_data(
    gateway_with_traffic: Running, prometheus: Prometheus
) -> None:
    server = gateway_with_traffic
    moved = httpx.put(
        f"{server.url}/models/a/aliases/champion?wait=true",
        json={"version": "2"},
        headers=server.key,
        timeout=60,
    )
    assert moved.status_code == 200, moved.text
    wanted = {title: text for title, text in expressions() if title not in UNUSED}
    assert len(wanted) > 25
    deadline = time.monotonic() + 180
    while wanted:
        traffic(server)
        # What had data once is not asked again: on a busy machine a round may outlast a rate's window.
        wanted = {title: text for title, text in wanted.items() if not has_data(prometheus.ask(text))}
        assert time.monotonic() < deadline, wanted
    for title, text in expressions():
        if title in UNUSED:
            prometheus.ask(text)


def has_data(series: list[dict[str, Any]]) -> bool:
    return any(one["value"][1] != "NaN" for one in series)


def test_every_alert_is_evaluated_and_one_fires_for_what_is_wrong(
    gateway_with_traffic: Running, prometheus: Prometheus
) -> None:
    """A version without files: it was refused, its alias diverged, and requests for it fail."""
    wanted = {"GatewayRolledBack", "GatewayErrors", "GatewayAliasDiverged"}
    deadline = time.monotonic() + 240
    while wanted:
        traffic(gateway_with_traffic)
        wanted -= {one["metric"]["alertname"] for one in prometheus.ask("ALERTS")}
        assert time.monotonic() < deadline, wanted
    for rule in rules():
        prometheus.ask(rule["expr"])


def test_the_rules_are_valid_and_each_says_what_to_do() -> None:
    done = subprocess.run([tool("promtool"), "check", "rules", str(ALERTS)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_rules_fire_for_recorded_series_and_only_for_those(tmp_path: Path) -> None:
    """Of two pods one did not move; models are evicted all the time; few requests fail, many are refused."""
    pods = ('namespace="n", job="gateway", pod="1"', 'namespace="n", job="gateway", pod="2"')

    def series(text: str, values: str) -> dict[str, str]:
        return {"series": text, "values": values}

    given = [
        series(f'gateway_alias_info{{{pods[0]}, model="m", alias="champion", version="1"}}', "1x60"),
        series(f'gateway_alias_info{{{pods[1]}, model="m", alias="champion", version="2"}}', "1x60"),
        series(f'gateway_requests_total{{{pods[0]}, model="m", code="2xx"}}', "0+90x60"),
        series(f'gateway_requests_total{{{pods[0]}, model="m", code="PREDICTION_FAILED"}}', "0+10x60"),
        series(f'gateway_requests_total{{{pods[0]}, model="m", code="INVALID_INPUT"}}', "0+900x60"),
        series(f'gateway_requests_total{{{pods[0]}, model="fine", code="2xx"}}', "0+100x60"),
        series(f'gateway_requests_total{{{pods[0]}, model="fine", code="INVALID_INPUT"}}', "0+900x60"),
        series(f"gateway_saturation{{{pods[0]}}}", "5x60"),
        series(f"gateway_saturation{{{pods[1]}}}", "0x60"),
        series(f'gateway_cache_hits_total{{{pods[0]}, model="m"}}', "0+50x60"),
        series(f'gateway_cache_misses_total{{{pods[0]}, model="m"}}', "0+50x60"),
        series(f'gateway_unloads_total{{{pods[0]}, model="m", reason="evicted"}}', "0+50x60"),
        # The first failure makes its series.
        series(f'gateway_loads_total{{{pods[0]}, model="new", result="failure"}}', "_x20 1x40"),
        series(f'gateway_loads_total{{{pods[0]}, model="m", result="failure"}}', "7x60"),
        series(f"gateway_registry_age_seconds{{{pods[0]}}}", "5x60"),
        series(f"gateway_loop_lag_seconds{{{pods[0]}}}", "0.01x60"),
        series(f"gateway_open_connections{{{pods[0]}}}", "95x60"),
        series(f"gateway_max_connections{{{pods[0]}}}", "100x60"),
        series(f'gateway_peers{{{pods[0]}, state="lost"}}', "1x60"),
        series(f'gateway_peers{{{pods[1]}, state="lost"}}', "0x60"),
        series(f'gateway_peer_messages_total{{{pods[0]}, result="refused"}}', "0+3x60"),
        series(f'gateway_peer_messages_total{{{pods[1]}, result="accepted"}}', "0+60x60"),
    ]
    fires = {
        "GatewayVersionSkew", "GatewaySaturated", "GatewayThrashing", "GatewayConnectionsFull",
        "GatewayLoadsFail", "GatewayPeersLost", "GatewayPeersRefused",
    }  # fmt: skip
    # 10 of 1000 requests of m fail, which is less than 2 %.
    checks = []
    for rule in rules():
        expression = f'ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}}'
        count = 1.0 if rule["alert"] in fires else None
        samples = [] if count is None else [{"labels": "{}", "value": count}]
        checks.append({"expr": f"count({expression})", "eval_time": "30m", "exp_samples": samples})
    suite = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": checks}],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump(suite), encoding="utf-8")
    done = subprocess.run(
        [tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_codes_of_the_gateway_are_named() -> None:
    named = set()
    for text in (ALERTS.read_text(encoding="utf-8"), *(text for _, text in expressions())):
        for codes in re.findall(r'code=~"([A-Z_|]+)"', text):
            named |= set(codes.split("|"))
    assert named <= set(STATUS)
    # The panel of failed requests names every status 5xx.
    (failed,) = [text for title, text in expressions() if title == "Failed requests A"]
    (codes,) = re.findall(r'code=~"([A-Z_|]+)"', failed)
    assert set(codes.split("|")) == {code for code, status in STATUS.items() if status >= 500}


def test_alerts_about_models_leave_out_refusals_that_name_none() -> None:
    """A caller's own limit refuses it before its model is known."""
    selectors = [
        selector
        for rule in rules()
        for selector in re.findall(r"gateway_requests_total\{([^}]*)\}", rule["expr"])
    ]
    assert selectors
    assert all('model!=""' in selector for selector in selectors)
