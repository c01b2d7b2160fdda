"""Sets the stage of a comparison: environments, models, and servers that answer.

Knows how the parts come together. Does not know what is measured.
"""

from __future__ import annotations

import http.client
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tests.bench.bench_serving import free_port
from tests.bench.peers import environments
from tests.bench.peers.environments import Environment
from tests.bench.peers.load import Asked, Refused, answered, differences
from tests.bench.peers.process import Failed, Server
from tests.bench.peers.table import Peer, Row, Setup, flat

MODELS = Path(__file__).with_name("models.py")


class Unusable(Exception):
    """A peer that takes no part, and why."""


FAILURES = (Unusable, Refused, OSError, http.client.HTTPException, subprocess.CalledProcessError)
"""What may happen to one peer and must not end the comparison of the others."""


@dataclass
class Stage:
    envs: Path
    python: str
    models: Path
    """Where the models are."""
    scratch: Path
    core: int
    environments: dict[str, Environment] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    answers: list[list[Any]] = field(default_factory=list)
    """By model, by row: what the model itself says."""

    def make(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.environments:
                self.environments[name] = environments.made(name, self.envs, self.python)

    def train(self, kind: str, count: int, named: bool) -> None:
        self.models.mkdir(parents=True, exist_ok=True)
        self._run("plain", "train", kind, "named" if named else "array", str(count), str(self.models))
        for name, what in (("gateway", "package"), ("mlflow", "mlflow"), ("mlserver", "mlflow")):
            found = self.environments.get(name)
            if found and not found.failure and not (what == "mlflow" and (self.models / "mlflow").exists()):
                self._run(name, what, str(self.models))
        self.rows = orjson.loads((self.models / "rows.json").read_bytes())
        self.answers = orjson.loads((self.models / "answers.json").read_bytes())

    def _run(self, name: str, *arguments: str) -> None:
        found = self.environments[name]
        if found.failure:
            raise SystemExit(f"the environment {name} is needed and cannot be made:\n{found.failure}")
        without = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run([found.python, str(MODELS), *arguments], check=True, env=without)

    def start(
        self, name: str, peer: Peer, number: int = 0, room: int = 0, environ: Mapping[str, str] | None = None
    ) -> tuple[Server, int]:
        """A server that answers, and its port. Raises Unusable."""
        found = self.environments[peer.environment]
        if found.failure:
            raise Unusable(f"cannot be installed: {found.failure.splitlines()[-1]}")
        port = free_port()
        setup = Setup(found, self.models, self.scratch / f"{name}-{number}", port, room)
        start = peer.start(setup)
        first = peer.load("m0") if peer.load else peer.asked("m0", self.rows[0])
        try:
            server = Server(
                start.command,
                {**start.environ, **(environ or {})},
                setup.scratch,
                self.core,
                ready=lambda: answered(port, first),
            )
        except Failed as failure:
            raise Unusable(f"does not serve: {failure}") from None
        return server, port

    def check(
        self, peer: Peer, port: int, models: Sequence[int], connections: int, rows: int | None = None
    ) -> None:
        """Asks each model for so many rows (all), mixed. Raises Unusable if one answer is not its own."""
        pairs = [(model, row) for row in range(rows or len(self.rows)) for model in models]
        requests = [peer.asked(f"m{model}", self.rows[row]) for model, row in pairs]

        def right(i: int, body: bytes) -> bool:
            model, row = pairs[i]
            return self.right(peer, model, row, body)

        wrong = differences(port, requests, connections, right)
        if wrong:
            raise Unusable(f"WRONG: {len(wrong)} of {len(pairs)} answers at {connections} connections")

    def right(self, peer: Peer, model: int, row: int, body: bytes) -> bool:
        got, wanted = flat(peer.answer(orjson.loads(body))), flat(self.answers[model][row])
        return len(got) == len(wanted) and bool(np.allclose(got, wanted, rtol=1e-4, atol=1e-5))

    def asked(self, peer: Peer, model: int, row: int) -> Asked:
        return peer.asked(f"m{model}", self.rows[row % len(self.rows)])
