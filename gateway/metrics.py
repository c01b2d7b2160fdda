"""The gateway's metrics, as Prometheus series with bounded labels.

A name that is not in the registry never makes a series: such requests count once, under an empty model.
Gauges are not stored here: each scrape reads them through the callables given to `watch`. This module must
not know HTTP, models or the ledger: it receives names and numbers.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypedDict, Unpack

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway import __version__, events
from gateway.tallies import PHASES, Cached, Served, Tally
from gateway.vitals import Vitals

if TYPE_CHECKING:
    from gateway.record import RequestRecord

LINGER_SECONDS: Final = 300.0
MAX_PROBLEMS: Final = 64
MAX_TEAMS: Final = 100

_LOAD_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_AGE_BUCKETS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)


class Sources(TypedDict, total=False):
    """The callables that give the gauges. Each scrape calls them on the event loop, so they must be cheap.

    memory          bytes by state: `reserved`, `resident`, `closing`; the limit as `limit_bytes`, and what it
                    has no room for as `uncounted`
    models          (model, version) -> bytes, of every version that is held
    queue           model -> (requests waiting, requests in flight)
    mismatches      (model, version) of each version that runs in another environment than its own
    stuck           model -> how many of its versions have a process that does not work
    aliases         (model, alias) -> (version in service or None, whether it differs from the desired one)
    rollouts        (model, alias) -> phase, of each rollout in progress and the last ones
    disk            bytes of the artifact cache
    registry_age    seconds since the registry was last read, None before the first read
    connections     open client connections, and the most that may be open
    stalled         how many ended because the client took nothing of its answer
    descriptors     the same for this process's file descriptors
    """

    memory: Callable[[], Mapping[str, float | None]]
    models: Callable[[], Mapping[tuple[str, str], float]]
    queue: Callable[[], Mapping[str, tuple[int, int]]]
    mismatches: Callable[[], Collection[tuple[str, str]]]
    stuck: Callable[[], Mapping[str, int]]
    aliases: Callable[[], Mapping[tuple[str, str], tuple[str | None, bool]]]
    rollouts: Callable[[], Mapping[tuple[str, str], str]]
    disk: Callable[[], float]
    registry_age: Callable[[], float | None]
    connections: Callable[[], tuple[int, int]]
    stalled: Callable[[], int]
    descriptors: Callable[[], tuple[int, int]]


class Metrics:
    """The gateway's metrics in a Prometheus registry of their own. Only the event loop uses it.

    `clock` gives monotonic seconds; it decides when the series of a removed version end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sources: Sources = {}
        self._served: dict[tuple[str, str], Served] = {}
        self._batch_rows: dict[str, Tally] = {}
        self._problems: set[str] = set()
        self.vitals = Vitals()
        self._cache: dict[str, Cached] = {}
        self.registry = CollectorRegistry()
        own = self.registry
        self._unresolved: dict[tuple[str, str], int] = {}
        self._teams: set[str] = set()
        #: Called for each request that has ended.
        self.usage: Callable[[RequestRecord], None] = lambda record: None
        build = Info("gateway_build", "The gateway that runs, and its Python.", registry=own)
        build.info({"version": __version__, "python": platform.python_version()})
        self._loads = Counter("gateway_loads", "Loads by result.", ("model", "result"), registry=own)
        self._load_seconds = Histogram(
            "gateway_load_seconds",
            "Time of a load, from fetch to warm-up.",
            ("model",),
            buckets=_LOAD_BUCKETS,
            registry=own,
        )
        self._unloads = Counter("gateway_unloads", "Unloads by reason.", ("model", "reason"), registry=own)
        self._lenient = Counter(
            "gateway_lenient_casts",
            "Answers to inputs that strict enforcement would have refused.",
            ("model",),
            registry=own,
        )
        self._eviction_age = Histogram(
            "gateway_eviction_age_seconds",
            "Time since the last request of a model that was evicted.",
            ("model",),
            buckets=_AGE_BUCKETS,
            registry=own,
        )
        self._evictions_for = Counter(
            "gateway_evictions_for",
            "Evictions of others that made room for a model.",
            ("model",),
            registry=own,
        )
        self._crashes = Counter(
            "gateway_crashes", "Model processes that ended on their own.", ("model",), registry=own
        )
        self._swaps = Counter(
            "gateway_swaps",
            "Moves of an alias by result.",
            ("model", "alias", "result"),
            registry=own,
        )
        self._rollout_requests = Counter(
            "gateway_rollout_requests",
            "Requests during rollouts by the version that answered: candidate or service.",
            ("model", "alias", "arm"),
            registry=own,
        )
        self._notifications = Counter(
            "gateway_notifications",
            "Notifications by result: delivered, failed (an attempt), dropped.",
            ("result",),
            registry=own,
        )
        self._captured = Counter(
            "gateway_captured_requests",
            "Requests that capture chose, by result: kept, or why not (full, large, unnamed, failed).",
            ("model", "result"),
            registry=own,
        )
        self._registry_errors = Counter(
            "gateway_registry_errors", "Reads of the registry that failed.", registry=own
        )
        self._memory_short = Counter(
            "gateway_memory_short",
            "How often memory was short and no model was the cause.",
            registry=own,
        )
        self._rejections = Counter(
            "gateway_input_rejections",
            "Fields refused by a signature, by problem.",
            ("problem",),
            registry=own,
        )
        own.register(_Gauges(self))

    # What happened -------------------------------------------------------------------------------

    def request(
        self,
        model: str,
        version: str,
        code: str,
        seconds: float = 0.0,
        phases: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        team: str = "",
    ) -> None:
        """Counts an answer. `code` is "2xx" or an error code; `phases` are seconds in the order of `PHASES`.
        `team`: the caller's; past `MAX_TEAMS` it is "other".

        A request whose model was not resolved has an empty `model`: only the request counter includes it.
        """
        if team and team not in self._teams:
            if len(self._teams) >= MAX_TEAMS:
                team = "other"
            self._teams.add(team)
        answer = (code, team)
        if not model:
            self._unresolved[answer] = self._unresolved.get(answer, 0) + 1
            return
        served = self._served.get((model, version))
        if served is None:
            served = self._served[model, version] = Served()
        served.seen = self._clock()
        served.codes[answer] = served.codes.get(answer, 0) + 1
        served.observe((seconds, *phases))

    def batch(self, model: str, rows: int) -> None:
        """One call of a model with `rows` rows."""
        tally = self._batch_rows.get(model)
        if tally is None:
            tally = self._batch_rows[model] = Tally(_ROW_BUCKETS)
        tally.observe(rows)

    def load(self, model: str, result: str, seconds: float) -> None:
        self._loads.labels(model, result).inc()
        self._load_seconds.labels(model).observe(seconds)

    def record(self, record: RequestRecord) -> None:
        """Counts a request that has ended."""
        version = record.version
        name, number = (version.name, version.version) if version is not None else ("", "")
        phases = (record.parse, record.queue, record.predict, record.encode)
        team = "" if record.principal is None else record.principal.team
        self.request(name, number, record.code, time.perf_counter() - record.began, phases, team)
        self.usage(record)
        if record.lenient and record.code == "2xx":
            self._lenient.labels(name).inc()
        if record.cached is not None:
            cache = self._cache.get(name)
            if cache is None:
                cache = self._cache[name] = Cached()
            if record.cached:
                cache.hits += 1
            else:
                cache.misses += 1

    def unload(self, model: str, reason: str) -> None:
        self._unloads.labels(model, reason).inc()

    def eviction(self, model: str, idle: float, asking: str) -> None:
        """`model` was evicted `idle` seconds after its last request. `asking`: the model that got the room,
        empty if it was none."""
        self._eviction_age.labels(model).observe(idle)
        if asking:
            self._evictions_for.labels(asking).inc()

    def crash(self, model: str) -> None:
        self._crashes.labels(model).inc()

    def swap(self, model: str, alias: str, result: str) -> None:
        self._swaps.labels(model, alias, result).inc()

    def notified(self, result: str, number: int) -> None:
        self._notifications.labels(result).inc(number)

    def captured(self, model: str, result: str, number: int) -> None:
        self._captured.labels(model, result).inc(number)

    def rollout_request(self, model: str, alias: str, arm: str) -> None:
        self._rollout_requests.labels(model, alias, arm).inc()

    def registry_error(self) -> None:
        self._registry_errors.inc()

    def memory_short(self) -> None:
        self._memory_short.inc()

    def rejection(self, problem: str, count: int = 1) -> None:
        """`count` fields were refused. `problem` is a kind; past `MAX_PROBLEMS` kinds it is "other"."""
        if problem not in self._problems:
            if len(self._problems) >= MAX_PROBLEMS:
                problem = "other"
            self._problems.add(problem)
        self._rejections.labels(problem).inc(count)

    def forget(self, model: str, version: str) -> None:
        """The version was removed: its series end in five minutes, unless it is loaded or called again."""
        served = self._served.get((model, version))
        if served is not None:
            served.seen = self._clock()

    # What is so now ------------------------------------------------------------------------------

    def watch(self, **sources: Unpack[Sources]) -> None:
        """Sets the callables that give the gauges; see `Sources`. A later one replaces one of the same
        name."""
        self._sources.update(sources)

    def collect(self) -> list[Metric]:
        """All metrics as they are now."""
        self._sweep()
        return list(self.registry.collect())

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text that Prometheus reads and its content type; OpenMetrics if `accept` names it."""
        self._sweep()
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _sweep(self) -> None:
        now = self._clock()
        models = self._sources.get("models")
        held = models() if models else {}
        for key, served in list(self._served.items()):
            if key in held:
                served.seen = now
            elif now - served.seen >= LINGER_SECONDS:
                del self._served[key]

    def _served_series(self) -> Iterator[Metric]:
        by_version = ["model", "version"]
        # Without teams there is no such label: an empty one is the same to Prometheus.
        by_team = ["team"] if self._teams else []
        labels = [*by_version, "code", *by_team]
        requests = CounterMetricFamily("gateway_requests", "Answers sent.", labels=labels)
        seconds = HistogramMetricFamily(
            "gateway_request_seconds", "Time from the head of a request to its answer.", labels=by_version
        )
        parts = HistogramMetricFamily(
            "gateway_phase_seconds", "Time spent in the parts of a request.", labels=[*by_version, "phase"]
        )
        for answer, count in self._unresolved.items():
            requests.add_metric(["", "", *answer[: 1 + len(by_team)]], count)
        for version, served in self._served.items():
            served.count()
            for answer, count in served.codes.items():
                requests.add_metric([*version, *answer[: 1 + len(by_team)]], count)
            seconds.add_metric(version, served.seconds.buckets(), served.seconds.sum)
            for phase, tally in zip(PHASES, served.phases, strict=True):
                parts.add_metric([*version, phase], tally.buckets(), tally.sum)
        yield from (requests, seconds, parts)
        hits = CounterMetricFamily(
            "gateway_cache_hits", "Requests whose version was loaded when they came.", labels=["model"]
        )
        misses = CounterMetricFamily(
            "gateway_cache_misses", "Requests that had to wait for a load.", labels=["model"]
        )
        for model, cache in self._cache.items():
            hits.add_metric([model], cache.hits)
            misses.add_metric([model], cache.misses)
        batches = HistogramMetricFamily("gateway_batch_rows", "Rows per call of a model.", labels=["model"])
        for model, tally in self._batch_rows.items():
            tally.count()
            batches.add_metric([model], tally.buckets(), tally.sum)
        yield from (hits, misses, batches)

    def gauges(self) -> Iterator[Metric]:
        yield from self._served_series()
        sources = self._sources
        if "memory" in sources:
            memory = dict(sources["memory"]())
            limit, uncounted = memory.pop("limit_bytes", None), memory.get("uncounted")
            family = GaugeMetricFamily("gateway_memory_bytes", "Bytes accounted to models.", labels=["state"])
            for state in ("reserved", "resident", "closing"):
                family.add_metric([state], memory.get(state) or 0)
            yield family
            if limit is not None:
                yield GaugeMetricFamily("gateway_memory_limit_bytes", "Bytes that models may use.", limit)
            if uncounted is not None:
                said = "Bytes of processes that models share for which the limit has no room now."
                yield GaugeMetricFamily("gateway_memory_uncounted_bytes", said, uncounted)
        if "models" in sources:
            total: dict[str, float] = {}
            for (model, _), size in sources["models"]().items():
                total[model] = total.get(model, 0) + size
            family = GaugeMetricFamily(
                "gateway_model_bytes", "Bytes held by a model's versions.", labels=["model"]
            )
            for model, size in total.items():
                family.add_metric([model], size)
            yield family
        if "queue" in sources:
            waiting = GaugeMetricFamily("gateway_queue_requests", "Requests waiting.", labels=["model"])
            inflight = GaugeMetricFamily(
                "gateway_inflight_requests", "Requests being answered.", labels=["model"]
            )
            for model, (queued, running) in sources["queue"]().items():
                waiting.add_metric([model], queued)
                inflight.add_metric([model], running)
            yield waiting
            yield inflight
        if "mismatches" in sources:
            family = GaugeMetricFamily(
                "gateway_environment_mismatch",
                "1 for a version that runs in another environment than its own.",
                labels=["model", "version"],
            )
            for labels in sources["mismatches"]():
                family.add_metric(list(labels), 1)
            yield family
        if "stuck" in sources:
            family = GaugeMetricFamily(
                "gateway_stuck", "Versions with a process that is alive but does not work.", labels=["model"]
            )
            for model, count in sources["stuck"]().items():
                family.add_metric([model], count)
            yield family
        if "aliases" in sources:
            info = GaugeMetricFamily(
                "gateway_alias_info", "The version an alias serves.", labels=["model", "alias", "version"]
            )
            apart = GaugeMetricFamily(
                "gateway_alias_diverged", "1 if an alias serves another version than the desired one.",
                labels=["model", "alias"],
            )  # fmt: skip
            for (model, alias), (version, diverged) in sources["aliases"]().items():
                if version is not None:
                    info.add_metric([model, alias, version], 1)
                apart.add_metric([model, alias], float(diverged))
            yield info
            yield apart
        if "rollouts" in sources:
            family = GaugeMetricFamily(
                "gateway_rollout_phase", "1 for the phase of an alias's current or last rollout.",
                labels=["model", "alias", "phase"],
            )  # fmt: skip
            for (model, alias), phase in sources["rollouts"]().items():
                family.add_metric([model, alias, phase], 1)
            yield family
        if "disk" in sources:
            yield GaugeMetricFamily(
                "gateway_disk_cache_bytes", "Bytes of cached artifacts.", sources["disk"]()
            )
        if "registry_age" in sources and (age := sources["registry_age"]()) is not None:
            yield GaugeMetricFamily("gateway_registry_age_seconds", "Time since the registry was read.", age)
        if "connections" in sources:
            now, most = sources["connections"]()
            yield GaugeMetricFamily("gateway_open_connections", "Open client connections.", now)
            yield GaugeMetricFamily("gateway_max_connections", "Client connections that may be open.", most)
        if "stalled" in sources:
            yield CounterMetricFamily(
                "gateway_stalled_connections",
                "Connections that ended because the client took nothing of its answer for send_timeout.",
                sources["stalled"](),
            )
        if "descriptors" in sources:
            now, most = sources["descriptors"]()
            yield GaugeMetricFamily("gateway_open_descriptors", "Open file descriptors.", now)
            yield GaugeMetricFamily("gateway_max_descriptors", "File descriptors that may be open.", most)
        yield GaugeMetricFamily(
            "gateway_loop_lag_seconds",
            "The longest delay of the event loop in the last half minute.",
            self.vitals.lag,
        )
        if self.vitals.load is not None:
            yield GaugeMetricFamily(
                "gateway_saturation",
                "Requests in flight as a share of those that can run at the same time, smoothed over 10 s.",
                self.vitals.saturation,
            )


class _Gauges(Collector):
    """The collector through which prometheus_client reads the gauges at a scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.gauges()

    def describe(self) -> list[Metric]:
        """Empty, because the sources are set after the registration."""
        return []


def count(metrics: Metrics, event: events.Event) -> None:
    """Counts an event in its metric."""
    match event:
        case events.Loaded():
            metrics.load(event.model, "success", event.seconds)
        case events.LoadFailed():
            metrics.load(event.model, "failure", event.seconds)
        case events.Unloaded():
            metrics.unload(event.model, event.reason)
            if event.idle is not None:
                metrics.eviction(event.model, event.idle, event.asking)
            metrics.forget(event.model, event.version)
        case events.Swapped():
            metrics.swap(event.model, event.alias, "success")
        case events.SwapRefused():
            metrics.swap(event.model, event.alias, "refused")
        case events.RolloutChanged() if event.phase in ("rolled_back", "aborted"):
            metrics.swap(event.model, event.alias, "rolled_back")
        case events.AliasDeleted():
            metrics.swap(event.model, event.alias, "deleted")
        case events.Crashed() if event.what in ("crashed", "timeout", "stopped"):
            metrics.crash(event.model)
        case events.InputRefused():
            for problem in event.problems:
                metrics.rejection(problem)
        case events.RegistryFailed():
            metrics.registry_error()
        case events.MemoryShort():
            metrics.memory_short()
        case _:
            pass
