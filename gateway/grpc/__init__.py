"""The gateway over gRPC: the Open Inference Protocol (V2) and `grpc.health.v1` on a separate port.

The service, tensors and rules are the same as in V2 over HTTP. Needs the extra `grpc`. This module does not
import it, so that a gateway without the setting `grpc_port` runs without the extra. Must not know models, and
uses from HTTP only the parts that both transports share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.grpc.server import RpcServer
    from gateway.http.parts import Parts

#: The import names of the extra's packages.
_PACKAGES = frozenset({"grpc", "grpc_health", "google"})


def rpc_server(parts: Parts) -> RpcServer:
    """Returns the server, which does not listen yet. Raises SettingsError if the extra is not installed.

    It is not called `server`, because the import of the module `server` replaces this attribute.
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
