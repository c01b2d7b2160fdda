"""Writes families of metrics as the text that Prometheus reads, in pieces of some milliseconds.

A family is plain data: a name and rows of label values and numbers. The encoder of `prometheus_client` writes
one row of each family; its text is the pattern of all other rows, so the format is that of the library at a
small part of its cost. Must not know what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, NamedTuple, TypeAlias

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

#: Maximum lines of a piece, unless one row has more. A line takes less than a microsecond, a row a few.
LINES_AT_ONCE: Final = 2000
_ROW_COSTS_LINES: Final = 4

_any_number: Callable[[float], str] = floatToGoString
_SUFFIXES: Final = {"counter": "_total", "gauge": "", "info": "_info"}
#: From here on, floatToGoString writes an exponent.
_LARGE: Final = 1e6


class Distribution(NamedTuple):
    """The value of a histogram. `below`: for each bound and for infinity, how many values are not above it.
    `sum`: of all values."""

    below: Sequence[int]
    sum: float


Row: TypeAlias = tuple[tuple[str, ...], "float | Distribution"]
"""The values of the labels, and the number that belongs to them."""


@dataclass(frozen=True, slots=True)
class Family:
    """The series of one name. `name`: without `_total` or `_info`, which its kind adds. `rows`: is read once,
    each row when it is written; the values of a histogram are distributions, others
    are numbers. `bounds`: a histogram's upper bounds, without infinity; its labels come after `le` in the
    alphabet."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    labels: tuple[str, ...]
    rows: Iterable[Row]
    bounds: Sequence[float] = ()


def batches(family: Family) -> Iterator[list[Row]]:
    """Yields the rows in lists of at most `LINES_AT_ONCE` lines."""
    rows = iter(family.rows)
    # A histogram's row: a line for each bucket, and the count and the sum.
    lines = len(family.bounds) + 3 if family.kind == "histogram" else 1
    while batch := list(islice(rows, max(1, LINES_AT_ONCE // (lines + _ROW_COSTS_LINES)))):
        yield batch


class Writer:
    """Writes families in the form that the header Accept asks for. `content_type`: its name. `end`: comes
    after the last family."""

    def __init__(self, accept: str) -> None:
        self._encode, self.content_type = choose_encoder(accept)
        self.end = self._encode(_Collected())

    def pieces(self, family: Family) -> Iterator[bytes]:
        """Yields the text of a family in pieces that end with a line; at least one piece."""
        head, labels, pattern = self._patterns(family)
        order = sorted(range(len(family.labels)), key=family.labels.__getitem__)
        # All numbers of a histogram but the sum are counts. Small ones are written with less work.
        *counts, last = pattern.splitlines(keepends=True)
        small = "".join(line.replace(" %s\n", " %d.0\n") for line in counts) + last
        text = [head]
        for batch in batches(family):
            for values, value in batch:
                label = labels % tuple([_escaped(values[place]) for place in order])
                if isinstance(value, Distribution):
                    few = value.below[-1] < _LARGE
                    text.append((small if few else pattern) % _mixed(label, value, few))
                else:
                    text.append(pattern % ((label, _number(value)) if labels else _number(value)))
            yield "".join(text).encode()
            text = []
        if text:
            yield "".join(text).encode()

    def _patterns(self, family: Family) -> tuple[str, str, str]:
        """The lines before the first row; the labels with a %s for the value of each, in the order of their
        names; and the lines of a row with a %s for the labels and the number of each line."""
        metric = Metric(family.name, family.help, family.kind)
        head = self._written(metric)
        labels = dict.fromkeys(family.labels, "%s")
        if family.kind == "histogram":
            for bound in (*family.bounds, math.inf):
                metric.add_sample(f"{family.name}_bucket", {**labels, "le": _number(bound)}, 0)
            metric.add_sample(f"{family.name}_count", labels, 0)
            metric.add_sample(f"{family.name}_sum", labels, 0)
        else:
            metric.add_sample(family.name + _SUFFIXES[family.kind], labels, 0)
        row = self._written(metric).removeprefix(head).replace(" 0.0\n", " %s\n")
        if not labels:
            return head, "", row
        written = row[row.rindex("{") + 1 : row.rindex("}")]
        assert row.count(written) == row.count("\n"), "le stands between the labels"
        return head, written, row.replace(written, "%s")

    def _written(self, metric: Metric) -> str:
        return self._encode(_Collected(metric)).removesuffix(self.end).decode()


class _Collected(Collector):
    """Gives metrics to an encoder."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _mixed(label: str, value: Distribution, few: bool) -> tuple[object, ...]:
    """The labels and the number of each line of a histogram's row. `few`: the counts may stay numbers."""
    counts = [*value.below, value.below[-1]]
    numbers = [*(counts if few else map(_number, counts)), _number(value.sum)]
    mixed: list[object] = [label] * (2 * len(numbers))
    mixed[1::2] = numbers
    return tuple(mixed)


def _number(value: float) -> str:
    # The library's function also writes what is large, negative, or not a number.
    return repr(float(value)) if 0 <= value < _LARGE else _any_number(value)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
