"""Fetches a large file in parallel ranges, and retries each range separately.

Reads ranges only through a function argument.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from gateway import backoff
from gateway.artifacts.base import Meter
from gateway.registries.mlflow_client import MLflowUnavailable

#: Minimum size of a file that is fetched in ranges of `RANGE` bytes; and the number of parallel ranges.
RANGED: Final = 32 * 1024**2
RANGE: Final = 8 * 1024**2
AT_ONCE: Final = 8
_ATTEMPTS: Final = 3
CHUNK: Final = 1 << 18


def in_ranges(read: Callable[[int, int], bytes], size: int, target: Path, meter: Meter) -> str:
    """Fetches a file of `size` bytes in parallel ranges, and retries each range separately. Returns its
    SHA-256, computed from the disk while the rest is still downloading."""

    def fetch(start: int) -> None:
        end = min(start + RANGE, size)
        content = again(lambda: read(start, end))
        written = 0
        while written < len(content):
            written += os.pwrite(handle, memoryview(content)[written:], start + written)
        meter.add(written)

    content = hashlib.sha256()
    handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(handle, size)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tasks = {start: pool.submit(fetch, start) for start in range(0, size, RANGE)}
            try:
                for start, task in tasks.items():
                    task.result()
                    end = min(start + RANGE, size)
                    for at in range(start, end, CHUNK):
                        content.update(os.pread(handle, min(CHUNK, end - at), at))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(handle)
    return content.hexdigest()


def again(read: Callable[[], Any]) -> Any:
    """Calls `read` up to three times; retries transient errors only."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except (MLflowUnavailable, OSError) as error:
            told = isinstance(error, FileNotFoundError) or getattr(error, "status", 0) in (401, 403, 404)
            if told or attempt == _ATTEMPTS:
                raise
            time.sleep(backoff.pause(attempt, first=0.1, asked=getattr(error, "retry_after", None)))
    raise AssertionError("every attempt returns or raises")
