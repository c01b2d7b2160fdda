"""How much memory and how many processors this process may use: the limits of its control group, or those of
the machine.

Reads the kernel's files, for control groups version 1 and 2. The roots are arguments, for tests and for
containers that mount them elsewhere. Must not know models.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")

_READ_AT_ONCE = 1 << 16
_PRESENT = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def memory_total(root: Path = ROOT, proc: Path = PROC) -> int:
    """The lowest limit, in bytes, of this process's control group and of its parents; at most the machine's
    memory."""
    machine, _ = _machine_memory(proc)
    return min([machine, *(limit for limit in _limits(root, proc) if limit > 0)])


@dataclass(frozen=True, slots=True)
class Usage:
    """Used bytes that cannot be reclaimed (without the file cache), and their limit."""

    used: int
    limit: int

    @property
    def share(self) -> float:
        return self.used / self.limit


def memory_usages(root: Path = ROOT, proc: Path = PROC) -> list[Usage]:
    """The present usage of the machine, and of this process's control group and each above it that has a
    limit. Takes some hundred microseconds."""
    found = [_machine_usage(proc)]
    for directory, name in _directories(root, proc):
        limit = _number(f"{directory}/{name}")
        used = _number(f"{directory}/{_PRESENT[name]}") if limit else None
        if limit and used is not None:
            found.append(Usage(max(0, used - _file_cache(f"{directory}/memory.stat")), limit))
    return found


def memory_usage(root: Path = ROOT, proc: Path = PROC) -> Usage:
    """The present usage of what is nearest to its limit: this process's control group, one above it, or
    the machine. Takes some hundred microseconds."""
    return max(memory_usages(root, proc), key=lambda usage: usage.share)


def cpus(root: Path = ROOT, proc: Path = PROC) -> int:
    """How many processors this process may use: its control group's quota, at most the processors that it may
    run on, at least 1."""
    if sys.platform == "linux":
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    quotas = [usable, *(math.ceil(quota) for quota in _quotas(root, proc))]
    return max(1, min(quotas))


def _quotas(root: Path, proc: Path) -> list[float]:
    """The processors that each quota for this process allows, of both versions."""
    found = []
    for mount, _, group in _groups(root, proc):
        for place in (group, *group.parents):
            here = str(place).lstrip("/")
            two = root / here / "cpu.max"
            one = root / "cpu" / here
            if mount == root and two.is_file():
                quota, _, period = two.read_text().partition(" ")
                if quota.isdigit() and period.strip().isdigit():
                    found.append(int(quota) / int(period))
            elif (quota_us := _number(one / "cpu.cfs_quota_us")) is not None and quota_us > 0:
                period_us = _number(one / "cpu.cfs_period_us")
                if period_us:
                    found.append(quota_us / period_us)
    return found


def _machine_usage(proc: Path) -> Usage:
    total, available = _machine_memory(proc)
    return Usage(total - available, total)


def _machine_memory(proc: Path) -> tuple[int, int]:
    """The machine's memory in bytes, and how much of it is available: all where the kernel does not tell."""
    found: dict[bytes, int] = {}
    try:
        for line in _content(f"{proc}/meminfo").splitlines():
            name, _, rest = line.partition(b":")
            if name in (b"MemTotal", b"MemAvailable"):
                found[name] = int(rest.split()[0]) * 1024
    except OSError:
        pass  # not Linux
    total = found.get(b"MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, found.get(b"MemAvailable", total)


def _file_cache(stat: str) -> int:
    """The bytes of cached files that the kernel can drop, in the group and its children."""
    fields: dict[bytes, int] = {}
    try:
        for line in _content(stat).splitlines():
            name, _, number = line.partition(b" ")
            if name.endswith(b"active_file"):
                fields[name] = int(number)
    except (OSError, ValueError):
        return 0
    prefix = b"total_" if b"total_inactive_file" in fields else b""
    return fields.get(prefix + b"inactive_file", 0) + fields.get(prefix + b"active_file", 0)


def _limits(root: Path, proc: Path) -> list[int]:
    found = [_number(f"{directory}/{name}") for directory, name in _directories(root, proc)]
    return [limit for limit in found if limit is not None]


def _directories(root: Path, proc: Path) -> list[tuple[str, str]]:
    """The directories of this process's groups and of those above them, each once, with the name of the file
    that holds the limit."""
    found: dict[tuple[str, str], None] = {}
    for mount, name, group in _groups(root, proc):
        # In a container the path may be the host's: then only the root of the mount exists.
        for place in (group, *group.parents):
            found[f"{mount}{place}", name] = None
    return list(found)


def _groups(root: Path, proc: Path) -> list[tuple[Path, str, PurePosixPath]]:
    """(mount, name of the file with the limit, this process's path) for each version in use."""
    top = PurePosixPath("/")
    groups = [(root, "memory.max", top), (root / "memory", "memory.limit_in_bytes", top)]
    try:
        lines = _content(f"{proc}/self/cgroup").decode(errors="replace").splitlines()
    except OSError:
        return groups
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or ".." in PurePosixPath(path).parts:
            continue
        if not controllers:
            groups.append((root, "memory.max", PurePosixPath(path)))
        elif "memory" in controllers.split(","):
            groups.append((root / "memory", "memory.limit_in_bytes", PurePosixPath(path)))
    return groups


def _number(file: Path | str) -> int | None:
    """The number in a file; None for `max` and for a missing file."""
    try:
        return int(_content(file))
    except (OSError, ValueError):
        return None


def _content(file: Path | str) -> bytes:
    """The content of one of the kernel's files, with few system calls: it is read all the time."""
    parts = []
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while part := os.read(descriptor, _READ_AT_ONCE):
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)
