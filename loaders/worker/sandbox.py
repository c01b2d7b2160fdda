"""Confines a model process before the first line of the model runs.

Each measure is applied if the kernel and the process's rights allow it. The report has a text for operators
per measure, by name. A text that begins with `not ` means that the measure is not in force. Linux only: on
other systems every measure is reported as not available. Must not know models or the gateway. Standard
library only; calls the kernel through ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from loaders.worker import syscalls

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522
_OOM_SCORE: Final = "500"

# Numbers that are the same on all architectures.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_SCOPES: Final = 0b11  # abstract sockets and signals reach only the model's own processes

_SYSTEM: Final = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/proc", "/sys/devices", "/sys/fs/cgroup",
    "/sys/module", "/sys/class", "/sys/bus",
    *(f"/etc/{name}" for name in (
        "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf", "hosts", "host.conf",
        "resolv.conf", "gai.conf", "services", "protocols", "localtime", "timezone", "ssl", "pki",
        "ca-certificates", "mime.types", "fonts", "alternatives", "OpenCL", "vulkan", "nvidia",
    )),
)  # fmt: skip
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "dri", "kfd")

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 1 << 14, 1 << 19
_SHARED_MEMORY: Final = "/dev/shm"


class ConfinementError(Exception):
    """A measure that the operator requires is not available here."""


class Applied(NamedTuple):
    """`held`: the report of each measure, by name. `shared_memory`: a descriptor of this process's own
    `/dev/shm`, used to measure its contents; -1 if it has none."""

    held: dict[str, str]
    shared_memory: int = -1


def apply(policy: Mapping[str, Any], package: str, temporary: str) -> Applied:
    """Confines this process.

    `policy`: `uid` (a number; None: keep), `own_user` (True if no other process runs as that user), `files`,
    `processes`, `cpu_seconds` (limits; None: keep), `shared_memory` (bytes; None: the kernel's default),
    `filesystem`, `syscalls`, `network` (booleans), `readable` (further paths), `required` (names of measures
    that must be in force before a model is loaded). The process may read `package` and write `temporary`.
    Raises ConfinementError if a required measure is missing.
    """
    held: dict[str, str] = {}
    shared_memory = -1
    if sys.platform != "linux":
        held["all"] = "not available on this system"
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        initial = _user_namespace()
        held["oom"] = _reported(lambda: _prefer_as_victim(libc))
        try:
            shared_memory = _own_shared_memory(libc, policy)
            held["shared_memory"] = "its own, removed when it ends"
        except OSError as error:
            refused = os.strerror(error.errno or 0)
        steps: dict[str, Callable[[], str]] = {
            "user": lambda: _become(libc, policy.get("uid"), package, temporary),
            "limits": lambda: _limit(policy, _user_namespace() != initial),
            "capabilities": lambda: _drop_capabilities(libc),
            "new_privileges": lambda: _switch(libc, _PR_SET_NO_NEW_PRIVS, 1, "refused"),
            "filesystem": lambda: _landlock(libc, policy, package, temporary, shared_memory >= 0),
            "children": lambda: _switch(libc, _PR_SET_CHILD_SUBREAPER, 1, ""),
            "syscalls": lambda: _seccomp(libc, policy),
            "memory": lambda: _switch(libc, _PR_SET_DUMPABLE, 0, "closed to other processes"),
        }
        for name, step in steps.items():
            held[name] = _reported(step)
        if shared_memory < 0:
            open_to_all = held["filesystem"].startswith("not ")
            said = "not private" if open_to_all else "none, /dev/shm cannot be opened"
            held["shared_memory"] = f"{said}: a mount of its own is not available: {refused}"
        filtered = held["syscalls"].startswith("filtered") and policy.get("syscalls", True)
        held["children"] = _said_of_children(policy) if filtered else "not held together: no filter"
        held["signals"] = _said_of_signals(libc, policy, bool(filtered))
    missing = [name for name in policy.get("required", ()) if held.get(name, "not").startswith("not ")]
    if missing:
        raise ConfinementError(f"required but not available: {', '.join(missing)}")
    return Applied(held, shared_memory)


def _reported(step: Callable[[], str]) -> str:
    try:
        return step()
    except OSError as error:
        return f"not available: {os.strerror(error.errno or 0)}"


def _has_own_user(policy: Mapping[str, Any]) -> bool:
    """Returns True if no other process runs as this process's user."""
    return bool(policy.get("own_user")) and os.getuid() == policy.get("uid")


def _said_of_children(policy: Mapping[str, Any]) -> str:
    said = "in its process group: their memory counts as its own, they end with it"
    if os.getuid() == policy.get("uid") and not _is_initial_user_namespace():
        # The kernel delivers the gateway's last signal only to the same user, or if the gateway is root.
        return f"{said}, but may outlive a gateway and a zygote that are killed at the same moment"
    return f"{said} and with the gateway"


def _said_of_signals(libc: Any, policy: Mapping[str, Any], filtered: bool) -> str:
    if policy.get("filesystem", True) and _landlock_version(libc) >= 6:
        return "to its own processes"
    if _has_own_user(policy):
        return "to processes of its own user"
    if filtered:
        return "only to itself: it cannot signal its children either (Linux 6.12 can distinguish them)"
    return "not confined: it can signal every process of its user"


def _is_initial_user_namespace() -> bool:
    with suppress(OSError):
        return Path("/proc/self/uid_map").read_text("ascii").split() == ["0", "0", "4294967295"]
    return False


def _own_shared_memory(libc: Any, policy: Mapping[str, Any]) -> int:
    """Mounts a `/dev/shm` that only this process sees and that ends with it. Returns a descriptor of it.

    Needs a mount namespace, and, unless the user is root, a user namespace around it. A process cannot become
    another user inside a user namespace. Raises OSError.
    """
    if not os.path.isdir(_SHARED_MEMORY):
        raise OSError(errno.ENOENT, "")
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call(libc.unshare, _CLONE_NEWNS)
    except OSError:
        if policy.get("uid") is not None:
            raise
        _call(libc.unshare, _CLONE_NEWUSER | _CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny", "ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", "ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", "ascii")
    # Receive unmounts from outside, so that this process does not keep such mounts in use.
    _call(libc.mount, None, b"/", None, _MS_REC | _MS_SLAVE, None)
    size = policy.get("shared_memory")
    options = "mode=1777" if size is None else f"mode=1777,size={int(size)}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _call(libc.mount, b"tmpfs", _SHARED_MEMORY.encode(), b"tmpfs", flags, options.encode())
    return os.open(_SHARED_MEMORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _call(function: Any, *arguments: Any) -> int:
    """Calls a function of the C library. Raises OSError if it fails."""
    result = int(function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _switch(libc: Any, option: int, value: int, said: str) -> str:
    _call(libc.prctl, option, value, 0, 0, 0)
    return said


def _prefer_as_victim(libc: Any) -> str:
    """Makes the kernel end a model, not the gateway, when memory runs out."""
    _call(libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)  # the parent was closed, and so is this file
    Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, "ascii")
    return f"score {_OOM_SCORE}"


def _limit(policy: Mapping[str, Any], own_namespace: bool) -> str:
    # The kernel counts processes per user, and since Linux 5.14 per user namespace. The limit makes sense
    # only for a user or namespace of its own.
    own_user = os.getuid() == policy.get("uid") or (own_namespace and _kernel() >= (5, 14))
    wanted = {
        "cores": (resource.RLIMIT_CORE, 0),
        "files": (resource.RLIMIT_NOFILE, policy.get("files")),
        "cpu_seconds": (resource.RLIMIT_CPU, policy.get("cpu_seconds")),
        "processes": (resource.RLIMIT_NPROC, policy.get("processes") if own_user else None),
    }
    set_ = []
    for name, (kind, value) in wanted.items():
        if value is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
        set_.append(f"{name} {most}")
    return ", ".join(set_)


def _user_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/user")
    return ""


def _kernel() -> tuple[int, ...]:
    numbers = os.uname().release.split("-")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())


def _become(libc: Any, uid: int | None, package: str, temporary: str) -> str:
    """Becomes another user, if this one is root and the other can read the package. Drops all groups."""
    if uid is None:
        return f"not changed: {os.getuid()}"
    if os.geteuid() != 0:
        return f"not changed: {os.getuid()} is not root"
    os.chown(temporary, uid, uid)
    groups, group = os.getgroups(), os.getegid()
    try:
        os.setgroups([])
        os.setegid(uid)
        os.seteuid(uid)
        if not _readable([package, temporary, *_roots()]):
            os.seteuid(0)
            os.setegid(group)
            os.setgroups(groups)
            os.chown(temporary, 0, 0)
            return "not changed: another user cannot read the package or this environment"
        os.seteuid(0)
    except OSError:
        os.seteuid(0)
        os.setegid(group)
        raise
    _drop_bounding(libc)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    return str(uid)


def _readable(paths: Iterable[str]) -> bool:
    """Returns True if the effective user can list and read the paths, one level deep."""
    for path in paths:
        for entry in [path, *(os.path.join(path, name) for name in _listed(path))]:
            if not os.access(entry, os.R_OK | (os.X_OK if os.path.isdir(entry) else 0), effective_ids=True):
                return False
    return True


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _roots() -> list[str]:
    return sorted({sys.prefix, sys.base_prefix})


def _drop_bounding(libc: Any) -> None:
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for capabilities unknown to the kernel


def _drop_capabilities(libc: Any) -> str:
    _drop_bounding(libc)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _call(libc.capset, header, bytes(24))
    return "none"


def _landlock_version(libc: Any) -> int:
    return int(libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1))


def _landlock(
    libc: Any, policy: Mapping[str, Any], package: str, temporary: str, own_shared_memory: bool
) -> str:
    """Allows reading the package, the environment and the system, and writing the process's own directory. If
    the kernel supports it, signals and abstract sockets reach only the model's own processes."""
    if not policy.get("filesystem", True):
        return "not confined: switched off"
    version = _landlock_version(libc)
    if version < 1:
        return "not available: the kernel has no Landlock"
    known = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        known |= (1 << bit) if version >= since else 0
    attributes = struct.pack("=QQQ", known, 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _call(libc.syscall, _LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        environment = [path for path in sys.path if path and path != os.sep]
        reading = [*_SYSTEM, *_roots(), *environment, own, package, *policy.get("readable", ())]
        devices = [f"/dev/{name}" for name in (*_DEVICES, *_nvidia())]
        if own_shared_memory:
            devices.append(_SHARED_MEMORY)
        for path, access in [
            *((path, _READ) for path in reading),
            *((path, known & ~_EXECUTE) for path in devices),
            (temporary, known),
        ]:
            _allow(libc, ruleset, path, access & known)
        _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call(libc.syscall, _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"its own directory, the package read-only (Landlock {version})"


def _nvidia() -> list[str]:
    return [name for name in _listed("/dev") if name.startswith("nvidia")]


def _allow(libc: Any, ruleset: int, path: str, access: int) -> None:
    with suppress(OSError):  # an absent or inaccessible path needs no rule
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):
                access &= _FILE_ONLY
            _call(libc.syscall, _LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", access, descriptor), 0)
        finally:
            os.close(descriptor)


def _seccomp(libc: Any, policy: Mapping[str, Any]) -> str:
    network = bool(policy.get("network", True))
    if policy.get("syscalls", True):
        scopes = bool(policy.get("filesystem", True)) and _landlock_version(libc) >= 6
        shared_user = not _has_own_user(policy)
        # Before Landlock's third version, a file without the right to write can still be truncated.
        cuts = bool(policy.get("filesystem", True)) and _landlock_version(libc) < 3
        wanted = syscalls.rules(
            shared_user=shared_user, signals=shared_user and not scopes, network=network, cuts=cuts
        )
    else:
        wanted = syscalls.network_rules(network=network)
        if not wanted:
            return "not filtered: switched off"
    reason = syscalls.apply(libc, wanted)
    if reason is not None:
        return f"not available: {reason}"
    return "filtered" if network else "filtered, no network"
