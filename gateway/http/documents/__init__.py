"""What a person and a program can read about the gateway and its models: OpenAPI, and pages with a form.

`/openapi.json` and `/docs` are about the service, `/models/REFERENCE/openapi.json` and `…/docs` about the
model that answers for the reference now. A document is made once for each version. Everything that a page
needs is served here: it requests nothing from other hosts. Knows paths, headers and who may see the saved
example.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qs

import orjson
from starlette.types import Receive, Scope, Send

from gateway import __version__, names
from gateway.errors import Problem
from gateway.http import problems, wholebodies
from gateway.http.documents import openapi, pages, service
from gateway.http.problems import JSON, Header
from gateway.views.paging import Page

if TYPE_CHECKING:
    from gateway.http.parts import Parts
    from gateway.names import Reference
    from gateway.record import RequestRecord
    from gateway.views.contents import Described

MODELS: Final = b"/models/"
OPENAPI: Final = b"/openapi.json"
DOCS: Final = b"/docs"
ASSETS: Final = b"/docs/"

#: So many models are on a page.
SHOWN: Final = 100
#: So many documents of versions are kept.
KEPT: Final = 256

HTML: Final[Header] = (b"content-type", b"text/html; charset=utf-8")
_FILES: Final = {"page.css": b"text/css; charset=utf-8", "page.js": b"text/javascript; charset=utf-8"}
SAFE: Final[tuple[Header, ...]] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Found(NamedTuple):
    """A document, ready to be sent."""

    body: bytes
    etag: bytes
    kind: Header
    private: bool = False


def is_here(path: bytes) -> bool:
    """Returns True if a raw path is one of these."""
    if path.startswith(MODELS):
        return path[len(MODELS) :].endswith((OPENAPI, DOCS))
    return path in (OPENAPI, DOCS) or path.startswith(ASSETS)


class Documents:
    """Answers every path for which `is_here` is true."""

    def __init__(self, parts: Parts) -> None:
        self._views = parts.views
        self._access = parts.access
        self._console = parts.settings.console
        self._files = {
            name: _found((Path(__file__).parent / name).read_bytes(), (b"content-type", kind))
            for name, kind in _FILES.items()
        }
        self._service: Found | None = None
        self._kept: dict[tuple[Any, ...], tuple[dict[str, Any], Found]] = {}

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Answers one request. `path` is the raw path, without the mount point."""
        record: RequestRecord = scope[problems.RECORD]
        try:
            problems.check_headers(record)
            if scope["method"] not in ("GET", "HEAD"):
                await problems.respond_not_allowed(send, record, scope["method"], "GET, HEAD")
                return
            found = await self._find(record, path, scope.get("query_string", b""))
            head = [found.kind, *SAFE, (b"etag", found.etag), (b"x-request-id", record.id)]
            head.append((b"cache-control", b"private, no-cache" if found.private else b"no-cache"))
            head.append((b"vary", b"authorization"))
            asked = record.headers.get(b"if-none-match", b"")
            if found.etag in [one.strip().removeprefix(b"W/") for one in asked.split(b",")]:
                await send({"type": "http.response.start", "status": 304, "headers": head[1:]})
                await send({"type": "http.response.body", "body": b""})
                return
            await problems.respond(send, 200, head, found.body)
        except Exception as error:  # noqa: BLE001 - nothing may reach the server without an answer
            problem = error if isinstance(error, Problem) else problems.unexpected(error, record.id)
            await problems.respond_problem(send, problem, record)

    async def _find(self, record: RequestRecord, path: bytes, query: bytes = b"") -> Found:
        if path.startswith(MODELS):
            rest = path[len(MODELS) :]
            ending = OPENAPI if rest.endswith(OPENAPI) else DOCS
            return await self._of_model(record, names.parse_path(rest.removesuffix(ending)), ending == DOCS)
        if path == OPENAPI:
            if self._service is None:
                self._service = _found(orjson.dumps(service.document(self._console)), JSON)
            return self._service
        if path == DOCS:
            return await self._index(record, query)
        file = self._files.get(path[len(ASSETS) :].decode("latin-1"))
        if file is None:
            raise problems.not_found()
        return file

    async def _index(self, record: RequestRecord, query: bytes) -> Found:
        asked = parse_qs(query.decode("latin-1"))
        after, search = (next(iter(asked.get(name, ())), None) for name in ("after", "q"))
        listed = await self._views.names(Page(SHOWN, after, search, self._access.reads(record)))
        models = [model async for part in self._views.models(listed) for model in part]
        html = pages.index(models, service.routes(self._console), search or "", listed.next, self._console)
        found = _found(html.encode(), HTML)
        return found._replace(private=self._access.guarded)

    async def _of_model(self, record: RequestRecord, reference: Reference, page: bool) -> Found:
        self._access.read(record, reference.name)
        described = await self._views.described(reference)
        in_full = self._access.controls(record, reference)
        # A load may show that the model accepts more than its package says.
        accepted = described.prepared.accepted is not None
        key = (reference, described.version, described.alias, accepted, in_full)
        kept = self._kept.get(key)
        if kept is None:
            document = await self._document(reference, described, in_full)
            # A signature may have many columns: large documents take seconds.
            text = await asyncio.to_thread(orjson.dumps, document)
            kept = document, _found(text, JSON, private=in_full)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = kept
        document, found = kept
        if not page:
            return found
        view = await self._views.model(reference.name)
        shown = view if self._access.sees_all(record) else view.without_others()
        html = pages.model(document, reference, described, shown, self._console)
        return _found(html.encode(), HTML, private=in_full or self._access.guarded)

    async def _document(self, reference: Reference, described: Described, in_full: bool) -> dict[str, Any]:
        version = described.version
        example = None
        if in_full:
            view = await self._views.version(version.name, version.version, in_full=True)
            example = view.input_example if isinstance(view.input_example, dict) else None
        signature = described.prepared.signature
        return await asyncio.to_thread(
            openapi.model,
            version.name,
            version.version,
            described.alias,
            signature,
            reference=reference,
            up=up(reference),
            raw=wholebodies.media_types(signature),
            example=None if example is None else {k: v for k, v in example.items() if v is not None},
        )


def up(reference: Reference) -> str:
    """The gateway, as a relative URL from a document of the model."""
    return "../../../.." if reference.version is not None else "../.."


def _found(body: bytes, kind: Header, *, private: bool = False) -> Found:
    tag = hashlib.sha256(body + __version__.encode()).hexdigest()[:32]
    return Found(body, f'"{tag}"'.encode(), kind, private)
