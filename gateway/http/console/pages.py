"""The console's pages as HTML: overview, rollouts, failures, sign-in.

What a model, a registry or a client named is escaped, all of it. Everything can be read without JavaScript,
and every verb is a form. Knows views and HTML; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

from gateway.http.documents.frame import Visitor, console_page, facts, size, table
from gateway.names import Reference, url_path
from gateway.quantities import shown_seconds
from gateway.views.shapes import Absent

if TYPE_CHECKING:
    from gateway.views import ModelView, ReadinessView, RolloutView, VersionView
    from gateway.views.troubles import Trouble

#: The durations of a rollout policy.
_DURATIONS: Final = frozenset({"deleted_grace", "every", "watch", "within"})

_FIRST = 5
#: Which models the overview may list.
SHOWN: Final = {"": "All", "loaded": "Loaded", "problems": "With problems"}


def overview(
    ready: ReadinessView,
    loaded: Sequence[VersionView],
    troubles: Sequence[Trouble],
    models: Sequence[ModelView],
    search: str,
    show: str,
    after: str | None,
    visitor: Visitor,
    whole: bool,
) -> str:
    """`show`: which models, a key of `SHOWN`. `whole`: the visitor may know of all models, and so the
    totals."""
    parts = ["<h1>Model gateway</h1>", _readiness(ready)]
    if troubles:
        parts.append(f'<h2 id="problems">Problems ({len(troubles)})</h2>')
        parts.append(_troubles(troubles[:_FIRST], "."))
        if len(troubles) > _FIRST:
            parts.append('<p><a href="console/failures">All problems, with what to do</a></p>')
    if whole:
        parts.append(_totals(ready.memory, loaded))
    parts.append(f"<h2>Loaded ({len(loaded)})</h2>")
    parts.append(_loaded(loaded) if loaded else "<p>No model is loaded; the first request loads one.</p>")
    parts.append("<h2>Models</h2>")
    parts.append(
        '<form action="." method="get" role="search"><p><label for="q">Part of the name</label>'
        f'<input id="q" name="q" type="search" value="{escape(search)}"></p>'
        f'<p><label for="show">Which models</label><select id="show" name="show">{_choices(show)}</select> '
        '<button type="submit">Search</button></p></form>'
    )
    rows = []
    for model in models:
        aliases = ", ".join(f"{alias} → {version}" for alias, version in model.aliases.items())
        link = f'<a href="models/{url_path(Reference(model.name))}/docs">{escape(model.name)}</a>'
        states = sorted({one.state for one in model.versions if one.state != "UNLOADED"})
        rows.append([link, escape(aliases), str(len(model.versions)), ", ".join(states) or "not loaded"])
    none = f"<p>{'No such model.' if search or show else 'The registry has no models.'}</p>"
    parts.append(table(["Model", "Aliases", "Versions", "State"], rows) if rows else none)
    parts.append(_next(".", search, after, "More models", show))
    return console_page("Model gateway", ".", "", visitor, "\n".join(parts))


def _choices(chosen: str) -> str:
    return "".join(
        f'<option value="{value}"{" selected" if value == chosen else ""}>{text}</option>'
        for value, text in SHOWN.items()
    )


def _readiness(ready: ReadinessView) -> str:
    age = ready.registry.get("age_seconds")
    read = "was not read yet" if age is None else f"was read {float(age):.0f} s ago"
    state = "ready" if ready.ready else "not ready"
    text = f'<p class="state" data-ready="{str(ready.ready).lower()}">It is {state}; the registry {read}.'
    if ready.registry.get("error"):
        text += f" {escape(str(ready.registry['error']))}."
    if ready.preload_pending:
        waits = ", ".join(ready.preload_pending[:10])
        text += f" It waits for: {escape(waits)}."
    return text + "</p>"


def _totals(memory: Mapping[str, float | None], loaded: Sequence[VersionView]) -> str:
    used = sum(memory.get(state) or 0.0 for state in ("reserved", "resident", "closing"))
    limit = memory.get("limit_bytes") or 0.0
    rate = sum((one.recent or {}).get("requests_per_second", 0.0) for one in loaded)
    slow = [tail for one in loaded if (tail := (one.recent or {}).get("p99_seconds")) is not None]
    tail = f"{1e3 * max(slow):.1f} ms" if slow else "too few requests to tell"
    bar = (
        f'<meter aria-label="Memory in use" min="0" max="{limit:.0f}" value="{used:.0f}" '
        f'high="{0.9 * limit:.0f}">{size(used)}</meter> {size(used)} of {size(limit)}'
    )
    rates = ("Requests in the last minute", f"{rate:.1f} per second")
    return facts([("Memory", bar), rates, ("p99 of the slowest model", tail)])


def _loaded(loaded: Iterable[VersionView]) -> str:
    rows = []
    for one in loaded:
        recent, name = one.recent or {}, "" if isinstance(one.name, Absent) else one.name
        errors, tail = recent.get("error_rate"), recent.get("p99_seconds")
        state = one.state if one.stuck is None else f"STUCK: {one.stuck}"
        state += f" ({one.reason})" if one.reason else ""
        rows.append(
            [
                f'<a href="models/{url_path(Reference(name))}/docs">{escape(name)}</a>',
                escape(one.version),
                escape(state),
                size(one.bytes),
                f"{recent.get('requests_per_second', 0.0):.1f}",
                "–" if errors is None else f"{100 * errors:.1f} %",
                "–" if tail is None else f"{1e3 * tail:.1f}",
                escape(str((one.placement or {}).get("isolation", ""))),
            ]
        )
    head = ["Model", "Version", "State", "Memory", "Requests/s", "Errors", "p99 (ms)", "Runs in"]
    return table(head, rows)


def failures(troubles: Sequence[Trouble], visitor: Visitor) -> str:
    body = "<h1>Failures</h1>\n"
    body += _troubles(troubles, "..") if troubles else "<p>Nothing fails now.</p>"
    return console_page("Failures", "..", "console/failures", visitor, body)


def _troubles(troubles: Iterable[Trouble], up: str) -> str:
    items = []
    for one in troubles:
        place = (
            f"console/rollouts/{_alias_path(one.name, one.alias)}"
            if one.alias
            else f"models/{url_path(Reference(one.name))}/docs"
        )
        since = f" since {escape(one.since)}" if one.since else ""
        items.append(
            f'<li><a href="{up}/{place}">{escape(one.subject)}</a>: {escape(one.kind)}{since}'
            f"<p>{escape(one.text)}</p><p><strong>What to do:</strong> {escape(one.help)}</p></li>"
        )
    return f'<ul class="problems">{"".join(items)}</ul>'


def rollouts(views: Sequence[RolloutView], search: str, after: str | None, visitor: Visitor) -> str:
    rows = [
        [
            f'<a href="rollouts/{_alias_path(one.name, one.alias)}">{escape(f"{one.name}@{one.alias}")}</a>',
            escape(one.phase),
            escape(one.desired or "–"),
            escape(one.serving or "–"),
            escape(one.since or "–"),
            escape(one.error or ""),
        ]
        for one in views
    ]
    body = (
        '<h1>Rollouts</h1>\n<form action="rollouts" method="get" role="search"><p><label for="q">Part of the '
        f'model\'s name</label><input id="q" name="q" type="search" value="{escape(search)}"> '
        '<button type="submit">Search</button></p></form>'
    )
    head = ["Alias", "Phase", "Wanted", "Serving", "Since", "Reason"]
    body += table(head, rows) if rows else "<p>There is no alias.</p>"
    return console_page(
        "Rollouts", "..", "console/rollouts", visitor, body + _next("rollouts", search, after, "More")
    )


def rollout(
    view: RolloutView,
    verbs: Sequence[str],
    may_control: bool,
    visitor: Visitor,
    up: str,
    refused: str = "",
) -> str:
    """One alias. `verbs`: what can be done with the rollout under way. `up`: the gateway as a relative URL.
    `refused`: why a verb was refused."""
    name = f"{view.name}@{view.alias}"
    parts = [f"<h1>{escape(name)}</h1>"]
    if refused:
        parts.append(f'<p role="alert" class="refused">{escape(refused)}</p>')
    known = {
        "Phase": view.phase,
        "Wanted": view.desired,
        "Serving": view.serving,
        "Last good": view.last_good,
        "Since": view.since,
        "Reason": view.error,
    }
    parts.append(facts((name, escape(value)) for name, value in known.items() if value))
    if not isinstance(view.policy_error, Absent):
        parts.append(f"<p>{escape(view.policy_error)}; the gateway's own policy is used.</p>")
    course = None if isinstance(view.rollout, Absent) else view.rollout
    if verbs and may_control:
        path = _alias_path(view.name, view.alias)
        buttons = "".join(
            f'<form class="inline" method="post" action="{up}/console/rollouts/{path}/{verb}">'
            '<button type="submit">'
            f"{verb.capitalize()}</button></form> "
            for verb in verbs
        )
        parts.append(f'<h2>Control</h2><div class="verbs">{buttons}</div>')
    elif verbs:
        parts.append("<p>Sign in with control access to pause, resume, abort or finish the rollout.</p>")
    if course is not None:
        parts.append(f"<h2>Rollout of version {escape(course.version)}</h2>")
        about = {"Phase": course.phase, "Compared with": course.compared_with, "Reason": course.reason}
        parts.append(facts((name, escape(value)) for name, value in about.items() if value))
        if course.step:
            parts += ["<h3>Step</h3>", _values(course.step)]
        parts.append("<h3>Evidence</h3>")
        parts.append(_values(course.evidence) if course.evidence else "<p>There is none yet.</p>")
        if course.changes:
            parts += ["<h3>What happened</h3>", _changes(course.changes)]
    if not isinstance(view.earlier_rollouts, Absent) and view.earlier_rollouts:
        parts.append("<h2>Earlier rollouts</h2>")
        for one in view.earlier_rollouts:
            parts.append(
                f"<details><summary>Version {escape(one.version)}: {escape(one.phase)}</summary>"
                f"{_changes(one.changes)}</details>"
            )
    if not isinstance(view.policy, Absent):
        parts += ["<h2>Policy</h2>", _values(view.policy)]
    if view.history:
        rows = [
            [
                escape(one.version),
                escape(one.from_),
                escape(one.until or "now"),
                escape(one.moved_by),
                escape(one.ended_because or ""),
            ]
            for one in reversed(view.history)
        ]
        parts += ["<h2>History</h2>", table(["Version", "From", "Until", "Moved by", "Ended because"], rows)]
    parts.append(f'<p><a href="{up}/models/{url_path(Reference(view.name))}/docs">The model</a></p>')
    return console_page(name, up, "console/rollouts", visitor, "\n".join(parts))


def _changes(changes: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for one in changes:
        rest = {key: value for key, value in one.items() if key not in ("at", "phase", "evidence")}
        evidence = _flat(one.get("evidence") or {})
        told = ", ".join(f"{key}: {value}" for key, value in [*_flat(rest), *evidence])
        rows.append([escape(str(one.get("at", ""))), escape(str(one.get("phase", ""))), escape(told)])
    return table(["At", "Phase", "Evidence"], rows)


def sign_in(code: str, visitor: Visitor, refused: bool = False) -> str:
    body = "<h1>Sign in</h1>\n"
    if refused:
        body += '<p role="alert" class="refused">This code is not valid: it was used, or it is too old.</p>\n'
    if code:
        body += "<p>This browser gets the access of the one who ran <code>gateway console</code>.</p>\n"
    else:
        body += (
            "<p>Run <code>gateway console</code> where the gateway's key is, and open what it prints.</p>\n"
        )
    body += (
        '<form method="post" action="sign-in"><p><label for="code">Code</label>'
        f'<input id="code" name="code" autocomplete="off" required value="{escape(code)}"></p>'
        '<p><button type="submit">Sign in</button></p></form>'
    )
    return console_page("Sign in", "..", "console/sign-in", visitor, body)


def refusal(status: int, message: str, hint: str | None, up: str, visitor: Visitor) -> str:
    """A page for what cannot be shown."""
    body = f"<h1>{status}</h1>\n<p>{escape(message)}</p>\n"
    body += f"<p>{escape(hint)}</p>\n" if hint else ""
    if status == 401:
        place = f'<a href="{up}/console/sign-in">Sign in</a>'
        body += f"<p>{place} with a code from <code>gateway console</code>.</p>"
    return console_page(message, up, "-", visitor, body)


def _values(value: Mapping[str, Any]) -> str:
    return table(["Name", "Value"], [[escape(key), escape(told)] for key, told in _flat(value)])


def _flat(value: Any, above: str = "") -> list[tuple[str, str]]:
    """Nested JSON as pairs of a dotted name and a text."""
    if isinstance(value, Mapping):
        pairs = [_flat(item, f"{above}.{key}" if above else str(key)) for key, item in value.items()]
        return [pair for found in pairs for pair in found]
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [(above, ", ".join(_told(item, above.rpartition(".")[2]) for item in items))]


def _told(value: Any, name: str) -> str:
    """A value in the form that settings have."""
    if isinstance(value, bool):
        return str(value).lower()
    if name in _DURATIONS and isinstance(value, (int, float)):
        return shown_seconds(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _next(path: str, search: str, after: str | None, text: str, show: str = "") -> str:
    if after is None:
        return ""
    asked = {"q": search, "show": show, "after": after}
    query = urlencode({name: value for name, value in asked.items() if value})
    return f'<p><a rel="next" href="{path}?{escape(query)}">{text}</a></p>'


def _alias_path(name: str, alias: str) -> str:
    return f"{quote(name, safe='')}@{quote(alias, safe='')}"
