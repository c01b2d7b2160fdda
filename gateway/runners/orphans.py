"""Adopts the processes that a killed zygote leaves: its model processes, and their children.

The kernel reparents orphans to the nearest ancestor that is a subreaper, else to process 1, which in a
container is the gateway. Each must be reaped, or it stays in the process table; and processes that a model
left must end. Other children are not touched, because other code waits for their exit status: a child in this
process's own session is not an orphan, because each zygote starts its own session. Knows process ids; must
not know models.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from gateway.runners.child import Child

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_LOOKS: Final = 3


def adopt(adopting: bool = True) -> bool:
    """Makes this process the parent of its orphaned descendants. Returns True if the kernel agrees."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopting), 0, 0, 0)) == 0


def adopts() -> bool:
    """Whether orphans are reparented to this process. If not, all its children are its own."""
    if sys.platform != "linux":
        return False
    answer = ctypes.c_int()
    asked: int = ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return asked == 0 and bool(answer.value)


class Orphans:
    """Only the event loop uses it. Call `tend` regularly; without work it costs one system call. Create it
    before the first zygote: children that already exist, such as those of a shell that became this process,
    are ignored."""

    def __init__(self) -> None:
        self._waited_for: dict[int, subprocess.Popen[bytes]] = {}
        self._in_use: dict[int, Child] = {}
        self._suspects: set[int] = set()
        self._strangers = {pid for pid, _ in _adopted()} if adopts() else set()
        self._looks = 0

    def __repr__(self) -> str:
        return f"<Orphans {len(self._in_use)} in use>"

    def spare(self, process: subprocess.Popen[bytes]) -> None:
        """Excludes a child that is not an orphan: other code waits for its exit status."""
        self._waited_for[process.pid] = process

    def come(self, children: Mapping[int, Child]) -> None:
        """A zygote has ended. Its model processes with an open handle continue to be used."""
        self._in_use.update(children)
        self._looks = _LOOKS

    def tend(self) -> None:
        """Reaps ended orphans. Ends an unused one when it is seen for the second time, because the zygote's
        last message may not have been read yet."""
        for pid, process in list(self._waited_for.items()):
            if process.poll() is not None:
                del self._waited_for[pid]
        if _somebody_ended():
            self._looks = max(self._looks, 1)
        if self._looks:
            self._looks = _LOOKS if self._look() else self._looks - 1

    def end(self) -> None:
        """Ends all orphans."""
        self._in_use.clear()
        for _ in range(2):
            self._look()

    def _look(self) -> bool:
        """Returns True if there are orphans."""
        self._in_use = {pid: child for pid, child in self._in_use.items() if child.handle >= 0}
        if not adopts():
            return False
        children = dict(_adopted())
        self._strangers &= children.keys()  # a free id may later be that of an orphan
        others = self._waited_for.keys() | self._strangers
        found = [(pid, state) for pid, state in children.items() if pid not in others]
        unused = {pid for pid, state in found if state != "Z" and pid not in self._in_use}
        for pid, state in found:
            with suppress(OSError):
                if state == "Z":
                    os.waitpid(pid, os.WNOHANG)
                elif pid in unused & self._suspects:
                    os.kill(pid, signal.SIGKILL)
        self._suspects = unused
        return bool(found)


def _somebody_ended() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False  # there are no children


def _adopted() -> Iterator[tuple[int, str]]:
    """(process id, state) of every child that is not in this process's session, and has ended or is more
    confined than this process: children of a model are confined like the model. Other children are not, such
    as those of a library here or, for process 1, other processes in its container."""
    own, session, held = str(os.getpid()), str(os.getsid(0)), _confinement("self")
    for entry in _children():
        with suppress(OSError):
            stat = Path("/proc", entry, "stat").read_text("utf-8", "replace")
            state, parent, _, its = stat.rpartition(")")[2].split()[:4]
            if parent != own or its == session:
                continue
            if state == "Z" or _confinement(entry) > held:
                yield int(entry), state


def _children() -> list[str]:
    """The ids of this process's children; of all processes if the kernel has no such list."""
    try:
        lists = [Path("/proc/self/task", task, "children") for task in os.listdir("/proc/self/task")]
        return [pid for listed in lists for pid in listed.read_text("ascii").split()]
    except OSError:  # or a thread has ended meanwhile
        return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def _confinement(process: str) -> int:
    """How many permanent, inherited restrictions a process has: no new privileges, and filters of system
    calls (a kernel before 5.9 does not tell how many)."""
    lines = Path("/proc", process, "status").read_text("utf-8", "replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields.get("NoNewPrivs", 0)) + int(fields.get("Seccomp_filters", 0))
