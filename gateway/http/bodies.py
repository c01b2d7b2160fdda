"""Request bodies: read within limits, unpacked, and parsed into untyped raw input.

Knows bytes, JSON and CSV; must not know signatures: enforcement checks whether the input fits a model.
Refusals raise `Problem`, and their text never repeats the body's data.
"""

from __future__ import annotations

import asyncio
import csv
import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import orjson

from gateway import names
from gateway.errors import Detail, Problem, overloaded
from gateway.http import arrow, cost, jsonbody
from gateway.http.connections import SLOWEST
from gateway.pools import in_large_thread
from loaders.enforcement import CsvTable, RawInput

if TYPE_CHECKING:
    from starlette.types import Message, Receive

    from gateway.names import Reference

Media = Literal["json", "csv", "arrow", "parquet", "octets", "text", "npy", "file"]

#: The forms by media type. The last three, and `FILES`, are one value: see `wholebodies`.
_MEDIA: Final[Mapping[str, Media]] = {
    "application/json": "json",
    "text/csv": "csv",
    arrow.MEDIA: "arrow",
    arrow.PARQUET: "parquet",
    "application/octet-stream": "octets",
    "text/plain": "text",
    "application/x-npy": "npy",
}
FILES: Final = ("image/", "audio/")

PAYLOADS: Final = ("dataframe_split", "dataframe_records", "instances", "inputs")
#: Above this many bytes a body is counted in a thread.
COUNT_ON_LOOP: Final = 1 << 20

ABSENT: Final = object()
csv.field_size_limit(2**31 - 1)  # one cell may be as large as a body
#: Among how many members a misspelt one is looked for, and how long it may be.
_NEAR_NAMES: Final = 20
_NEAR_LENGTH: Final = 40
_CSV_NULLS: Final = frozenset(
    {
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    }
)
"""The cells that pandas reads as missing (`na_values` in the documentation of `pandas.read_csv`)."""


class ClientLeft(Exception):
    """The connection ended before the body was complete; no answer can be sent."""


class Parsed(NamedTuple):
    """A parsed body. `model`: the JSON member of that name, or `ABSENT`. `asked`: the facts about the request
    that the answer's protocol needs, as JSON."""

    raw: RawInput
    params: Any
    model: object
    asked: Any = None


def media_type(header: bytes) -> Media:
    """The form that a Content-Type announces. The only parameter allowed is `charset=utf-8`, in any case,
    quoted or not. Raises UNSUPPORTED_MEDIA_TYPE."""
    kind, *parameters = header.decode("latin-1").split(";")
    kind = kind.strip().lower()
    media = _MEDIA.get(kind) or ("file" if kind.startswith(FILES) else None)
    hint = "send Content-Type: application/json or text/csv; the only allowed parameter is charset=utf-8"
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if parameter.strip() and (name.lower(), value.strip('"').lower()) != ("charset", "utf-8"):
            media = None
    if media in ("arrow", "parquet") and not arrow.available():
        media, hint = (
            None,
            "Arrow and Parquet bodies need the package pyarrow: install the gateway with its extra `arrow`",
        )
    if media is None:
        given = (
            f"the content type {header[:80].decode('latin-1')!r}" if header else "a body without content type"
        )
        raise Problem(
            "UNSUPPORTED_MEDIA_TYPE",
            f"{given} is not supported",
            hint=hint,
        )
    return media


#: How long a large body waits for its turn to be parsed if its request has no deadline, in seconds.
TURN_SECONDS: Final = 30.0


class BodyReader:
    """Reads bodies. `limit`: the bytes of one body, as sent and unpacked. `total`: the bytes of all bodies
    that are held at once, as sent and as parsed in this process's memory.

    `idle_seconds`: how long a client may send nothing in the middle of a body, in all, if it otherwise sends
    as slowly as is accepted. A client that has sent only the head of a request holds no bytes, and may wait
    as on any idle connection.
    """

    def __init__(self, limit: int, total: int, idle_seconds: float = 60.0) -> None:
        self.limit = limit
        self.total = total
        self.idle_seconds = idle_seconds
        self.held = 0
        #: Set when bytes are released, if somebody waits for that.
        self.freed: asyncio.Event | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0  # bytes of the bodies that wait for their turn

    async def read(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        """Reads the whole body, unpacked. Its bytes count as held until `release` gets their number.

        Raises BODY_TOO_LARGE (at once if Content-Length says so), OVERLOADED if too much is held,
        UNSUPPORTED_MEDIA_TYPE for an encoding other than gzip, MALFORMED_BODY, and ClientLeft.
        """
        is_packed = b"content-encoding" in headers and _is_packed(headers[b"content-encoding"])
        announced = headers.get(b"content-length")
        if announced is not None and int(announced) > self.limit:
            raise self._too_large()
        size = 0
        try:
            body, more = self._chunk(await receive())
            size = len(body)
            if more:
                chunks = [body]
                now = asyncio.get_running_loop().time
                began = now()
                async with asyncio.timeout(self.idle_seconds) as patience:
                    while more:
                        chunk, more = self._chunk(await receive())
                        chunks.append(chunk)
                        size += len(chunk)
                        if size > self.limit:
                            raise self._too_large()
                        patience.reschedule(min(now(), began + size / SLOWEST) + self.idle_seconds)
                body = b"".join(chunks)
            if size > self.limit:
                raise self._too_large()
            if is_packed:
                body = await in_large_thread(gunzip, body, self.limit)
                self.release(size)
                size = 0
                self.hold(len(body))
        except TimeoutError:
            self.release(size)
            raise Problem(
                "MALFORMED_BODY",
                f"the body came too slowly: nothing for {self.idle_seconds:g} s, or less than {SLOWEST} "
                "bytes a second over a longer time",
                hint="send the body without pauses, or in several smaller requests",
            ) from None
        except BaseException:
            self.release(size)
            raise
        return body

    def _chunk(self, message: Message) -> tuple[bytes, bool]:
        """The received part of the body, counted as held, and whether there is more."""
        if message["type"] != "http.request":
            raise ClientLeft
        body: bytes = message.get("body", b"")
        size = len(body)
        if self.held + size > self.total:  # as `hold`, without a call for each request
            self.hold(size)  # raises
        self.held += size
        return body, message.get("more_body", False)

    def charge(self, size: int, parsed: int) -> int:
        """Counts the memory that a body of `size` bytes takes once parsed as held too, until `release` gets
        the returned number. Raises BODY_TOO_LARGE if the body alone takes too much, OVERLOADED if all bodies
        together do."""
        if size + parsed > self.total:
            raise Problem(
                "BODY_TOO_LARGE",
                f"the body would take about {parsed} bytes of memory when it is parsed, and all requests "
                f"together may take {self.total}",
                hint="send fewer rows in one request, or Arrow; the limit is the setting max_inflight_bytes",
            )
        if self.held + parsed > self.total:
            self.hold(parsed)  # raises
        self.held += parsed
        return parsed

    async def charge_elsewhere(self, size: int, parsed: int, deadline: float | None) -> int:
        """The same for a body that another process parses, one at a time: however large it becomes there, it
        takes half of the total at most, so that one such body is in work and others are still answered. The
        next ones wait for their turn, until `deadline` or for `TURN_SECONDS`. Raises OVERLOADED."""
        parsed = min(parsed, self.total // 2)
        # Bodies that wait are held: more than these would keep out the one whose turn it is.
        if self._waiting + size + parsed <= self.total:
            now = asyncio.get_running_loop().time()
            self._waiting += size
            try:
                async with asyncio.timeout_at(now + TURN_SECONDS if deadline is None else deadline):
                    async with self._turn:
                        while self.held + parsed > self.total:
                            self.freed = asyncio.Event()
                            await self.freed.wait()
            except TimeoutError:
                pass
            finally:
                self._waiting -= size
        return self.hold(parsed)

    def release(self, size: int) -> None:
        self.held -= size
        if self.freed is not None:
            self.freed.set()

    def hold(self, size: int) -> int:
        """Counts more bytes as held until `release` gets their number. Raises OVERLOADED."""
        if self.held + size > self.total:
            raise overloaded("the gateway", "requests and answers take all of max_inflight_bytes", 1.0)
        self.held += size
        return size

    def _too_large(self) -> Problem:
        return Problem(
            "BODY_TOO_LARGE",
            f"the body is larger than {self.limit} bytes",
            hint="send fewer rows in one request; the limit is the setting max_body_bytes",
        )


def _is_packed(encoding: bytes) -> bool:
    """Whether a Content-Encoding is gzip. Raises UNSUPPORTED_MEDIA_TYPE for any other one."""
    encoding = encoding.strip().lower()
    if encoding not in (b"", b"identity", b"gzip"):
        raise Problem(
            "UNSUPPORTED_MEDIA_TYPE",
            f"the content encoding {encoding[:40].decode('latin-1')!r} is not supported",
            hint="send the body as it is, or with Content-Encoding: gzip",
        )
    return encoding == b"gzip"


class Held:
    """The bytes of a reader's total that one request holds. `complete`: its body was read to the end."""

    __slots__ = ("_reader", "complete", "size")

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self.size = 0
        self.complete = False

    def add(self, size: int) -> None:
        """Holds more. Raises OVERLOADED."""
        self.size += self._reader.hold(size)

    def charge(self, size: int, parsed: int) -> None:
        """Holds what a body of `size` bytes takes once it is parsed. Raises BODY_TOO_LARGE, OVERLOADED."""
        self.size += self._reader.charge(size, parsed)

    def outlast(self, work: asyncio.Future[Any]) -> None:
        """Holds the bytes until `work` has ended, however early the request does."""
        size, self.size = self.size, 0

        def ended(done: asyncio.Future[Any]) -> None:
            self._reader.release(size)
            if not done.cancelled():
                done.exception()  # its caller has left: nothing else looks at it

        work.add_done_callback(ended)

    def release(self) -> None:
        """Releases all held bytes."""
        self._reader.held -= self.size  # as `BodyReader.release`, for one call less per request
        if self._reader.freed is not None:
            self._reader.freed.set()
        self.size = 0


#: What is unpacked at once: the bytes of it that follow a member are copied.
_GZIP_CHUNK: Final = 8192
#: A body has so many members at most, and one more for each of these bytes.
_FEW_MEMBERS: Final = 16
_MEMBER_BYTES: Final = 256
_GZIP: Final = "compress the whole body with gzip, or leave out the header Content-Encoding"


def gunzip(body: bytes, limit: int) -> bytes:
    """Unpacks gzip (also with several members), and never makes more than `limit` + 1 bytes. The time is
    proportional to the body, so the members must not be many and tiny.

    Raises BODY_TOO_LARGE, MALFORMED_BODY.
    """
    rest, at = memoryview(body), 0
    parts: list[bytes] = []
    size = members = 0
    while at < len(rest):
        members += 1
        if members > _FEW_MEMBERS + len(rest) // _MEMBER_BYTES:
            raise Problem("MALFORMED_BODY", "the gzip body has too many members", hint=_GZIP)
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if at >= len(rest):
                raise Problem("MALFORMED_BODY", "the gzip body ends too early", hint=_GZIP)
            chunk = rest[at : at + _GZIP_CHUNK]
            try:
                part = member.decompress(chunk, limit + 1 - size)
            except zlib.error as error:
                raise Problem("MALFORMED_BODY", f"the body is not gzip: {error}", hint=_GZIP) from None
            size += len(part)
            if size > limit:
                raise Problem("BODY_TOO_LARGE", f"the unpacked body is larger than {limit} bytes")
            parts.append(part)
            at += len(chunk) - len(member.unused_data)
    return b"".join(parts)


def agreed(reference: Reference | None, model: object) -> Reference | None:
    """The model of the request, from its path or header and the body's `model`. Raises INVALID_REFERENCE if
    they disagree."""
    if model is ABSENT:
        return reference
    if not isinstance(model, str) or not model.startswith("models:/"):
        raise Problem(
            "INVALID_REFERENCE", "model must be text that begins with models:/", hint="models:/NAME@ALIAS"
        )
    named = names.parse_reference(model)
    if reference is not None and named != reference:
        raise Problem(
            "INVALID_REFERENCE", f"the request names two models: {reference} and, in its body, {named}"
        )
    return named


def parse_json(body: bytes) -> Parsed:
    """Parses MLflow's scoring protocol: an object with exactly one payload, and `params`; ignores other
    members, as MLflow does. Raises MALFORMED_BODY, and INVALID_INPUT if `params` is not an object."""
    document = decode_object(body, jsonbody.loads)
    present = [name for name in PAYLOADS if name in document]
    if len(present) != 1:
        wanted = ", ".join(PAYLOADS)
        if present:
            raise Problem(
                "MALFORMED_BODY", f"exactly one of {wanted} is allowed; found {' and '.join(present)}"
            )
        raise Problem("MALFORMED_BODY", f"the body has none of {wanted}", hint=_nearest(document, PAYLOADS))
    params = document.get("params")
    if params is not None and not isinstance(params, dict):
        got = json_kind(params)
        raise Problem(
            "INVALID_INPUT",
            "params must be an object",
            details=[Detail("params", "is not an object", expected="object", got=got)],
        )
    form = present[0]
    return Parsed(RawInput(form, document[form]), params, document.get("model", ABSENT))


def parse_vertex(body: bytes) -> Parsed:
    """Parses Vertex AI's form: `instances`, and the model's params as `parameters`. Raises MALFORMED_BODY,
    and INVALID_INPUT if `parameters` is not an object."""
    hint = 'send {"instances": [...]}'
    document = decode_object(body, jsonbody.loads, hint)
    if "instances" not in document:
        raise Problem("MALFORMED_BODY", "the body has no instances", hint=hint)
    params = document.get("parameters")
    if params is not None and not isinstance(params, dict):
        got = json_kind(params)
        raise Problem(
            "INVALID_INPUT",
            "parameters must be an object",
            details=[Detail("parameters", "is not an object", expected="object", got=got)],
        )
    return Parsed(RawInput("instances", document["instances"]), params, ABSENT)


def decode_object(
    body: bytes, loads: Callable[[bytes], Any] = orjson.loads, hint: str | None = None
) -> dict[str, Any]:
    """The body as a JSON object. `hint` says what to send; None: a payload of `parse_json`. Raises
    MALFORMED_BODY."""
    if not body:
        raise Problem("MALFORMED_BODY", "the body is empty", hint=hint or "send a JSON object")
    try:
        document = loads(body)
    except ValueError as error:
        raise Problem("MALFORMED_BODY", f"the body is not valid JSON: {error}", hint=hint) from None
    if not isinstance(document, dict):
        message = f"the body must be a JSON object, not {json_kind(document)}"
        raise Problem("MALFORMED_BODY", message, hint=hint)
    return document


def json_kind(value: object) -> str:
    """JSON's name for the kind of a value, for messages."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _nearest(document: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """A hint with the known member that is most similar to a given one. Compares only a few short ones,
    because the client chooses them."""
    for key in islice(document, _NEAR_NAMES):
        if len(key) <= _NEAR_LENGTH and (found := names.near(key.lower(), known)):
            return f"did you mean {found}?"
    return None


def parse_csv(body: bytes) -> Parsed:
    """Parses a table of text with a header row. Reads a cell as null if `pandas.read_csv` does by default: an
    empty cell, quoted or not, and words such as `NA`, because models were trained with that. Skips blank
    lines. Raises MALFORMED_BODY with the number of the row, counted from 1 after the header."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem("MALFORMED_BODY", f"the body is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise Problem("MALFORMED_BODY", "the body holds a zero byte, which CSV cannot")
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), strict=True):
            if not row:
                continue
            if rows and len(row) != len(rows[0]):
                message = f"row {len(rows)} has {len(row)} cells, the header has {len(rows[0])}"
                raise Problem("MALFORMED_BODY", message)
            rows.append(row)
    except csv.Error as error:
        raise Problem("MALFORMED_BODY", f"row {len(rows)} is not valid CSV: {error}") from None
    if not rows:
        raise Problem("MALFORMED_BODY", "the body has no header row", hint="begin with a row of column names")
    columns = rows[0]
    if len(set(columns)) < len(columns):
        twice = sorted(name for name, times in Counter(columns).items() if times > 1)
        raise Problem(
            "MALFORMED_BODY", f"the header names a column twice: {', '.join(map(repr, twice[:10]))}"
        )
    cells = [
        [None if cell in _CSV_NULLS else cell for cell in column] for column in zip(*rows[1:], strict=True)
    ]
    return Parsed(RawInput("csv", CsvTable(columns, cells or [[] for _ in columns])), None, ABSENT)


def parse_arrow(body: bytes) -> Parsed:
    """Parses an Arrow stream, which cannot carry params. Raises MALFORMED_BODY."""
    return Parsed(arrow.read(body), None, ABSENT)


def parse_parquet(body: bytes) -> Parsed:
    """Parses a Parquet file, which cannot carry params. Raises MALFORMED_BODY."""
    return Parsed(arrow.read_parquet(body), None, ABSENT)


PARSERS: Final[Mapping[str, Callable[[bytes], Parsed]]] = {
    "json": parse_json,
    "vertex": parse_vertex,
    "csv": parse_csv,
    "arrow": parse_arrow,
    "parquet": parse_parquet,
}

COSTS: Final[Mapping[str, Callable[[bytes], int]]] = {
    "json": cost.json_bytes,
    "vertex": cost.json_bytes,
    "csv": cost.csv_bytes,
    "arrow": arrow.cost,
    "parquet": arrow.parquet_cost,
}
