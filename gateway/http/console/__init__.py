"""The console: pages of the running gateway at `/` and below `/console`, the forms of their buttons, and how
a browser signs in.

A browser signs in with a one-time code and then has a cookie, which counts like the credential of the caller
who requested the code. Only pages of this gateway send it (SameSite), and each form checks where it comes
from (`Callers`). Knows paths, forms and headers; what pages look like is for `pages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from gateway import names
from gateway.errors import Problem
from gateway.http import bodies, documents, problems
from gateway.http.console import pages
from gateway.http.documents.frame import Visitor
from gateway.http.problems import JSON, Header
from gateway.views.paging import Page

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.names import Reference
    from gateway.record import RequestRecord
    from gateway.views import RolloutView

HOME: Final = b"/"
BELOW: Final = b"/console/"
CODES: Final = b"/console/codes"
SIGN_IN: Final = b"/console/sign-in"
SIGN_OUT: Final = b"/console/sign-out"
FAILURES: Final = b"/console/failures"
ROLLOUTS: Final = b"/console/rollouts"
VERBS: Final = ("pause", "resume", "abort", "finish")

_SHOWN: Final = 50
_MAX_FORM: Final = 4096
_POSTS: Final = (CODES, SIGN_IN, SIGN_OUT)


def is_here(path: bytes) -> bool:
    """Returns True if a raw path is one of the console's."""
    return path == HOME or path.startswith(BELOW)


class Console:
    """Answers every path for which `is_here` is true."""

    def __init__(self, parts: Parts) -> None:
        self._views = parts.views
        self._access = parts.access
        self._promotions = parts.promotions
        self._bodies = bodies.BodyReader(_MAX_FORM, 256 * _MAX_FORM)

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        method = scope["method"]
        is_read = method in ("GET", "HEAD")
        try:
            problems.check_headers(record)
            self._access.check_listener(record)
            writes = path in _POSTS or path.rpartition(b"/")[2].decode("latin-1") in VERBS
            allowed = "GET, HEAD, POST" if path == SIGN_IN else "POST" if writes else "GET, HEAD"
            if method not in allowed.split(", "):
                await problems.respond_not_allowed(send, record, method, allowed)
                return
            if is_read:
                query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
                asked = {name: values[0] for name, values in query.items()}
                await self._page(send, record, 200, await self._read(record, path, asked))
            else:
                await self._write(receive, send, record, path)
        except bodies.ClientLeft:
            record.code = "CLIENT_LEFT"
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
            if path == CODES:
                await problems.respond_problem(send, problem, record)
                return
            record.code = problem.code
            up = "/".join([".."] * (path.count(b"/") - 1)) or "."
            visitor = self._visitor(record)
            body = pages.refusal(problem.status, problem.message, problem.hint, up, visitor)
            await self._page(send, record, problem.status, body)

    # Pages ---------------------------------------------------------------------------------------

    async def _read(self, record: RequestRecord, path: bytes, asked: Mapping[str, str]) -> str:
        search, after = asked.get("q", ""), asked.get("after")
        visitor = self._visitor(record)
        if path == SIGN_IN:
            return pages.sign_in(asked.get("code", ""), visitor)
        reads = self._access.reads(record)
        page = Page(_SHOWN, after, search or None, reads)
        if path == HOME:
            loaded = [one for one in self._views.loaded() if reads is None or reads(str(one.name))]
            troubles = self._views.troubles(reads)
            chosen = {"loaded": {str(one.name) for one in loaded}, "problems": {one.name for one in troubles}}
            show = asked.get("show", "")
            if show in chosen:
                page = replace(page, reads=chosen[show].__contains__)
            listed = await self._views.names(page)
            models = [model async for part in self._views.models(listed) for model in part]
            ready = self._access.readiness(record, self._views.ready())
            whole = reads is None
            return pages.overview(ready, loaded, troubles, models, search, show, listed.next, visitor, whole)
        if path == FAILURES:
            return pages.failures(self._views.troubles(reads), visitor)
        if path == ROLLOUTS:
            return await self._rollouts(page, search, visitor)
        if path.startswith(ROLLOUTS + b"/"):
            return self._rollout(record, _alias(path[len(ROLLOUTS) + 1 :]))
        raise problems.not_found()

    async def _rollouts(self, page: Page, search: str, visitor: Visitor) -> str:
        found: list[RolloutView] = []
        async for part in self._views.rollouts(page):
            found += part
            if len(found) > _SHOWN:
                break
        shown = found[:_SHOWN]
        after = f"{shown[-1].name}@{shown[-1].alias}" if len(found) > _SHOWN else None
        return pages.rollouts(shown, search, after, visitor)

    def _rollout(
        self, record: RequestRecord, reference: Reference, up: str = "../..", refused: str = ""
    ) -> str:
        self._access.read(record, reference.name)
        assert reference.alias is not None
        view = self._views.rollout_in_full(reference.name, reference.alias)
        verbs: tuple[str, ...] = ()
        if view.step is not None:
            paused = bool(view.step.get("paused"))
            verbs = ("resume" if paused else "pause", "abort", "finish")
        controls = self._access.controls(record, reference)
        return pages.rollout(view, verbs, controls, self._visitor(record), up, refused)

    def _visitor(self, record: RequestRecord) -> Visitor:
        principal = self._access.principal(record)
        name = str(principal) if principal.known else None
        return Visitor(name)

    # Verbs ---------------------------------------------------------------------------------------

    async def _write(self, receive: Receive, send: Send, record: RequestRecord, path: bytes) -> None:
        body = await self._bodies.read(receive, record.headers)
        self._bodies.release(len(body))
        if path == CODES:
            principal = self._access.principal(record)
            if not principal.known:
                self._access.control(record, None)  # raises, and says which credential is needed
            code = self._access.sessions.code(principal)
            content = {"code": code, "path": f"/console/sign-in?code={code}"}
            await problems.respond(
                send, 200, [JSON, (b"x-request-id", record.id)], problems.json_line(content)
            )
            return
        if not self._access.from_here(record):
            raise Problem("FORBIDDEN", "this form was not sent by a page of this gateway")
        if path == SIGN_IN:
            given = parse_qs(body.decode("latin-1")).get("code", [""])[0].strip()
            secret = self._access.sessions.begin(given)
            if secret is None:
                await self._page(send, record, 403, pages.sign_in("", self._visitor(record), refused=True))
                return
            await self._go(send, record, b"../", f"{secret}; Max-Age=43200")
        elif path == SIGN_OUT:
            self._access.sessions.end(record.headers.get(b"cookie", b""))
            await self._go(send, record, b"../", "; Max-Age=0")
        elif path.startswith(ROLLOUTS + b"/"):
            target, _, verb = path[len(ROLLOUTS) + 1 :].rpartition(b"/")
            reference = _alias(target)
            name, alias = reference.name, reference.alias or ""
            call = f"POST {path.decode('latin-1')}"
            try:
                with self._access.audited(
                    record, call, reference, lambda: self._views.rollout(name, alias).phase
                ):
                    await self._promotions.direct(name, alias, verb.decode("latin-1"))
            except Problem as problem:
                if problem.status in (401, 403, 404):
                    raise
                record.code = problem.code
                shown = self._rollout(record, reference, "../../..", problem.message)
                await self._page(send, record, problem.status, shown)
                return
            await self._go(send, record, b"../" + target)
        else:
            raise problems.not_found()

    async def _go(self, send: Send, record: RequestRecord, place: bytes, cookie: str | None = None) -> None:
        head: list[Header] = [
            (b"location", place),
            (b"x-request-id", record.id),
            (b"cache-control", b"no-store"),
        ]
        if cookie is not None:
            name = self._access.sessions.cookie
            text = f"{name}={cookie}; Path=/; HttpOnly; SameSite=Strict"
            head.append((b"set-cookie", text.encode()))
        await problems.respond(send, 303, head, b"")

    async def _page(self, send: Send, record: RequestRecord, status: int, body: str) -> None:
        head = [
            documents.HTML,
            *documents.SAFE,
            (b"x-request-id", record.id),
            (b"cache-control", b"no-store"),
        ]
        await problems.respond(send, status, head, body.encode())


def _alias(raw: bytes) -> Reference:
    reference = names.parse_path(raw)
    if reference.alias is None:
        raise Problem("INVALID_REFERENCE", "the path names no alias", hint="console/rollouts/NAME@ALIAS")
    return reference
