"""Ends an HTTP call at its deadline. A server may send so slowly, its headers too, that no read times out.

Works for httpx clients that open a connection for each call. Must not know what is called.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any


class Deadline:
    """A context that lasts for one call. Give `trace` to the call as its extension `trace`. `connected` is
    called with each new network stream; if it raises, the stream is closed. `passed`: the call was ended."""

    def __init__(self, seconds: float, connected: Callable[[Any], None] = lambda stream: None) -> None:
        self.passed = False
        self._connected = connected
        self._streams: list[Any] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event not in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            return
        stream = info["return_value"]
        self._streams.append(stream)
        try:
            self._connected(stream)
        except BaseException:
            stream.close()
            raise
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        with contextlib.suppress(OSError, IndexError):
            self._streams[-1].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
