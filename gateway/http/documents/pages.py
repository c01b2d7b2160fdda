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
from gateway.http.documents.frame import page, size, table
from gateway.http.documents.service import Route
from gateway.names import Reference, url_path
from loaders.schema import ColSpec, ParamSpec, TensorSpec

if TYPE_CHECKING:
    from gateway.views import ModelView
    from gateway.views.contents import Described

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
<pre id="answer" role="group" tabindex="0" aria-labelledby="answer-title"></pre>
<noscript><p>The form needs JavaScript; the commands below do not.</p></noscript>
"""


def index(
    models: Sequence[ModelView],
    routes: Iterable[Route],
    search: str = "",
    after: str | None = None,
    console: bool = False,
) -> str:
    """A page of models with their own pages, and all routes. `search`: what their names hold; `after`: what
    the next page comes after."""
    rows = []
    for model in models:
        place = f"models/{url_path(Reference(model.name))}/docs"
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model.aliases.items())
        numbers = ", ".join(version.version for version in model.versions)
        rows.append([f'<a href="{escape(place)}">{escape(model.name)}</a>', escape(aliases), escape(numbers)])
    body = "<h1>Models</h1>\n" + _SEARCH.format(search=escape(search))
    none = "<p>No model has such a name.</p>" if search else "<p>The registry has no models.</p>"
    body += table(["Model", "Aliases", "Versions"], rows) if rows else none
    if after is not None:
        query = escape(urlencode({"q": search, "after": after} if search else {"after": after}))
        body += f'\n<p><a href="docs?{query}" rel="next">More models</a></p>'
    body += '\n<h2>Routes</h2>\n<p>As OpenAPI: <a href="openapi.json">openapi.json</a>.</p>\n'
    said = [
        [f"<code>{route.method.upper()}</code>", f"<code>{escape(route.path)}</code>", escape(route.summary)]
        for route in routes
    ]
    return page(
        "Model gateway",
        ".",
        body + table(["Method", "Path", "What it does"], said),
        here="docs",
        console=console,
    )


def model(
    document: Mapping[str, Any],
    reference: Reference,
    described: Described,
    view: ModelView,
    console: bool = False,
) -> str:
    """One model: its aliases and versions, its signature, examples in each form, the form to try it, and the
    same call as commands. `console`: whether there are pages of rollouts."""
    version = described.version
    signature = described.prepared.signature
    up = document["servers"][0]["url"]
    target = f"{up}/predict/{url_path(reference)}"
    title = f"{version.name}, version {version.version}"
    parts = [
        "" if console else f'<p><a href="{up}/docs">All models</a></p>',
        f"<h1>{escape(version.name)}</h1>",
        f"<p>{escape(document['info']['description'])} As OpenAPI: "
        f'<a href="openapi.json">openapi.json</a>.</p>',
    ]
    parts += _aliases(view, up if console else None)
    parts += ["<h2>Versions</h2>", _versions(view)]
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
    parts.append("<h2>Commands</h2>\n<p>GATEWAY stands for the URL of the gateway.</p>")
    target = url_path(reference)
    told = [(name, openapi.curl(target, value)) for name, value in json_bodies.items()]
    for value in [*json_bodies.values()][:1]:
        told.append(("Python", _python(target, value)))
    if (v2 := openapi.v2_example(signature)) is not None:
        told.append(("Open Inference Protocol (V2)", openapi.curl(target, v2, "v2/models/", "/infer")))
    parts += [f'<h3>{escape(name)}</h3>\n<pre tabindex="0">{escape(text)}</pre>' for name, text in told]
    return page(title, up, "\n".join(parts), here="models", console=console)


def _python(target: str, value: Mapping[str, Any]) -> str:
    return (
        "import requests\n\n"
        f'answer = requests.post(GATEWAY + "/predict/{target}", json={value!r})\n'
        "answer.raise_for_status()\n"
        'print(answer.json()["predictions"])'
    )


def _aliases(view: ModelView, up: str | None) -> list[str]:
    """The aliases with what they served. `up`: the gateway, where there are pages of rollouts."""
    rollouts = view.rollouts if isinstance(view.rollouts, Mapping) else {}
    rows, served = [], []
    for alias, version in view.aliases.items():
        shown = escape(alias)
        if up is not None:
            place = url_path(Reference(view.name, alias=alias))
            shown = f'<a href="{up}/console/rollouts/{escape(place)}">{shown}</a>'
        found = rollouts.get(alias)
        if found is None:
            rows.append([shown, escape(version), "", "", ""])
            continue
        cells = (found.serving or "–", found.phase, found.error or "")
        rows.append([shown, escape(version), *map(escape, cells)])
        served += [
            [escape(cell) for cell in (alias, one.version, one.from_, one.until or "now", one.moved_by)]
            for one in reversed(found.history)
        ]
    if not rows:
        return []
    parts = ["<h2>Aliases</h2>", table(["Alias", "Wanted", "Serving", "Phase", "Reason"], rows)]
    if served:
        parts.append("<h3>What they served</h3>")
        parts.append(table(["Alias", "Version", "From", "Until", "Moved by"], served))
    return parts


def _versions(view: ModelView) -> str:
    rows = []
    for one in reversed(view.versions):
        state = f"{one.state}: {one.reason}" if one.reason else one.state
        place = one.environment.get("place", "") if isinstance(one.environment, Mapping) else ""
        warnings = "; ".join(one.warnings) if isinstance(one.warnings, list) else ""
        digest = "–" if one.digest is None else f"{one.digest[:19]}…"
        cells = (one.version, state, size(one.bytes), str(place) or "–", digest, one.created or "–", warnings)
        rows.append([escape(cell) for cell in cells])
    return table(["Version", "State", "Memory", "Environment", "Digest", "Made", "Warnings"], rows)


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
        return table(["Name", "Type"], [row[:2] for row in rows])
    return table(["Name", "Type", "Required"], rows)


def _params(specs: Sequence[ParamSpec]) -> str:
    rows = [
        [
            escape(spec.name),
            escape(f"{spec.type}{'' if spec.shape is None else '[]'}"),
            escape(json.dumps(spec.default, default=str)),
        ]
        for spec in specs
    ]
    return table(["Name", "Type", "Default"], rows)
