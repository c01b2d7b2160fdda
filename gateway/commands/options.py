"""The options that several commands share, and what they stand for once the environment has been asked.

Knows precedence (option, then environment, then default) and nothing of what a command does.
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

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="The form of the result on stdout.")]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        "-r",
        metavar="R",
        help="A registry file (.yaml, .yml, .json), its URL, or an MLflow server. Else $GATEWAY_REGISTRY, "
        "$MLFLOW_REGISTRY_URI, $MLFLOW_TRACKING_URI, ./registry.yaml.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The running gateway. Else $GATEWAY_URL, else the settings host and port.",
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--admin-key-file",
        metavar="FILE",
        envvar="GATEWAY_ADMIN_KEY_FILE",
        help="The file with the gateway's admin key. Else the key itself in $GATEWAY_ADMIN_KEY, or the one "
        "that a gateway on this machine wrote to its state_dir.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The settings file; else ./gateway.yaml."),
]
AliasArgument = Annotated[
    str, typer.Argument(metavar="NAME@ALIAS", help="The alias to move, such as iris@champion.")
]
ReferenceArgument = Annotated[
    str, typer.Argument(metavar="REF", help="NAME, NAME@ALIAS, NAME/VERSION or a models:/ URI.")
]


def url_given(url: str | None) -> str | None:
    """The gateway to go through, None where nothing names one."""
    return url or os.environ.get("GATEWAY_URL") or None


def connect(url: str | None, admin_key_file: Path | None, config: Path | None = None) -> Client:
    """A client of the running gateway: of `url`, $GATEWAY_URL, or the host and port of the settings in force
    (`config`: their file).

    Its key is that of `admin_key_file`, of $GATEWAY_ADMIN_KEY, of the setting `admin_key_file`; else, for a
    gateway on this machine, the one that it wrote to `state_dir`. Raises Failure for a key file that is named
    and cannot be read, SettingsError.
    """
    from gateway.commands.client import Client

    settings = settings_of(config)
    target = url_given(url) or _url_of(settings.host, settings.port)
    key = os.environ.get("GATEWAY_ADMIN_KEY") if admin_key_file is None else None
    file = admin_key_file or settings.admin_key_file
    if not key and file is not None:
        try:
            key = file.read_text(encoding="utf-8")
        except OSError as error:
            raise Failure(f"the admin key file {file} cannot be read: {error.strerror}") from None
    if not key and _on_this_machine(target):
        # Not sent to other machines: it opens the gateway here.
        with contextlib.suppress(OSError):
            key = (settings.state_dir / "control.key").read_text(encoding="utf-8")
    return Client(target, key.strip() if key else None)


def _url_of(host: str, port: int) -> str:
    """Where a gateway that listens on this address is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def target_of(registry: str | None) -> str:
    """The registry that is meant. Raises NoRegistry, naming all the ways to say it, where none is."""
    from gateway.registries import default_target

    return default_target(os.environ, registry)


def alias_of(text: str) -> tuple[str, str]:
    """NAME@ALIAS as a pair. Raises typer.BadParameter."""
    reference = reference_of(text)
    if reference.alias is None:
        raise typer.BadParameter(f"{text!r} names no alias; write NAME@ALIAS, such as iris@champion")
    return reference.name, reference.alias


def reference_of(text: str) -> Reference:
    """A model reference as people write it. Raises typer.BadParameter."""
    from gateway.names import InvalidReference, parse_short

    try:
        return parse_short(text)
    except InvalidReference as error:
        raise typer.BadParameter(str(error)) from None


def version_of(text: str) -> str:
    """A version number. Raises typer.BadParameter."""
    from gateway.names import InvalidReference, check_version

    try:
        return check_version(text)
    except InvalidReference as error:
        raise typer.BadParameter(str(error)) from None


def settings_of(config: Path | None = None, **flags: Any) -> Settings:
    """The effective settings; flags that are None were not given. Raises SettingsError."""
    from gateway import configuration

    given = {name: value for name, value in flags.items() if value is not None}
    return configuration.load(given, os.environ, config)
