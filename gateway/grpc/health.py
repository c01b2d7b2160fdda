"""`grpc.health.v1`: tells balancers and probes whether the gateway can take traffic.

Source: https://grpc.io/docs/guides/health-checking/. Knows readiness; must not know models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2

from gateway.errors import Problem
from gateway.grpc import statuses

if TYPE_CHECKING:
    from gateway.grpc.arrivals import Arrivals

#: Seconds between two checks of a watched status.
INTERVAL: Final = 1.0

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health service. `services`: the known names; the empty name means the whole gateway. `drained`: set
    when the gateway stops. `arrivals` receives the messages."""

    def __init__(
        self,
        ready: Callable[[], bool],
        services: frozenset[str],
        drained: asyncio.Event,
        arrivals: Arrivals,
    ) -> None:
        self._arrivals = arrivals
        self._ready = ready
        self._services = services
        self._drained = drained

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the handler to add to a server."""
        serialized = {
            "request_deserializer": health_pb2.HealthCheckRequest.FromString,
            "response_serializer": health_pb2.HealthCheckResponse.SerializeToString,
        }
        methods = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, **serialized),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, **serialized),
        }
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods)

    async def _request(self, messages: AsyncIterator[Any], context: Any) -> Any:
        """The request of a call, which is received as that of a stream: see `calls.Calls.unary`."""
        try:
            request = await self._arrivals.next(messages)
        except Problem as problem:
            await context.abort(statuses.code(problem), statuses.text(problem))
        return health_pb2.HealthCheckRequest() if request is None else request

    async def _check(self, messages: AsyncIterator[Any], context: Any) -> Any:
        request = await self._request(messages, context)
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no service of this name")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def _watch(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Yields the current status, and each change; ends when the gateway stops."""
        request = await self._request(messages, context)
        said = None
        while True:
            status = self._status(request.service)
            if status != said:
                yield health_pb2.HealthCheckResponse(status=status)
                said = status
            if self._drained.is_set():
                return
            try:
                async with asyncio.timeout(INTERVAL):
                    await self._drained.wait()
            except TimeoutError:
                continue

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._ready() else _NOT_SERVING
