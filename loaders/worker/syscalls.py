"""The system calls that a model process may make: a table of rules, and the seccomp program made from it.

A rule refuses a call always, or for some values of one argument. Some calls only pretend to succeed, because
libraries make them routinely and stop if they fail. The kernel applies the program to every process that the
model starts. Must not know models or the gateway. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

_PR_SET_NO_NEW_PRIVS: Final = 38
_PRETEND: Final = 0
"""Error number 0: the call returns 0 and does nothing."""

ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
"""By machine: the column of the table, the kernel's name, and the number of `seccomp`."""

_NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280),
    "chmod": (90, None), "chown": (92, None), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435), "delete_module": (176, 106),
    "fanotify_init": (300, 262), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "fchownat": (260, 54), "fcntl": (72, 25), "file_setattr": (469, 469),
    "finit_module": (313, 273), "fremovexattr": (199, 16), "fsconfig": (431, 431), "fsetxattr": (190, 7),
    "fsmount": (432, 432), "fsopen": (430, 430), "fspick": (433, 433), "futimesat": (261, None),
    "init_module": (175, 105), "inotify_add_watch": (254, 27), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioctl": (16, 29), "ioperm": (173, None),
    "iopl": (172, None), "ioprio_set": (251, 30), "kcmp": (312, 272), "kexec_file_load": (320, 294),
    "kexec_load": (246, 104), "keyctl": (250, 219), "kill": (62, 129), "lchown": (94, None),
    "lremovexattr": (198, 15), "lsetxattr": (189, 6), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "migrate_pages": (256, 238), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "move_pages": (279, 239), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "msgctl": (71, 187), "msgget": (68, 186), "msgrcv": (70, 188), "msgsnd": (69, 189),
    "open": (2, None), "open_by_handle_at": (304, 265), "openat": (257, 56), "openat2": (437, 437),
    "open_tree": (428, 428), "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41), "prctl": (157, 167), "prlimit64": (302, 261), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "removexattr": (197, 14), "removexattrat": (466, 466), "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "semctl": (66, 191), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192),
    "setdomainname": (171, 162), "sethostname": (170, 161), "setns": (308, 268), "setpgid": (109, 154),
    "setpriority": (141, 140), "setsid": (112, 157), "settimeofday": (164, 170), "setxattr": (188, 5),
    "setxattrat": (463, 463), "shmat": (30, 196), "shmctl": (31, 195), "shmget": (29, 194),
    "socket": (41, 198), "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116),
    "tgkill": (234, 131), "tkill": (200, 130), "truncate": (76, 45), "umount2": (166, 39),
    "unshare": (272, 97), "userfaultfd": (323, 282), "utime": (132, None), "utimensat": (280, 88),
    "utimes": (235, None), "vhangup": (153, 58),
}  # fmt: skip

_REACH_OTHERS: Final = (
    "kcmp", "migrate_pages", "move_pages", "pidfd_getfd", "process_madvise", "process_mrelease",
    "process_vm_readv", "process_vm_writev", "ptrace",
)  # fmt: skip
_CHANGE_THE_KERNEL: Final = (
    "acct", "add_key", "adjtimex", "bpf", "chroot", "clock_adjtime", "clock_settime", "delete_module",
    "fanotify_init", "finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "init_module",
    "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kexec_file_load",
    "kexec_load", "keyctl", "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree",
    "open_tree_attr", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd", "reboot", "request_key",
    "setdomainname", "sethostname", "setns", "settimeofday", "swapoff", "swapon", "syslog", "umount2",
    "unshare", "userfaultfd", "vhangup",
)  # fmt: skip
# Resources shared by all processes of a machine or user, counted for no process, which outlive processes.
_SHARED_MEMORY: Final = (
    "memfd_create", "memfd_secret", "mq_open", "mq_unlink", "msgctl", "msgget", "msgrcv", "msgsnd", "semctl",
    "semget", "semop", "semtimedop", "shmat", "shmctl", "shmget",
)  # fmt: skip
_OWNERS: Final = ("chown", "fchown", "fchownat", "file_setattr", "lchown")
_ATTRIBUTES: Final = (
    "fremovexattr", "fsetxattr", "lremovexattr", "lsetxattr", "removexattr", "removexattrat", "setxattr",
    "setxattrat",
)  # fmt: skip
_MODES_AND_TIMES: Final = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "futimesat", "utime", "utimensat", "utimes",
)  # fmt: skip
_SIGNALS: Final = (  # call, argument with the process, argument with the signal
    ("kill", 0, 1), ("tkill", 0, 1), ("tgkill", 0, 2), ("rt_sigqueueinfo", 0, 1), ("rt_tgsigqueueinfo", 0, 2),
)  # fmt: skip

# clone: a new namespace of any kind, a sibling instead of a child, a child that is traced.
_CLONE_FLAGS: Final = 0x7E020000 | 0x8000 | 0x2000
# fcntl: F_SETOWN, F_SETSIG and F_SETOWN_EX make the kernel send signals to others; a lease (F_SETLEASE)
# delays every process that opens the file; F_NOTIFY watches directories.
_FCNTL: Final = (8, 10, 15, 1024, 1026)
# ioctl: the owner of a socket or file (FIOSETOWN, SIOCSPGRP), typing into a terminal (TIOCSTI, TIOCLINUX).
_IOCTL: Final = (0x8901, 0x8902, 0x5412, 0x541C)
# ioctl: flags, generation, project and verity of a file, which its owner can set without opening it to write.
_FILE_IOCTL: Final = (0x40086602, 0x40046602, 0x40087602, 0x40047602, 0x401C5820, 0x40806685)
# open: O_TRUNC without an access mode that writes, and the mask of these bits.
_CUTS: Final = (0x200, 0x203)
_CUTS_AND_MODE: Final = 0x203
# prctl: orphans must stay with their model; core scheduling names other processes.
_PRCTL: Final = (36, 62)
_FAMILIES: Final = (1, 2, 10, 16)  # local, IPv4, IPv6, and netlink, which resolvers query for addresses
_LOCAL_FAMILIES: Final = (1,)
_PRIO_PROCESS: Final = 0
_IOPRIO_PROCESS: Final = 1


class Rule(NamedTuple):
    """Refuses `call` with `error`. If `argument` is None: always. Otherwise: if that argument (its low 32
    bits) is one of `values`, or none of them (`others`), or has one of the bits of `mask`. `within`: only
    these bits are compared. `unless`: an argument and its value for which the rule does not apply."""

    call: str
    error: int
    argument: int | None = None
    values: tuple[int, ...] = ()
    others: bool = False
    mask: int = 0
    within: int = 0
    unless: tuple[int, int] | None = None


def rules(*, shared_user: bool, signals: bool, network: bool, cuts: bool = False) -> list[Rule]:
    """Returns the rules for this process. `shared_user`: the gateway or another model runs as the same user,
    so modes, times and attributes of files must not be changed. `signals`, `cuts`: the kernel has no other
    means against signals to other processes, or against truncating files without the right to write."""
    own = (0, os.getpid())
    found = [Rule(call, errno.EPERM) for call in (*_REACH_OTHERS, *_CHANGE_THE_KERNEL, *_SHARED_MEMORY)]
    found += [
        Rule("clone", errno.EPERM, 0, mask=_CLONE_FLAGS),
        # Landlock allows watching a directory that may not be listed.
        Rule("inotify_add_watch", errno.EPERM),
        # The flags of clone3 are in memory that a filter cannot read. Libraries fall back to clone.
        Rule("clone3", errno.ENOSYS),
        Rule("prlimit64", errno.EPERM, 0, own, others=True),
        Rule("sched_setparam", errno.EPERM, 0, own, others=True),
        Rule("sched_setscheduler", errno.EPERM, 0, own, others=True),
        Rule("sched_setattr", errno.EPERM, 0, own, others=True),
        # Thread pools pin each thread by its id, and log an error for each failure.
        Rule("sched_setaffinity", _PRETEND, 0, own, others=True),
        Rule("setpriority", errno.EPERM, 0, (_PRIO_PROCESS,), others=True),
        Rule("setpriority", errno.EPERM, 1, own, others=True),
        Rule("ioprio_set", errno.EPERM, 0, (_IOPRIO_PROCESS,), others=True),
        Rule("ioprio_set", errno.EPERM, 1, own, others=True),
        # All children of a model stay in its process group, so that they are counted and ended with the
        # model.
        Rule("setsid", _PRETEND),
        Rule("setpgid", _PRETEND),
        Rule("kill", errno.EPERM, 0, (-1, -os.getpid())),
        Rule("prctl", errno.EPERM, 0, _PRCTL),
        Rule("fcntl", errno.EPERM, 1, _FCNTL),
        Rule("ioctl", errno.EPERM, 1, _IOCTL),
        Rule("socket", errno.EPERM, 0, _FAMILIES if network else _LOCAL_FAMILIES, others=True),
    ]
    if shared_user:
        found += [Rule(call, _PRETEND) for call in _MODES_AND_TIMES]
        found += [Rule(call, errno.EPERM) for call in _OWNERS]
        found += [Rule(call, errno.EOPNOTSUPP) for call in _ATTRIBUTES]
        found.append(Rule("ioctl", errno.EOPNOTSUPP, 1, _FILE_IOCTL))
    if cuts:
        found += [
            Rule("truncate", errno.EPERM),
            Rule("open", errno.EPERM, 1, _CUTS, within=_CUTS_AND_MODE),
            Rule("openat", errno.EPERM, 2, _CUTS, within=_CUTS_AND_MODE),
            # The flags are in memory that a filter cannot read. Libraries fall back to openat.
            Rule("openat2", errno.ENOSYS),
        ]
    if signals:
        found += [
            Rule(call, errno.EPERM, who, own, others=True, unless=(what, 0)) for call, who, what in _SIGNALS
        ]
        found.append(Rule("pidfd_send_signal", errno.EPERM))
    return found


def network_rules(*, network: bool) -> list[Rule]:
    """Returns the rules if only the network is filtered."""
    return [] if network else [Rule("socket", errno.EPERM, 0, _LOCAL_FAMILIES, others=True)]


def apply(libc: Any, wanted: Sequence[Rule]) -> str | None:
    """Makes the kernel enforce the rules for this process and its children. Returns None, or the reason why
    it is not possible. Raises OSError."""
    if platform.machine() not in ARCHITECTURES:
        return f"no table of system calls for {platform.machine()}"
    column, architecture, number = ARCHITECTURES[platform.machine()]
    program = assemble(wanted, column, architecture)
    buffer = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    zero = ctypes.c_long(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_long(1), zero, zero, zero) < 0:
        raise OSError(ctypes.get_errno(), "")
    every_thread = ctypes.c_long(1)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(1), every_thread, described) < 0:
        raise OSError(ctypes.get_errno(), "")
    return None


_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def assemble(wanted: Sequence[Rule], column: int, architecture: int) -> bytes:
    """Returns the program. A call that no rule refuses is allowed. Calls of another architecture or numbering
    (x32) fail, because the table does not apply to them."""
    refuse = (_GIVE, 0, 0, _REFUSE | errno.EPERM)
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), refuse,
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 0x40000000), refuse,
    ]  # fmt: skip
    for rule in wanted:
        call = _NUMBERS[rule.call][column]
        if call is None:
            continue
        body = _body(rule)
        if rule.argument is not None:
            body.append((_LOAD, 0, 0, 0))  # load the number again for the following rules
        steps += [(_EQUAL, 0, len(body), call), *body]
    steps.append((_GIVE, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _body(rule: Rule) -> list[tuple[int, int, int, int]]:
    """Returns the instructions of a rule, which refuse the call or fall through."""
    refuse = (_GIVE, 0, 0, _REFUSE | rule.error)
    if rule.argument is None:
        return [refuse]
    test: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, 16 + 8 * rule.argument)]
    if rule.within:
        test.append((_AND, 0, 0, rule.within))
    if rule.mask:
        test += [(_ANY_BIT, 0, 1, rule.mask), refuse]
    elif rule.others:
        left = len(rule.values)
        for value in rule.values:
            test.append((_EQUAL, left, 0, value & 0xFFFFFFFF))
            left -= 1
        test.append(refuse)
    else:
        for value in rule.values:
            test += [(_EQUAL, 0, 1, value & 0xFFFFFFFF), refuse]
    if rule.unless is not None:
        argument, value = rule.unless
        test = [(_LOAD, 0, 0, 16 + 8 * argument), (_EQUAL, len(test), 0, value), *test]
    return test
