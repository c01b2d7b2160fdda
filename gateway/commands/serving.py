"""`demo` and `serve`: the server itself.

Knows how to start a gateway and that its port must be free; nothing of how it serves.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.options import ConfigOption, OutputOption, RegistryOption, settings_of
from gateway.commands.terminal import Failure, Output, result, working

if TYPE_CHECKING:
    from gateway.settings import Settings


def demo(
    directory: Annotated[
        Path, typer.Option("--dir", metavar="D", help="Where the demo lives. What is there is kept.")
    ] = Path("gateway-demo"),
    port: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=65535, help="The port on 127.0.0.1.  [default: 8080]"),
    ] = None,
    output: OutputOption = Output.text,
) -> None:
    """Serve three small real models and print the lines to try.

    iris (scikit-learn), diabetes (ONNX) and tickets (a Python class with an artifact and a param), each in
    two versions: champion is 1, challenger is 2. Training takes some seconds, once: the directory (registry,
    models, cache, state) is kept, and the next demo there goes on where this one ended.
    """
    from gateway import demo as show

    settings = settings_of(
        registry=str(directory / "registry.yaml"),
        host="127.0.0.1",
        port=port,
        cache_dir=str((directory / "cache").absolute()),
        state_dir=str((directory / "state").absolute()),
    )
    _must_be_free(settings.host, settings.port)
    with working(f"making the demo in {directory}"):
        registry = show.prepare(directory)
    url = f"http://{settings.host}:{settings.port}"
    key = directory / "state" / "control.key"
    view = {"url": url, "directory": str(directory), "registry": str(registry)}
    where = f"The demo is in {directory}. Ctrl-C stops it; `gateway demo --dir {directory}` goes on.\n"
    result(output, view, f"{where}\n{show.lines_to_try(url, show.champion(registry, 'iris'), key)}")
    _serve(settings)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Serve just these: directories or URIs, NAME=DIR to give the name."
        ),
    ] = None,
    registry: RegistryOption = None,
    host: Annotated[
        str | None, typer.Option(metavar="H", help="The address to listen on.  [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=65535, help="The port.  [default: 8080]")
    ] = None,
    config: ConfigOption = None,
    output: Annotated[
        Output | None,
        typer.Option("--output", "-o", help="The form of the log; else the setting log_format."),
    ] = None,
) -> None:
    """Serve predictions for a registry, or for models named here.

    Until SIGTERM or Ctrl-C. Without MODEL all of the registry is served: a model loads on its first request,
    and aliases are followed while it runs. With MODEL, a directory or a URI, no registry is needed. The name
    of the directory is the model's; where that is only a number (models/iris/1), the one above it; NAME=DIR
    names it. Every setting is an environment variable too (GATEWAY_PORT=9000); `gateway config` shows them.
    """

    def read() -> Settings:
        return settings_of(config, registry=registry, host=host, port=port, log_format=output)

    settings = read()
    _must_be_free(settings.host, settings.port)
    _serve(settings, models or [], read)


def _must_be_free(host: str, port: int) -> None:
    """Raises Failure where the server could not listen: better now than after minutes of work."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise Failure(message, "choose another port with --port, or stop what uses this one") from None


def _serve(
    settings: Settings, models: Sequence[str] = (), reload: Callable[[], Settings] | None = None
) -> None:
    from gateway.server import serve as run

    raise typer.Exit(run(settings, models, reload))
