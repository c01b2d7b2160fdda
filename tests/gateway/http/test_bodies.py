"""Bodies: what is read, what is refused and with which code, before any model is looked at."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import os
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.http import bodies
from gateway.http.bodies import ABSENT, BodyReader, ClientLeft, Parsed, gunzip
from loaders.enforcement import CsvTable

Receive = Callable[[], Awaitable[dict[str, Any]]]


def problem(call: Callable[[], object]) -> Problem:
    with pytest.raises(Problem) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("header", "media"),
    [
        (b"application/json", "json"),
        (b"Application/JSON", "json"),
        (b"application/json; charset=utf-8", "json"),
        (b'application/json;charset="UTF-8"', "json"),
        (b"application/json ; Charset=Utf-8", "json"),
        (b"application/json;", "json"),
        (b"text/csv", "csv"),
        (b"TEXT/CSV; charset=utf-8", "csv"),
        (b"text/plain; charset=utf-8", "text"),
        (b"application/octet-stream", "octets"),
        (b"application/x-npy", "npy"),
        (b"image/png", "file"),
        (b"Audio/wav", "file"),
    ],
)
def test_content_types(header: bytes, media: str) -> None:
    assert bodies.media_type(header) == media


OTHER_TYPES = [
    b"",
    b"text/html",
    b"text/plain; charset=latin-1",
    b"image",
    b"application/x-www-form-urlencoded",
    b"application/json; charset=latin-1",
    b"application/json; version=2",
    b"application/json; charset",
    b"application/json; charset=utf-8; x=y",
    b"application/json, text/csv",
    b"application/jsonp",
    b"json",
    b"\xff/\xfe",
]


@pytest.mark.parametrize("header", OTHER_TYPES)
def test_other_content_types(header: bytes) -> None:
    refused = problem(lambda: bodies.media_type(header))
    assert refused.code == "UNSUPPORTED_MEDIA_TYPE"
    assert "application/json" in (refused.hint or "")


def sent(*chunks: bytes, then: str | None = None) -> Receive:
    """The messages of a server: the chunks, and then what `then` says (nothing more, ever, for "silence")."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if then is None:
        messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if then == "disconnect":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def read(reader: BodyReader, receive: Receive, *headers: tuple[bytes, bytes]) -> bytes:
    return asyncio.run(reader.read(receive, dict(headers)))  # type: ignore[arg-type]


GZIP = (b"content-encoding", b"gzip")


def test_a_body_is_joined_and_counted_until_released() -> None:
    reader = BodyReader(100, 1000)
    assert read(reader, sent(b"ab", b"", b"cd")) == b"abcd"
    assert reader.held == 4
    reader.release(4)
    assert reader.held == 0


def test_the_limit_is_inclusive() -> None:
    assert read(BodyReader(4, 1000), sent(b"abcd"), (b"content-length", b"4")) == b"abcd"


def test_an_announced_length_over_the_limit_is_refused_without_reading() -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    reader = BodyReader(4, 1000)
    assert problem(lambda: read(reader, receive, (b"content-length", b"5"))).code == "BODY_TOO_LARGE"


def test_an_unannounced_length_is_counted_while_reading() -> None:
    reader = BodyReader(4, 1000)
    receive = sent(b"abc", b"de", b"never read", then="silence")
    assert problem(lambda: read(reader, receive)).code == "BODY_TOO_LARGE"
    assert reader.held == 0
    assert asyncio.run(receive())["body"] == b"never read"  # type: ignore[arg-type]


def test_bodies_share_a_limit() -> None:
    reader = BodyReader(10, 15)
    assert read(reader, sent(b"0123456789")) == b"0123456789"
    refused = problem(lambda: read(reader, sent(b"012", b"345")))
    assert (refused.code, refused.status, reader.held) == ("OVERLOADED", 429, 10)
    assert refused.retry_after is not None
    reader.release(10)
    assert read(reader, sent(b"0123456789")) == b"0123456789"


def test_a_client_that_leaves() -> None:
    reader = BodyReader(100, 100)
    with pytest.raises(ClientLeft):
        read(reader, sent(b"ab", then="disconnect"))
    assert reader.held == 0


def test_a_client_that_falls_silent() -> None:
    reader = BodyReader(100, 100, idle_seconds=0.01)
    assert problem(lambda: read(reader, sent(b"ab", then="silence"))).code == "MALFORMED_BODY"
    assert reader.held == 0


def test_a_client_that_sends_a_byte_now_and_then() -> None:
    reader = BodyReader(1000, 1000, idle_seconds=0.05)
    bytes_left = list(range(400))

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        bytes_left.pop()
        return {"type": "http.request", "body": b"x", "more_body": bool(bytes_left)}

    assert problem(lambda: read(reader, receive)).code == "MALFORMED_BODY"
    assert bytes_left
    assert reader.held == 0


def test_gzip_is_unpacked_and_counted_as_unpacked() -> None:
    reader = BodyReader(1000, 1000)
    packed = gzip.compress(b"x" * 900)
    assert read(reader, sent(packed[:5], packed[5:]), GZIP) == b"x" * 900
    assert reader.held == 900


def test_gzip_of_several_members() -> None:
    assert read(BodyReader(100, 100), sent(gzip.compress(b"ab") + gzip.compress(b"cd")), GZIP) == b"abcd"


def test_the_members_of_a_gzip_body_are_not_many_and_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda **options: made.append(0) or real(**options))
    with pytest.raises(Problem) as refused:
        gunzip(gzip.compress(b"") * 100_000, 1 << 20)
    assert refused.value.code == "MALFORMED_BODY"
    assert len(made) < 10_000
    blocks = [gzip.compress(os.urandom(n), compresslevel=1) for n in (1, 8191, 8192, 100_000, 0, 3)]
    assert gunzip(b"".join(blocks * 3), 1 << 20) == b"".join(map(gzip.decompress, blocks * 3))


def test_a_gzip_bomb_is_stopped_at_the_limit() -> None:
    bomb = gzip.compress(bytes(200_000_000), compresslevel=9)
    limit = 1_000_000
    reader = BodyReader(limit, 10 * limit)
    tracemalloc.start()
    try:
        assert problem(lambda: read(reader, sent(bomb), GZIP)).code == "BODY_TOO_LARGE"
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()
    assert reader.held == 0


@pytest.mark.parametrize("body", [b"not gzip", gzip.compress(b"abc")[:-3], gzip.compress(b"abc") + b"junk"])
def test_broken_gzip(body: bytes) -> None:
    reader = BodyReader(1000, 1000)
    refused = problem(lambda: read(reader, sent(body), GZIP))
    assert refused.code == "MALFORMED_BODY"
    assert "gzip" in (refused.hint or "")
    assert reader.held == 0


@pytest.mark.parametrize("encoding", [b"br", b"deflate", b"gzip, gzip", b"zstd"])
def test_other_encodings(encoding: bytes) -> None:
    refused = problem(lambda: read(BodyReader(9, 9), sent(b"x"), (b"content-encoding", encoding)))
    assert refused.code == "UNSUPPORTED_MEDIA_TYPE"


def parsed(body: bytes | str, media: bodies.Media = "json") -> Parsed:
    return bodies.PARSERS[media](body.encode() if isinstance(body, str) else body)


@pytest.mark.parametrize("form", bodies.PAYLOADS)
@pytest.mark.parametrize("data", [[1, 2.5], {"a": [None]}, None, 3, "text", []])
def test_each_payload(form: str, data: object) -> None:
    result = parsed(json.dumps({form: data, "unknown": 1}))
    assert (result.raw.form, result.raw.data) == (form, data)
    assert (result.params, result.model) == (None, ABSENT)


def test_params_and_model() -> None:
    result = parsed('{"inputs": 1, "params": {"t": 0.5}, "model": null}')
    assert (result.params, result.model) == ({"t": 0.5}, None)
    assert parsed('{"inputs": 1, "params": null}').params is None


@pytest.mark.parametrize("params", ["[]", "5", '"x"', "true"])
def test_params_that_are_not_an_object(params: str) -> None:
    refused = problem(lambda: parsed(f'{{"inputs": 1, "params": {params}}}'))
    assert refused.code == "INVALID_INPUT"
    assert refused.details[0].path == "params"


MALFORMED = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"[1]",
    b"5",
    b"null",
    b'"x"',
    b"{}",
    b'{"data": 1}',
    b'{"inputs": 1} x',
    b'{"inputs": 1, "instances": 1}',
    b'{"inputs": 1, "dataframe_split": null}',
    b"\xff\xfe",
    b'{"inputs": "\xff"}',
    b'{"inputs": ' + b"[" * 5000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda b: repr(b)[:30])
def test_malformed_json(body: bytes) -> None:
    assert problem(lambda: parsed(body)).code == "MALFORMED_BODY"


def test_a_near_miss_is_named() -> None:
    assert "dataframe_records" in (problem(lambda: parsed('{"dataframe_record": []}')).hint or "")


def test_a_refusal_does_not_repeat_the_data() -> None:
    for body in ('{"secret-4711": }', '{"inputs": secret-4711}', '"secret-4711"'):
        refused = problem(lambda body=body: parsed(body))  # type: ignore[misc]
        assert "4711" not in refused.message + str(refused.hint)


def table(body: bytes | str) -> tuple[list[str], list[list[str | None]]]:
    raw = parsed(body, "csv").raw
    assert raw.form == "csv"
    assert isinstance(raw.data, CsvTable)
    return list(raw.data.columns), [list(column) for column in raw.data.cells]


def test_csv() -> None:
    assert table("a,b\n1,x\n2,y\n") == (["a", "b"], [["1", "2"], ["x", "y"]])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_line_ends(end: str) -> None:
    assert table(f"a,b{end}1,2{end}3,4") == (["a", "b"], [["1", "3"], ["2", "4"]])


def test_csv_with_a_byte_order_mark() -> None:
    assert table(b"\xef\xbb\xbfa\n1") == (["a"], [["1"]])


def test_cells_are_null_where_pandas_reads_them_as_missing() -> None:
    words = [
        "",
        '""',
        "NA",
        '"NA"',
        "n/a",
        "nan",
        "NULL",
        "None",
        "<NA>",
        "#N/A",
        "-",
        "na",
        " NA",
        "none",
        "x",
        '"y""z"',
    ]
    body = "a,b\n" + "".join(f"{word},1\n" for word in words)
    read = pd.read_csv(io.StringIO(body))["a"]
    assert table(body)[1][0] == [None if pd.isna(cell) else cell for cell in read]
    assert None in table(body)[1][0]


def test_the_gap_that_writers_put_into_a_table_of_one_column() -> None:
    written = pd.DataFrame({"a": ["x", None, "y"]}).to_csv(index=False)
    assert table(written) == (["a"], [["x", None, "y"]])


def test_quotes_hold_commas_line_ends_and_quotes() -> None:
    assert table('a,b\n"x,""y"",\nz",2\n"""",""""""\n') == (["a", "b"], [['x,"y",\nz', '"'], ["2", '""']])


def test_blank_lines_are_skipped() -> None:
    assert table("\n\na\n1\n\n2\n\n") == (["a"], [["1", "2"]])


def test_a_header_alone_is_a_table_without_rows() -> None:
    assert table("a,b") == (["a", "b"], [[], []])


def test_the_unnamed_column_that_pandas_writes() -> None:
    assert table(",a\n0,1") == (["", "a"], [["0"], ["1"]])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "header"),
        (b"\n\n", "header"),
        (b"a,b\n1,2\n1,2,3\n", "row 2"),
        (b"a,b\n1,2\n\n3\n", "row 2"),
        (b'a\n1\n"open', "row 2"),
        (b'a,b\n"x"y,1', "row 1"),
        (b"a,a\n1,2", "'a'"),
        (b"a\n\xff", "UTF-8"),
        (b"a\n\x00", "zero"),
    ],
)
def test_malformed_csv(body: bytes, word: str) -> None:
    refused = problem(lambda: parsed(body, "csv"))
    assert refused.code == "MALFORMED_BODY"
    assert word in refused.message


MISSING = ["", "NA", "N/A", "nan", "NaN", "null", "NULL", "None", "n/a"]
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(st.lists(st.tuples(cells, cells), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_pythons_writer_quotes_is_read_back(rows: Sequence[tuple[str, str]], end: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerow(["a", "b"])
    writer.writerows(rows)
    shown = [[None if cell in MISSING else cell for cell in column] for column in zip(*rows, strict=True)]
    assert table(out.getvalue()) == (["a", "b"], shown or [[], []])
