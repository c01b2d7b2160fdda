"""The command `gateway`: collects its subcommands, and turns their exceptions into messages and exit codes.

Knows which failures are expected; `gateway.commands` holds what each command does. Imports little, so that
`gateway --help` is fast.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from gateway import __version__
from gateway.commands import (
    capture,
    checking,
    configuration,
    console,
    environments,
    moving,
    operating,
    prediction,
    registry,
    rollouts,
    serving,
    tokens,
    usage,
)
from gateway.commands.terminal import REFUSED, WRONG_USAGE, Failure, apart, complain, note

INTERRUPTED = 130
#: What a hint says to HTTP clients, and what it says on the command line. A member of a body is left out: the
#: hint names the option next to it.
_IN_COMMANDS = tuple(
    (re.compile(http), command)
    for http, command in (
        (r", or \{[^{}]*\}", ""),
        (r"GET /models/NAME(/versions/VERSION)?(?![\w/])", "`gateway models NAME`"),
        (r"GET /models(?![\w/])", "`gateway models`"),
        (r"GET /rollouts/NAME@ALIAS(?![\w/])", "`gateway rollout NAME@ALIAS`"),
        (r"\bafter Retry-After\b", "a little later"),
        (r"\bfor the time in Retry-After\b", "a little"),
    )
)

# Typer uses its own copy of click or the installed one, and exports only this exception. Its base class is
# the class of every usage error.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="gateway",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    serving.demo,
    serving.serve,
    registry.push,
    moving.promote,
    moving.rollback,
    rollouts.rollout,
    registry.models,
    registry.gc,
    operating.status,
    operating.load,
    operating.unload,
    usage.usage,
    prediction.predict,
    checking.check,
    configuration.config,
    console.console,
):
    app.command()(command)
app.add_typer(environments.app, name="env")
app.add_typer(tokens.app, name="token")
app.add_typer(capture.app, name="capture")


@app.callback()
def entry(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Serve the models of a registry over HTTP.

    Start with `gateway demo`. A registry is a file with names, versions and aliases of models, or an MLflow
    server. `push` adds a version. `serve` answers predictions for every model, and follows each move of an
    alias while it runs.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage. Results go to stdout, messages to stderr.
    """


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code."""
    if list(arguments) == ["--version"]:
        typer.echo(__version__)
        return 0
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="gateway", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        return _wrong_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the outermost place: every error becomes a message and an exit code
        failure = _expected(error)
        if failure is None:
            if {"--verbose", "-v"} & set(arguments[:1]):
                note("".join(traceback.format_exception(error)).rstrip())
            kind = type(error).__name__
            failure = Failure(f"unexpected {kind}: {error}", "gateway --verbose … prints the traceback")
        complain(failure.message, _in_commands(failure.hint), failure.problems)
        return failure.code


def _wrong_usage(error: Exception) -> int:
    """Prints what is wrong with the command line, and which help to read."""
    context = getattr(error, "ctx", None)
    path = "gateway" if context is None else context.command_path
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if context is not None and message == context.get_help():
        note(message)  # a bare `gateway`
    else:
        complain(message, _setting_meant(error, path) or f"see {path} --help")
    return WRONG_USAGE


def _setting_meant(error: Exception, path: str) -> str | None:
    """The hint for an unknown option that is the name of a setting."""
    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    if not name or path not in ("gateway serve", "gateway demo"):
        return None
    from gateway.settings import Settings

    if name not in Settings.model_fields:
        return None
    return f"{name} is a setting without a flag: set GATEWAY_{name.upper()}, or {name} in gateway.yaml"


def _in_commands(hint: str | None) -> str | None:
    """A hint for HTTP clients as one for the command line: `GET /models` becomes `gateway models`."""
    if not hint:
        return hint
    for http, command in _IN_COMMANDS:
        hint = http.sub(command, hint)
    return hint


def _expected(error: Exception) -> Failure | None:
    """An expected error as a failure; None for an unexpected one."""
    if isinstance(error, Failure):
        return error
    from gateway.artifacts.base import ArtifactError
    from gateway.errors import Problem
    from gateway.names import InvalidReference
    from gateway.registries.base import (
        NoRegistry,
        RegistryError,
        RegistryInvalid,
        RegistryUnavailable,
    )
    from gateway.runners.base import ModelError
    from gateway.settings import SettingsError
    from loaders.flavors.base import MissingFramework
    from loaders.package import PackageError

    if isinstance(error, SettingsError):
        problems = [f"{place}: {problem}" for place, problem in error.problems]
        return Failure("the settings are wrong", code=WRONG_USAGE, problems=problems)
    if isinstance(error, RegistryInvalid):
        problems = [f"{place}: {problem}" if place else problem for place, problem in error.problems]
        return Failure(f"{error.target} is not a valid registry", error.hint, problems=problems)
    if isinstance(error, InvalidReference | NoRegistry):
        return Failure(str(error), code=WRONG_USAGE)
    if isinstance(error, RegistryUnavailable):
        return Failure(str(error), error.hint)
    if isinstance(error, Problem):
        message, lines = apart(str(error), [detail.problem for detail in error.details])
        return Failure(message, error.hint, problems=lines)
    if isinstance(error, RegistryError | ArtifactError | PackageError | ModelError | MissingFramework):
        return Failure(str(error))
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return Failure(f"{place}{error.strerror or error}", code=REFUSED)
    return None
