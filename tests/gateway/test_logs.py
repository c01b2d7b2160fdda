"""The log: a line for what happened, bursts as one line, JSON that machines read."""

from __future__ import annotations

import io
import json
import logging

import pytest

from gateway import events, logs


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="gateway")
    return caplog


def test_every_event_has_words(lines: pytest.LogCaptureFixture) -> None:
    say = logs.EventLog()
    say(events.Loaded("iris", "2", 0.25, 3_000_000))
    say(events.Swapped("iris", "champion", "2", "1", "promote"))
    say(events.PredictionFailed("iris", "2", "ValueError: no", "Traceback …\nValueError: no", "r-1"))
    say(events.Dispatched("iris", "2", 3, 3))
    said = [record.getMessage() for record in lines.records]
    assert said == [
        "loaded iris/2 in 0.250 s, 3.0 MB",
        "iris@champion serves version 2, before 1 (promote)",
        "iris/2 raised ValueError: no (request r-1)\n    Traceback …\n    ValueError: no",
    ]


def test_a_traceback_that_comes_again_is_counted_not_printed(lines: pytest.LogCaptureFixture) -> None:
    say = logs.EventLog()

    def fail(place: int, row: int) -> None:
        trace = f'Traceback …\n  File "m.py", line {place}\nValueError: {row}'
        say(events.PredictionFailed("iris", "2", f"ValueError: {row}", trace, f"r-{row}"))

    for row in range(3):
        fail(7, row)
    fail(8, 3)
    said = [record.getMessage() for record in lines.records]
    assert [line.count("Traceback") for line in said] == [1, 0, 0, 1]
    assert said[2] == "iris/2 raised ValueError: 2 (request r-2) (its traceback is above, 2 times by now)"


def test_a_burst_of_refusals_is_one_line_with_their_number(lines: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    say = logs.EventLog(clock=lambda: now[0])
    for _ in range(50):
        say(events.InputRefused("iris", "1", ("is missing",)))
    say(events.InputRefused("wine", "1", ("is missing",)))
    now[0] += 11
    say(events.InputRefused("iris", "1", ("is null",)))
    said = [record.getMessage() for record in lines.records]
    assert said == [
        "refused the input of a request for iris/1: is missing",
        "refused the input of a request for wine/1: is missing",
        "refused the input of a request for iris/1: is null (and 49 before, since the last such line)",
    ]


def test_json_has_the_fields_of_the_event() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    record = logging.LogRecord("gateway", logging.INFO, __file__, 1, "loaded", None, None)
    record.event = events.Loaded("iris", "2", 0.25, 3_000_000)
    handler.handle(record)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["model"], line["version"], line["bytes"]) == (
        "Loaded",
        "iris",
        "2",
        3_000_000,
    )
    assert line["level"] == "info"
