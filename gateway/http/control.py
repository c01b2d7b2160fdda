"""Views and verbs over HTTP: a table of paths in front of `Views`,
`Promotions` and `Residency`.

Knows paths, queries, bodies (`schemas`) and status codes; decides nothing about a model. Paths are matched as
they came, still percent-encoded, so that `%40` and `%2F` belong to a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Detail, Problem
from gateway.http import answers, bodies, pieces, problems, schemas
from gateway.http.schemas import AnyBody
from gateway.names import Reference
from gateway.registries.webhooks import Deliveries, concerned
from gateway.rollouts.residency import LONGEST_WAIT
from gateway.usage import BY
from gateway.views import View
from gateway.views.paging import MOST, Page
from loaders.batch import Value

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.record import RequestRecord
    from gateway.rollouts.promotions import Moved

Content: TypeAlias = "View | dict[str, Any]"
Result: TypeAlias = "Content | tuple[int, Content] | Response"
Handler: TypeAlias = "Callable[[Request], Result | Awaitable[Result]]"

MAX_BODY_BYTES: Final = 64 * 1024
MAX_HELD_BYTES: Final = 16 * MAX_BODY_BYTES

WEBHOOK: Final = "/webhooks/mlflow"
EVENT_STREAM: Final = {"content-type": "text/event-stream", "cache-control": "no-cache"}
VERBS: Final = ("pause", "resume", "abort", "finish")
#: What the codes of predictions mean here.
_HINTS: Final = {
    "MALFORMED_BODY": 'the body is one JSON object, such as {"version": "2"}, or empty',
    "INVALID_INPUT": 'details names each field and what it takes; a version is a string: {"version": "2"}',
    "BODY_TOO_LARGE": f"a control call's body has at most {MAX_BODY_BYTES // 1024} KiB",
}
#: The key in a call's scope of what it asks, for the audit log.
_ASKED: Final = "gateway.asked"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})


class Control:
    """Everything that is not a prediction. A view of a model needs the right to read about it; a verb needs
    control of it."""

    def __init__(self, parts: Parts) -> None:
        self._views = parts.views
        self._promotions = parts.promotions
        self._residency = parts.residency
        self._watch = parts.watch
        self._access = parts.access
        self._draining = parts.draining
        self._usage = parts.usage
        self._feed = parts.feed
        self._captures = parts.captures
        self._rendered = parts.metrics.render
        self._deliveries = Deliveries(parts.settings.webhook_secret_file)
        self._hints: set[asyncio.Task[None]] = set()
        self._bodies = bodies.BodyReader(MAX_BODY_BYTES, MAX_HELD_BYTES)
        table: dict[str, dict[str, Handler]] = {
            "/models": {"GET": self._models},
            "/models/{name}": {"GET": self._model},
            "/models/{name}/versions/{version}": {"GET": self._version},
            "/models/{name}/aliases/{alias}": {"PUT": self._promote, "DELETE": self._delete_alias},
            "/models/{name}/aliases/{alias}/rollback": {"POST": self._rollback},
            "/models/{name}/load": {"POST": self._load},
            "/models/{name}/versions/{version}/load": {"POST": self._load},
            "/models/{name}/unload": {"POST": self._unload},
            "/models/{name}/versions/{version}/unload": {"POST": self._unload},
            "/rollouts": {"GET": self._rollouts},
            "/rollouts/{name}": {"GET": self._rollout},
            **{f"/rollouts/{{name}}/{verb}": {"POST": self._direct} for verb in VERBS},
            "/events": {"GET": self._events},
            "/captures": {"GET": self._captured, "DELETE": self._drop_captures},
            "/captures/{name}": {"GET": self._captured, "DELETE": self._drop_captures},
            "/captures/{name}/versions/{version}": {"GET": self._captured, "DELETE": self._drop_captures},
            "/registry/refresh": {"POST": self._refresh},
            "/registry.yaml": {"GET": self._document},
            WEBHOOK: {"POST": self._webhook},
            "/livez": {"GET": self._livez},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
            "/usage": {"GET": self._used},
        }
        self._router = Router(
            [
                Route(path, self._endpoint(handlers), methods=list(handlers))
                for path, handlers in table.items()
            ],
            redirect_slashes=False,
            default=_nowhere,
        )

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        # With an `app`, the router raises for a method that a path does not have.
        inner = {**scope, "app": self, "path": path.decode("latin-1"), "root_path": ""}
        try:
            await self._router(inner, receive, send)
        except bodies.ClientLeft:
            record.code = "CLIENT_LEFT"
        except HTTPException as error:  # the router's, for a method that a path does not have
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            await problems.respond_not_allowed(send, record, scope["method"], allowed)
        except Problem as problem:
            problem.hint = problem.hint or _HINTS.get(problem.code)
            await problems.respond_problem(send, problem, record)
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            await problems.respond_problem(send, problems.unexpected(error, record.id), record)

    def _endpoint(self, handlers: Mapping[str, Handler]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            method = request.method
            problems.check_headers(request.scope[problems.RECORD])
            handler = handlers["GET" if method == "HEAD" else method]
            # The webhook has its own signature.
            if method in _SAFE_METHODS or request.scope["path"] == WEBHOOK:
                result = await _done(handler(request))
            else:
                reference = _controlled(request)
                call = f"{method} {request.scope['path']}"
                standing = partial(self._standing, request.scope["path"], reference)
                record = request.scope[problems.RECORD]
                whole = request.scope["path"].startswith("/captures")
                with self._access.audited(record, call, reference, standing, whole=whole) as asked:
                    request.scope[_ASKED] = asked
                    result = await _done(handler(request))
            if not isinstance(result, Response):
                status, content = result if isinstance(result, tuple) else (200, result)
                content = content.to_json() if isinstance(content, View) else content
                result = Response(
                    answers.encode_now(Value(content)) + b"\n", status, media_type="application/json"
                )
            result.headers["x-request-id"] = request.scope[problems.RECORD].id.decode()
            return result

        return endpoint

    def _standing(self, path: str, reference: Reference | None) -> str | None:
        """How what a verb controls stands: an alias's version, a rollout's phase, a version's state."""
        if reference is None:
            return None
        if path.startswith("/rollouts/"):
            return self._views.rollout(reference.name, reference.alias or "").phase
        if "/aliases/" in path:
            return self._views.pointed(reference.name, reference.alias or "")
        return self._views.state_of(reference)

    # Views ---------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Result:
        page = self._page(request)
        listed = await self._views.names(page)
        parts = []
        async for models in self._views.models(listed):
            shown = models if page.reads is None else [model.without_others() for model in models]
            parts.append(pieces.items(shown))
        rest: dict[str, Any] = {"writable": self._views.writable}
        return pieces.json_list(
            "models", parts, rest if page.limit is None else {**rest, "next": listed.next}
        )

    async def _model(self, request: Request) -> Result:
        name, record = _name(request), request.scope[problems.RECORD]
        self._access.read(record, name)
        view = await self._views.model(name)
        return view if self._access.sees_all(record) else view.without_others()

    async def _version(self, request: Request) -> Result:
        reference = _reference(request)
        assert reference.version is not None
        record = request.scope[problems.RECORD]
        self._access.read(record, reference.name)
        in_full = self._access.controls(record, reference)
        view = await self._views.version(reference.name, reference.version, in_full=in_full)
        return view if self._access.sees_all(record) else view.without_others()

    async def _rollouts(self, request: Request) -> Result:
        page = self._page(request)
        if page.after is not None and "@" not in page.after:
            raise _invalid("?after", "is no NAME@ALIAS", "the `next` of the page before")
        control = self._access.controls(request.scope[problems.RECORD], None)
        rest = self._views.sharing(addresses=control)
        parts, count, last = [], 0, None
        async for rollouts in self._views.rollouts(page):
            if page.limit is not None and count + len(rollouts) > page.limit:
                rollouts = rollouts[: page.limit - count]
                last = f"{rollouts[-1].name}@{rollouts[-1].alias}" if rollouts else last
                parts.append(pieces.items(rollouts))
                return pieces.json_list("rollouts", parts, {**rest, "next": last})
            if rollouts:
                parts.append(pieces.items(rollouts))
                count, last = count + len(rollouts), f"{rollouts[-1].name}@{rollouts[-1].alias}"
        return pieces.json_list("rollouts", parts, rest if page.limit is None else {**rest, "next": None})

    def _page(self, request: Request) -> Page:
        """`?limit=50&after=NAME&q=TEXT`. Raises INVALID_INPUT, and UNAUTHENTICATED where a credential is
        needed."""
        given = dict(request.query_params)
        for name in given:
            if name not in ("limit", "after", "q") or len(request.query_params.getlist(name)) > 1:
                hint = "known here, once each: ?limit, ?after, ?q"
                raise _invalid(f"?{name[:64]}", "is not known", "limit, after or q", hint=hint)
        limit = given.get("limit")
        is_number = limit is not None and len(limit) <= 9 and limit.isascii() and limit.isdigit()
        if limit is not None and not (is_number and 0 < int(limit) <= MOST):
            raise _invalid("?limit", "is not a number of items", f"1 to {MOST}")
        reads = self._access.reads(request.scope[problems.RECORD])
        return Page(None if limit is None else int(limit), given.get("after"), given.get("q") or None, reads)

    def _rollout(self, request: Request) -> Result:
        reference = _reference(request)
        if reference.alias is None:
            raise Problem("INVALID_REFERENCE", "the path names no alias", hint="GET /rollouts/NAME@ALIAS")
        record = request.scope[problems.RECORD]
        self._access.read(record, reference.name)
        view = self._views.rollout_in_full(reference.name, reference.alias)
        if self._access.controls(record, reference):
            view = replace(view, calls=self._access.calls(reference.name, reference.alias))
        return view

    def _livez(self, request: Request) -> Result:
        return {"alive": True}

    def _readyz(self, request: Request) -> Result:
        view = self._access.readiness(request.scope[problems.RECORD], self._views.ready())
        if self._draining():
            view = view.stopping()
        return (200 if view.ready else 503), view

    async def _metrics(self, request: Request) -> Result:
        self._access.operate(request.scope[problems.RECORD])
        text, content_type = await self._rendered(request.headers.get("accept", ""))
        return pieces.Pieces(text, content_type)

    async def _used(self, request: Request) -> Result:
        self._access.operate(request.scope[problems.RECORD])
        given = request.query_params.get("by", ",".join(BY))
        by = tuple(part.strip() for part in given.split(",") if part.strip())
        if request.query_params.keys() - {"by"} or set(by) - set(BY):
            hint = "?by=team, ?by=model or ?by=team,model"
            raise _invalid("?by", "is not known", "team, model or both", hint=hint)
        await self._usage.look()
        return await self._usage.view(by)

    # Verbs ---------------------------------------------------------------------------------------

    async def _promote(self, request: Request) -> Result:
        name, alias = _alias(request)
        flags = _flags(request, "wait", "dry_run")
        body = await self._body(request, schemas.Promotion)
        moving = self._promotions.promote(
            name,
            alias,
            body.version,
            expect=body.expect,
            force=body.force,
            dry_run=flags.get("dry_run", False),
            steps=None if body.canary is None else tuple(body.canary),
            shadow=body.shadow,
        )
        async with moving as moved:
            return await self._moved(moved, flags)

    async def _rollback(self, request: Request) -> Result:
        name, alias = _alias(request)
        flags = _flags(request, "wait")
        body = await self._body(request, schemas.Rollback)
        async with self._promotions.rollback(name, alias, body.to) as moved:
            return await self._moved(moved, flags)

    async def _moved(self, moved: Moved, flags: Mapping[str, bool]) -> Result:
        """200 for a dry run, and with `wait` once the version serves here; else 202, also when its first step
        begins."""
        if not moved.written:
            return self._views.moved(moved)
        wait = LONGEST_WAIT if flags.get("wait", False) else None
        serves = await self._promotions.take_effect(moved, wait=wait)
        return (200 if serves else 202), self._views.moved(moved)

    async def _delete_alias(self, request: Request) -> Result:
        name, alias = _alias(request)
        _flags(request)
        await self._body(request, schemas.Body)
        await self._promotions.delete_alias(name, alias)
        return {"name": name, "alias": alias, "deleted": True}

    async def _load(self, request: Request) -> Result:
        reference, flags = _reference(request), _flags(request, "wait")
        await self._body(request, schemas.Body)
        wait = flags.get("wait", True)
        found = await self._residency.load(reference, wait=wait)
        if isinstance(found, tuple):
            view = replace(self._views.state(*found), name=found[0].name)
            return (200 if wait else 202), view
        return 202, self._views.rollout(found.name, found.alias)

    async def _unload(self, request: Request) -> Result:
        reference, flags = _reference(request), _flags(request, "wait")
        await self._body(request, schemas.Body)
        wait = flags.get("wait", True)
        version, servable = await self._residency.unload(reference, wait=wait)
        if version is None:
            return {"name": reference.name, "state": "UNLOADED"}
        return (200 if wait else 202), replace(self._views.state(version, servable), name=version.name)

    def _events(self, request: Request) -> Result:
        record = request.scope[problems.RECORD]
        self._access.operate(record, always=True)
        if request.method == "HEAD":
            return Response(headers=EVENT_STREAM)

        def ended() -> bool:
            return self._draining() or not self._access.still_operates(record)

        return StreamingResponse(self._feed.subscribe(ended), headers=EVENT_STREAM)

    async def _captured(self, request: Request) -> Result:
        # Captures hold real data: here a view needs what a verb needs, and is written down as one.
        record, reference = request.scope[problems.RECORD], _controlled(request)
        if reference is None:
            self._access.control(record, None)
            _flags(request)
            return await self._captures.summary()
        with self._access.audited(record, f"GET {request.scope['path']}", reference, whole=True):
            return await self._captures.export(request, *_versions(request))

    async def _drop_captures(self, request: Request) -> Result:
        _flags(request)
        await self._body(request, schemas.Body)
        name, version = _versions(request) if "name" in request.path_params else (None, None)
        return await self._captures.drop(name, version)

    async def _direct(self, request: Request) -> Result:
        reference = _reference(request)
        _flags(request)
        await self._body(request, schemas.Body)
        if reference.alias is None:
            hint = "POST /rollouts/NAME@ALIAS/VERB"
            raise Problem("INVALID_REFERENCE", "the path names no alias", hint=hint)
        verb = request.scope["path"].rpartition("/")[2]
        await self._promotions.direct(reference.name, reference.alias, verb)
        return self._views.rollout_in_full(reference.name, reference.alias)

    async def _refresh(self, request: Request) -> Result:
        _flags(request)
        await self._body(request, schemas.Body)
        await self._watch.look()
        return self._watch.status()

    async def _document(self, request: Request) -> Result:
        self._access.operate(request.scope[problems.RECORD])
        content, stamp = await self._views.document()
        headers = {"etag": f'"{stamp}"', "content-type": "application/yaml"}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    async def _webhook(self, request: Request) -> Result:
        """Answers at once; queries the registry after the answer."""
        body = await self._bodies.read(request.receive, dict(request.scope["headers"]))
        try:
            head = request.headers
            fresh = self._deliveries.accept(
                head.get("x-mlflow-delivery-id"),
                head.get("x-mlflow-timestamp"),
                head.get("x-mlflow-signature"),
                body,
            )
            reference = concerned(body) if fresh else None
        finally:
            self._bodies.release(len(body))
        if reference is not None:
            task = asyncio.get_running_loop().create_task(self._look_again(reference))
            self._hints.add(task)
            task.add_done_callback(self._hints.discard)
        return {"accepted": True, "repeated": not fresh}

    async def _look_again(self, reference: Reference) -> None:
        """Reads the registry now if the model is in use: something happened to it."""
        if self._views.follows(reference.name):
            with contextlib.suppress(Problem):  # the next poll asks again
                await self._watch.ask(reference)

    async def _body(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        """The body of a call; an empty one has no members."""
        body = await self._bodies.read(request.receive, dict(request.scope["headers"]))
        try:
            parsed = schemas.parsed(kind, bodies.decode_object(body) if body.strip() else {})
            request.scope[_ASKED].update(parsed.model_dump(exclude_unset=True))
            return parsed
        finally:
            self._bodies.release(len(body))


async def _done(result: Result | Awaitable[Result]) -> Result:
    return await result if inspect.isawaitable(result) else result


def _invalid(
    path: str, problem: str, expected: str, got: str | None = None, hint: str | None = None
) -> Problem:
    detail = Detail(path, problem, expected, got)
    return Problem("INVALID_INPUT", f"{path} {problem}", details=[detail], hint=hint)


def _flags(request: Request, *allowed: str) -> dict[str, bool]:
    """The query as flags: `?wait`, `?wait=true`, `?wait=false`. Raises INVALID_INPUT."""
    flags: dict[str, bool] = {}
    for name, value in request.query_params.multi_items():
        if name not in allowed:
            hint = f"known here: {', '.join(f'?{flag}' for flag in allowed)}" if allowed else "leave it out"
            raise _invalid(f"?{name[:64]}", "is not known", " or ".join(allowed) or "no query", hint=hint)
        if value.lower() not in ("", "true", "false"):
            hint = f"write ?{name}=true or ?{name}=false"
            raise _invalid(f"?{name}", "has the wrong type", "true or false", hint=hint)
        flags[name] = value.lower() != "false"
    request.scope.get(_ASKED, {}).update(flags)
    return flags


def _reference(request: Request) -> Reference:
    """NAME, NAME@ALIAS or NAME/versions/VERSION of the raw path. Raises INVALID_REFERENCE."""
    raw = request.path_params["name"].encode("latin-1")
    if (version := request.path_params.get("version")) is not None:
        raw += b"/versions/" + version.encode("latin-1")
    return names.parse_path(raw)


def _controlled(request: Request) -> Reference | None:
    """What a verb controls: the alias or version that the path names, else the model; None: the gateway."""
    if "name" not in request.path_params:
        return None
    if "alias" in request.path_params:
        name, alias = _alias(request)
        return Reference(name, alias=alias)
    return _reference(request)


def _versions(request: Request) -> tuple[str, str | None]:
    """NAME or NAME/versions/VERSION of the raw path. Raises INVALID_REFERENCE."""
    if request.path_params.get("version") is None:
        return _name(request), None
    reference = _reference(request)
    return reference.name, reference.version


def _name(request: Request) -> str:
    reference = _reference(request)
    if reference.alias is not None:
        raise Problem(
            "INVALID_REFERENCE", "this path takes a name without alias", hint="an @ in a name is written %40"
        )
    return reference.name


def _alias(request: Request) -> tuple[str, str]:
    name = _name(request)
    raw = request.path_params["alias"].encode("latin-1")
    if b"@" in raw:
        raise names.InvalidReference("an alias holds no @")
    alias = names.parse_path(b"x@" + raw).alias
    assert alias is not None
    return name, alias


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise problems.not_found()
