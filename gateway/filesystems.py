"""Connections and calls to fsspec file systems with a time limit.

The libraries behind fsspec retry for minutes, or wait for ever: longer than a caller may wait. Must not know
registries or packages.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, Final, TypeVar

import fsspec
import fsspec.asyn

T = TypeVar("T")

#: A connection takes at most this long, in seconds. Some libraries are imported only then.
CONNECT_SECONDS: Final = 30.0
#: The most calls at a time, those that were abandoned and have not ended included. Each holds a thread.
MOST_CALLS: Final = 32
_CALLS: Final = threading.BoundedSemaphore(MOST_CALLS)


def connected(url: str, **options: Any) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it. Those of SFTP and FTP connect at once. Raises
    TimeoutError, and what fsspec and the file system's library raise."""
    if "::" not in url and not getattr(_class_of(url), "async_impl", False):
        # A thread cannot use another thread's connection, and connections break.
        options = {"skip_instance_cache": True, **options}
    connect: Callable[[], tuple[Any, str]] = partial(fsspec.core.url_to_fs, url, **options)
    return within(CONNECT_SECONDS, connect, "connection")


def asked(files: Any, verb: str, seconds: float, *args: Any, **options: Any) -> Any:
    """Calls `files.VERB(*args, **options)` of a file system, and abandons it after `seconds`. Raises
    TimeoutError, and what the file system's library raises."""
    if not getattr(files, "async_impl", False):
        return within(seconds, lambda: getattr(files, verb)(*args, **options))
    try:
        return fsspec.asyn.sync(files.loop, getattr(files, f"_{verb}"), *args, timeout=seconds, **options)
    except fsspec.asyn.FSTimeoutError as error:
        raise _late(seconds) from error


def within(seconds: float, call: Callable[[], T], what: str = "answer") -> T:
    """Returns what `call` returns. It runs in a thread of its own, which is abandoned after `seconds`; before
    that it waits as long for one of the others to end. Raises TimeoutError, and what `call` raises."""
    calls = _CALLS
    if not calls.acquire(timeout=seconds):
        why = f"{MOST_CALLS} earlier calls have not ended within {seconds:g} s"
        raise TimeoutError(errno.ETIMEDOUT, why)
    result: Future[T] = Future()
    context = copy_context()

    def run() -> None:
        try:
            result.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            result.set_exception(error)
        finally:
            calls.release()

    try:
        # A daemon: a call that never ends keeps no process alive.
        threading.Thread(target=run, name="fsspec", daemon=True).start()
    except RuntimeError:  # no more threads
        calls.release()
        raise
    try:
        return result.result(seconds)
    except TimeoutError as error:
        if result.done():  # it is the call's own, or it came just now
            return result.result()
        raise _late(seconds, what) from error


def _late(seconds: float, what: str = "answer") -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"no {what} within {seconds:g} s")


def _class_of(url: str) -> Any:
    return fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0])
