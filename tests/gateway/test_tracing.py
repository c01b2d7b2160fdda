"""Trace Context: what is a valid `traceparent`, and how far a trace is carried."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import logs, tracing

TRACE, PARENT = b"0af7651916cd43dd8448eb211c80319c", b"b7ad6b7169203331"
GIVEN = b"00-%s-%s-01" % (TRACE, PARENT)


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (GIVEN, 1),
        (b"00-%s-%s-00" % (TRACE, PARENT), 0),
        (b"00-%s-%s-ff" % (TRACE, PARENT), 1),
        (b"cc-%s-%s-01" % (TRACE, PARENT), 1),
        (b"cc-%s-%s-01-what the future will be like" % (TRACE, PARENT), 1),
    ],
)
def test_what_is_valid_is_read(header: bytes, flags: int) -> None:
    assert tracing.parse(header) == (TRACE.decode(), flags)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        GIVEN[:-1],
        GIVEN + b"0",
        GIVEN + b"-00",
        b"cc-%s-%s-01.rest" % (TRACE, PARENT),
        b"ff-%s-%s-01" % (TRACE, PARENT),
        b"0x-%s-%s-01" % (TRACE, PARENT),
        b"00-%s-%s-01" % (b"0" * 32, PARENT),
        b"00-%s-%s-01" % (TRACE, b"0" * 16),
        b"00-%s-%s-01" % (TRACE.upper(), PARENT),
        b"00-%s-%s-0G" % (TRACE, PARENT),
        b"00-%s-%s-01" % (PARENT, TRACE),
        b"000%s-%s--01" % (TRACE, PARENT),
        GIVEN.replace(b"-", b"_"),
        b"\xff" * 55,
    ],
)
def test_what_is_not_is_ignored(header: bytes) -> None:
    assert tracing.parse(header) is None


@given(st.binary(max_size=80) | st.text("0123456789abcdef-", min_size=50, max_size=60).map(str.encode))
def test_nothing_is_read_that_the_grammar_does_not_have(header: bytes) -> None:
    grammar = re.fullmatch(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", header, re.S)
    valid = (
        grammar is not None
        and grammar[1] != b"ff"
        and not (grammar[1] == b"00" and grammar[5])
        and grammar[2].strip(b"0")
        and grammar[3].strip(b"0")
    )
    assert (tracing.parse(header) is not None) == bool(valid)


def test_a_trace_goes_where_its_request_goes_and_ends_with_it() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        release = asyncio.Event()

        async def outlives() -> None:
            assert tracing.current() is not None
            await release.wait()
            assert tracing.current() is None

        async def request(header: bytes) -> tuple[tracing.Trace | None, asyncio.Task[None]]:
            trace = tracing.begin(header, b"vendor=1")
            assert tracing.current() is trace
            if trace is not None:
                assert await asyncio.to_thread(tracing.headers) == trace.headers()
            started = loop.create_task(outlives())
            await asyncio.sleep(0)
            return trace, started

        requests = [loop.create_task(request(GIVEN)) for _ in range(2)]
        (first, started), (second, also) = await asyncio.gather(*requests)
        assert first is not None
        assert second is not None
        assert first.trace_id == second.trace_id == TRACE.decode()
        assert len({first.span_id, second.span_id, PARENT.decode()}) == 3
        assert first.headers() == {
            "traceparent": f"00-{TRACE.decode()}-{first.span_id}-01",
            "tracestate": "vendor=1",
        }
        assert tracing.headers() == {}
        release.set()
        await asyncio.gather(started, also)

    asyncio.run(work())


@pytest.mark.parametrize("state", [b"x" * 513, b"a=\r\nb", "ä=1".encode(), b""])
def test_a_state_that_cannot_be_passed_on_is_left_out(state: bytes) -> None:
    async def work() -> None:
        assert tracing.begin(GIVEN, state) is not None
        assert tracing.headers().keys() == {"traceparent"}

    asyncio.run(work())


@pytest.mark.parametrize("form", ["json", "text"])
def test_every_line_that_belongs_to_a_request_says_its_trace(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("json" if form == "json" else "text", "info")
    log = logging.getLogger("gateway.models")
    try:

        async def request() -> None:
            tracing.begin(GIVEN)
            log.info("inside")
            await asyncio.to_thread(log.info, "in its thread")

        asyncio.run(request())
        log.info("printed", extra={"model": "iris", "version": "2"})
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = stream.getvalue().splitlines()
    assert [TRACE.decode() in line for line in lines] == [True, True, False]
    if form == "json":
        first, *_, last = [json.loads(line) for line in lines]
        assert first["trace_id"] == TRACE.decode()
        assert re.fullmatch(r"[0-9a-f]{16}", first["span_id"])
        assert (last["model"], last["version"], last["message"]) == ("iris", "2", "printed")
    else:
        assert lines[0].endswith(f"INFO inside (trace {TRACE.decode()})")
        assert lines[-1].endswith("INFO iris/2: printed")
