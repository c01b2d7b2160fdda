"""What every page has: the frame, the navigation, tables. Everything that it loads is served by the gateway.

Knows HTML; nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="{up}/docs/page.css">
<script src="{up}/docs/page.js" defer></script>
</head>
<body>
<a class="skip" href="#content">To the content</a>
{top}<main id="content">
{body}
</main>
</body>
</html>
"""
_CONSOLE = (("", "Overview"), ("console/rollouts", "Rollouts"), ("console/failures", "Failures"))
_API = ("docs", "API")
#: A text with more characters keeps a width in which it can be read.
_LONG = 40


@dataclass(frozen=True, slots=True)
class Visitor:
    """The caller that a page is made for: `name` is None without a credential."""

    name: str | None


def page(title: str, up: str, body: str, *, here: str = "", console: bool = False, top: str = "") -> str:
    """A page. `up`: the gateway as a relative URL, without a slash at its end. `here`: the place of the page
    in the navigation. `console`: whether there is one. `top`: HTML at the end of the navigation."""
    places = (*(_CONSOLE if console else ()), _API)
    links = "".join(
        f'<li><a href="{up}/{place}"{_current(place == here)}>{name}</a></li>' for place, name in places
    )
    header = f'<header><nav aria-label="Pages"><ul>{links}</ul></nav>{top}</header>\n'
    return _FRAME.format(title=escape(title), up=up, top=header, body=body)


def console_page(title: str, up: str, here: str, visitor: Visitor, body: str) -> str:
    """A page of the console, with who is signed in."""
    if visitor.name is None:
        signed = f'<div><a href="{up}/console/sign-in">Sign in</a></div>'
    else:
        signed = (
            f'<form class="inline" method="post" action="{up}/console/sign-out"><span>{escape(visitor.name)}'
            '</span> <button type="submit">Sign out</button></form>'
        )
    return page(title, up, body, here=here, console=True, top=signed)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. The cells are HTML already."""
    top = "".join(f'<th scope="col">{escape(one)}</th>' if one else "<td></td>" for one in head)
    lines = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    body = f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"
    return f'<div class="wide" tabindex="0" role="group" aria-label="Table">\n{body}\n</div>'


def _cell(content: str) -> str:
    is_long = len(content) > _LONG and "<" not in content
    return f'<td class="long">{content}</td>' if is_long else f"<td>{content}</td>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with values, which are HTML already."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def size(count: float | None) -> str:
    """A number of bytes, for people."""
    if count is None:
        return "–"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _current(is_here: bool) -> str:
    return ' aria-current="page"' if is_here else ""
