"""A person at a terminal: commands run as subprocesses, in a directory and an environment of their own."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from gateway import cli

if TYPE_CHECKING:
    from tests.support.running import Running

SCRIPT = Path(sys.executable).with_name("gateway")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "gateway"]
PATIENCE = 120.0


@dataclass(frozen=True)
class Done:
    """The result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def failed(self, code: int = 1) -> str:
        """Its complaint: one line or two and a line for each of several problems, never a traceback."""
        assert self.code == code, (self.code, self.out, self.err)
        said = [line for line in self.err.splitlines() if not line.endswith(" …")]
        lines = [line for line in said if not line.startswith("  ")]
        assert 1 <= len(lines) <= 2, self.err
        assert lines[0].startswith("gateway: "), self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return "\n".join(said)


@dataclass(frozen=True)
class Shell:
    """A place to run commands in: a directory and an environment of its own."""

    directory: Path
    environment: dict[str, str]

    def gateway(self, *arguments: object, stdin: str | bytes = b"", **variables: str) -> Done:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=self.directory,
            env={**self.environment, **variables},
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def called(self, *arguments: object, **variables: str) -> Done:
        """As `gateway`, but in this process: half a second less, for what starts nothing of its own."""
        out, err = io.StringIO(), io.StringIO()
        kept = dict(os.environ)
        with chdir(self.directory), redirect_stdout(out), redirect_stderr(err):
            os.environ.clear()
            os.environ.update({**self.environment, **variables})
            try:
                code = cli.run([str(argument) for argument in arguments])
            finally:
                os.environ.clear()
                os.environ.update(kept)
        return Done(code, out.getvalue(), err.getvalue())

    @contextmanager
    def running(self, *arguments: object, port: int, **variables: str) -> Iterator[str]:
        """The URL of a command that serves, once it is ready; ended by SIGTERM, with exit code 0. The port is
        a flag unless GATEWAY_PORT is given."""
        flag = [] if "GATEWAY_PORT" in variables else ["--port", str(port)]
        log = self.directory / f"serve-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments), *flag],
                cwd=self.directory,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: process.poll() is not None or answers(f"{url}/readyz"), log)
            assert process.poll() is None, log.read_text()
            yield url
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        assert code == 0, log.read_text()


def until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    """One that is free at every address. No outgoing connection takes it before its user listens there,
    because the kernel gives it to none, and hardly any other test run: it is drawn without a seed."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("0.0.0.0", port))
            return port


def clean_shell(directory: Path) -> Shell:
    """Nothing of this process's settings reaches it; cache and state lie under `directory`."""
    foreign = ("GATEWAY_", "MLFLOW_", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment |= {"XDG_CACHE_HOME": str(directory / "cache"), "XDG_STATE_HOME": str(directory / "state")}
    work = directory / "work"
    work.mkdir()
    return Shell(work, environment)


def operator(server: Running, directory: Path) -> Shell:
    """A shell whose commands reach a running gateway, with its key."""
    shell = clean_shell(directory)
    key = server.key["Authorization"].removeprefix("Bearer ")
    return Shell(directory, {**shell.environment, "GATEWAY_URL": server.url, "GATEWAY_ADMIN_KEY": key})
