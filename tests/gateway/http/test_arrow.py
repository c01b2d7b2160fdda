"""Arrow streams over a real socket, in and out; and what is said where pyarrow is not installed."""

from __future__ import annotations

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
def test_what_is_no_stream_is_refused(pa: ModuleType, server: Running, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/predict/scaled", content=body, headers={"Content-Type": STREAM})
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
