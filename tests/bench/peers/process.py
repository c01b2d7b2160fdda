"""A server and everything below it: on one core, with its processor time and memory counted as a whole.

Knows processes and `/proc`. Does not know which server it is or what it answers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.hostile import descendants

LAUNCH = Path(__file__).with_name("launch.py")
TICK = os.sysconf("SC_CLK_TCK")
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""One core has no use for more threads of a mathematics library, whoever would start them."""


class Failed(Exception):
    """The server does not start or does not answer; the text has the end of its log."""


class Server:
    def __init__(
        self,
        command: list[str],
        environ: Mapping[str, str],
        directory: Path,
        core: int,
        ready: Callable[[], bool],
        patience: float = 180.0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "server.log"
        # Settings of the caller's shell must not decide what is measured.
        left_out = (
            "GATEWAY_",
            "MLFLOW_",
            "OPENBLAS_",
            "VIRTUAL_ENV",
            "PYTHONDONTWRITEBYTECODE",
            "PYTHONPATH",
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        programs = str(Path(command[0]).parent) + os.pathsep + clean.get("PATH", "")
        with self.log.open("wb") as output:
            self._launcher = subprocess.Popen(
                ["taskset", "-c", str(core), sys.executable, str(LAUNCH), *command],
                cwd=directory,
                env={**clean, "PATH": programs, **SINGLE, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        end = time.monotonic() + patience
        while not ready():
            if self._launcher.poll() is not None or time.monotonic() > end:
                self.stop()
                raise Failed(self.log.read_text("utf-8", "replace")[-2000:] or "it ends without a message")
            time.sleep(0.1)

    @property
    def _pids(self) -> list[int]:
        return list(descendants(self._launcher.pid))

    def processor_seconds(self) -> float:
        """What all its processes have used, those that have ended included."""
        ticks = 0
        for pid in (self._launcher.pid, *self._pids):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:  # it has just ended: its parent counts it
                continue
            ticks += sum(map(int, fields[11:15]))  # user, system, and the same of finished children
        return ticks / TICK

    def proportional_megabytes(self) -> float:
        """Memory of all its processes, each page by its share."""
        kilobytes = 0
        for pid in self._pids:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return kilobytes / 1024

    def freeze(self) -> None:
        """Stops all its processes, so that it takes nothing while another server is measured."""
        for pid in self._pids:  # parents first: they would otherwise see their children stop
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(self._pids):
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._launcher.poll() is None:
            self.thaw()
            self._launcher.terminate()
            try:
                self._launcher.wait(30)
            except subprocess.TimeoutExpired:
                for pid in self._pids:
                    os.kill(pid, signal.SIGKILL)
                self._launcher.wait(30)
