"""Arrow streams over a real socket, in and out; and what is said where pyarrow is not installed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest

from tests.conftest import needs
from tests.support.running import Running, log_scaled, running

STREAM = "application/vnd.apache.arrow.stream"


@pytest.fixture(scope="module")
def pa() -> ModuleType:
    return needs("pyarrow")


@pytest.fixture(scope="module")
def server(pa: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    directory = tmp_path_factory.mktemp("arrow")
    log_scaled(directory / "registry.yaml", "scaled", 3.0, alias="champion")
    with running(directory, GATEWAY_ISOLATION="inline") as server:
        yield server


def stream(pa: ModuleType, table: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:  # type: ignore[attr-defined]
        writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.all
def test_a_table_goes_in_and_comes_out(pa: ModuleType, server: Running) -> None:
    rows = np.arange(5000, dtype=float)
    body = stream(pa, pa.table({"x": rows, "unknown": rows}))
    answer = httpx.post(
        f"{server.url}/predict/scaled", content=body, headers={"Content-Type": STREAM, "Accept": STREAM}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == STREAM
    table = pa.ipc.open_stream(answer.content).read_all()
    assert np.array_equal(table["predictions"].to_numpy(), rows * 3)
    about = json.loads(table.schema.metadata[b"gateway"])
    assert about["model"] == {"name": "scaled", "version": "1", "alias": "champion"}
    assert "unknown" in about["warnings"][0]


@pytest.mark.all
def test_each_side_may_be_json(pa: ModuleType, server: Running) -> None:
    body = stream(pa, pa.table({"x": pa.array([1, 2], pa.int32())}))
    answer = httpx.post(f"{server.url}/predict/scaled", content=body, headers={"Content-Type": STREAM})
    assert answer.json()["predictions"] == [3.0, 6.0]
    answer = httpx.post(
        f"{server.url}/predict/scaled", json={"dataframe_records": [{"x": 2}]}, headers={"Accept": STREAM}
    )
    assert pa.ipc.open_stream(answer.content).read_all().to_pydict() == {"predictions": [6.0]}


@pytest.mark.all
@pytest.mark.parametrize("body", [b"", b"no stream", b"\xff\xff\xff\xff\x10\x00\x00\x00" + b"\x00" * 40])
def test_a_body_that_is_not_a_stream_is_refused(pa: ModuleType, server: Running, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/predict/scaled", content=body, headers={"Content-Type": STREAM})
    assert (answer.status_code, answer.json()["error_code"]) == (400, "MALFORMED_BODY")
    assert "stream format" in answer.json()["hint"]


PARQUET = "application/vnd.apache.parquet"


def parquet(table: object, **options: object) -> bytes:
    from pyarrow import parquet as written

    file = io.BytesIO()
    written.write_table(table, file, **options)
    return file.getvalue()


@pytest.mark.all
@pytest.mark.parametrize(
    "column", [[1.0, 2.0], [1, 2], [1.5, None], ["text", "b"], [True, False], [[1.0], [2.0]]]
)
def test_a_parquet_file_gets_the_verdict_of_the_same_stream(
    pa: ModuleType, server: Running, column: list[object]
) -> None:
    table = pa.table({"x": column, "unknown": [1, 2]})
    asked = [(stream(pa, table), STREAM), (parquet(table), PARQUET), (parquet(table, version="1.0"), PARQUET)]
    answers = [
        httpx.post(f"{server.url}/predict/scaled", content=body, headers={"Content-Type": kind}, timeout=60)
        for body, kind in asked
    ]
    assert len({answer.status_code for answer in answers}) == 1
    for answer in answers:
        told = {**answer.json(), "request_id": "", "hint": ""}
        assert told == {**answers[0].json(), "request_id": "", "hint": ""}


def parquet_bombs(pa: ModuleType) -> dict[str, bytes]:
    zeros = pa.table({"x": np.zeros(60_000_000)})
    once = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), pa.array(["a" * 1_000_000]))
    return {
        "480 MB of zeros in little": parquet(zeros, compression="zstd", row_group_size=60_000_000),
        "one text of 1 MB in 100,000 rows": parquet(pa.table({"x": once}), compression="zstd"),
        "a text of 300 MB": parquet(
            pa.table({"x": ["a" * 300_000_000]}), compression="zstd", use_dictionary=False
        ),
    }


@pytest.mark.all
def test_a_parquet_file_that_becomes_too_large_is_refused(pa: ModuleType, server: Running) -> None:
    def resident() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    before = resident()
    for name, body in parquet_bombs(pa).items():
        assert len(body) < 1_000_000
        answer = httpx.post(
            f"{server.url}/predict/scaled", content=body, headers={"Content-Type": PARQUET}, timeout=180
        )
        assert answer.status_code in (413, 422), (name, answer.text)
        if answer.status_code == 422:  # it was read, and is not a number
            assert "text" in name
    assert resident() - before < 64 << 20  # nothing was read in the gateway


@pytest.mark.all
def test_a_body_that_is_not_a_parquet_file_is_refused(pa: ModuleType, server: Running) -> None:
    whole = parquet(pa.table({"x": [1.0, 2.0]}))
    random = np.random.default_rng(0)
    damaged = []
    for _ in range(25):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            content[place] = random.integers(0, 256)
        damaged.append(bytes(content))
    for body in (b"", b"PAR1", b"PAR1PAR1", whole[:-9], b"\0" * 100, *damaged):
        answer = httpx.post(
            f"{server.url}/predict/scaled", content=body, headers={"Content-Type": PARQUET}, timeout=60
        )
        assert answer.status_code in (200, 400, 413, 422), answer.text
        if body not in damaged:
            assert (answer.status_code, answer.json()["error_code"]) == (400, "MALFORMED_BODY")


@pytest.mark.all
def test_wrong_columns_are_named(pa: ModuleType, server: Running) -> None:
    body = stream(pa, pa.table({"x": ["text"]}))
    answer = httpx.post(f"{server.url}/predict/scaled", content=body, headers={"Content-Type": STREAM})
    assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_INPUT")
    assert answer.json()["details"][0]["path"].startswith("arrow")


def test_without_pyarrow_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')\n")
    log_scaled(tmp_path / "registry.yaml", "scaled", 3.0, alias="champion")
    with running(tmp_path, GATEWAY_ISOLATION="inline", PYTHONPATH=str(tmp_path)) as server:
        answer = httpx.post(f"{server.url}/predict/scaled", content=b"x", headers={"Content-Type": STREAM})
        assert (answer.status_code, answer.json()["error_code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert "pyarrow" in answer.json()["hint"]
