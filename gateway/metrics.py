"""The gateway's metrics, as Prometheus series with bounded labels.

A name that is not in the registry never makes a series: such requests count once, under an empty model.
Gauges are not stored here: each scrape reads them through the callables given to `watch`. Counts are plain
numbers, so that counting costs a request little and a scrape of thousands of models takes no longer than
writing its text. This module must not know HTTP, models or the ledger: it receives names and numbers.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import tee
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict, Unpack

from gateway import __version__, events
from gateway.exposition import Family, Row, Writer, batches
from gateway.tallies import PHASE_BOUNDS, PHASES, REQUEST_BOUNDS, Cached, Served, Tallies
from gateway.vitals import Vitals

if TYPE_CHECKING:
    from gateway.record import RequestRecord

LINGER_SECONDS: Final = 300.0
MAX_PROBLEMS: Final = 64
MAX_TEAMS: Final = 100

_LOAD_BOUNDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_AGE_BOUNDS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_ROW_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

_MODEL: Final = ("model",)
_VERSION: Final = ("model", "version")
_ALIAS: Final = ("model", "alias")

Counts: TypeAlias = "defaultdict[tuple[str, ...], int]"
"""Counts by the values of the labels."""


class Sources(TypedDict, total=False):
    """The callables that give the gauges. Each scrape calls them on the event loop, so they must be cheap.

    memory          bytes by state: `reserved`, `resident`, `closing`; the limit as `limit_bytes`, and what it
                    has no room for as `uncounted`
    models          (model, version) -> bytes, of every version that is held
    queue           model -> (requests waiting, requests in flight)
    mismatches      (model, version) of each version that runs in another environment than its own
    stuck           model -> how many of its versions have a process that does not work
    aliases         (model, alias), (version in service or None, whether it differs from the desired one); the
                    loop does other work while they are read
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
    aliases: Callable[[], Iterable[tuple[tuple[str, str], tuple[str | None, bool]]]]
    rollouts: Callable[[], Mapping[tuple[str, str], str]]
    disk: Callable[[], float]
    registry_age: Callable[[], float | None]
    connections: Callable[[], tuple[int, int]]
    stalled: Callable[[], int]
    descriptors: Callable[[], tuple[int, int]]


class Metrics:
    """The gateway's metrics. Only the event loop uses it.

    `clock` gives monotonic seconds; it decides when the series of a removed version end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sources: Sources = {}
        self.vitals = Vitals()
        self._teams: set[str] = set()
        self._problems: set[str] = set()
        #: Called for each request that has ended.
        self.usage: Callable[[RequestRecord], None] = lambda record: None
        #: Gives the families of the peers.
        self.peers: Callable[[], Iterable[Family]] = tuple
        self._served: dict[tuple[str, str], Served] = {}
        self._cache: dict[str, Cached] = {}
        self._unresolved: dict[tuple[str, str], int] = {}
        self._batch_rows = Tallies(_ROW_BOUNDS)
        self._load_seconds = Tallies(_LOAD_BOUNDS)
        self._eviction_age = Tallies(_AGE_BOUNDS)
        self._loads: Counts = defaultdict(int)
        self._unloads: Counts = defaultdict(int)
        self._lenient: Counts = defaultdict(int)
        self._evictions_for: Counts = defaultdict(int)
        self._crashes: Counts = defaultdict(int)
        self._swaps: Counts = defaultdict(int)
        self._rollout_requests: Counts = defaultdict(int)
        self._notifications: Counts = defaultdict(int)
        self._captured: Counts = defaultdict(int)
        self._rejections: Counts = defaultdict(int)
        self._registry_errors = 0
        self._memory_short = 0

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
        self._batch_rows[model].observe(rows)

    def load(self, model: str, result: str, seconds: float) -> None:
        self._loads[model, result] += 1
        self._load_seconds[model].observe(seconds)

    def record(self, record: RequestRecord) -> None:
        """Counts a request that has ended."""
        version = record.version
        name, number = (version.name, version.version) if version is not None else ("", "")
        phases = (record.parse, record.queue, record.predict, record.encode)
        team = "" if record.principal is None else record.principal.team
        self.request(name, number, record.code, time.perf_counter() - record.began, phases, team)
        self.usage(record)
        if record.lenient and record.code == "2xx":
            self._lenient[name,] += 1
        if record.cached is not None:
            cache = self._cache.get(name)
            if cache is None:
                cache = self._cache[name] = Cached()
            if record.cached:
                cache.hits += 1
            else:
                cache.misses += 1

    def unload(self, model: str, reason: str) -> None:
        self._unloads[model, reason] += 1

    def eviction(self, model: str, idle: float, asking: str) -> None:
        """`model` was evicted `idle` seconds after its last request. `asking`: the model that got the room,
        empty if it was none."""
        self._eviction_age[model].observe(idle)
        if asking:
            self._evictions_for[asking,] += 1

    def crash(self, model: str) -> None:
        self._crashes[model,] += 1

    def swap(self, model: str, alias: str, result: str) -> None:
        self._swaps[model, alias, result] += 1

    def notified(self, result: str, number: int) -> None:
        self._notifications[result,] += number

    def captured(self, model: str, result: str, number: int) -> None:
        self._captured[model, result] += number

    def rollout_request(self, model: str, alias: str, arm: str) -> None:
        self._rollout_requests[model, alias, arm] += 1

    def registry_error(self) -> None:
        self._registry_errors += 1

    def memory_short(self) -> None:
        self._memory_short += 1

    def rejection(self, problem: str, count: int = 1) -> None:
        """`count` fields were refused. `problem` is a kind; past `MAX_PROBLEMS` kinds it is "other"."""
        if problem not in self._problems:
            if len(self._problems) >= MAX_PROBLEMS:
                problem = "other"
            self._problems.add(problem)
        self._rejections[problem,] += count

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

    async def collect(self) -> list[Family]:
        """All metrics as they are now. The event loop gets a turn after each part of a family."""
        found = []
        for family in self._families():
            rows: list[Row] = []
            for batch in batches(family):
                rows += batch
                await asyncio.sleep(0)
            found.append(replace(family, rows=rows))
        return found

    async def render(self, accept: str = "") -> tuple[list[bytes], str]:
        """The text that Prometheus reads, in pieces, and its content type; OpenMetrics if `accept` names it.
        The event loop gets a turn after each piece, so counts go on: each row is of one moment, the families
        of a text may differ by some requests."""
        writer, pieces = Writer(accept), []
        for family in self._families():
            for piece in writer.pieces(family):
                pieces.append(piece)
                await asyncio.sleep(0)
        return [*pieces, writer.end], writer.content_type

    def _sweep(self) -> Mapping[tuple[str, str], float]:
        """Ends the series of the versions that left long ago. Returns the bytes of those that are held."""
        now = self._clock()
        models = self._sources.get("models")
        held = models() if models else {}
        for key, served in list(self._served.items()):
            if key in held:
                served.seen = now
            elif now - served.seen >= LINGER_SECONDS:
                del self._served[key]
        return held

    # All that follows makes families. The rows are read while others count, so they come from copies of the
    # keys.

    def _families(self) -> Iterator[Family]:
        held = self._sweep()
        build = {"version": __version__, "python": platform.python_version()}
        yield Family(
            "gateway_build", "The gateway that runs, and its Python.", "info",
            tuple(build), [(tuple(build.values()), 1)],
        )  # fmt: skip
        yield from self._requests()
        yield from self._events()
        yield from self._sizes(held)
        yield from self._states()
        yield from self._limits()
        yield from self.peers()

    def _requests(self) -> Iterator[Family]:
        # Without teams there is no such label: an empty one is the same to Prometheus.
        by_team = ("team",) if self._teams else ()
        yield Family(
            "gateway_requests", "Answers sent.", "counter",
            (*_VERSION, "code", *by_team), self._answers(bool(by_team)),
        )  # fmt: skip
        yield Family(
            "gateway_request_seconds", "Time from the head of a request to its answer.", "histogram",
            _VERSION, self._times(), REQUEST_BOUNDS,
        )  # fmt: skip
        yield Family(
            "gateway_phase_seconds", "Time spent in the parts of a request.", "histogram",
            (*_VERSION, "phase"), self._phase_times(), PHASE_BOUNDS,
        )  # fmt: skip
        cache = list(self._cache.items())
        hits: list[Row] = [((model,), one.hits) for model, one in cache]
        yield Family(
            "gateway_cache_hits", "Requests whose version was loaded when they came.", "counter", _MODEL, hits
        )
        misses: list[Row] = [((model,), one.misses) for model, one in cache]
        yield Family(
            "gateway_cache_misses", "Requests that had to wait for a load.", "counter", _MODEL, misses
        )
        yield _tallied("gateway_batch_rows", "Rows per call of a model.", self._batch_rows)

    def _answers(self, by_team: bool) -> Iterator[Row]:
        counted = [(("", ""), self._unresolved)]
        counted += [(version, served.codes) for version, served in self._served.items()]
        for version, codes in counted:
            for (code, team), count in list(codes.items()):
                if by_team:
                    yield (*version, code, team), count
                elif not team:  # otherwise the first team came after the family began
                    yield (*version, code), count

    def _times(self) -> Iterator[Row]:
        for version, served in list(self._served.items()):
            served.count()
            yield version, served.seconds.distribution()

    def _phase_times(self) -> Iterator[Row]:
        for version, served in list(self._served.items()):
            served.count()
            for phase, tally in zip(PHASES, served.phases, strict=True):
                yield (*version, phase), tally.distribution()

    def _events(self) -> Iterator[Family]:
        yield _counted("gateway_loads", "Loads by result.", (*_MODEL, "result"), self._loads)
        yield _tallied("gateway_load_seconds", "Time of a load, from fetch to warm-up.", self._load_seconds)
        yield _counted("gateway_unloads", "Unloads by reason.", (*_MODEL, "reason"), self._unloads)
        said = "Answers to inputs that strict enforcement would have refused."
        yield _counted("gateway_lenient_casts", said, _MODEL, self._lenient)
        said = "Time since the last request of a model that was evicted."
        yield _tallied("gateway_eviction_age_seconds", said, self._eviction_age)
        said = "Evictions of others that made room for a model."
        yield _counted("gateway_evictions_for", said, _MODEL, self._evictions_for)
        yield _counted("gateway_crashes", "Model processes that ended on their own.", _MODEL, self._crashes)
        yield _counted("gateway_swaps", "Moves of an alias by result.", (*_ALIAS, "result"), self._swaps)
        said = "Requests during rollouts by the version that answered: candidate or service."
        yield _counted("gateway_rollout_requests", said, (*_ALIAS, "arm"), self._rollout_requests)
        said = "Notifications by result: delivered, failed (an attempt), dropped."
        yield _counted("gateway_notifications", said, ("result",), self._notifications)
        said = "Requests that capture chose, by result: kept, or why not (full, large, unnamed, failed)."
        yield _counted("gateway_captured_requests", said, (*_MODEL, "result"), self._captured)
        said = "Reads of the registry that failed."
        yield _counted("gateway_registry_errors", said, (), {(): self._registry_errors})
        said = "How often memory was short and no model was the cause."
        yield _counted("gateway_memory_short", said, (), {(): self._memory_short})
        said = "Fields refused by a signature, by problem."
        yield _counted("gateway_input_rejections", said, ("problem",), self._rejections)

    def _sizes(self, held: Mapping[tuple[str, str], float]) -> Iterator[Family]:
        sources = self._sources
        if "memory" in sources:
            memory = dict(sources["memory"]())
            limit, uncounted = memory.pop("limit_bytes", None), memory.get("uncounted")
            states = ("reserved", "resident", "closing")
            yield _gauge(
                "gateway_memory_bytes", "Bytes accounted to models.", ("state",),
                [((state,), memory.get(state) or 0) for state in states],
            )  # fmt: skip
            if limit is not None:
                yield _one("gateway_memory_limit_bytes", "Bytes that models may use.", limit)
            if uncounted is not None:
                said = "Bytes of processes that models share for which the limit has no room now."
                yield _one("gateway_memory_uncounted_bytes", said, uncounted)
        if "models" in sources:
            total: dict[str, float] = defaultdict(float)
            for (model, _), size in held.items():
                total[model] += size
            rows: list[Row] = [((model,), size) for model, size in total.items()]
            yield _gauge("gateway_model_bytes", "Bytes held by a model's versions.", _MODEL, rows)
        if "queue" in sources:
            queues = sources["queue"]()
            waiting: list[Row] = [((model,), queued) for model, (queued, _) in queues.items()]
            yield _gauge("gateway_queue_requests", "Requests waiting.", _MODEL, waiting)
            inflight: list[Row] = [((model,), running) for model, (_, running) in queues.items()]
            yield _gauge("gateway_inflight_requests", "Requests being answered.", _MODEL, inflight)
        if "disk" in sources:
            yield _one("gateway_disk_cache_bytes", "Bytes of cached artifacts.", sources["disk"]())

    def _states(self) -> Iterator[Family]:
        sources = self._sources
        if "mismatches" in sources:
            said = "1 for a version that runs in another environment than its own."
            rows: list[Row] = [(version, 1) for version in sources["mismatches"]()]
            yield _gauge("gateway_environment_mismatch", said, _VERSION, rows)
        if "stuck" in sources:
            said = "Versions with a process that is alive but does not work."
            rows = [((model,), count) for model, count in sources["stuck"]().items()]
            yield _gauge("gateway_stuck", said, _MODEL, rows)
        if "aliases" in sources:
            aliases, again = tee(sources["aliases"]())  # each alias is looked at when its row is written
            serving = (((*alias, version), 1.0) for alias, (version, _) in aliases if version is not None)
            said = "The version an alias serves."
            yield _gauge("gateway_alias_info", said, (*_ALIAS, "version"), serving)
            diverged = ((alias, float(differs)) for alias, (_, differs) in again)
            said = "1 if an alias serves another version than the desired one."
            yield _gauge("gateway_alias_diverged", said, _ALIAS, diverged)
        if "rollouts" in sources:
            rows = [((*alias, phase), 1) for alias, phase in sources["rollouts"]().items()]
            said = "1 for the phase of an alias's current or last rollout."
            yield _gauge("gateway_rollout_phase", said, (*_ALIAS, "phase"), rows)

    def _limits(self) -> Iterator[Family]:
        sources = self._sources
        if "registry_age" in sources and (age := sources["registry_age"]()) is not None:
            yield _one("gateway_registry_age_seconds", "Time since the registry was read.", age)
        if "connections" in sources:
            now, most = sources["connections"]()
            yield _one("gateway_open_connections", "Open client connections.", now)
            yield _one("gateway_max_connections", "Client connections that may be open.", most)
        if "stalled" in sources:
            said = "Connections that ended because the client took nothing of its answer for send_timeout."
            yield _counted("gateway_stalled_connections", said, (), {(): sources["stalled"]()})
        if "descriptors" in sources:
            now, most = sources["descriptors"]()
            yield _one("gateway_open_descriptors", "Open file descriptors.", now)
            yield _one("gateway_max_descriptors", "File descriptors that may be open.", most)
        said = "The longest delay of the event loop in the last half minute."
        yield _one("gateway_loop_lag_seconds", said, self.vitals.lag)
        if self.vitals.load is not None:
            said = "Requests in flight as a share of those that can run at the same time, smoothed over 10 s."
            yield _one("gateway_saturation", said, self.vitals.saturation)


def _counted(name: str, said: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]) -> Family:
    return Family(name, said, "counter", labels, list(counts.items()))


def _tallied(name: str, said: str, tallies: Tallies) -> Family:
    rows = (((model,), tally.distribution()) for model, tally in list(tallies.items()))
    return Family(name, said, "histogram", _MODEL, rows, tallies.bounds)


def _gauge(name: str, said: str, labels: tuple[str, ...], rows: Iterable[Row]) -> Family:
    return Family(name, said, "gauge", labels, rows)


def _one(name: str, said: str, value: float) -> Family:
    return Family(name, said, "gauge", (), [((), value)])


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
