"""The Prometheus metrics over OTLP, for collectors that do not scrape: the same names, labels and values.

On with `OTEL_METRICS_EXPORTER=otlp` or an endpoint of metrics; sent every `OTEL_METRIC_EXPORT_INTERVAL`
milliseconds. Sums and histograms are cumulative. A collector that is slow or away delays nothing: while one
sending goes on, no other begins. Must not know what the metrics mean.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from gateway import __version__, otel
from gateway.exposition import Distribution, Family, Row

if TYPE_CHECKING:
    from gateway.metrics import Metrics

log = logging.getLogger("gateway")

_INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"
_DEFAULT_MS: Final = 60_000
_LEAST_MS: Final = 100


class OtlpMetrics:
    """Sends the metrics of one gateway. Does nothing unless the variables ask for it."""

    def __init__(self, metrics: Metrics, environ: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._exporters = otel.exporters(environ, "metrics")
        self._started = time.time_ns()
        self._sending: threading.Thread | None = None
        given = environ.get(_INTERVAL, "")
        valid = given.isascii() and given.isdigit() and len(given) < 10
        self._seconds = max(_LEAST_MS, int(given) if valid else _DEFAULT_MS) / 1000

    async def run(self) -> None:
        """Sends until it is cancelled, then once more, unless a collector does not answer just then."""
        if not self._exporters:
            return
        try:
            while True:
                await asyncio.sleep(self._seconds)
                if not self._is_sending:
                    families = await self._metrics.collect()
                    self._sending = threading.Thread(target=self._send, args=(families,), daemon=True)
                    self._sending.start()
        finally:
            if not self._is_sending:
                families = await self._metrics.collect()
                await otel.briefly(lambda: self._send(families))

    @property
    def _is_sending(self) -> bool:
        return self._sending is not None and self._sending.is_alive()

    def _send(self, families: Iterable[Family]) -> None:
        data = metrics_data(families, self._started, time.time_ns())
        for exporter in self._exporters:
            try:
                exporter.export(data)
            except Exception as error:  # noqa: BLE001 - an exporter's fault is for the log alone
                log.warning("cannot send metrics: %s", error)


def metrics_data(families: Iterable[Family], started: int, now: int) -> Any:
    """The metrics as the SDK's exporters take them. Times: in nanoseconds since the epoch."""
    from opentelemetry.sdk.metrics import export as sdk
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    temporality = sdk.AggregationTemporality.CUMULATIVE

    def point_of(family: Family, row: Row) -> Any:
        values, value = row
        labels = dict(zip(family.labels, values, strict=True))
        if not isinstance(value, Distribution):
            return sdk.NumberDataPoint(labels, started, now, float(value))
        # Prometheus counts what is at most a bound, OTLP what is between two.
        between = [count - before for before, count in pairwise((0, *value.below))]
        return sdk.HistogramDataPoint(
            labels, started, now, value.below[-1], value.sum, between, family.bounds, None, None
        )

    def data_of(family: Family, points: list[Any]) -> Any:
        if family.kind == "histogram":
            return sdk.Histogram(points, temporality)
        return sdk.Sum(points, temporality, True) if family.kind == "counter" else sdk.Gauge(points)

    ending = {"counter": "_total", "info": "_info"}
    found = []
    for family in families:
        if points := [point_of(family, row) for row in family.rows]:
            name = family.name + ending.get(family.kind, "")
            found.append(sdk.Metric(name, family.help, "", data_of(family, points)))
    scope = sdk.ScopeMetrics(InstrumentationScope("gateway", __version__), found, "")
    return sdk.MetricsData([sdk.ResourceMetrics(otel.resource(), [scope], "")])
