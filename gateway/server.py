"""The server process: uvicorn around the gateway's application, signals, and process tuning.

Knows sockets, signals and process limits; must not know models or requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import glob
import logging
import os
import resource
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from gateway import grpc, logs
from gateway.app import Gateway
from gateway.credentials import address
from gateway.errors import Problem
from gateway.http.build import build
from gateway.http.protocol import protocol
from gateway.names import Reference, parse_uri, url_path
from gateway.pools import IO_THREAD, LARGE_THREAD
from gateway.registries import default_target, open_registry
from gateway.registries.base import Registry, RegistryError
from gateway.registries.listed import ALIAS, ListedModels, Subset
from gateway.runners.confinement import hide
from gateway.runners.inline import THREAD, freeze_heap
from gateway.runners.orphans import adopt
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from gateway.grpc.server import RpcServer
    from gateway.http.hosting import Hosting
    from gateway.settings import Settings

log = logging.getLogger("gateway")

#: The longest time, in seconds, that a busy thread may delay the loop (Python's default is 5 ms).
SWITCH_INTERVAL: Final = 0.0005
#: A request creates many short-lived objects and no cycles: with the defaults the collector runs far too
#: often.
GC_THRESHOLDS: Final = (20_000, 20, 20)
#: Each allocation of at least this size, in bytes, gets its own memory mapping.
MAPPED_BYTES: Final = 1 << 20
_M_MMAP_THRESHOLD: Final = -3
BACKLOG: Final = 2048
#: After the port is closed, open connections are still answered for this time, in seconds: each
#: answer carries `Connection: close`, so a busy client leaves without a failed request.
LINGER: Final = 1.0
LINGER_STEP: Final = 0.02
#: The time from refusing new connections to closing the port, in seconds: current handshakes end, and the
#: loop accepts the connections in the kernel's queue.
HANDSHAKE: Final = 0.1
_SO_ATTACH_FILTER: Final = 26
#: A socket filter of the kernel over the TCP header: byte 13 holds the flags. Segments with ACK pass; the
#: first segment of a handshake has none and is dropped.
_ONLY_OPEN: Final = b"".join(
    struct.pack("HBBI", *step)
    for step in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x10), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0))
)


class Server(uvicorn.Server):
    """uvicorn, stopped in the gateway's order by SIGTERM or SIGINT:

    1. `/readyz` answers 503, and every answer carries `Connection: close`. Requests are accepted for
       `drain_delay`.
    2. New connections are refused, then the port is closed. Requests on open connections are still answered,
       for `LINGER` at most.
    3. New requests are refused, idle connections are closed; requests in flight end within `drain_timeout`.

    A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway, rpc: RpcServer | None = None) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._rpc = rpc
        self._lingers_until = 0.0
        self._bound: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._bound = sockets or []
        # Log this only now: readers of the line may send requests and signals.
        registry = self._gateway.registry
        for admin in self._bound[1:]:
            log.info("control calls and metrics on %s", url_of(*admin.getsockname()[:2]))
        for bound in self._bound[:1]:
            url = url_of(*bound.getsockname()[:2])
            log.info("serving %s on %s", registry.target, url)
            for name in registry.names if isinstance(registry, ListedModels) else []:
                log.info("to predict: POST %s/predict/%s", url, url_path(Reference(name)))

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._gateway.draining:
            self.force_exit = self.should_exit = True
            return
        self._gateway.draining = True
        log.info("%s: stopping", signal.Signals(sig).name)
        asyncio.get_running_loop().call_later(self._gateway.settings.drain_delay, self._close_port)

    def _close_port(self) -> None:
        # Closing the port resets the connections that the kernel has accepted but the loop has not: their
        # clients would lose requests. So the kernel first stops accepting new ones, and the loop takes the
        # waiting ones.
        for bound in self._bound:
            _start_no_connection(bound)
        asyncio.get_running_loop().call_later(HANDSHAKE, self._closed)

    def _closed(self) -> None:
        for server in self.servers:
            server.close()
        if self._rpc is not None:
            self._rpc.drain(self._gateway.settings.drain_timeout)
        self._lingers_until = asyncio.get_running_loop().time() + LINGER
        self._linger()

    def _linger(self) -> None:
        loop = asyncio.get_running_loop()
        if self.server_state.connections and loop.time() < self._lingers_until:
            loop.call_later(LINGER_STEP, self._linger)
        else:
            self._gateway.refuse()
            self.should_exit = True


def serve(
    settings: Settings,
    models: Sequence[str] = (),
    reload: Callable[[], Settings] | None = None,
    hosting: Hosting | None = None,
) -> int:
    """Serves a registry, or only `models` (directories or URIs), until SIGTERM or SIGINT. `hosting`: what a
    managed host expects; the models that it adds are then the registry.

    `reload` reads the settings again; SIGHUP calls it. Returns the exit code. Raises RegistryError if there
    is nothing to serve, OSError if the port cannot be bound.
    """
    if hosting is not None and hosting.models is not None:
        registry: Registry = hosting.models
    else:
        registry, settings = _opened(settings, models)
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(_bound(settings, settings.host, settings.port))]
        if settings.admin_listen is not None:
            sockets.append(open_.enter_context(_bound(settings, *address(settings.admin_listen))))
        _raise_file_limit()
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.set_threshold(*GC_THRESHOLDS)
        _return_large_memory()
        adopt()
        hide()  # model processes must not read this one's memory and environment
        logs.configure(settings.log_format, settings.log_level)
        for name in settings.foreign_variables():
            log.warning("%s is not a setting of the gateway and is ignored", name)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            code = runner.run(_serve(settings, registry, sockets, reload, hosting))
    unfinished = (THREAD, IO_THREAD, LARGE_THREAD)
    if any(thread.name.startswith(unfinished) for thread in threading.enumerate()):
        # A model in this process, a download or a large body has not ended: Python would wait for its thread.
        logging.shutdown()
        os._exit(code)
    return code


async def _serve(
    settings: Settings,
    registry: Registry,
    sockets: list[socket.socket],
    reload: Callable[[], Settings] | None,
    hosting: Hosting | None,
) -> int:
    gateway = Gateway(settings, registry)
    parts = gateway.parts
    rpc = None
    try:
        if settings.grpc_port is not None:
            rpc = grpc.rpc_server(parts)
        config = uvicorn.Config(
            build(parts, hosting, sockets[1].getsockname()[1] if len(sockets) > 1 else None),
            http=protocol(settings.max_connection_age, gateway.connections, settings.send_timeout),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,  # the client's address is the connection's address
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type] # seconds for call_later
            timeout_graceful_shutdown=max(1, int(settings.drain_timeout)),
        )
        server = Server(config, gateway, rpc)
        _on_hangup(server, gateway, reload)
        await gateway.start()
        freeze_heap()  # a first full collection among requests would stop them for a tenth of a second
        for bound in sockets:
            bound.listen(BACKLOG)
        if rpc is not None:
            log.info("serving V2 over gRPC on %s", await rpc.start())
        await server.serve(sockets=sockets)
        if rpc is not None and not server.force_exit:
            await rpc.close(settings.drain_timeout)
    finally:
        if rpc is not None:
            await rpc.close()
        await gateway.stop()
    return 0


def _bound(settings: Settings, host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        _end_stalled(bound, settings.send_timeout)
    except BaseException:
        bound.close()
        raise
    return bound


def _on_hangup(server: Server, gateway: Gateway, reload: Callable[[], Settings] | None) -> None:
    """SIGHUP reloads. If it means that the terminal was closed, it stops the server as SIGTERM does."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        return
    if sys.stdin is not None and sys.stdin.isatty():
        signal.signal(signal.SIGHUP, server.handle_exit)
        return

    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def hangup() -> None:
        task = loop.create_task(_reload(gateway, reload))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGHUP, hangup)


async def _reload(gateway: Gateway, reload: Callable[[], Settings] | None) -> None:
    """Reads the settings and the registry again. Only `log_level` takes effect; the log names other changed
    settings, which need a restart. Key and secret files are read again whenever they change."""
    if reload is not None:
        try:
            new = await asyncio.to_thread(reload)
        except SettingsError as error:
            log.error("SIGHUP: the new settings are not valid and were ignored: %s", error)
        else:
            old = gateway.settings
            changed = [name for name in type(new).model_fields if getattr(new, name) != getattr(old, name)]
            # Not settings of the file: what the command line made of them.
            later = [name for name in changed if name not in ("log_level", "default_model", "preload")]
            logs.configure(new.log_format, new.log_level)
            log.info("SIGHUP: log level %s", new.log_level)
            if later:
                log.warning("SIGHUP: these settings take effect after a restart: %s", ", ".join(later))
    try:
        await gateway.watch.look()
    except Problem as problem:
        log.warning("SIGHUP: cannot read the registry: %s", problem)
    else:
        log.info("SIGHUP: the registry was read")


def _start_no_connection(bound: socket.socket) -> None:
    """Makes the kernel drop new connections to this port. Their clients try again after a second and are then
    refused, because the port is closed. On systems without such filters the port is simply closed."""
    steps = ctypes.create_string_buffer(_ONLY_OPEN)
    program = struct.pack("HP", len(_ONLY_OPEN) // 8, ctypes.addressof(steps))
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # a sandbox may forbid filters
        bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _end_stalled(bound: socket.socket, seconds: float) -> None:
    """Makes the kernel end each connection whose client takes nothing of what was sent for so long, whether
    the answer still waits here, in the kernel, or behind a closed transport. Connections inherit it from
    the port. Systems other than Linux have no such option."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(1e3 * seconds)))


def url_of(host: str, port: int) -> str:
    """The URL of a server that listens on this address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _raise_file_limit() -> None:
    """Raises the limit on open files to the hard limit, because each model process needs some of ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems do not grant their own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _return_large_memory() -> None:
    """Returns large allocations to the system when they are freed. By default glibc keeps as much in its heap
    as the largest body that came."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def _opened(settings: Settings, models: Sequence[str]) -> tuple[Registry, Settings]:
    """The registry to serve. If models are given, MLflow's own endpoints answer for the first one."""
    if not models:
        return _registry(settings), settings
    references = [parse_uri(text) for text in models]
    if all(reference.uri is not None for reference in references):
        listed = ListedModels(models)
        first = str(Reference(listed.names[0]))
        # What a bare file states of its inputs is known once it is loaded, and clients ask for it first.
        preload = [*settings.preload, *(f"{glob.escape(name)}@{ALIAS}" for name in listed.bare)]
        return listed, settings.model_copy(
            update={"default_model": settings.default_model or first, "preload": preload}
        )
    settings = settings.model_copy(update={"default_model": settings.default_model or str(references[0])})
    if any(reference.uri is not None or not reference.name for reference in references):
        raise RegistryError(
            "cannot serve directories and models of a registry (models:/NAME@ALIAS) at once: give one kind"
        )
    registry = _registry(settings)
    names = [reference.name for reference in references]
    return Subset(registry, names), settings


def _registry(settings: Settings) -> Registry:
    target = default_target(os.environ, settings.registry)
    return open_registry(
        target, stages=settings.mlflow_stages, tagging=settings.mlflow_tags, digests=settings.require_digest
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The factory of the event loop; None means asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None  # not available on this platform: use asyncio's own loop
    return uvloop.new_event_loop
