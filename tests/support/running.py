"""A gateway as a user has it: the installed command in a process of its own, asked over a socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import gateway

READY_WITHIN = 180.0


class Running:
    """A gateway process. Its log is read to the end, so that it never blocks on a full pipe."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        *,
        port: int | None = 0,
        before: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        settings = {
            "GATEWAY_CACHE_DIR": str(directory / "cache"),
            "GATEWAY_STATE_DIR": str(directory / "state"),
            "GATEWAY_LOG_FORMAT": "json",
            # A test whose models do not fit must not start builds from the network.
            "GATEWAY_ENVIRONMENTS__BUILD": "never",
            # On a busy machine a load may take longer than callers usually wait for one.
            "GATEWAY_COLD_WAIT": "120s",
        }
        self.directory = directory
        self._state = Path({**settings, **environ}["GATEWAY_STATE_DIR"])
        self.lines: list[str] = []
        self._found = threading.Event()
        self.url = ""
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("GATEWAY_", "MLFLOW_"))
        }
        clean.pop("PYTHONDONTWRITEBYTECODE", None)
        listening = [] if port is None else ["--port", str(port)]
        self.process = subprocess.Popen(
            [*before, python, "-m", "gateway", "serve", *listening, *arguments],
            cwd=directory,
            env={**clean, **settings, **environ},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._found.wait(READY_WITHIN) or not self.url:
            self.stop(signal.SIGKILL)
            raise AssertionError("the gateway did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"serving .* on (http://[^\s\"]+)", line)
            if found:
                self.url = found[1]
                self._found.set()
        self._found.set()

    @property
    def key(self) -> dict[str, str]:
        """The header of control calls, with the key that the gateway made."""
        return {"Authorization": f"Bearer {(self._state / 'control.key').read_text().strip()}"}

    def stop(self, how: signal.Signals = signal.SIGTERM, within: float = 120.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(within)
        self._reader.join(60)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    def events(self, kind: str) -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [line for line in parsed if line.get("event") == kind]

    def predict(self, path: str, rows: Sequence[Mapping[str, Any]]) -> httpx.Response:
        return httpx.post(f"{self.url}/predict/{path}", json={"dataframe_records": list(rows)}, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of that name whose labels include these."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            found = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
            if found:
                have = dict(re.findall(r'(\w+)="([^"]*)"', found[1] or ""))
                if labels.items() <= have.items():
                    total += float(found[2])
        return total


@contextmanager
def running(directory: Path, *arguments: str, **environ: str) -> Iterator[Running]:
    """A gateway over `directory`, on a free port, until the block ends."""
    server = Running(directory, arguments, environ)
    try:
        yield server
    finally:
        server.stop()


class Scaled:
    """A model whose answer says which version gave it: x times its factor."""

    def __init__(self, factor: float, ballast: int = 0) -> None:
        self.factor = factor
        self.ballast = np.zeros(ballast, dtype=np.uint8)

    def predict(self, model_input: Any) -> Any:
        return (model_input["x"] * self.factor).to_numpy()


def log_scaled(
    registry: Path, name: str, factor: float, alias: str | None = None, ballast: int = 0
) -> gateway.ModelVersion:
    import pandas as pd

    example = pd.DataFrame({"x": [1.0, 2.0]})
    return gateway.log_model(
        Scaled(factor, ballast),
        name=name,
        registry=str(registry),
        input_example=example,
        alias=alias,
        verify=False,
    )
