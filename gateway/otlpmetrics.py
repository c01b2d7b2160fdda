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
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import Metric

from gateway import __version__, otel

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
                    families = self._metrics.collect()
                    self._sending = threading.Thread(target=self._send, args=(families,), daemon=True)
                    self._sending.start()
        finally:
            if not self._is_sending:
                families = self._metrics.collect()
                await otel.briefly(lambda: self._send(families))

    @property
    def _is_sending(self) -> bool:
        return self._sending is not None and self._sending.is_alive()

    def _send(self, families: list[Metric]) -> None:
        data = metrics_data(families, self._started, time.time_ns())
        for exporter in self._exporters:
            try:
                exporter.export(data)
            except Exception as error:  # noqa: BLE001 - an exporter's fault is for the log alone
                log.warning("cannot send metrics: %s", error)


def metrics_data(families: Iterable[Metric], started: int, now: int) -> Any:
    """The metrics as the SDK's exporters take them. Times: in nanoseconds since the epoch."""
    from opentelemetry.sdk.metrics import export as sdk
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    temporality = sdk.AggregationTemporality.CUMULATIVE

    def data_of(family: Metric) -> Any:
        if family.type == "histogram":
            return sdk.Histogram(_histograms(family, started, now, sdk.HistogramDataPoint), temporality)
        points = [
            sdk.NumberDataPoint(sample.labels, started, now, float(sample.value))
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        return sdk.Sum(points, temporality, True) if family.type == "counter" else sdk.Gauge(points)

    ending = {"counter": "_total", "info": "_info"}
    found = [
        sdk.Metric(
            family.name + ending.get(family.type, ""), family.documentation, family.unit, data_of(family)
        )
        for family in families
        if family.samples
    ]
    scope = sdk.ScopeMetrics(InstrumentationScope("gateway", __version__), found, "")
    return sdk.MetricsData([sdk.ResourceMetrics(otel.resource(), [scope], "")])


def _histograms(family: Metric, started: int, now: int, point: Any) -> list[Any]:
    """One point for each set of labels. Prometheus counts what is at most a bound, OTLP what is between
    two."""
    points: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        one = points.setdefault(labels, {"bounds": [], "below": [], "sum": 0.0})
        if sample.name.endswith("_bucket"):
            one["bounds"].append(float(sample.labels["le"]))
            one["below"].append(int(sample.value))
        elif sample.name.endswith("_sum"):
            one["sum"] = sample.value
    return [
        point(
            dict(labels), started, now, one["below"][-1], one["sum"],
            [count - before for count, before in zip(one["below"], [0, *one["below"]], strict=False)],
            one["bounds"][:-1], None, None,
        )
        for labels, one in points.items()
    ]  # fmt: skip
