"""Checks whether a model process works. A process that does not work is shown as stuck; one that stays
stopped is ended.

A process is stuck if the kernel has stopped it (state T), or if a call has been pending for `SILENT` seconds
without CPU time of the process and its children. A call without CPU time may wait for a network or a lock, so
it is only shown: the operator's `timeout` decides. A process that is stopped for `STOPPED` seconds is ended,
because it cannot answer. The decision is pure; `read` reads the kernel's files.
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
    """The kernel's view of a process: its state (a letter) and its CPU time, in clock ticks."""

    state: str
    ticks: int


class Pulse:
    """The observations of one process. `stuck`: why it does not work, or None."""

    def __init__(self) -> None:
        self.stuck: str | None = None
        self._call: int | None = None
        self._ticks = -1
        self._others: int | None = None
        self._silent_since = 0.0
        self._stopped_since: float | None = None

    def look(self, now: float, sign: Sign, call: int | None, others: Callable[[], int]) -> bool:
        """Evaluates a reading. `call`: the number of the pending call, or None. `others`: gives the CPU ticks
        with those of its children, called only if the process itself used none. Returns True to end it."""
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
    """Reads a process; None if it has ended, or the kernel does not tell."""
    fields = _stat(proc / str(pid))
    return None if fields is None else Sign(fields[0], int(fields[11]) + int(fields[12]))


def of_group(pid: int, proc: Path = PROC) -> int:
    """The CPU ticks of all processes in a process group. A model process leads a group with its children.
    Walks through `/proc`."""
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
