"""Output of the command line: results on stdout as text or JSON, everything else on stderr.

Must not know models, registries or servers. Every error is a `Failure`: a message, a hint, an exit code.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import typer

from gateway.logs import printable

REFUSED = 1
WRONG_USAGE = 2
_CREDENTIALS = re.compile(r"(://)[^/?#@\s\"']+@(?=[^/?#@\s])")


class Output(StrEnum):
    """The formats of a result."""

    text = "text"
    json = "json"


class Failure(Exception):
    """Ends a command. `message` says what is wrong, `problems` each of several in a line, `hint` what to do
    about it."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        code: int = REFUSED,
        problems: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.problems = tuple(problems)


def result(output: Output, value: Any, text: str | Callable[[], None]) -> None:
    """Prints a result: `value` as JSON, or `text`. If `text` is a function, calls it to print the text."""
    if output is Output.json:
        typer.echo(_public(json.dumps(value, indent=2, ensure_ascii=False, default=str)))
    elif isinstance(text, str):
        typer.echo(_public(text))
    else:
        text()


def note(text: str) -> None:
    """Prints a line to stderr: people see it, a pipe does not."""
    typer.echo(_public(text), err=True)


def complain(message: str, hint: str | None, problems: Sequence[str] = ()) -> None:
    """Prints an error, each of several problems on a line of its own, and a hint. A single problem is on
    the first line."""
    if len(problems) == 1:
        message, problems = f"{message}: {problems[0]}", ()
    note(f"gateway: {_one_line(message)}{':' if problems else ''}")
    for problem in problems:
        note(f"  {_one_line(problem)}")
    if hint:
        note(f"hint: {_one_line(hint)}")


def apart(message: str, problems: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A message without the problems that it ends with, which then have a line each."""
    return message.removesuffix("; ".join(problems)).removesuffix(": "), tuple(problems)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Prints a table to stdout; columns named in `right` are aligned right. In a pipe no cell is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))  # a cell may hold text from a model
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 1000)
    with console.capture() as captured:
        console.print(grid)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Shows that work is in progress: a spinner on a terminal, one line elsewhere.

    Yields a function that replaces the text of the spinner; any thread may call it.
    """
    if not sys.stderr.isatty():
        note(f"{what} …")
        yield lambda text: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(_public(what))) as status:
        yield lambda text: status.update(escape(_public(text)))


def size(count: float | None) -> str:
    """Formats a number of bytes, such as `12.3 MB`."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _public(text: str) -> str:
    """The text without the credentials of a URL in it: a registry's URL may have a user and a password."""
    return _CREDENTIALS.sub(r"\1***@", text)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
