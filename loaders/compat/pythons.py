"""Functions that this package uses and that Python 3.8 to 3.10 lack. Each does what the newer Python's does.

A model's process runs on the Python with which the model was made. Every module that such a process imports
is written for Python 3.8 (`X | Y` only in annotations), and imports newer functions from here.
"""

from __future__ import annotations

import array
import importlib.machinery
import os
import socket
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
elif sys.version_info >= (3, 10):
    from dataclasses import dataclass
else:
    import dataclasses

    def dataclass(cls: Any = None, *, slots: bool = False, **options: Any) -> Any:
        """`dataclasses.dataclass`, without `slots` (which only saves memory) where Python lacks it."""
        return dataclasses.dataclass(cls, **options)


if sys.version_info >= (3, 10):

    def zipped(*columns: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """`zip(…, strict=True)`. Raises ValueError if the lengths differ."""
        return zip(*columns, strict=True)

    def standard_library() -> frozenset[str]:
        """`sys.stdlib_module_names`."""
        return sys.stdlib_module_names

else:

    def zipped(*columns: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """`zip(…, strict=True)`. Raises ValueError if the lengths differ."""
        lists = [list(column) for column in columns]
        if len({len(items) for items in lists}) > 1:
            raise ValueError("zip() arguments differ in length")
        return zip(*lists)

    def standard_library() -> frozenset[str]:
        """Replaces `sys.stdlib_module_names`: lists the standard library's directories."""
        suffixes = tuple(importlib.machinery.all_suffixes())
        names = set(sys.builtin_module_names)
        root = sysconfig.get_path("stdlib")
        for place in (root, os.path.join(root, "lib-dynload")):
            for entry in os.listdir(place) if os.path.isdir(place) else ():
                name = entry.partition(".")[0]
                if name.isidentifier() and (entry.endswith(suffixes) or "." not in entry):
                    names.add(name)
        return frozenset(names)


def is_below(path: PurePath, root: PurePath) -> bool:
    """`path.is_relative_to(root)`."""
    return path == root or root in path.parents


def traced(error: BaseException) -> list[str]:
    """`traceback.format_exception(error)`."""
    return traceback.format_exception(type(error), error, error.__traceback__)


def exit_code(status: int) -> int:
    """`os.waitstatus_to_exitcode`: negative for a signal."""
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def union_types() -> tuple[Any, ...]:
    """The origins of unions: `Union[X, Y]`, and `X | Y` where Python has it."""
    import types
    import typing

    return (typing.Union, types.UnionType) if sys.version_info >= (3, 10) else (typing.Union,)


def send_descriptors(sock: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """`socket.send_fds`, which sends all data at once."""
    packed = array.array("i", descriptors)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])


def receive_descriptors(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """`socket.recv_fds`: the data and the descriptors; child processes do not inherit these."""
    space = socket.CMSG_LEN(most * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return data, list(found)
