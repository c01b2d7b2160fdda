"""The text is byte for byte what `prometheus_client` writes for the same families."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict
from prometheus_client.parser import text_string_to_metric_families as plain
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gateway.exposition import LINES_AT_ONCE, Distribution, Family, Row, Writer

ACCEPTS = [
    "",
    "*/*",
    "text/plain; version=1.0.0",
    "application/openmetrics-text",
    "application/openmetrics-text; version=1.0.0, text/plain;q=0.5",
    "application/openmetrics-text; version=1.0.0; escaping=dots",
    "application/openmetrics-text; version=1.0.0; escaping=values",
    "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
]
TEXTS = ["", "iris", 'a "quote"', "back\\slash\\", "two\nlines", "ünï-✓", "100 %s %d {} %%", "\0", 'x="y",z']
NUMBERS = [
    0,
    1,
    1.5,
    -2,
    True,
    1e-7,
    999_999,
    1_000_000,
    123_456_789.25,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
]
BOUNDS = (0.0005, 1, 2.5, 16384, 1e7)
HELP = 'What "it" \\ is,\nin two lines, 100 %s.'


class Library(Collector):
    """The same families as metrics of the library."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._metrics = [metric(family) for family in families]

    def collect(self) -> list[Metric]:
        return self._metrics


def metric(family: Family) -> Metric:
    labels = family.labels
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=labels)
        for values, value in family.rows:
            assert isinstance(value, Distribution)
            bounds = [*map(floatToGoString, family.bounds), "+Inf"]
            histogram.add_metric(values, list(zip(bounds, value.below, strict=True)), value.sum)
        return histogram
    if family.kind == "info":
        info = InfoMetricFamily(family.name, family.help)
        for values, _ in family.rows:
            info.add_metric([], dict(zip(labels, values, strict=True)))
        return info
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    numbers = kind(family.name, family.help, labels=labels)
    for values, value in family.rows:
        assert not isinstance(value, Distribution)
        numbers.add_metric(values, value)
    return numbers


def families() -> list[Family]:
    numbers: list[Row] = [((f"m{i}", "1"), number) for i, number in enumerate(NUMBERS)]
    texts: list[Row] = [((text, other), 3) for text in TEXTS for other in TEXTS]
    many: list[Row] = [((f"m{i}",), i) for i in range(2 * LINES_AT_ONCE)]
    distributions: list[Row] = [
        ((text, f"{count}"), Distribution((0, 0, 1, 2, 2, count), total))
        for text in TEXTS
        for count, total in ((2, 0.25), (999_999, 1e6), (1_000_000, 123_456_789.0), (12_345_678, 1e-9))
    ]
    return [
        Family("numbers", HELP, "gauge", ("model", "version"), numbers),
        Family("counted", HELP, "counter", ("version", "alias"), texts),
        Family("many", HELP, "counter", ("model",), many),
        Family("alone", HELP, "gauge", (), [((), 1.5)]),
        Family("nothing", HELP, "gauge", ("model",), []),
        Family("no_times", HELP, "histogram", ("model",), [], BOUNDS),
        Family("times", HELP, "histogram", ("version", "model"), distributions, BOUNDS),
        Family("all_times", HELP, "histogram", ("model",), [(("a",), Distribution((1, 1), 0.5))], (1.0,)),
        Family("build", HELP, "info", ("version", "python"), [(("1", "3.11"), 1)]),
    ]


def written(accept: str) -> tuple[bytes, str]:
    writer = Writer(accept)
    pieces = [piece for family in families() for piece in writer.pieces(family)]
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert max(piece.count(b"\n") for piece in pieces) <= LINES_AT_ONCE
    return b"".join([*pieces, writer.end]), writer.content_type


@pytest.mark.parametrize("accept", ACCEPTS)
def test_the_text_is_the_librarys(accept: str) -> None:
    encode, content_type = choose_encoder(accept)
    text, named = written(accept)
    assert text.splitlines() == encode(Library(families())).splitlines()
    assert text == encode(Library(families()))
    assert named == content_type


@pytest.mark.parametrize(("accept", "read"), [("", plain), ("application/openmetrics-text", strict)])
def test_prometheus_reads_the_labels_that_were_given(accept: str, read: object) -> None:
    assert callable(read)
    text, _ = written(accept)
    found = [
        (sample.labels["version"], sample.labels["alias"])
        for family in read(text.decode())
        for sample in family.samples
        if sample.name == "counted_total"
    ]
    assert found == [(text, other) for text in TEXTS for other in TEXTS]
