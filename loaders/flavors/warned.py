"""Blocks of code in which warnings are recorded or ignored.

All threads of a process share the filters of warnings. If two threads leave their blocks of
`warnings.catch_warnings` in the order in which they entered, the process keeps the filters and the list of
one of them. So only one thread at a time is in such a block of this package.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_TURN: Final = threading.RLock()


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    """Records all warnings in the `with` block, and shows none."""
    # Record warnings instead of raising them: other threads may warn now.
    with _TURN, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


@contextmanager
def ignored(category: type[Warning]) -> Iterator[None]:
    """Ignores the warnings of one category in the `with` block."""
    with _TURN, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
