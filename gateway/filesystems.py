"""Calls to fsspec file systems with a time limit.

The libraries behind it try again for minutes by themselves, and a caller may not wait as long. Knows no
registry and no package.
"""

from __future__ import annotations

import errno
from typing import Any

import fsspec.asyn


def asked(files: Any, verb: str, seconds: float, *args: Any, **options: Any) -> Any:
    """`files.VERB(*args, **options)` of a file system, abandoned after `seconds`. One without a loop,
    which as a rule reaches no network, cannot be given up. Raises TimeoutError, and what the file system's
    library raises."""
    if not getattr(files, "async_impl", False):
        return getattr(files, verb)(*args, **options)
    try:
        return fsspec.asyn.sync(files.loop, getattr(files, f"_{verb}"), *args, timeout=seconds, **options)
    except fsspec.asyn.FSTimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer came within {seconds:.0f} s") from error
