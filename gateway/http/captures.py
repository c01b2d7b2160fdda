"""Captured requests over HTTP: what there is, its content, and its end. All of it needs control access,
because captures hold real data.

    GET    /captures                            how many requests of each version
    GET    /captures/NAME[/versions/VERSION]    JSON lines; ?form=frames: what `gateway check --replay` reads
    DELETE /captures[/NAME[/versions/VERSION]]

Knows the store; must not know how requests get there.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson
from starlette.responses import StreamingResponse

from gateway.capture.exchange import to_frame, to_json
from gateway.errors import Detail, Problem

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.capture.recorder import Recorder
    from gateway.capture.records import Record

T = TypeVar("T")
log = logging.getLogger("gateway.capture")

FRAMES: Final = "application/vnd.model-gateway.captures"
LINES: Final = "application/x-ndjson"


class Captures:
    """What the recorder has written. What it has only taken so far is written first, so that it is there."""

    def __init__(self, recorder: Recorder) -> None:
        self._store = recorder.store
        self._io = recorder.io
        self._flush = recorder.flush
        self._drop = recorder.drop

    async def summary(self) -> dict[str, Any]:
        await self._flush()
        found = await self._blocking(self._store.summaries)
        return {"captures": [one.to_json() for one in found]}

    async def export(self, request: Request, name: str, version: str | None) -> StreamingResponse:
        """The requests, oldest first. `?last=N`: the last N that can be replayed."""
        form, last = _asked(request)
        await self._flush()
        if last is None:
            records = self._store.every(name, version)
        else:
            if version is None:
                raise _invalid("?last", "needs a version", "/captures/NAME/versions/VERSION?last=N")
            numbers, _ = await self._blocking(lambda: self._store.newest(name, version, last))
            records = (one for number in numbers if (one := self._store.read(number)) is not None)
        written: Callable[[Record], bytes] = to_frame if form == "frames" else _line
        media = FRAMES if form == "frames" else LINES
        return StreamingResponse(self._stream(records, written), media_type=media)

    async def _stream(
        self, records: Iterator[Record], written: Callable[[Record], bytes]
    ) -> AsyncIterator[bytes]:
        def following() -> bytes | None:
            record = next(records, None)
            return None if record is None else written(record)

        while (text := await self._blocking(following)) is not None:
            yield text

    async def drop(self, name: str | None, version: str | None) -> dict[str, Any]:
        with _failures():
            dropped = await self._drop(name, version)
        return {"name": name, "version": version, "dropped": dropped}

    async def _blocking(self, work: Callable[[], T]) -> T:
        with _failures():
            return await asyncio.get_running_loop().run_in_executor(self._io, work)


@contextmanager
def _failures() -> Iterator[None]:
    """Makes INTERNAL of a failure of the disk or the store."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        log.error("cannot use the captured requests: %s", error)
        message = "the captured requests cannot be read or changed; the gateway's log has the reason"
        raise Problem("INTERNAL", message) from None


def _line(record: Record) -> bytes:
    return orjson.dumps(to_json(record), default=str) + b"\n"


def _asked(request: Request) -> tuple[str, int | None]:
    """The form and the number of requests from the query. Raises INVALID_INPUT."""
    form, last = "lines", None
    for name, value in request.query_params.multi_items():
        if name == "form" and value in ("lines", "frames"):
            form = value
        elif name == "last" and value.isascii() and value.isdigit() and int(value[:9]) > 0:
            last = int(value[:9])
        else:
            raise _invalid(f"?{name[:64]}", "is not valid", "?form=lines, ?form=frames or ?last=N")
    return form, last


def _invalid(path: str, problem: str, expected: str) -> Problem:
    return Problem("INVALID_INPUT", f"{path} {problem}", details=[Detail(path, problem, expected)])
