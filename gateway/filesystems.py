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
#: The most calls that were abandoned and have not ended. Each holds a thread, so no more begin then.
MOST_HANGING: Final = 32
_HANGING: Final = threading.BoundedSemaphore(MOST_HANGING)


def connected(url: str, **options: Any) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it. Those of SFTP and FTP connect at once. Raises
    TimeoutError, and what fsspec and the file system's library raise."""
    if "::" not in url and not getattr(_class_of(url), "async_impl", False):
        # Its connection is of one thread, and breaks. One with an event loop is shared.
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
    """Returns what `call` returns. It runs in a thread of its own, which is abandoned after `seconds`. Raises
    TimeoutError, and what `call` raises."""
    if not _HANGING.acquire(blocking=False):
        raise TimeoutError(errno.ETIMEDOUT, f"{MOST_HANGING} earlier calls hang and have not ended")
    result: Future[T] = Future()
    context = copy_context()

    def run() -> None:
        try:
            result.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            result.set_exception(error)
        finally:
            _HANGING.release()

    # A daemon: a call that never ends keeps no process alive.
    threading.Thread(target=run, name="fsspec", daemon=True).start()
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
