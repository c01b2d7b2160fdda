"""The log: a line for what happened, bursts as one line, JSON that machines read."""

from __future__ import annotations

import io
import json
import logging
import sys

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
    say(events.Unloaded("iris", "2", "unloaded"))
    say(events.Unloaded("iris", "2", "evicted", "for wine/1: its value is least"))
    said = [record.getMessage() for record in lines.records]
    assert said == [
        "loaded iris/2 in 0.250 s, 3.0 MB",
        "iris@champion serves version 2, previously 1 (promote)",
        "iris/2 raised ValueError: no (request r-1)\n    Traceback …\n    ValueError: no",
        "unloaded iris/2: an operator requested it",
        "unloaded iris/2: to make room, for wine/1: its value is least",
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
    assert said[2] == "iris/2 raised ValueError: 2 (request r-2) (repeated 2 times; the traceback is above)"


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
        "refused the input of a request for iris/1: is null (and 49 more since the last such line)",
    ]


def test_a_refusal_is_logged_again_if_its_reason_changes_or_after_an_hour(
    lines: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    say = logs.EventLog(clock=lambda: now[0])

    def refuse(reason: str, version: str = "2") -> None:
        say(events.SwapRefused("iris", "champion", version, reason))

    for _ in range(60):
        refuse("digest mismatch")
        now[0] += 59
    refuse("no such file")
    refuse("digest mismatch")
    refuse("digest mismatch", "3")
    say(events.Swapped("iris", "champion", "1", "4", "rollback"))
    refuse("digest mismatch", "3")
    for _ in range(3):
        now[0] += 1300
        refuse("digest mismatch", "3")
    said = [record.getMessage().removeprefix("iris@champion did not move to ") for record in lines.records]
    assert said == [
        "version 2: digest mismatch",
        "version 2: no such file",
        "version 2: digest mismatch",
        "version 3: digest mismatch",
        "iris@champion serves version 1, previously 4 (rollback)",
        "version 3: digest mismatch",
        "version 3: digest mismatch (and 2 more times since the last such line)",
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


@pytest.mark.parametrize(
    ("said", "shown"),
    {
        "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m",
        "done\rfailed": "done\\x0dfailed",
        "\x07bell\x08\x7f": "\\x07bell\\x08\\x7f",
        "\x9b2J": "\\x9b2J",
        "next\x85line\u2028and\u2029more": "next\\x85line\\u2028and\\u2029more",
        "\u202etxt.exe\u2066\u200f": "\\u202etxt.exe\\u2066\\u200f",
        "a\x00b\x0bc\x0cd": "a\\x00b\\x0bc\\x0cd",
        "tab\tand ünïcode 東京": "tab\tand ünïcode 東京",
        "loaded\n2026-01-01 00:00:00 INFO forged": "loaded\n    2026-01-01 00:00:00 INFO forged",
    }.items(),
)
def test_control_characters_of_a_model_are_escaped_in_text(said: str, shown: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter())
    for text, extra in ((said, {}), ("plain", {"model": said, "version": "1"})):
        record = logging.LogRecord("gateway.models", logging.INFO, __file__, 1, "%s", (text,), None)
        record.__dict__.update(extra)
        handler.handle(record)
    assert stream.getvalue().count(shown) == 2
    assert len(stream.getvalue().split("\n")) == 3 + 2 * shown.count("\n")


def test_a_trace_is_indented_and_escaped() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter())
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        record = logging.LogRecord("gateway", logging.ERROR, __file__, 1, "failed", None, sys.exc_info())
    handler.handle(record)
    first, *more = stream.getvalue().splitlines()
    assert first.endswith("ERROR failed")
    assert all(line.startswith("    ") for line in more)
    assert more[-1] == "    ValueError: \\x1b[2J"
