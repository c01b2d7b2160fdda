"""Metrics are read as Prometheus reads them: through the strict OpenMetrics parser."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.events import Unloaded
from gateway.exposition import LINES_AT_ONCE, Family
from gateway.metrics import LINGER_SECONDS, MAX_PROBLEMS, Metrics, count
from gateway.record import RequestRecord
from gateway.registries.base import Version

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def render(metrics: Metrics, accept: str = "") -> tuple[str, str]:
    pieces, content_type = asyncio.run(metrics.render(accept))
    return b"".join(pieces).decode(), content_type


def scrape(metrics: Metrics) -> Samples:
    text, content_type = render(metrics, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples}


PHASES = (0.0002, 0.0, 0.003, 0.0001)


def everything(metrics: Metrics) -> None:
    metrics.request("iris", "2", "2xx", 0.004, PHASES)
    metrics.batch("iris", 3)
    metrics.load("iris", "ready", 0.2)
    metrics.unload("iris", "evicted")
    metrics.crash("iris")
    metrics.swap("iris", "champion", "served")
    metrics.registry_error()
    metrics.rejection("is missing", 2)
    metrics.watch(
        memory=lambda: {"limit_bytes": 100, "reserved": 1, "resident": 2, "closing": 3},
        models=lambda: {("iris", "1"): 10, ("iris", "2"): 20},
        queue=lambda: {"iris": (4, 5)},
        aliases=lambda: [(("iris", "champion"), ("2", False)), (("iris", "next"), (None, True))],
        disk=lambda: 77,
        registry_age=lambda: 1.5,
    )


def test_every_name_of_the_contract_is_there_with_its_labels() -> None:
    metrics = Metrics()
    everything(metrics)
    got = scrape(metrics)
    iris = {"model": "iris"}
    version = {"model": "iris", "version": "2"}
    assert value(got, "gateway_requests_total", **version, code="2xx") == 1
    assert value(got, "gateway_request_seconds_count", **version) == 1
    for phase, seconds in zip(("parse", "queue", "predict", "encode"), PHASES, strict=True):
        assert value(got, "gateway_phase_seconds_sum", **version, phase=phase) == seconds
    assert value(got, "gateway_batch_rows_sum", **iris) == 3
    assert value(got, "gateway_queue_requests", **iris) == 4
    assert value(got, "gateway_inflight_requests", **iris) == 5
    assert value(got, "gateway_loads_total", **iris, result="ready") == 1
    assert value(got, "gateway_load_seconds_sum", **iris) == 0.2
    assert value(got, "gateway_unloads_total", **iris, reason="evicted") == 1
    assert value(got, "gateway_crashes_total", **iris) == 1
    assert value(got, "gateway_model_bytes", **iris) == 30
    assert value(got, "gateway_memory_bytes", state="reserved") == 1
    assert value(got, "gateway_memory_bytes", state="resident") == 2
    assert value(got, "gateway_memory_bytes", state="closing") == 3
    assert value(got, "gateway_memory_limit_bytes") == 100
    assert value(got, "gateway_disk_cache_bytes") == 77
    assert value(got, "gateway_alias_info", model="iris", alias="champion", version="2") == 1
    assert value(got, "gateway_alias_diverged", model="iris", alias="champion") == 0
    assert value(got, "gateway_alias_diverged", model="iris", alias="next") == 1
    assert value(got, "gateway_swaps_total", model="iris", alias="champion", result="served") == 1
    assert value(got, "gateway_registry_age_seconds") == 1.5
    assert value(got, "gateway_registry_errors_total") == 1
    assert value(got, "gateway_input_rejections_total", problem="is missing") == 2
    assert value(got, "gateway_loop_lag_seconds") == 0


def test_prometheus_text_is_given_to_who_does_not_ask_for_openmetrics() -> None:
    metrics = Metrics()
    everything(metrics)
    text, content_type = render(metrics)
    assert content_type.startswith("text/plain")
    assert 'gateway_requests_total{code="2xx",model="iris",version="2"} 1.0\n' in text


def test_ten_thousand_invented_names_add_no_series() -> None:
    metrics = Metrics()
    metrics.request("", "", "MODEL_NOT_FOUND", 0.001)
    before = scrape(metrics)
    for _ in range(10_000):
        metrics.request("", "", "MODEL_NOT_FOUND", 0.001, PHASES)
    after = scrape(metrics)
    assert after.keys() == before.keys()
    assert value(after, "gateway_requests_total", model="", version="", code="MODEL_NOT_FOUND") == 10_001
    assert "gateway_request_seconds_count" not in names(after)


def test_the_series_of_a_version_linger_five_minutes_and_totals_by_model_stay() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    held: dict[tuple[str, str], float] = {("iris", "1"): 10}
    metrics.watch(models=lambda: held)
    metrics.request("iris", "1", "2xx", 0.004, PHASES)
    metrics.load("iris", "ready", 0.2)
    clock.now += 10 * LINGER_SECONDS
    assert value(scrape(metrics), "gateway_requests_total", model="iris", version="1", code="2xx") == 1, (
        "still held"
    )
    held.clear()
    metrics.forget("iris", "1")
    clock.now += LINGER_SECONDS - 1
    assert value(scrape(metrics), "gateway_requests_total", model="iris", version="1", code="2xx") == 1
    clock.now += 1
    gone = scrape(metrics)
    assert not {name for name, labels in gone if ("version", "1") in labels}
    assert value(gone, "gateway_loads_total", model="iris", result="ready") == 1
    metrics.request("iris", "1", "2xx", 0.004, PHASES)
    assert value(scrape(metrics), "gateway_requests_total", model="iris", version="1", code="2xx") == 1


def test_a_version_that_still_gets_requests_keeps_its_series() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.request("iris", "1", "MODEL_UNAVAILABLE", 0.004)
    metrics.forget("iris", "1")
    for _ in range(5):
        clock.now += LINGER_SECONDS / 2
        metrics.request("iris", "1", "MODEL_UNAVAILABLE", 0.004)
        scrape(metrics)
    labels = {"model": "iris", "version": "1", "code": "MODEL_UNAVAILABLE"}
    assert value(scrape(metrics), "gateway_requests_total", **labels) == 6


def test_times_are_counted_whether_or_not_somebody_looks() -> None:
    metrics = Metrics()
    for _ in range(3 * 512 + 7):
        metrics.request("iris", "1", "2xx", 0.004, PHASES)
    got = scrape(metrics)
    assert value(got, "gateway_request_seconds_count", model="iris", version="1") == 3 * 512 + 7
    assert value(got, "gateway_request_seconds_bucket", model="iris", version="1", le="0.0025") == 0
    assert value(got, "gateway_request_seconds_bucket", model="iris", version="1", le="0.005") == 3 * 512 + 7
    assert value(
        got, "gateway_phase_seconds_sum", model="iris", version="1", phase="predict"
    ) == pytest.approx(0.003 * (3 * 512 + 7))


def test_kinds_of_problems_are_bounded() -> None:
    metrics = Metrics()
    for i in range(MAX_PROBLEMS + 50):
        metrics.rejection(f"problem {i}")
    got = {key: v for key, v in scrape(metrics).items() if key[0] == "gateway_input_rejections_total"}
    assert len(got) == MAX_PROBLEMS + 1
    assert value(got, "gateway_input_rejections_total", problem="other") == 50


def test_sources_that_were_not_handed_in_give_no_series() -> None:
    got = names(scrape(Metrics()))
    assert got == {
        "gateway_loop_lag_seconds", "gateway_registry_errors_total", "gateway_memory_short_total",
        "gateway_build_info",
    }  # fmt: skip


@pytest.mark.parametrize("age", [None, 3.0])
def test_the_registry_has_no_age_before_it_was_read(age: float | None) -> None:
    metrics = Metrics()
    metrics.watch(registry_age=lambda: age)
    assert value(scrape(metrics), "gateway_registry_age_seconds") == age


def asked(version: Version, cached: bool | None) -> RequestRecord:
    return RequestRecord(version=version, cached=cached, code="2xx")


def test_hits_and_misses_are_counted_by_model_and_stay() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for version, cached in (("1", False), ("1", True), ("2", True), ("2", None)):
        metrics.record(asked(Version("iris", version, "/models/iris"), cached))
    clock.now += LINGER_SECONDS + 1
    got = scrape(metrics)
    assert value(got, "gateway_cache_hits_total", model="iris") == 2
    assert value(got, "gateway_cache_misses_total", model="iris") == 1


def test_evictions_say_how_long_the_model_was_idle_and_for_which_they_made_room() -> None:
    metrics = Metrics()
    count(metrics, Unloaded("iris", "1", "evicted", "for digits/1", idle=30.0, asking="digits"))
    count(metrics, Unloaded("iris", "2", "evicted", "for the processes", idle=2.0))
    count(metrics, Unloaded("iris", "3", "unloaded"))
    got = scrape(metrics)
    assert value(got, "gateway_eviction_age_seconds_count", model="iris") == 2
    assert value(got, "gateway_eviction_age_seconds_sum", model="iris") == 32.0
    assert value(got, "gateway_evictions_for_total", model="digits") == 1
    assert value(got, "gateway_evictions_for_total", model="") is None


def test_a_scrape_of_many_versions_gives_the_loop_turns_and_each_row_is_of_one_moment() -> None:
    """Others count in the turns: known versions, new ones, and ones of a team."""
    metrics = Metrics()
    for i in range(500):
        metrics.request(f"model-{i}", "1", "2xx", 0.004, PHASES)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            for i in range(500):
                metrics.request(f"model-{i}", "1", "2xx", 0.004, PHASES)
            # The first team comes while the requests are written.
            for model in ("model-499", f"new-{turns}"):
                metrics.request(model, "1", "2xx", 0.004, PHASES, team="blue" if turns > 1 else "")
            metrics.load(f"new-{turns}", "success", 0.2)
            await asyncio.sleep(0)

    async def scraped() -> tuple[list[bytes], int]:
        task = asyncio.create_task(others())
        pieces, _ = await metrics.render(OPENMETRICS)
        task.cancel()
        return pieces, turns

    pieces, turned = asyncio.run(scraped())
    assert turned >= len(pieces) - 1
    assert max(piece.count(b"\n") for piece in pieces) <= LINES_AT_ONCE
    text = b"".join(pieces).decode()
    series = [line.rpartition(" ")[0] for line in text.splitlines()]
    assert len(series) == len(set(series))
    # The strict parser refuses counts that are not those of the last bucket.
    families = text_string_to_metric_families(text)
    got = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    first, last = (
        value(got, "gateway_phase_seconds_count", model=model, version="1", phase="encode")
        for model in ("model-0", "model-499")
    )
    assert first is not None
    assert last is not None
    assert 1 < first < last, "no request was counted meanwhile"


def test_the_families_for_otlp_come_in_turns_too() -> None:
    metrics = Metrics()
    for i in range(500):
        metrics.request(f"model-{i}", "1", "2xx", 0.004, PHASES)
    turns = 0

    async def collected() -> list[Family]:
        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        found = await metrics.collect()
        task.cancel()
        return found

    families = {family.name: list(family.rows) for family in asyncio.run(collected())}
    assert len(families["gateway_phase_seconds"]) == 4 * 500
    assert turns > 10
