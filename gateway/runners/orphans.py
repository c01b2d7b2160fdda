"""What comes to this process when a zygote is killed: the model processes that it made, and what they left.

The kernel gives orphans to the nearest ancestor that asked for them, else to process 1, which in a container
is the gateway itself. Somebody must take the exit status of each, or it stays in the process table for ever;
and what a model left behind must end. Exit statuses that somebody else waits for are left alone: a child of
this process's own session was not adopted, because zygotes begin sessions of their own and no way leads back
from them. Knows process ids, and nothing of models.
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
    """From now on the orphans among this process's descendants come to it. True if the kernel agrees."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopting), 0, 0, 0)) == 0


def adopts() -> bool:
    """Whether orphans come to this process. Where they do not, all its children are its own."""
    if sys.platform != "linux":
        return False
    answer = ctypes.c_int()
    asked: int = ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return asked == 0 and bool(answer.value)


class Orphans:
    """Used by the event loop alone. `tend` is to be called now and then; where there is nothing to do, that
    costs one call of the kernel. Made before the first zygote: children that are there already, such as those
    of a shell that became this process, are none of its affair."""

    def __init__(self) -> None:
        self._waited_for: dict[int, subprocess.Popen[bytes]] = {}
        self._in_use: dict[int, Child] = {}
        self._suspects: set[int] = set()
        self._strangers = {pid for pid, _ in _adopted()} if adopts() else set()
        self._looks = 0

    def __repr__(self) -> str:
        return f"<Orphans {len(self._in_use)} in use>"

    def spare(self, process: subprocess.Popen[bytes]) -> None:
        """A child that is no orphan: its exit status is its own."""
        self._waited_for[process.pid] = process

    def come(self, children: Mapping[int, Child]) -> None:
        """A zygote is gone. Of what it made, those go on being used whose handle is open."""
        self._in_use.update(children)
        self._looks = _LOOKS

    def tend(self) -> None:
        """Takes the exit status of those that ended, and ends what nobody uses when it is seen for the second
        time: what a zygote said last may not have been read yet."""
        for pid, process in list(self._waited_for.items()):
            if process.poll() is not None:
                del self._waited_for[pid]
        if _somebody_ended():
            self._looks = max(self._looks, 1)
        if self._looks:
            self._looks = _LOOKS if self._look() else self._looks - 1

    def end(self) -> None:
        """Ends all of them."""
        self._in_use.clear()
        for _ in range(2):
            self._look()

    def _look(self) -> bool:
        """Whether there are orphans."""
        self._in_use = {pid: child for pid, child in self._in_use.items() if child.handle >= 0}
        if not adopts():
            return False
        children = dict(_adopted())
        self._strangers &= children.keys()  # an id that is free again may become an orphan's
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
    """(process id, state) of every child that is not of this process's session, and has ended or may do less
    than this one: what a model leaves is confined as the model was. What others started is not, be it a
    library's here or, for process 1, whatever runs in its container."""
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
    """The ids of this process's children; where the kernel keeps no such list, of all processes."""
    try:
        lists = [Path("/proc/self/task", task, "children") for task in os.listdir("/proc/self/task")]
        return [pid for listed in lists for pid in listed.read_text("ascii").split()]
    except OSError:  # or a thread has ended meanwhile
        return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def _confinement(process: str) -> int:
    """How much of what is inherited and never taken back holds for a process: that it gains no privileges,
    and filters of system calls (a kernel before 5.9 does not say how many)."""
    lines = Path("/proc", process, "status").read_text("utf-8", "replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields.get("NoNewPrivs", 0)) + int(fields.get("Seccomp_filters", 0))
