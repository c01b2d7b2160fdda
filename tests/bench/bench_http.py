"""What the HTTP layer itself costs a request: scope to service, and answer to bytes.

    python tests/bench/bench_http.py [REQUESTS]

The service behind it answers a constant, so that enforcement, batching and the model cost nothing; there
is no socket either. Beside each figure stands what orjson alone needs for the same body and answer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson

from gateway.http.bodies import BodyReader
from gateway.http.build import build
from gateway.metrics import Metrics
from gateway.registries.base import Version
from gateway.service import Answer, Inference
from loaders.batch import Batch, Columns, Tensors

COLUMNS = ("sepal_length", "sepal_width", "petal_length", "petal_width")
HEADERS = [
    (b"host", b"127.0.0.1:8080"),
    (b"user-agent", b"bench"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip"),
    (b"connection", b"keep-alive"),
    (b"content-type", b"application/json"),
]


class Constant:
    """A service whose models all know the answer."""

    stopping = False

    def __init__(self, result: Batch) -> None:
        self.answer = Answer(result)
        self.version = Version("iris", "2", "/models/iris/2")

    async def predict(self, inference: Inference) -> Answer:
        inference.record.version, inference.record.alias = self.version, "champion"
        return self.answer


class Parts(SimpleNamespace):
    """The parts that a prediction touches; the others are None."""

    def __getattr__(self, name: str) -> None:
        return None


async def measure(body: bytes, result: Batch, requests: int) -> float:
    """Microseconds a request."""
    app: Any = Parts(
        settings=SimpleNamespace(
            max_body_bytes=2**25,
            max_inflight_bytes=2**28,
            max_answer_bytes=2**28,
            webhook_secret_file=None,
            access_log=False,
        ),
        service=Constant(result),
        metrics=Metrics(),
        draining=lambda: False,
        bodies=BodyReader(2**25, 2**28),
    )
    serve = build(app)
    headers = [*HEADERS, (b"content-length", b"%d" % len(body))]
    message = {"type": "http.request", "body": body, "more_body": False}
    statuses: set[int] = set()

    async def receive() -> Any:
        return message

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            statuses.add(event["status"])

    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(requests):
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
        best = min(best, time.perf_counter() - began)
    if statuses != {200}:
        raise SystemExit(f"the answers were {statuses}")
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
            ours = asyncio.run(measure(body, result, requests))
            least = orjson_alone(body, answer, requests)
            shown = f"{ours:6.1f} µs a request, orjson {least:5.1f} µs, ours {ours - least:5.1f} µs"
            print(f"{name:16} {rows:4} rows: {shown}")


if __name__ == "__main__":
    main()
