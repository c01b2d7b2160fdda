"""Whether a model process works. One that does not is shown as stuck; one that stays stopped is ended.

A process is stuck when the kernel says that it is stopped (state T), or when a call has been pending for
`SILENT` seconds without any CPU time of it and of the processes it started. A call without CPU time may wait
for a network or a lock, so it is only shown: the operator's `timeout` decides. A process that is stopped for
`STOPPED` seconds is ended: it cannot answer any caller. The decision is pure; `read` asks the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.runners.memory import PROC

SILENT: Final = 30.0
STOPPED: Final = 10.0


@dataclass(frozen=True, slots=True)
class Sign:
    """What the kernel says of a process: its state (a letter) and its CPU time, in clock ticks."""

    state: str
    ticks: int


class Pulse:
    """What was seen of one process. `stuck`: why it does not work, None while it does."""

    def __init__(self) -> None:
        self.stuck: str | None = None
        self._call: int | None = None
        self._ticks = -1
        self._others: int | None = None
        self._silent_since = 0.0
        self._stopped_since: float | None = None

    def look(self, now: float, sign: Sign, call: int | None, others: Callable[[], int]) -> bool:
        """Takes what was read; `call` numbers the pending call, None: there is none. `others`: CPU ticks with
        those of the processes it started, asked only where it is silent itself. True: end it."""
        if call is None or call != self._call or sign.ticks != self._ticks:
            self._silent_since, self._others = now, None
        self._call, self._ticks = call, sign.ticks
        if now - self._silent_since >= SILENT / 2:
            ticks = others()
            if self._others is not None and ticks != self._others:
                self._silent_since = now
            self._others = ticks
        silent = now - self._silent_since
        if sign.state == "T":
            if self._stopped_since is None:
                self._stopped_since = now
            stopped = now - self._stopped_since
            self.stuck = f"the process is stopped (state T) for {stopped:.0f} s"
            return stopped >= STOPPED
        self._stopped_since = None
        self.stuck = f"a call is pending for {silent:.0f} s without CPU time" if silent >= SILENT else None
        return False


def read(pid: int, proc: Path = PROC) -> Sign | None:
    """None: it has ended, or the kernel does not say."""
    fields = _stat(proc / str(pid))
    return None if fields is None else Sign(fields[0], int(fields[11]) + int(fields[12]))


def of_group(pid: int, proc: Path = PROC) -> int:
    """CPU ticks of all processes in a process group. A model process leads one, its children are in it. Walks
    through `/proc`."""
    ticks = 0
    for entry in os.listdir(proc):
        if entry.isdigit():
            fields = _stat(proc / entry)
            if fields is not None and fields[2] == str(pid):
                ticks += int(fields[11]) + int(fields[12])
    return ticks


def _stat(directory: Path) -> list[str] | None:
    """The fields of `stat` after the command: state, parent, group, session, …, utime (11), stime (12)."""
    with suppress(OSError):
        fields = (directory / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        if len(fields) > 12:
            return fields
    return None
