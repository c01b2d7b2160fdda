"""`demo` and `serve`: start the server.

Knows how to start a gateway and that its port must be free; must not know how it serves.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.options import ConfigOption, OutputOption, RegistryOption, settings_of, url_of
from gateway.commands.terminal import Failure, Output, result, working
from gateway.names import InvalidReference, check_name

if TYPE_CHECKING:
    from gateway.http.hosting import Hosting
    from gateway.settings import Settings


def demo(
    directory: Annotated[
        Path, typer.Option("--dir", metavar="D", help="The directory of the demo. Existing files are kept.")
    ] = Path("gateway-demo"),
    port: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=65535, help="The port; else the setting.  [default: 8080]"),
    ] = None,
    output: OutputOption = Output.text,
) -> None:
    """Serve three small real models, and print commands to try.

    The models are iris (scikit-learn), diabetes (ONNX) and tickets (a Python class with an artifact and a
    param). Each has two versions: champion is 1, challenger is 2. The first start trains them, which takes
    some seconds. The directory (registry, models, cache, state) is kept, and the next demo continues with it.
    """
    from gateway import demo as show

    settings = settings_of(
        registry=str(directory / "registry.yaml"),
        port=port,
        cache_dir=str((directory / "cache").absolute()),
        state_dir=str((directory / "state").absolute()),
    )
    _must_be_free(settings.host, settings.port)
    does = "continuing" if (directory / "registry.yaml").exists() else "making"
    with working(f"{does} the demo in {directory}"):
        registry = show.prepare(directory)
    url = url_of(settings.host, settings.port)
    key = directory / "state" / "control.key"
    view = {"url": url, "directory": str(directory), "registry": str(registry)}
    where = f"The demo is in {directory}. Ctrl-C stops it; `gateway demo --dir {directory}` continues it.\n"
    result(output, view, f"{where}\n{show.lines_to_try(url, show.champion(registry, 'iris'), key)}")
    _serve(settings)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Serve only these: directories, model files or URIs; NAME=FILE-OR-DIR sets the name.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name of the only MODEL, as NAME=MODEL.")
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
        typer.Option("--output", "-o", help="The format of the log.  [default: the setting log_format]"),
    ] = None,
) -> None:
    """Serve predictions for a registry, or only for the given models.

    The server runs until SIGTERM or Ctrl-C. Without MODEL it serves every model of the registry: a model
    loads on its first request, and the server follows the aliases while it runs. With MODEL, a directory or
    a URI, it needs no registry. The model's name is the name of its directory. If that is a number, as in
    models/iris/1, it is the name of the parent directory. NAME=DIR sets the name.

    MODEL may be a model file without an MLmodel, or a directory that holds one: .joblib, .pkl, .skops, .onnx,
    .bst, .json, .ubj, .cbm, .txt or .pt2. Its signature is what the file states. It runs in this interpreter.

    Every setting is an environment variable too, such as GATEWAY_PORT=9000; `gateway config` lists them.
    """

    from gateway.commands.hosting import asked

    if name is not None:
        models = [_named(name, models or [])]
    host_asked = asked(os.environ, models or [])
    flags: dict[str, Any] = {**host_asked.flags}
    flags |= {name: value for name, value in (("host", host), ("port", port)) if value is not None}

    def read() -> Settings:
        return settings_of(config, registry=registry, log_format=output, **flags)

    settings = read()
    _must_be_free(settings.host, settings.port)
    _serve(settings, host_asked.models, read, host_asked.hosting)


def _named(name: str, models: list[str]) -> str:
    if len(models) != 1 or ":" in models[0].partition("/")[0]:
        raise Failure("--name needs one MODEL, a directory or a model file", "write NAME=MODEL for several")
    try:
        check_name(name)
    except InvalidReference as error:
        raise Failure(f"--name: {error}") from None
    if "=" in name:
        raise Failure("--name: a name on the command line holds no =", "push the model to a registry")
    return f"{name}={models[0]}"


def _must_be_free(host: str, port: int) -> None:
    """Raises Failure if the server cannot listen there. Called first, because the start may take minutes."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise Failure(message, "choose another port with --port, or stop the program that uses it") from None


def _serve(
    settings: Settings,
    models: Sequence[str] = (),
    reload: Callable[[], Settings] | None = None,
    hosting: Hosting | None = None,
) -> None:
    from gateway.server import serve as run

    raise typer.Exit(run(settings, models, reload, hosting))
