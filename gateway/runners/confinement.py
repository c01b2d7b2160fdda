"""What the operator lets model processes do, and what this process does so that they cannot look into it.

The measures themselves are taken by each model process (`loaders.worker.sandbox`), which reports what holds.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from dataclasses import dataclass
from typing import Any, Final, Literal

_PR_SET_DUMPABLE: Final = 4
_FIRST_USER: Final = 61184
_USERS: Final = 4336
"""The range that systemd sets aside for users that exist only while something runs."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """`user`: `auto` gives each process its own user if the gateway is root, `same` keeps the gateway's, a
    number sets that user. `files`, `processes`, `cpu_seconds`: limits, None for no limit (`processes`
    includes threads; if the kernel has no such limit for one model, the gateway ends a model that has more).
    `filesystem`: the process can read only the package, the environment, the system and `readable`. `disk`:
    the bytes of temporary files above which a process is ended, None for no limit. `syscalls`: none that
    reach other processes or the kernel. `network`: whether it may use it. `required`: measures (user,
    filesystem, syscalls, …) without which nothing is loaded."""

    user: Literal["auto", "same"] | int = "auto"
    files: int | None = 4096
    processes: int | None = 1024
    cpu_seconds: int | None = None
    filesystem: bool = True
    syscalls: bool = True
    network: bool = True
    readable: tuple[str, ...] = ()
    disk: int | None = None
    required: tuple[str, ...] = ()

    def to_json(self, user: int) -> dict[str, Any]:
        """The policy for one process; `user` is its user if `auto` applies."""
        chosen = (
            None if self.user == "same" or os.geteuid() != 0 else user if self.user == "auto" else self.user
        )
        return {
            "uid": chosen,
            "own_user": self.user == "auto",
            "files": self.files,
            "processes": self.processes,
            "cpu_seconds": self.cpu_seconds,
            "filesystem": self.filesystem,
            "syscalls": self.syscalls,
            "network": self.network,
            "readable": list(self.readable),
            "required": list(self.required),
        }


class Users:
    """User numbers for model processes; no two running processes share one."""

    def __init__(self, first: int = _FIRST_USER, count: int = _USERS) -> None:
        self._next = itertools.cycle(range(first, first + count))
        self._count = count
        self._taken: set[int] = set()

    def take(self) -> int:
        if len(self._taken) >= self._count:
            raise RuntimeError("there are not enough user numbers for all model processes")
        user = next(u for u in self._next if u not in self._taken)
        self._taken.add(user)
        return user

    def give_back(self, user: int) -> None:
        self._taken.discard(user)


def hide() -> bool:
    """Closes this process to other processes of the same user, so that its memory and its environment, which
    may hold credentials, cannot be read through `/proc`. Returns True if the kernel did it."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)) == 0
