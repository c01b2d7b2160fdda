"""What the HTTP layer itself costs a request: scope to service, and answer to bytes.

    python -m tests.bench.bench_http [REQUESTS]

The service behind it answers a constant, so that enforcement, batching and the model cost nothing. There is
no socket either. Next to each figure stands what orjson alone needs for the same body and answer, and how
many functions a request calls: unlike a time, that number is the same on every machine.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from gateway.app import Gateway
from gateway.http.build import build
from gateway.registries import open_registry
from gateway.registries.base import Version
from gateway.service import Answer, Inference, Service
from gateway.settings import Settings
from loaders.batch import Batch, Columns, Tensors
from tests.support.counted import counted

COLUMNS = ("sepal_length", "sepal_width", "petal_length", "petal_width")
HEADERS = [
    (b"host", b"127.0.0.1:8080"),
    (b"user-agent", b"bench"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip"),
    (b"connection", b"keep-alive"),
    (b"content-type", b"application/json"),
]
Ask = Callable[[], Awaitable[None]]


class Constant:
    """A service whose models all know the answer."""

    stopping = False

    def __init__(self, result: Batch) -> None:
        self.answer = Answer(result)
        self.version = Version("iris", "2", "/models/iris/2")

    async def predict(self, inference: Inference) -> Answer:
        inference.record.version, inference.record.alias = self.version, "champion"
        return self.answer


@asynccontextmanager
async def asking(body: bytes, result: Batch, directory: Path) -> AsyncIterator[Ask]:
    """A function that sends one request through the application of a real gateway, and fails if the answer is
    not 200."""
    registry = directory / "registry.yaml"
    registry.write_text("models: {}\n")
    settings = Settings(cache_dir=directory / "cache", state_dir=directory / "state")
    gateway = Gateway(settings, open_registry(str(registry)))
    serve = build(replace(gateway.parts, service=cast(Service, Constant(result))))
    headers = [*HEADERS, (b"content-length", b"%d" % len(body))]
    message = {"type": "http.request", "body": body, "more_body": False}

    async def receive() -> Any:
        return message

    async def send(event: Any) -> None:
        if event.get("status", 200) != 200:
            raise SystemExit(f"the answer was {event['status']}")

    async def ask() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict/iris@champion",
            "raw_path": b"/predict/iris@champion",
            "root_path": "",
            "query_string": b"",
            "headers": list(headers),
            "client": ("127.0.0.1", 1),
            "scheme": "http",
        }
        await serve(scope, receive, send)

    try:
        yield ask
    finally:
        await gateway.stop()


async def calls(ask: Ask, requests: int = 200) -> float:
    """How many functions a request calls, in Python and in C."""
    await ask()
    with counted() as found:
        for _ in range(requests):
            await ask()
    return found.total() / requests


async def microseconds(ask: Ask, requests: int) -> float:
    """The time of a request, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(requests):
            await ask()
        best = min(best, time.perf_counter() - began)
    return best / requests * 1e6


def orjson_alone(body: bytes, answer: Any, requests: int) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(requests):
            orjson.loads(body)
            orjson.dumps(answer)
        best = min(best, time.perf_counter() - began)
    return best / requests * 1e6


async def measure(body: bytes, result: Batch, requests: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as directory:
        async with asking(body, result, Path(directory)) as ask:
            return await calls(ask), await microseconds(ask, requests)


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    for rows in (1, 100):
        record = dict(zip(COLUMNS, (5.1, 3.5, 1.4, 0.2), strict=True))
        split = {"columns": COLUMNS, "data": [[5.1, 3.5, 1.4, 0.2]] * rows}
        labels = np.arange(rows)
        cases: list[tuple[str, dict[str, Any], Batch, Any]] = [
            (
                "records, labels",
                {"dataframe_records": [record] * rows},
                Tensors({"": labels}, rows),
                labels.tolist(),
            ),
            ("split, labels", {"dataframe_split": split}, Tensors({"": labels}, rows), labels.tolist()),
            (
                "split, frame",
                {"dataframe_split": split},
                Columns({"label": labels, "p": labels / 7}, rows),
                [{"label": int(i), "p": float(i / 7)} for i in labels],
            ),
        ]
        for name, document, result, answer in cases:
            body = orjson.dumps(document)
            called, ours = asyncio.run(measure(body, result, requests))
            least = orjson_alone(body, answer, requests)
            shown = f"{ours:6.1f} µs a request, orjson {least:5.1f} µs, ours {ours - least:5.1f} µs"
            print(f"{name:16} {rows:4} rows: {shown}, {called:.1f} calls")


if __name__ == "__main__":
    main()
