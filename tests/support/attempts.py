"""What a hostile model may try against the gateway, its zygote and its siblings: one model that makes the
attempt named in its input.

An attempt is refused (it raises) or pretends to succeed; `Victims` sees whether it had an effect.
"""

from __future__ import annotations

import json
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.batch import Tensors
from loaders.package import Package
from loaders.worker import syscalls
from tests.support.hostile import write_package

REFUSED, PRETENDED, ANY = "refused", "pretended", "any"

# Name: (what must come of it, the lines). The lines know GATEWAY, ZYGOTE, SIBLINGS (process ids), VICTIM (a
# file of the gateway that this user may write), call(NAME, …) for a raw system call, and ALL that of them.
ATTEMPTS: dict[str, tuple[str, str]] = {
    # other processes
    "lower the gateway's limits": (REFUSED, "resource.prlimit(GATEWAY, resource.RLIMIT_NOFILE, (8, 8))"),
    "lower a sibling's limits": (REFUSED, "resource.prlimit(SIBLINGS[0], resource.RLIMIT_CPU, (1, 1))"),
    "lower its zygote's limits": (REFUSED, "resource.prlimit(ZYGOTE, resource.RLIMIT_NPROC, (0, 0))"),
    "slow the gateway down": (REFUSED, "os.setpriority(os.PRIO_PROCESS, GATEWAY, 19)"),
    "slow a group down": (REFUSED, "os.setpriority(os.PRIO_PGRP, os.getpgid(GATEWAY), 19)"),
    "slow a user down": (REFUSED, "os.setpriority(os.PRIO_USER, 0, 19)"),
    "pin the gateway to one processor": (PRETENDED, "os.sched_setaffinity(GATEWAY, {0})"),
    "schedule the gateway last": (
        REFUSED, "os.sched_setscheduler(GATEWAY, os.SCHED_IDLE, os.sched_param(0))",
    ),
    "schedule by parameter": (REFUSED, "os.sched_setparam(GATEWAY, os.sched_param(0))"),
    "schedule by attributes": (REFUSED, "call('sched_setattr', GATEWAY, bytes([48] + [0] * 47), 0)"),
    "starve the gateway of input and output": (REFUSED, "call('ioprio_set', 1, GATEWAY, 3 << 13)"),
    "starve a user of input and output": (REFUSED, "call('ioprio_set', 3, os.getuid(), 3 << 13)"),
    "signal the gateway": (REFUSED, "os.kill(GATEWAY, signal.SIGWINCH)"),
    "kill its zygote": (REFUSED, "os.kill(ZYGOTE, signal.SIGKILL)"),
    "kill a sibling": (REFUSED, "os.kill(SIBLINGS[0], signal.SIGKILL)"),
    "kill everybody": (REFUSED, "os.kill(-1, signal.SIGKILL)"),
    "kill the gateway's group": (REFUSED, "os.killpg(os.getpgid(GATEWAY), signal.SIGKILL)"),
    "kill the zygote's group": (REFUSED, "os.killpg(os.getpgid(ZYGOTE), signal.SIGKILL)"),
    "kill a thread of the gateway": (REFUSED, "call('tgkill', GATEWAY, GATEWAY, 9)"),
    "kill a thread of any process": (REFUSED, "call('tkill', GATEWAY, 9)"),
    "queue a signal": (REFUSED, "call('rt_sigqueueinfo', GATEWAY, 9, bytes(128))"),
    "signal by descriptor": (
        REFUSED, "signal.pidfd_send_signal(os.pidfd_open(SIBLINGS[0]), signal.SIGKILL)",
    ),
    "have the kernel signal the gateway": (
        REFUSED,
        "r, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, GATEWAY)\nfcntl.fcntl(r, 10, signal.SIGKILL)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    ),
    "have the kernel signal a group": (
        REFUSED,
        "a, b = socket.socketpair()\nfcntl.ioctl(a, 0x8901, struct.pack('i', GATEWAY))\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\nb.send(b'x')",
    ),
    "trace the gateway": (REFUSED, "call('ptrace', 16, GATEWAY, 0, 0)"),
    "trace a sibling": (REFUSED, "call('ptrace', 16, SIBLINGS[0], 0, 0)"),
    "read the gateway's memory": (REFUSED, "open(f'/proc/{GATEWAY}/mem', 'rb').read(1)"),
    "read a sibling's environment": (REFUSED, "open(f'/proc/{SIBLINGS[0]}/environ', 'rb').read()"),
    "see the gateway's descriptors": (REFUSED, "os.readlink(f'/proc/{GATEWAY}/fd/0')"),
    "write another's memory": (REFUSED, "call('process_vm_writev', SIBLINGS[0], 0, 0, 0, 0, 0)"),
    "read another's memory": (REFUSED, "call('process_vm_readv', SIBLINGS[0], 0, 0, 0, 0, 0)"),
    "take a descriptor of another": (REFUSED, "call('pidfd_getfd', os.pidfd_open(SIBLINGS[0]), 1, 0)"),
    "compare what processes share": (REFUSED, "call('kcmp', GATEWAY, os.getpid(), 0, 0, 0)"),
    "advise on another's memory": (REFUSED, "call('process_madvise', os.pidfd_open(ZYGOTE), 0, 0, 21, 0)"),
    "move another's pages": (REFUSED, "call('migrate_pages', SIBLINGS[0], 64, bytes(8), bytes(8))"),
    "make the gateway the kernel's victim": (
        REFUSED, "open(f'/proc/{GATEWAY}/oom_score_adj', 'w').write('1000')",
    ),
    # files
    "change a mode": (PRETENDED, "os.chmod(VICTIM, 0o644)"),
    "change a mode by descriptor": (PRETENDED, "os.fchmod(os.open('.', os.O_RDONLY), 0)"),
    "change a mode at a place": (PRETENDED, "call('fchmodat', -100, VICTIM.encode(), 0)"),
    "change a mode the newest way": (ANY, "call('fchmodat2', -100, VICTIM.encode(), 0, 0)"),
    "close the state to everybody": (PRETENDED, "os.chmod(os.path.dirname(VICTIM), 0)"),
    "close its package": (PRETENDED, "os.chmod(os.path.dirname(os.path.abspath(__file__)), 0)"),
    "change a time": (PRETENDED, "os.utime(VICTIM, (1, 1))"),
    "set an attribute": (REFUSED, "os.setxattr(VICTIM, 'user.x', b'1')"),
    "remove an attribute": (REFUSED, "os.removexattr(VICTIM, 'user.kept')"),
    "set the flags of its package": (
        REFUSED, "fcntl.ioctl(os.open(__file__, os.O_RDONLY), 0x40086602, struct.pack('i', 0x40))",
    ),
    "set the extended flags of its package": (
        REFUSED,
        "f = os.open(os.path.dirname(__file__), os.O_RDONLY)\nold = fcntl.ioctl(f, 0x801c581f, bytes(28))\n"
        "fcntl.ioctl(f, 0x401c5820, old)",
    ),
    "seal its package": (
        REFUSED,
        "f = os.open(__file__, os.O_RDONLY)\n"
        "fcntl.ioctl(f, 0x40806685, struct.pack('III', 1, 1, 4096) + bytes(116))",
    ),
    "cut a file that it opens for reading": (REFUSED, "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)"),
    "cut a file that it opens for nothing": (REFUSED, "os.open(VICTIM, 3 | os.O_TRUNC)"),
    "give a file away": (REFUSED, "os.chown(VICTIM, os.getuid(), os.getgid())"),
    "give a directory away": (REFUSED, "os.lchown(os.path.dirname(VICTIM), os.getuid(), os.getgid())"),
    "read a secret": (REFUSED, "open(VICTIM).read()"),
    "write a secret": (REFUSED, "open(VICTIM, 'a').write('x')"),
    "cut a file": (REFUSED, "os.truncate(VICTIM, 0)"),
    "move a file": (REFUSED, "os.rename(VICTIM, VICTIM + '.old')"),
    "link a file into its own directory": (REFUSED, "os.link(VICTIM, 'mine')"),
    "remove a file": (REFUSED, "os.unlink(VICTIM)"),
    "list the state": (REFUSED, "os.listdir(os.path.dirname(VICTIM))"),
    "watch the state": (REFUSED, "call('inotify_add_watch', call('inotify_init1', 0), "
                                 "os.path.dirname(VICTIM).encode(), 0xfff)"),
    "watch everything": (REFUSED, "call('fanotify_init', 0x200, 0)"),
    "hold up who opens its package": (
        REFUSED, "fcntl.fcntl(open(__file__), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    ),
    "write into its package": (REFUSED, "open(__file__, 'a').write('x')"),
    "leave a pipe where the gateway looks": (REFUSED, "os.mkfifo(VICTIM + '.pipe')"),
    "change the kernel's settings": (REFUSED, "open('/proc/sys/kernel/core_pattern', 'w').write('core')"),
    "change its control group": (REFUSED, "open('/sys/fs/cgroup/memory/x', 'w')"),
    "list the siblings' directories": (REFUSED, "os.listdir('..')"),
    # memory that belongs to no process
    "make System V shared memory": (REFUSED, "call('shmget', 0, 1 << 20, 0o1600)"),
    "attach to shared memory": (REFUSED, "call('shmat', 0, 0, 0)"),
    "remove shared memory": (REFUSED, "call('shmctl', 0, 0, 0)"),
    "make a System V semaphore": (REFUSED, "call('semget', 0, 1, 0o1600)"),
    "make a System V queue": (REFUSED, "call('msgget', 0, 0o1600)"),
    "make a POSIX queue": (REFUSED, "call('mq_open', b'x', 0o102, 0o600, 0)"),
    "make memory without a name": (REFUSED, "os.memfd_create('x')"),
    "find a sibling's shared memory": (REFUSED, "open('/dev/shm/of-another').read()"),
    # the kernel
    "make a user namespace by clone": (REFUSED, "call('clone', 0x10000000 | 17, 0, 0, 0, 0)"),
    "make a mount namespace by clone": (REFUSED, "call('clone', 0x20000 | 17, 0, 0, 0, 0)"),
    "make a process namespace by clone": (REFUSED, "call('clone', 0x20000000 | 17, 0, 0, 0, 0)"),
    "make a namespace by clone3": (
        REFUSED, "call('clone3', struct.pack('QQQQQQQQ', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)",
    ),
    "make a sibling by clone": (REFUSED, "call('clone', 0x8000 | 17, 0, 0, 0, 0)"),
    "make a user namespace": (REFUSED, "call('unshare', 0x10000000)"),
    "enter a namespace": (REFUSED, "call('setns', os.pidfd_open(GATEWAY), 0x10000000)"),
    "mount": (REFUSED, "call('mount', b'none', b'/tmp', b'tmpfs', 0, 0)"),
    "mount the newest way": (REFUSED, "call('fsopen', b'tmpfs', 0)"),
    "change its root": (REFUSED, "call('chroot', b'/')"),
    "use io_uring": (REFUSED, "call('io_uring_setup', 8, bytes(120))"),
    "handle faults itself": (REFUSED, "call('userfaultfd', 1)"),
    "load a program into the kernel": (REFUSED, "call('bpf', 0, bytes(48), 48)"),
    "measure others": (REFUSED, "call('perf_event_open', bytes(112), GATEWAY, -1, -1, 0)"),
    "keep a key in the kernel": (REFUSED, "call('add_key', b'user', b'x', b'y', 1, -4)"),
    "read the kernel's log": (REFUSED, "call('syslog', 3, bytes(100), 100)"),
    "open by handle": (REFUSED, "call('open_by_handle_at', 3, bytes(16), 0)"),
    "take a raw socket": (REFUSED, "socket.socket(17, socket.SOCK_RAW)"),
    "talk to the host": (REFUSED, "socket.socket(40, socket.SOCK_STREAM)"),
    "use the kernel's ciphers": (REFUSED, "socket.socket(38, socket.SOCK_SEQPACKET)"),
    "let its orphans go": (REFUSED, "call('prctl', 36, 0, 0, 0, 0)"),
    "leave its process group": (
        PRETENDED, "os.setpgid(0, os.getpgid(ZYGOTE))\nassert os.getpgid(0) == os.getpid()",
    ),
    "leave its session": (
        PRETENDED,
        "pid = os.fork()\nif pid == 0:\n    os.setsid()\n"
        "    os._exit(int(os.getpgid(0) != os.getppid()))\nassert os.waitpid(pid, 0)[1] == 0",
    ),
}  # fmt: skip

_HELPERS = """
import ctypes, fcntl, json, resource, signal, socket, struct
import numpy as np
_LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = json.loads({numbers!r})
ATTEMPTS = json.loads({attempts!r})
VICTIM = {victim!r}

def call(name, *arguments):
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _LIBC.syscall(ctypes.c_long(NUMBERS[name]), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    if result == 0 and name in ("clone", "clone3"):
        os._exit(0)
    return result

def _parent(pid):
    with open(f"/proc/{{pid}}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])

def _name(data):
    while isinstance(data, dict):
        data = next(iter(data.values()))
    return str(np.asarray(data).ravel()[0])

def attempt(name):
    zygote = os.getppid()
    others = [int(p) for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]
    siblings = []
    for pid in others:
        try:
            if _parent(_parent(pid)) == _parent(zygote):
                siblings.append(pid)
        except OSError:
            pass
    known = dict(globals(), ZYGOTE=zygote, GATEWAY=_parent(zygote), SIBLINGS=siblings)
    try:
        exec(ATTEMPTS[name], known)
    except (OSError, PermissionError) as error:
        return f"refused: {{error}}"
    return "done"
"""


def write_attempts(directory: Path, victim: str) -> Package:
    """Writes a package that makes the attempt named in its input. `victim`: the path of a file."""
    column = syscalls.ARCHITECTURES[platform.machine()][0]
    numbers = {name: found[column] for name, found in syscalls._NUMBERS.items()}
    numbers["inotify_init1"] = (294, 26)[column]
    lines = _HELPERS.format(
        numbers=json.dumps(numbers),
        attempts=json.dumps({name: code for name, (_, code) in ATTEMPTS.items()}),
        victim=victim,
    )
    return write_package(directory, at_import=lines, at_predict="return [attempt(_name(data))]")


def asked(name: str) -> Tensors:
    return Tensors({"": np.array([name])}, 1)


def is_as_it_must(name: str, outcome: str) -> bool:
    wanted = ATTEMPTS[name][0]
    return wanted == ANY or outcome.startswith("refused") == (wanted == REFUSED)


@dataclass
class Victims:
    """Processes and files that an attempt must not change."""

    pids: tuple[int, ...]
    paths: tuple[str, ...]

    def state(self) -> dict[str, object]:
        """Everything about them that an attempt could have changed."""
        found: dict[str, object] = {}
        for pid in self.pids:
            limits = (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_NPROC)
            found[f"process {pid}"] = (
                [resource.prlimit(pid, limit) for limit in limits],
                os.getpriority(os.PRIO_PROCESS, pid),
                sorted(os.sched_getaffinity(pid)),
                os.sched_getscheduler(pid),
                os.getpgid(pid),
                Path(f"/proc/{pid}/oom_score_adj").read_text(),
            )
        for path in self.paths:
            seen = os.stat(path)
            found[path] = (
                seen.st_mode, seen.st_uid, seen.st_gid, seen.st_size, seen.st_mtime_ns, seen.st_ino,
                sorted(os.listxattr(path)), sorted(os.listdir(path)) if os.path.isdir(path) else (),
            )  # fmt: skip
        return found
