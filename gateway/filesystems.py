"""Calls to fsspec file systems with a time limit.

The libraries behind fsspec retry for minutes, longer than a caller may wait. Must not know registries or
packages.
"""

from __future__ import annotations

import errno
from typing import Any

import fsspec.asyn


def asked(files: Any, verb: str, seconds: float, *args: Any, **options: Any) -> Any:
    """Calls `files.VERB(*args, **options)` of a file system, and abandons it after `seconds`. A file system
    without an event loop, which usually uses no network, has no limit. Raises TimeoutError, and what the file
    system's library raises."""
    if not getattr(files, "async_impl", False):
        return getattr(files, verb)(*args, **options)
    try:
        return fsspec.asyn.sync(files.loop, getattr(files, f"_{verb}"), *args, timeout=seconds, **options)
    except fsspec.asyn.FSTimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s") from error
