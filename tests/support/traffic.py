"""Requests without pause to a gateway, each answer checked, and what is seen of it from outside."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from tests.support.running import Running

#: Of the versions of a model that `log_scaled` made: its answer is x times this.
FACTORS = {"1": 10.0, "2": 1000.0}


def until(condition: Callable[[], bool], seconds: float = 120.0) -> float:
    """How long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come about"
        time.sleep(0.01)  # between two looks from outside at another process
    return time.monotonic() - began


def served(server: Running, path: str) -> str:
    answer = server.predict(path, [{"x": 2.0}])
    shown = answer.json()
    return str(shown["model"]["version"]) if answer.status_code == 200 else str(shown["error_code"])


class Traffic:
    """Requests without pause, from several connections."""

    def __init__(self, url: str, path: str) -> None:
        self.failures: list[str] = []
        #: How long each answer took.
        self.seconds: list[float] = []
        self._ask = (url, path)
        self._stop = threading.Event()

    @property
    def answers(self) -> int:
        return len(self.seconds)

    def _run(self) -> None:
        url, path = self._ask
        with httpx.Client(base_url=url, timeout=60) as client:
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                sent = {"dataframe_records": [{"x": float(turn)}]}
                began = time.monotonic()
                response = client.post(f"/predict/{path}", json=sent)
                self.seconds.append(time.monotonic() - began)
                if response.status_code != 200:
                    self.failures.append(response.text)
                elif response.json()["predictions"] != [turn * FACTORS[response.headers["x-model-version"]]]:
                    self.failures.append(f"a wrong answer: {response.text}")


@contextmanager
def traffic(url: str, path: str, connections: int = 3) -> Iterator[Traffic]:
    made = Traffic(url, path)
    with ThreadPoolExecutor(connections) as pool:
        callers = [pool.submit(made._run) for _ in range(connections)]
        try:
            yield made
        finally:
            made._stop.set()
    for caller in callers:
        caller.result()
