"""What a model process may do: applied by itself, before the first line of the model runs.

Each measure is taken where the kernel and the process's rights allow it and reported by name, so that an
operator sees what holds. Linux; elsewhere everything is reported as not available. Knows nothing of
models or of the gateway. Standard library only: the kernel is called through ctypes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522
_OOM_SCORE: Final = "500"

# Numbers that all architectures share.
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_SCOPES: Final = 0b11  # abstract sockets and signals stay among the model's own processes

_SYSTEM: Final = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/proc", "/sys/devices", "/sys/fs/cgroup",
    "/sys/module", "/sys/class", "/sys/bus",
    *(f"/etc/{name}" for name in (
        "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf", "hosts", "host.conf",
        "resolv.conf", "gai.conf", "services", "protocols", "localtime", "timezone", "ssl", "pki",
        "ca-certificates", "mime.types", "fonts", "alternatives", "OpenCL", "vulkan", "nvidia",
    )),
)  # fmt: skip
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "shm", "dri", "kfd")

# System calls a model has no use for, by which it could reach other processes, the kernel's configuration
# or (io_uring) the network past the filter: name -> number on x86-64 and on 64-bit ARM.
_DENIED: Final = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
}
_SOCKET: Final = (41, 198)
_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""Machine: column of the tables above, the kernel's name for it, and the number of `seccomp`."""


class ConfinementError(Exception):
    """A measure the operator demands cannot be taken here."""


def apply(policy: Mapping[str, Any], package: str, temporary: str) -> dict[str, str]:
    """Confines this process and returns what holds, by name.

    `policy`: `uid` (a number; None: stay), `files`, `processes`, `cpu_seconds` (limits; None: as they are),
    `filesystem`, `syscalls`, `network` (booleans), `readable` (further paths), `required` (names of measures
    without which nothing may be loaded). `package` is what may be read, `temporary` what may be written.
    Raises ConfinementError where a required measure is missing.
    """
    held: dict[str, str] = {}
    if sys.platform != "linux":
        held["all"] = "not available on this system"
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        steps: dict[str, Callable[[], str]] = {
            "oom": lambda: _prefer_as_victim(libc),
            "user": lambda: _become(libc, policy.get("uid"), package, temporary),
            "limits": lambda: _limit(policy),
            "capabilities": lambda: _drop_capabilities(libc),
            "new_privileges": lambda: _switch(libc, _PR_SET_NO_NEW_PRIVS, 1, "refused"),
            "filesystem": lambda: _landlock(libc, policy, package, temporary),
            "syscalls": lambda: _seccomp(libc, policy),
            "memory": lambda: _switch(libc, _PR_SET_DUMPABLE, 0, "closed to other processes"),
        }
        for name, step in steps.items():
            try:
                held[name] = step()
            except OSError as error:
                held[name] = f"not available: {os.strerror(error.errno or 0)}"
    missing = [name for name in policy.get("required", ()) if held.get(name, "not").startswith("not ")]
    if missing:
        raise ConfinementError(f"required here and not available: {', '.join(missing)}")
    return held


def _call(function: Any, *arguments: Any) -> int:
    """A call of the C library; raises OSError where it fails."""
    result = int(function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _switch(libc: Any, option: int, value: int, said: str) -> str:
    _call(libc.prctl, option, value, 0, 0, 0)
    return said


def _prefer_as_victim(libc: Any) -> str:
    """Where memory ends all the same, the kernel takes a model, not the gateway."""
    _call(libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)  # what forked it was closed, and so this file is, too
    Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, "ascii")
    return f"score {_OOM_SCORE}"


def _limit(policy: Mapping[str, Any]) -> str:
    # Processes are counted by user: that means something only for a user of one's own.
    own_user = os.getuid() == policy.get("uid")
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


def _become(libc: Any, uid: int | None, package: str, temporary: str) -> str:
    """Another user, if this one is root and the other can read the package; groups are left behind."""
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
    """Whether the effective user can list and read what is there, one level deep."""
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
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those the kernel does not know


def _drop_capabilities(libc: Any) -> str:
    _drop_bounding(libc)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _call(libc.capset, header, bytes(24))
    return "none"


def _landlock(libc: Any, policy: Mapping[str, Any], package: str, temporary: str) -> str:
    """Reads the package, the environment and the system; writes its own directory. Signals and abstract
    sockets reach its own processes only, where the kernel knows these scopes."""
    if not policy.get("filesystem", True):
        return "not confined: switched off"
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
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
    with suppress(OSError):  # what is not there, or not for this user, needs no rule
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):
                access &= _FILE_ONLY
            _call(libc.syscall, _LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", access, descriptor), 0)
        finally:
            os.close(descriptor)


def _seccomp(libc: Any, policy: Mapping[str, Any]) -> str:
    if not policy.get("syscalls", True) and policy.get("network", True):
        return "not filtered: switched off"
    if platform.machine() not in _ARCHITECTURES:
        return f"not available: no table for {platform.machine()}"
    column, architecture, number = _ARCHITECTURES[platform.machine()]
    denied = [numbers[column] for numbers in _DENIED.values()]
    program = _filter(architecture, denied, None if policy.get("network", True) else _SOCKET[column])
    buffer = ctypes.create_string_buffer(program)
    length = len(program) // 8
    described = struct.pack("@HP", length, ctypes.addressof(buffer))
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.syscall, number, 1, 1, described)  # a filter, for all threads
    return "filtered" if policy.get("network", True) else "filtered, no network"


def _filter(architecture: int, denied: list[int], socket: int | None) -> bytes:
    """A seccomp program: `denied` calls fail with EPERM, and so do sockets of any family but local ones."""
    load, equal, greater, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001
    checks = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    checks += [(greater, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 numbering of the same calls
    for call in denied:
        checks += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    if socket is not None:
        checks += [(equal, 0, 3, socket), (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, refuse)]
    checks.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *check) for check in checks)
