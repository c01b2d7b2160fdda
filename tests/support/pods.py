"""The pods of the chart's Deployment as processes of this machine, and their rolling restart.

What decides whether a request fails during a restart is read from the rendered chart: the settings of the
gateway, the pause before SIGTERM and the time until SIGKILL. Changed: addresses and paths.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.charts import objects, rendered
from tests.support.running import Running
from tests.support.shell import free_port
from tests.support.traffic import until


@dataclass(frozen=True)
class Chart:
    """`settings` is the text of the gateway's settings file. `pre_stop`: how long a pod that is deleted runs
    as before; `grace`: how long after its deletion it is killed. In seconds."""

    settings: str
    pre_stop: float
    grace: float

    @classmethod
    def of(cls, values: Mapping[str, Any] | None = None) -> Chart:
        """What Helm renders. Without these settings and without `preStop` it would be `BARE`."""
        found = objects(rendered(values).values())
        spec = found["Deployment", "gateway"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        return cls(
            found["ConfigMap", "gateway-settings"]["data"]["gateway.yaml"],
            container["lifecycle"]["preStop"]["sleep"]["seconds"],
            spec["terminationGracePeriodSeconds"],
        )


#: A gateway with the defaults of its settings, in a pod with those of Kubernetes.
BARE = Chart("{}", 0, 30)


class Pods:
    """Gateways over one registry file. A new one takes the port of the one that it replaces, because the
    balancers of the tests know ports and not the addresses behind a name."""

    def __init__(self, directory: Path, registry: Path, chart: Chart, number: int) -> None:
        self.chart = chart
        self.ports = [free_port() for _ in range(number)]
        self._directory = directory
        self._registry = registry
        self.running: dict[int, Running] = {}
        try:
            for port in self.ports:
                self.start(port)
        except BaseException:
            self.stop()
            raise

    def start(self, port: int) -> None:
        """Returns when the pod is ready."""
        place = self._directory / str(port)
        place.mkdir(exist_ok=True)
        (place / "gateway.yaml").write_text(self.chart.settings, encoding="utf-8")
        environ = {
            "GATEWAY_REGISTRY": str(self._registry),
            "GATEWAY_CACHE_DIR": str(self._directory / "cache"),
        }
        started = self.running[port] = Running(place, ["--port", str(port)], environ, port=None)
        until(lambda: httpx.get(f"{started.url}/readyz", timeout=30).status_code == 200)

    def replace(self, port: int) -> bool:
        """One step of a rolling restart. Returns whether the pod ended by itself; else it is killed."""
        leaving = self.running.pop(port)
        # `preStop`: meanwhile, the balancers see the pod that came before.
        time.sleep(self.chart.pre_stop)
        leaving.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leaving.process.wait(self.chart.grace - self.chart.pre_stop)
        in_time = leaving.stop(signal.SIGKILL) == 0
        self.start(port)
        return in_time

    def stop(self) -> None:
        for one in self.running.values():
            one.process.send_signal(signal.SIGTERM)
        for one in self.running.values():
            one.stop()  # a second signal ends it at once
