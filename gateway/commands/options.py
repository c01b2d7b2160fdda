"""The options that several commands share, and how their values are found.

Knows precedence (option, then environment variable, then default). Must not know what a command does.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from gateway.commands.terminal import Failure, Output

if TYPE_CHECKING:
    from gateway.commands.client import Client
    from gateway.names import Reference
    from gateway.settings import Settings

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="The format of the result on stdout.")]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        "-r",
        metavar="R",
        help="A registry file (.yaml, .yml, .json), its URL, or the URL of an MLflow server.  [default: "
        "$GATEWAY_REGISTRY or the setting registry, $MLFLOW_REGISTRY_URI, $MLFLOW_TRACKING_URI or "
        "./registry.yaml]",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The running gateway.  [default: $GATEWAY_URL, else the settings host and port]",
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        metavar="FILE",
        envvar="GATEWAY_ADMIN_KEY_FILE",
        help="The file with the gateway's admin key, or with a token.  [default: the key in "
        "$GATEWAY_ADMIN_KEY, else the key that a gateway on this machine wrote to its state_dir]",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The settings file.  [default: ./gateway.yaml]"),
]
AliasArgument = Annotated[
    str, typer.Argument(metavar="NAME@ALIAS", help="The alias to move, such as iris@champion.")
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="NAME, NAME@ALIAS, NAME/VERSION, or as in a URL NAME/versions/VERSION."
    ),
]


def url_given(url: str | None) -> str | None:
    """The URL of the gateway from the option or $GATEWAY_URL; None if neither is set."""
    return url or os.environ.get("GATEWAY_URL") or None


def connect(url: str | None, admin_key_file: Path | None, config: Path | None = None) -> Client:
    """A client of the running gateway at `url`, else $GATEWAY_URL, else where the settings (`config`: their
    file) say that it takes control calls.

    Takes the key from the file `admin_key_file`, else from $GATEWAY_ADMIN_KEY, else from the file that the
    setting `admin_key_file` names, else, for a gateway on this machine, from `state_dir`. Raises Failure if a
    named key file cannot be read, and SettingsError.
    """
    from gateway.commands.client import Client
    from gateway.credentials import address

    settings = settings_of(config)
    listens = (settings.host, settings.port)
    if settings.admin_listen is not None:
        listens = address(settings.admin_listen)
    target = url_given(url) or url_of(*listens)
    key = os.environ.get("GATEWAY_ADMIN_KEY") if admin_key_file is None else None
    file = admin_key_file or settings.admin_key_file
    if not key and file is not None:
        try:
            key = file.read_text(encoding="utf-8")
        except OSError as error:
            raise Failure(f"cannot read the admin key file {file}: {error.strerror}") from None
    if not key and _on_this_machine(target):
        # Never send this key to another machine: it gives control over the gateway here.
        with contextlib.suppress(OSError):
            key = (settings.state_dir / "control.key").read_text(encoding="utf-8")
    return Client(target, key.strip() if key else None)


def url_of(host: str, port: int) -> str:
    """The URL at which this machine reaches a gateway that listens on this address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def target_of(registry: str | None, config: Path | None = None) -> str:
    """The registry to use; without the option the one of the settings (`config`: their file), as for the
    server. Raises NoRegistry, which names the five ways to set one, if none is set, and SettingsError."""
    from gateway.registries import default_target

    return default_target(os.environ, registry or settings_of(config).registry)


def alias_of(text: str) -> tuple[str, str]:
    """NAME@ALIAS as a pair. Raises typer.BadParameter."""
    reference = reference_of(text)
    if reference.alias is None:
        raise typer.BadParameter(f"{text!r} has no alias; write NAME@ALIAS, such as iris@champion")
    return reference.name, reference.alias


def reference_of(text: str) -> Reference:
    """A model reference from its short form or its models:/ URI. Raises typer.BadParameter."""
    from gateway.names import InvalidReference, parse_short

    try:
        return parse_short(text)
    except InvalidReference as error:
        raise typer.BadParameter(str(error)) from None


def version_of(text: str, name: str | None = None) -> str:
    """A version number; with `name` also NAME/VERSION or NAME/versions/VERSION of that model. Raises
    typer.BadParameter."""
    from gateway.names import InvalidReference, check_version

    if name is not None and "/" in text:
        reference = reference_of(text)
        if reference.name != name or reference.version is None:
            raise typer.BadParameter(f"{text!r} is not a version of {name}; write its number")
        return reference.version
    try:
        return check_version(text)
    except InvalidReference as error:
        raise typer.BadParameter(str(error)) from None


def settings_of(config: Path | None = None, **flags: Any) -> Settings:
    """The effective settings; a flag that is None was not given. Raises SettingsError."""
    from gateway import configuration

    given = {name: value for name, value in flags.items() if value is not None}
    return configuration.load(given, os.environ, config)
