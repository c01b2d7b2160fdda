"""A rolling restart with the values of the chart, under traffic through the real balancers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from gateway import configuration, quantities
from tests.support.balancers import BALANCERS, ROUTING, balancing
from tests.support.pods import Chart, Pods
from tests.support.running import log_scaled
from tests.support.traffic import traffic, until

pytestmark = pytest.mark.all


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    log_scaled(tmp_path / "registry.yaml", "scaled", 10.0, alias="champion")
    made = Pods(tmp_path, tmp_path / "registry.yaml", Chart.of(), 2)
    try:
        yield made
    finally:
        made.stop()


def test_all_gateways_are_replaced_and_no_request_fails(pods: Pods, tmp_path: Path) -> None:
    with ExitStack() as stack:
        through = {}
        for kind in BALANCERS:
            url = stack.enter_context(balancing(kind, tmp_path / kind, pods.ports))
            through[kind] = stack.enter_context(traffic(url, "scaled", connections=1))
        for port in pods.ports:
            # During the pause of `preStop` the gateway is as before: it says nothing about a restart.
            assert pods.replace(port), "it was killed"
        until(lambda: min(one.answers for one in through.values()) > 20)
    assert {kind: one.failures for kind, one in through.items()} == {kind: [] for kind in BALANCERS}


def seconds(text: str) -> float:
    found = quantities.seconds(text)
    assert isinstance(found, float)
    return found


def test_the_settings_of_the_chart_fit_the_files_of_the_balancers(tmp_path: Path) -> None:
    """A gateway that drains is taken out before its port closes, and no balancer keeps an idle connection
    longer than a gateway does."""
    file = tmp_path / "gateway.yaml"
    file.write_text(Chart.of().settings, encoding="utf-8")
    settings = configuration.load({}, {}, file)
    (cluster,) = yaml.safe_load((ROUTING / "envoy.yaml").read_text())["static_resources"]["clusters"]
    (check,) = cluster["health_checks"]
    (protocol,) = cluster["typed_extension_protocol_options"].values()
    haproxy, nginx = ((ROUTING / name).read_text() for name in ("haproxy.cfg", "nginx.conf"))
    (server,) = re.findall(
        r"default-server check inter (\d+s) fall (\d+) rise 1 pool-purge-delay (\d+s)", haproxy
    )
    (kept,) = re.findall(r"^ *keepalive_timeout (\d+s);", nginx, re.MULTILINE)
    noticed = {
        "envoy": seconds(check["interval"]) * check["unhealthy_threshold"] + seconds(check["timeout"]),
        "haproxy": seconds(server[0]) * (int(server[1]) + 1),
    }
    idle = {
        "envoy": seconds(protocol["common_http_protocol_options"]["idle_timeout"]),
        "haproxy": seconds(server[2]),
        "nginx": seconds(kept),
    }
    assert max(noticed.values()) < settings.drain_delay
    assert max(idle.values()) < settings.keep_alive
