"""Counts calls of functions in this thread. From Python 3.12 on, `cProfile` counts those of all threads."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: What functions in C count as.
IN_C = "C"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls by file while the block runs. Finalizers of what other tests left do not count."""
    found: Counter[str] = Counter()

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found[frame.f_code.co_filename] += 1
        elif event == "c_call":
            found[IN_C] += 1

    gc.collect()
    gc.disable()
    try:
        sys.setprofile(seen)
        yield found
    finally:
        sys.setprofile(None)
        gc.enable()
