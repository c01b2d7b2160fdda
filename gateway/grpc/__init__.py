"""The gateway over gRPC: the Open Inference Protocol (V2) and `grpc.health.v1` on a port of their own.

The same service, with the same tensors and rules as V2 over HTTP. Needs the extra `grpc`: this door imports
nothing of it, so that a gateway without the setting `grpc_port` runs without the extra. Knows no model, and
of HTTP only what both transports share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.grpc.server import RpcServer
    from gateway.http.parts import Parts

#: The packages of the extra, by the names that they are imported by.
_PACKAGES = frozenset({"grpc", "grpc_health", "google"})


def rpc_server(parts: Parts) -> RpcServer:
    """The server, which listens to nothing yet. Raises SettingsError where the extra is not installed.

    Not called `server`: the import of the module of that name replaces the attribute of the package.
    """
    try:
        from gateway.grpc.server import RpcServer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        place = parts.settings.sources()["grpc_port"]
        message = "gRPC needs the extra grpc: pip install 'model-gateway[grpc]'"
        raise SettingsError([(place, message)]) from None
    return RpcServer(parts)
