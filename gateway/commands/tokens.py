"""`token create`: makes a token, and the entry for the tokens file that admits it.

Knows the form of an entry. It asks no gateway, and writes no file: the secret is shown once.
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from gateway.commands.options import OutputOption
from gateway.commands.terminal import Output, note, result

app = typer.Typer(help="Make tokens for callers.", no_args_is_help=True)

Patterns = list[str] | None


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its holder, such as build-server.")],
    predict: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN", help="Models that it may use: iris, fraud-*@champion, *. Repeatable."
        ),
    ] = None,
    control: Annotated[
        Patterns, typer.Option(metavar="PATTERN", help="Models that it may control. Repeatable.")
    ] = None,
    team: Annotated[str | None, typer.Option(metavar="TEAM", help="Its team, for limits and usage.")] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="When it ends, such as 2027-01-31.")
    ] = None,
    output: OutputOption = Output.text,
) -> None:
    """Print a new token once, and its entry for the tokens file (setting access.tokens_file).

    The entry holds the token's digest, not the token. A running gateway reads the file again when it changes.

    Example: gateway token create build --predict 'fraud-*' --control 'fraud-*@challenger'
    """
    from gateway.access.tokens import InvalidTokens, digest, new_token, parse

    token = new_token()
    known = {"name": name, "sha256": digest(token.encode()).hex(), "team": team, "predict": predict}
    known |= {"control": control, "until": until}
    entry = {key: value for key, value in known.items() if value}
    try:
        (principal,) = parse(json.dumps([entry]), ()).values()
    except InvalidTokens as error:
        told = "; ".join(f"{place.partition('.')[2]}: {what}" for place, what in error.problems)
        raise typer.BadParameter(told) from None
    if principal.until <= time.time():
        raise typer.BadParameter(f"{until} is over: give a day to come", param_hint="--until")
    if not predict and not control:
        note("warning: this token allows nothing: give --predict PATTERN, or --control PATTERN")
    lines = [f"{'- ' if key == 'name' else '  '}{key}: {_yaml(value)}" for key, value in entry.items()]
    shown = "\n".join([f"token: {token}", "entry for the tokens file:", *lines])
    result(output, {"token": token, "entry": entry}, shown)


def _yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
