"""The output of a model: reads a pipe continuously, and passes lines to the log at a bounded rate.

A slow log never blocks a model that prints, and a model cannot flood the log. A model that prints without end
is slowed down by its own full pipe. Must not know models; the caller gives the sink.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

Sink = Callable[[str], None]

_READ: Final = 1 << 16
_MAX_LINE: Final = 2_000
#: The cost of a line in addition to its own bytes: each line becomes a log record.
_PER_LINE: Final = 128
#: How much a pipe may hold: what is still in it at the end fits into so many reads.
_LAST_READS: Final = 16
_BURST: Final = 64 << 10
_PER_SECOND: Final = 16 << 10
_DRAINED_PER_SECOND: Final = 32 << 20


class Output:
    """The reading end of one process's output. `write_end` goes to the process and is then closed here."""

    def __init__(self, sink: Sink) -> None:
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._line = b""
        self._cut = False
        self._budget = float(_BURST)
        self._dropped = 0
        self._second = self._loop.time()
        self._drained = 0
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._read_end, self._read)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Reads the rest of the pipe and closes it."""
        if self._read_end < 0:
            return
        self.close_write_end()
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._read_end)
        for _ in range(_LAST_READS):
            if not self._take():
                break
        if self._line:
            self._emit(self._line)
        self._tell_dropped()
        os.close(self._read_end)
        self._read_end = -1

    def _read(self) -> None:
        if not self._take():
            return
        if self._drained > _DRAINED_PER_SECOND:
            self._loop.remove_reader(self._read_end)
            self._pause = self._loop.call_later(max(0.0, self._second + 1 - self._loop.time()), self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._drained = 0
        self._loop.add_reader(self._read_end, self._read)

    def _take(self) -> bool:
        """One read; False when there is nothing (more)."""
        try:
            data = os.read(self._read_end, _READ)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._read_end)
            return False
        now = self._loop.time()
        if now - self._second >= 1:
            self._budget = min(_BURST, self._budget + (now - self._second) * _PER_SECOND)
            self._second, self._drained = now, 0
            self._tell_dropped()
        self._drained += len(data)
        self._take_lines(self._line + data)
        return True

    def _take_lines(self, data: bytes) -> None:
        """Lines for the log as long as the budget lasts; what is more is not even taken apart."""
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            if self._budget < _PER_LINE:
                last = data.rfind(b"\n")
                self._dropped += last - at
                at, self._cut = last + 1, False
                break
            self._emit(data[at:end])
            at, self._cut = end + 1, False
        self._line = data[at:]
        if len(self._line) > _MAX_LINE:
            self._emit(self._line)
            self._line = b""
            self._cut = True  # what follows, up to the next end of a line, is more of the same

    def _emit(self, line: bytes) -> None:
        shown = b"" if self._cut else line[:_MAX_LINE]
        cost: float = len(shown) + _PER_LINE
        if self._budget < cost:
            shown, cost = b"", self._budget
        self._budget -= cost
        self._dropped += len(line) - len(shown)
        if text := shown.decode("utf-8", "replace").rstrip("\r"):
            self._sink(text)

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._sink(f"… {self._dropped} bytes of output were left out")
            self._dropped = 0
