"""Bounds what a piece of work takes in memory, as Python's own allocator counts it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Fails if what is done inside takes more memory than this at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()
