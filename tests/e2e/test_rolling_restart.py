"""A rolling restart with the values of the chart, under traffic through the real balancers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.balancers import BALANCERS, balancing
from tests.support.pods import Chart, Pods
from tests.support.running import log_scaled
from tests.support.traffic import traffic

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
    assert {kind: one.failures for kind, one in through.items()} == {kind: [] for kind in BALANCERS}
    assert min(one.answers for one in through.values()) > 20
