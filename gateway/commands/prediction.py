"""`predict`: makes one prediction without a server, with the same enforcement and the same answer.

Knows request bodies and models; must not know a running gateway.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.options import ConfigOption, OutputOption, RegistryOption, settings_of
from gateway.commands.terminal import Failure, Output, note, result, working

if TYPE_CHECKING:
    from loaders.enforcement import InvalidInput

SHOWN_VIOLATIONS = 10


class Format(StrEnum):
    """The form of the input."""

    json = "json"
    csv = "csv"


def predict(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A model directory or a models:/ URI.")],
    source: Annotated[
        str, typer.Option("--input", "-i", metavar="FILE|-", help="The input, JSON or CSV; `-` is stdin.")
    ],
    form: Annotated[
        Format | None,
        typer.Option(
            "--format", help="The format of the input.  [default: by the file's suffix, else its first byte]"
        ),
    ] = None,
    registry: RegistryOption = None,
    config: ConfigOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Predict offline, without a server, and print {"predictions": …}.

    The input has the format of a request body: a JSON object with one of dataframe_split, dataframe_records,
    instances and inputs (and optionally params), or CSV with a header row. It must fit the model's signature.
    This process runs the model's code: use it only with models that you trust.

    Example: gateway predict models:/iris@champion -i rows.csv --registry registry.yaml
    """
    from gateway import api
    from gateway.http import answers, bodies
    from loaders.enforcement import InvalidInput, enforce

    content = _read(source)
    settings = settings_of(config)
    with working(f"loading {uri}"):
        model = api.load(uri, registry, None, settings)
    if not content.strip():
        raise Failure(
            f"the input {'on stdin' if source == '-' else source} is empty",
            'give JSON such as {"dataframe_records": [{"COLUMN": VALUE}]}, or CSV with a header row',
        )
    chosen = form or _form(source, content)
    parsed = bodies.parse_json(content) if chosen is Format.json else bodies.parse_csv(content)
    package = model.package
    try:
        enforced = enforce(
            model.signature,
            parsed.raw,
            parsed.params,
            settings.enforcement or "strict",
            type_hints=package.type_hints,
        )
    except InvalidInput as error:
        raise _unfit(uri, error) from None
    for warning in enforced.warnings:
        note(f"warning: {warning}")
    answer = {"predictions": json.loads(answers.encode_now(model.run(enforced.batch, enforced.params)))}
    result(output, answer, json.dumps(answer, ensure_ascii=False))


def _read(source: str) -> bytes:
    return sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()


def _form(source: str, content: bytes) -> Format:
    ending = Path(source).suffix.lower()
    if ending in (".json", ".csv"):
        return Format(ending[1:])
    return Format.json if content.lstrip()[:1] == b"{" else Format.csv


def _unfit(uri: str, error: InvalidInput) -> Failure:
    """Every violation, in one line each."""
    found = [str(violation) for violation in error.violations[:SHOWN_VIOLATIONS]]
    if error.total > len(found):
        found.append(f"{error.count_text} in all")
    return Failure(f"the input does not fit {uri}", problems=found)
