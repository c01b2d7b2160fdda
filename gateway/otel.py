"""What traces and metrics over OpenTelemetry share: the standard variables that switch them on, the exporters
that these name, and the resource. The SDK reads all other `OTEL_*` variables. The libraries are the extra
`otel`: nothing here imports them without the variables. Must not know what is exported.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from gateway import __version__
from gateway.logs import Bursts

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

Signal: TypeAlias = Literal["traces", "metrics"]
SERVICE: Final = "model-gateway"
#: What is left may take this long to leave when the gateway stops, in seconds.
PATIENCE: Final = 3.0

log = logging.getLogger("gateway")


class _Told(logging.Handler):
    """Passes on what the SDK says, of each of its loggers one line in ten seconds: it says several for each
    attempt to reach a collector that is away."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._bursts = Bursts(time.monotonic)

    def emit(self, record: logging.LogRecord) -> None:
        ending = self._bursts.ending(record.name)
        if ending is not None:
            log.log(record.levelno, "%s%s", record.getMessage(), ending)


def wanted(environ: Mapping[str, str], signal: Signal) -> list[str]:
    """The entry points of the exporters that the variables ask for; empty if the signal is off. The general
    endpoint asks for traces alone: metrics are scraped, unless a variable of metrics says otherwise."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    upper = signal.upper()
    own = f"OTEL_EXPORTER_OTLP_{upper}"
    endpoints = [f"{own}_ENDPOINT", *(["OTEL_EXPORTER_OTLP_ENDPOINT"] if signal == "traces" else [])]
    asked = environ.get(f"OTEL_{upper}_EXPORTER", "").strip()
    if not asked and not any(environ.get(name) for name in endpoints):
        return []
    protocols = (f"{own}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name] for name in protocols if environ.get(name)), "http/protobuf")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in (asked or "otlp").split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def exporters(environ: Mapping[str, str], signal: Signal) -> list[Any]:
    """The exporters that the variables ask for. The log says which cannot be had, and why: a wrong variable
    must not keep the gateway from serving."""
    names = wanted(environ, signal)
    if not names:
        return []
    try:
        import opentelemetry.sdk.resources  # noqa: F401
    except ImportError:
        log.warning(
            "OTEL_* variables ask for %s, but nothing exports them: install model-gateway[otel]", signal
        )
        return []
    told = logging.getLogger("opentelemetry")
    told.handlers[:], told.propagate = [_Told()], False
    found = []
    for name in names:
        try:
            (entry,) = entry_points(group=f"opentelemetry_{signal}_exporter", name=name)
            found.append(entry.load()())
        except ValueError:
            log.warning("no installed package exports %s as %s (opentelemetry-exporter-…)", signal, name)
        except Exception as error:  # noqa: BLE001 - whatever the exporter thinks of its variables
            log.warning("%s cannot be exported as %s: %s", signal, name, error)
    return found


def resource() -> Resource:
    """This gateway, as the variables describe it."""
    from opentelemetry.sdk.resources import Resource

    own = Resource({"service.name": SERVICE, "service.version": __version__, "host.name": platform.node()})
    given = Resource.create()
    named = not str(given.attributes.get("service.name", "")).startswith("unknown_service")
    return own.merge(given) if named else given.merge(own)


async def briefly(work: Callable[[], object]) -> bool:
    """Runs blocking work in a thread, and waits for `PATIENCE` at most. Returns whether it has ended. A
    collector that is away may keep an exporter longer than the gateway lives, so the thread is a daemon."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="otel", daemon=True).start()
    try:
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
    except TimeoutError:
        return False
    return True
