"""The pages as HTML: all models and routes, and one model with a form to try it.

What a model or a registry named is escaped, all of it. Without JavaScript a page can be read; with it
(`page.js`) the form sends. Knows documents (`openapi`) and HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from gateway.http.documents import openapi
from gateway.http.documents.service import Route
from gateway.names import Reference, url_path
from loaders.schema import ColSpec, ParamSpec, TensorSpec

if TYPE_CHECKING:
    from gateway.views import ModelView
    from gateway.views.contents import Described

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
<main>
{body}
</main>
</body>
</html>
"""

_BARE = (
    " It is a model file without an MLmodel: what the file states of its inputs is known once it is loaded."
)
_SEARCH = """<form action="docs" method="get" role="search">
<p><label for="q">Part of the name</label>
<input id="q" name="q" type="search" value="{search}">
<button type="submit">Search</button></p>
</form>
"""
_FORM = """<h2 id="try">Try it</h2>
<form id="ask" data-target="{target}">
<p><label for="form">Form of the body</label>
<select id="form">{options}</select></p>
<p><label for="body">Body</label>
<textarea id="body" rows="12" spellcheck="false">{first}</textarea></p>
<p><label for="key">Key, where the gateway asks for one</label>
<input id="key" type="password" autocomplete="off"></p>
<p><button type="submit">Send</button></p>
</form>
<h3 id="answer-title">Answer</h3>
<p id="status" role="status" aria-live="polite">Nothing was sent yet.</p>
<pre id="answer" tabindex="0" aria-labelledby="answer-title"></pre>
<noscript><p>The form needs JavaScript; the commands below do not.</p></noscript>
"""


def index(
    models: Sequence[ModelView], routes: Iterable[Route], search: str = "", after: str | None = None
) -> str:
    """A page of models with their own pages, and all routes. `search`: what their names hold; `after`: what
    the next page comes after."""
    rows = []
    for model in models:
        page = f"models/{url_path(Reference(model.name))}/docs"
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model.aliases.items())
        numbers = ", ".join(version.version for version in model.versions)
        rows.append([f'<a href="{escape(page)}">{escape(model.name)}</a>', escape(aliases), escape(numbers)])
    body = "<h1>Models</h1>\n" + _SEARCH.format(search=escape(search))
    none = "<p>No model has such a name.</p>" if search else "<p>The registry has no models.</p>"
    body += _table(["Model", "Aliases", "Versions"], rows) if rows else none
    if after is not None:
        query = escape(urlencode({"q": search, "after": after} if search else {"after": after}))
        body += f'\n<p><a href="docs?{query}" rel="next">More models</a></p>'
    body += '\n<h2>Routes</h2>\n<p>As OpenAPI: <a href="openapi.json">openapi.json</a>.</p>\n'
    said = [
        [f"<code>{route.method.upper()}</code>", f"<code>{escape(route.path)}</code>", escape(route.summary)]
        for route in routes
    ]
    return _page("Model gateway", ".", body + _table(["", "Path", ""], said))


def model(document: Mapping[str, Any], reference: Reference, described: Described) -> str:
    """One model: its signature, examples in each form, and the form to try it."""
    version = described.version
    signature = described.prepared.signature
    up = document["servers"][0]["url"]
    target = f"{up}/predict/{url_path(reference)}"
    title = f"{version.name}, version {version.version}"
    parts = [
        f'<p><a href="{up}/docs">All models</a></p>',
        f"<h1>{escape(version.name)}</h1>",
        f"<p>{escape(document['info']['description'])} As OpenAPI: "
        f'<a href="openapi.json">openapi.json</a>.</p>',
    ]
    if signature is None:
        known = "" if described.prepared.package.bare is None else _BARE
        parts.append(f"<p>It has no signature: it takes any input.{known}</p>")
    else:
        parts += ["<h2>Inputs</h2>", _specs(signature.inputs or (), required=True)]
        if signature.params:
            parts += ["<h2>Params</h2>", _params(signature.params)]
        if signature.outputs:
            parts += ["<h2>Outputs</h2>", _specs(signature.outputs)]
    content = document["paths"][f"/predict/{url_path(reference)}"]["post"]["requestBody"]["content"]
    json_bodies: dict[str, Any] = {
        name: example["value"] for name, example in content["application/json"].get("examples", {}).items()
    }
    texts = {f"JSON: {name}": json.dumps(value, indent=1) for name, value in json_bodies.items()}
    if "example" in content.get("text/csv", {}):
        texts["CSV"] = content["text/csv"]["example"]
    texts = texts or {"JSON": '{"inputs": []}'}
    options = "".join(_option(name, text) for name, text in texts.items())
    first = escape(next(iter(texts.values())))
    parts.append(_FORM.format(target=escape(target), options=options, first=first))
    parts.append("<h2>Commands</h2>")
    parts += [
        f'<h3>{escape(name)}</h3>\n<pre tabindex="0">{escape(openapi.curl(url_path(reference), value))}</pre>'
        for name, value in json_bodies.items()
    ]
    return _page(title, up, "\n".join(parts))


def _option(name: str, text: str) -> str:
    kind = "text/csv" if name == "CSV" else "application/json"
    return f'<option data-type="{kind}" data-body="{escape(text)}">{escape(name)}</option>'


def _specs(specs: Sequence[ColSpec | TensorSpec], *, required: bool = False) -> str:
    """Inputs or outputs. `required`: with a column that says which must be there."""
    rows = []
    for place, spec in enumerate(specs):
        name = str(place) if spec.name is None else str(spec.name)
        if isinstance(spec, TensorSpec):
            shape = ", ".join("any" if length == -1 else str(length) for length in spec.shape)
            rows.append([escape(name), escape(f"{spec.dtype.name} [{shape}]"), "yes"])
        else:
            rows.append([escape(name), escape(str(spec.type)), "yes" if spec.required else "no"])
    if not required:
        return _table(["Name", "Type"], [row[:2] for row in rows])
    return _table(["Name", "Type", "Required"], rows)


def _params(specs: Sequence[ParamSpec]) -> str:
    rows = [
        [
            escape(spec.name),
            escape(f"{spec.type}{'' if spec.shape is None else '[]'}"),
            escape(json.dumps(spec.default, default=str)),
        ]
        for spec in specs
    ]
    return _table(["Name", "Type", "Default"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. The cells are HTML already."""
    top = "".join(f'<th scope="col">{escape(one)}</th>' if one else "<td></td>" for one in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"
    return f'<div class="wide" tabindex="0">\n{table}\n</div>'


def _page(title: str, up: str, body: str) -> str:
    return _FRAME.format(title=escape(title), up=up, body=body)
