"""`capture`: lists, exports and deletes captured requests, at a running gateway or in this machine's state.

Knows the control routes and the store; must not know how requests are captured.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Protocol
from urllib.parse import quote

import typer

from gateway.commands.options import (
    ConfigOption,
    KeyOption,
    OutputOption,
    RegistryOption,
    connect,
    reference_of,
    settings_of,
    target_of,
    url_given,
)
from gateway.commands.terminal import Failure, Output, note, result, size, table

if TYPE_CHECKING:
    from gateway.capture.store import CaptureStore
    from gateway.commands.client import Client
    from gateway.settings import Settings

app = typer.Typer(
    help="List, export and delete captured requests (setting `capture`). They hold real data.",
    no_args_is_help=True,
)

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="A running gateway.  [default: $GATEWAY_URL, else the state of this machine]",
    ),
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME[/VERSION]]", help="A model, or one of its versions.")
]


class Form(StrEnum):
    lines = "lines"
    frames = "frames"


@app.command("list")
def list_(
    url: UrlOption = None,
    registry: RegistryOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Show how many requests of each version are captured."""
    with _place(url, registry, admin_key_file, config) as place:
        found = place.summary()
        result(output, {"captures": found, "target": place.name}, lambda: _show(found, place.name))


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A model, or one of its versions.")],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The file to write.  [default: stdout]")
    ] = None,
    form: Annotated[
        Form,
        typer.Option(help="lines: one JSON object per request. frames: typed, for `gateway check`."),
    ] = Form.lines,
    url: UrlOption = None,
    registry: RegistryOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Write captured requests to a file (mode 0600) or to stdout, oldest first.

    Example: gateway capture export fraud/3 -f fraud.jsonl
    """
    name, version = _model(model)
    assert name is not None
    if file is None and output is Output.json:
        raise typer.BadParameter("--output json needs --file: without it the requests are the output")
    if file is None and form is Form.frames and sys.stdout.isatty():
        raise typer.BadParameter("frames are not text: give --file")
    with _place(url, registry, admin_key_file, config) as place:
        _check_captured(place, name, version)
        count = 0
        with _written(file) as target:
            for text in place.export(name, version, form):
                target.write(text)
                count += text.count(b"\n") if form is Form.lines else 0
    if output is Output.json:
        counted = count if form is Form.lines else None
        said = {"name": name, "version": version, "form": form.value, "requests": counted, "file": str(file)}
        result(output, said, "")
        return
    where = f" to {file}" if file is not None else ""
    note(f"exported {f'{count} requests' if form is Form.lines else 'requests'} of {model}{where}")


@app.command()
def drop(
    model: ModelArgument = None,
    every: Annotated[bool, typer.Option("--all", help="The requests of all models.")] = False,
    url: UrlOption = None,
    registry: RegistryOption = None,
    admin_key_file: KeyOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Delete captured requests of a version, of a model, or of all models.

    Example: gateway capture drop fraud
    """
    if (model is None) is not every:
        raise typer.BadParameter("give NAME[/VERSION], or --all")
    name, version = _model(model)
    with _place(url, registry, admin_key_file, config) as place:
        if name is not None:
            _check_captured(place, name, version)
        dropped = place.drop(name, version)
        said = f"deleted {dropped} captured requests of {model or 'all models'} at {place.name}"
        result(output, {"name": name, "version": version, "dropped": dropped, "target": place.name}, said)


class _Place(Protocol):
    """Access to the captured requests: of a running gateway, or of a state directory."""

    name: str

    def summary(self) -> list[dict[str, Any]]: ...
    def export(self, name: str, version: str | None, form: Form) -> Iterator[bytes]: ...
    def drop(self, name: str | None, version: str | None) -> int: ...


class _Gateway:
    def __init__(self, client: Client) -> None:
        self._client = client
        self.name = client.url

    def summary(self) -> list[dict[str, Any]]:
        return list(self._client.call("GET", "/captures")["captures"])

    def export(self, name: str, version: str | None, form: Form) -> Iterator[bytes]:
        return self._client.chunks(path_of(name, version), form=form.value)

    def drop(self, name: str | None, version: str | None) -> int:
        return int(self._client.call("DELETE", path_of(name, version), timeout=0)["dropped"])


class _Here:
    def __init__(self, store: CaptureStore, name: str) -> None:
        self._store = store
        self.name = name

    def summary(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self._store.summaries()]

    def export(self, name: str, version: str | None, form: Form) -> Iterator[bytes]:
        from gateway.capture.exchange import to_frame, to_json

        for record in self._store.every(name, version):
            if form is Form.frames:
                yield to_frame(record)
            else:
                yield json.dumps(to_json(record), default=str, ensure_ascii=False).encode() + b"\n"

    def drop(self, name: str | None, version: str | None) -> int:
        return self._store.drop(name, version)


@contextlib.contextmanager
def _place(
    url: str | None, registry: str | None, admin_key_file: Path | None, config: Path | None
) -> Iterator[_Place]:
    if url_given(url) is not None:
        with connect(url, admin_key_file, config) as client:
            yield _Gateway(client)
        return
    settings = settings_of(config)
    with here(settings, target_of(registry, config)) as store:
        yield _Here(store, str(settings.state_dir))


@contextlib.contextmanager
def here(settings: Settings, target: str) -> Iterator[CaptureStore]:
    """The captured requests of a registry in the state of this machine. Raises Failure."""
    from gateway.capture.store import CaptureStore
    from gateway.registries import open_registry

    opened = open_registry(target)
    try:
        identity = opened.identity
    finally:
        opened.close()
    store = CaptureStore(settings.state_dir, identity)
    try:
        yield store
    except (OSError, sqlite3.Error) as error:
        hint = "run it as the gateway's user, or give the gateway's URL with --url"
        raise Failure(f"cannot use the captured requests in {settings.state_dir}: {error}", hint) from None
    finally:
        store.close()


def path_of(name: str | None, version: str | None = None) -> str:
    path = "/captures" if name is None else f"/captures/{quote(name, safe='')}"
    return path if version is None else f"{path}/versions/{version}"


def _model(text: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    reference = reference_of(text)
    if reference.alias is not None or reference.latest:
        raise typer.BadParameter(f"{text!r} names no version: write NAME or NAME/VERSION")
    return reference.name, reference.version


def _check_captured(place: _Place, name: str, version: str | None) -> None:
    """Raises Failure if nothing is captured of a model: its name may be mistyped."""
    try:
        captured = [(one["model"], str(one["version"])) for one in place.summary()]
    except Failure:
        return  # a token for some models alone may not see the list; the gateway decides about the model
    if not any(known == name and version in (None, number) for known, number in captured):
        wanted = name if version is None else f"{name}/{version}"
        others = ", ".join(f"{known}/{number}" for known, number in captured) or "nothing"
        raise Failure(f"no requests of {wanted} are captured at {place.name}", f"captured: {others}")


@contextlib.contextmanager
def _written(file: Path | None) -> Iterator[BinaryIO]:
    if file is None:
        yield sys.stdout.buffer
        return
    import os

    with open(file, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as target:
        os.fchmod(target.fileno(), 0o600)
        yield target


def _show(found: list[dict[str, Any]], place: str) -> None:
    if not found:
        typer.echo(f"no captured requests at {place}")
        return
    rows = [
        [
            f"{one['model']}/{one['version']}",
            str(one["requests"]),
            str(one["replayable"]),
            size(one["bytes"]),
            _age(one["oldest"]),
            _age(one["newest"]),
        ]
        for one in found
    ]
    columns = ("version", "requests", "replayable", "size", "oldest", "newest")
    table(columns, rows, right=("requests", "replayable", "size"))


def _age(moment: str) -> str:
    from gateway.quantities import shown_seconds

    seconds = max(0, time.time() - datetime.fromisoformat(moment).timestamp())
    return f"{shown_seconds(round(seconds))} ago"
