"""A registry document elsewhere: at a URL, in an object store, or at another gateway.

It is read, never written. Servers with entity tags (HTTP, object stores) do not send an unchanged document
again. fsspec reads everything except HTTP. Knows how to get bytes; `document` parses them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import fsspec
import httpx

from gateway import backoff, tracing
from gateway.filesystems import asked, connected
from gateway.registries import document
from gateway.registries.base import (
    RegistryError,
    RegistryInvalid,
    RegistryUnavailable,
    Snapshot,
)
from gateway.registries.deadline import Deadline
from gateway.registries.halves import ReadOnly, Whole

TIMEOUT: Final = 10.0
DEADLINE: Final = 30.0
MAX_BYTES: Final = 512 * 1024**2


class RemoteRegistry(Whole, ReadOnly):
    """The document at a URL. Credentials in the URL (a user, a signature in the query) are used but never
    shown. Raises RegistryError for a scheme that is not supported here."""

    poll_interval = 5.0

    def __init__(self, target: str, *, create: bool = False) -> None:
        parts = urlsplit(target)
        form = "json" if parts.path.lower().endswith(".json") else "yaml"
        self._last: Snapshot | None = None
        self._etag: str | None = None
        self._lock = threading.Lock()
        self._read: Callable[[], bytes | None]
        is_http = parts.scheme in ("http", "https")
        user, at, host = parts.netloc.rpartition("@")
        # Elsewhere than in HTTP the user may be a container, as in abfs://CONTAINER@ACCOUNT.
        shown = host if is_http else user.partition(":")[0] + at + host
        #: What is requested, and the same as it is shown.
        self._url = self.target = target
        if shown != parts.netloc or parts.query or parts.fragment:
            shown_query = "…" if parts.query else ""
            self.target = urlunsplit(parts._replace(netloc=shown, query=shown_query, fragment=""))
        if is_http:
            auth = (parts.username, parts.password or "") if parts.username else None
            self._url = urlunsplit(parts._replace(netloc=host, fragment=""))
            self._client = httpx.Client(
                timeout=TIMEOUT,
                follow_redirects=True,
                max_redirects=3,
                auth=auth,
                limits=httpx.Limits(max_keepalive_connections=0),  # each call can be ended alone
            )
            self._read = self._over_http
        else:
            try:
                fsspec.get_filesystem_class(parts.scheme)
            except (ImportError, ValueError) as error:
                raise RegistryError(f"{self.target} cannot be read here: {error}") from error
            #: The file system and the path in it; None: not connected.
            self._place: tuple[Any, str] | None = None
            self._read = self._through_fsspec
        self._base = urlunsplit(urlsplit(self._url)._replace(query="", fragment="")).rpartition("/")[0]
        self._json = document.Reader("json", self.target)
        self._reader = self._json if form == "json" else document.Reader("yaml", self.target)
        query = hashlib.sha256(parts.query.encode()).hexdigest()[:16] if parts.query else ""
        self.identity = f"remote:{self.target.removesuffix('…')}{query}"
        self.why_not = f"{self.target} cannot be written from here: change the document at its source"

    def __repr__(self) -> str:
        return f"<RemoteRegistry {self.target}>"

    def read(self) -> Snapshot:
        with self._lock:  # the entity tag, the snapshot and the reader belong together
            return self._read_again()

    def _read_again(self) -> Snapshot:
        content = self._read()
        if content is None and self._last is not None:
            return self._last
        assert content is not None
        stamp = hashlib.sha256(content).hexdigest()
        if self._last is None or self._last.stamp != stamp:
            try:
                self._last = Snapshot(self._models(content), stamp)
            except RegistryInvalid:
                self._etag = None  # that this document has not changed says nothing of the last valid one
                raise
        return self._last

    def _models(self, content: bytes) -> Mapping[str, Any]:
        if content.lstrip()[:1] == b"{" and self._reader is not self._json:
            try:
                return self._json.read(content, self._base)  # which is many times faster
            except RegistryInvalid:
                pass  # YAML in flow style, or what is wrong will be said of it as YAML
        return self._reader.read(content, self._base)

    def _over_http(self) -> bytes | None:
        """The document; None if it has not changed."""
        headers = {"If-None-Match": self._etag} if self._etag and self._last is not None else {}
        sent = headers | tracing.headers()
        deadline = Deadline(DEADLINE)
        try:
            with (
                deadline,
                self._client.stream(
                    "GET", self._url, headers=sent, extensions={"trace": deadline.trace}
                ) as response,
            ):
                if response.status_code == 304 and headers:
                    return None
                if response.status_code != 200:
                    asked = backoff.retry_after(response.headers.get("retry-after"))
                    raise RegistryUnavailable(f"{self.target} answered {response.status_code}", asked)
                chunks, size = [], 0
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > MAX_BYTES:
                        raise RegistryUnavailable(f"{self.target} is larger than {MAX_BYTES >> 20} MiB")
        except httpx.HTTPError as error:
            if not deadline.passed:
                reason = str(error) or type(error).__name__
                raise RegistryUnavailable(f"{self.target} cannot be read: {reason}") from error
        if deadline.passed:  # what came may be a part
            raise RegistryUnavailable(f"{self.target} did not come within {DEADLINE:g} s")
        self._etag = response.headers.get("etag")
        return b"".join(chunks)

    def _through_fsspec(self) -> bytes | None:
        """The document; None if its entity tag in the store has not changed."""
        try:
            if self._place is None:
                # Some keep a connection that broke.
                self._place = connected(self._url, skip_instance_cache=True)
            files, path = self._place
            files.invalidate_cache()
            info = asked(files, "info", TIMEOUT, path)
            etag = info.get("ETag") or info.get("etag")
            if etag is not None and etag == self._etag and self._last is not None:
                return None
            content: bytes = asked(files, "cat_file", DEADLINE, path)
        except FileNotFoundError:
            raise RegistryUnavailable(f"{self.target} does not exist") from None
        except Exception as error:  # each file system raises the errors of its own library
            self._place = None
            problem = f"{self.target} cannot be read: {type(error).__name__}: {error}"
            raise RegistryUnavailable(problem) from error
        self._etag = etag  # of the document before the read: a later change is read again
        return content

    def close(self) -> None:
        if self._read == self._over_http:
            self._client.close()
