"""Callers of a model that doubles x: they ask without pause, and count which version gave which status."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import httpx

from tests.support.running import Running
from tests.support.traffic import until


class Callers:
    """Ask `model` until the block ends. `seen` counts (status, version); `waits` has the seconds that each
    answer took."""

    def __init__(self, server: Running, model: str, callers: int = 2) -> None:
        self.seen: Counter[tuple[int, str]] = Counter()
        self.waits: list[float] = []
        self.wrong: list[float] = []
        self._server = server
        self._model = model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(callers)]

    def _ask(self, number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._stop.is_set():
                x = float(draw.randrange(3, 1000))
                began = time.monotonic()
                answer = client.post(f"/predict/{self._model}", json={"dataframe_records": [{"x": x}]})
                self.waits.append(time.monotonic() - began)
                if answer.status_code == 200 and answer.json()["predictions"] != [x * 2]:
                    self.wrong.append(x)
                self.seen[answer.status_code, answer.headers.get("x-model-version", "")] += 1

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, more: int) -> None:
        """Returns after so many more answers."""
        wanted = sum(self.seen.values()) + more
        until(lambda: sum(self.seen.values()) >= wanted)
