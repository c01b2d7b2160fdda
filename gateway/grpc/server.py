"""The gRPC server: its port, limits and shutdown.

Knows sockets and channel options; receives the services as arguments. Must not call models.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

# The gateway starts programs, but never forks. Without this, gRPC's fork handlers would run at each start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
import grpc.aio

from gateway.grpc.arrivals import Arrivals
from gateway.grpc.calls import Call, Calls
from gateway.grpc.health import Health
from gateway.grpc.inference import SERVICE, OpenInference, refused, streamed
from gateway.http.connections import SLOWEST, default_most

if TYPE_CHECKING:
    from gateway.http.parts import Parts

_STREAM: Final = "ModelStreamInfer"
#: Seconds without traffic after which a connection is pinged; it is closed without an answer.
PING_AFTER: Final = 60
PING_TIMEOUT: Final = 20
#: Minimum seconds between two pings of a client.
PING_ALLOWED: Final = 10
#: Maximum concurrent calls of a connection. Further calls wait in the client.
STREAMS: Final = 100
#: A compressed message could expand to any size before its length is checked, so none is accepted.
_IDENTITY_ONLY: Final = 1


class RpcServer:
    """The server. Create it on its event loop. Its limits of connections and of concurrent calls equal HTTP's
    limit of connections. A message counts towards `max_inflight_bytes` once it is complete, because gRPC does
    not show it before; unfinished messages of calls take as much at most, and those of streams twice as
    much."""

    def __init__(self, parts: Parts) -> None:
        settings = parts.settings
        self._drained = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._host = settings.host
        self._port = settings.grpc_port or 0
        most = settings.max_connections or default_most()
        options: list[tuple[str, int]] = [
            ("grpc.max_allowed_incoming_connections", most),
            ("grpc.max_concurrent_streams", STREAMS),
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
            ("grpc.http2.bdp_probe", 0),  # else a call that waits for its turn may send megabytes
            ("grpc.so_reuseport", 0),  # a port in use is an error
            ("grpc.keepalive_time_ms", PING_AFTER * 1000),
            ("grpc.keepalive_timeout_ms", PING_TIMEOUT * 1000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_ALLOWED * 1000),
            ("grpc.max_connection_idle_ms", int(settings.keep_alive * 1000)),
        ]
        if settings.max_connection_age is not None:
            options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)))
            options.append(("grpc.max_connection_age_grace_ms", int(settings.drain_timeout * 1000)))
        self._server: Any = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
        inference = OpenInference(parts)
        bodies = max(1, settings.max_inflight_bytes // settings.max_body_bytes)
        longest = settings.send_timeout + settings.max_body_bytes / SLOWEST
        arrivals = Arrivals(bodies, longest)
        calls = Calls(parts, SERVICE, self._drained, arrivals, Arrivals(2 * bodies))
        methods: dict[str, Any] = {
            name: grpc.stream_unary_rpc_method_handler(calls.unary(name, work))
            for name, work in inference.methods.items()
        }

        async def in_stream(body: bytes, call: Call) -> bytes:
            return streamed(await inference.infer(body, call))

        methods[_STREAM] = grpc.stream_stream_rpc_method_handler(calls.stream(_STREAM, in_stream, refused))

        def ready() -> bool:
            return parts.views.ready().ready and not parts.draining()

        health = Health(ready, frozenset({"", SERVICE}), self._drained, arrivals)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, methods), health.handler)
        )

    async def start(self) -> str:
        """Listens; returns the address. Raises OSError if the port is not available."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._port}")
        except RuntimeError:
            raise OSError(f"cannot listen on {host}:{self._port} (grpc_port)") from None
        await self._server.start()
        return f"{host}:{port}"

    def drain(self, patience: float) -> None:
        """Refuses new calls. Calls in flight have `patience` seconds to end, counted from the first call of
        this method."""
        self._drained.set()
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._server.stop(patience))

    async def close(self, patience: float | None = None) -> None:
        """Stops the server after the calls in flight have ended, at most after `patience` seconds. None:
        now."""
        if patience is None:
            self._drained.set()
            await self._server.stop(None)
            return
        self.drain(patience)
        assert self._stopping is not None
        await self._stopping
