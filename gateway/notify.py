"""Notifications: signed JSON, posted to the operator's URLs when an alias serves a new version, or does not.

The signature is that of https://www.standardwebhooks.com, so its libraries verify it: the headers
`webhook-id`, `webhook-timestamp` and `webhook-signature`, an HMAC-SHA256 over `ID.TIMESTAMP.BODY`. A delivery
that fails is tried again, the oldest first, for a day; one that its receiver refuses (4xx) does not hold up
the next ones. What is not delivered is in the durable state, so a restart continues with it; a receiver may
therefore get one twice, with the same id.

Knows events and URLs. Nothing waits for a notification, and no secret, URL path or row is logged.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import orjson

from gateway import backoff
from gateway.events import Event, RolloutChanged, Swapped, SwapRefused
from gateway.outbox import Outbox, Undelivered
from gateway.rollout_settings import Notify

log = logging.getLogger("gateway.notify")

#: A delivery takes at most this long, in seconds.
TIMEOUT: Final = 10.0
#: After this time, in seconds, a notification is given up.
GIVEN_UP_AFTER: Final = 24 * 3600.0
LONGEST_PAUSE: Final = 300.0
#: The most notifications that wait for one URL; the oldest are dropped.
MAX_WAITING: Final = 1000
#: The same news about an alias are not sent again within this time, in seconds: a version that cannot be
#: loaded is tried again and again.
REPEATED: Final = 3600.0
_LARGEST: Final = 256 * 1024
#: The answers 4xx that concern the receiver, not this delivery: credentials, a timeout, too many requests.
_LATER: Final = frozenset({401, 403, 404, 407, 408, 425, 429})
_SECRET_PREFIX: Final = "whsec_"


class Notifier:
    """`io` runs what concerns the outbox, one thing after the other; `files` reads secrets. `counted` is
    called with a result: `delivered`, `failed` (tried again), `dropped`. Only the event loop calls the
    methods."""

    def __init__(
        self,
        targets: Sequence[Notify],
        outbox: Outbox,
        io: Executor,
        files: Executor,
        *,
        counted: Callable[[str, int], None] = lambda result, number: None,
        wall: Callable[[], float] = time.time,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._targets = list(targets)
        self._outbox = outbox
        self._io = io
        self._files = files
        self._counted = counted
        self._wall = wall
        self._transport = transport
        self._news = {target.url: asyncio.Event() for target in self._targets}
        self._last: dict[tuple[str, str], tuple[tuple[Any, ...], float]] = {}
        #: The version that a rollout has just refused, and why, by alias.
        self._refused: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        self._failing: set[str] = set()
        #: The results by id of those that are delivered or given up, and are still in the outbox.
        self._over: dict[str, str] = {}

    def notice(self, event: Event) -> None:
        """Sends the event to the URLs that want it. Returns at once."""
        if not self._targets:
            return
        found = self._kind(event)
        if found is None:
            return
        kind, data = found
        now = self._wall()
        key = (data["model"], data["alias"])
        told = (kind, data["version"], data.get("reason"))
        last, at = self._last.get(key, ((), 0.0))
        if told == last and now - at < REPEATED:
            return
        self._last[key] = told, now
        data["gateway"] = socket.gethostname()
        at_utc = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
        text = _written(kind, at_utc, data)
        if len(text) > _LARGEST:
            data.pop("evidence", None)
            text = _written(kind, at_utc, data)
        for target in self._targets:
            if kind in target.on:
                entry = Undelivered(f"msg_{uuid.uuid4().hex}", target.url, text, now, 0)
                kept = asyncio.get_running_loop().run_in_executor(
                    self._io, self._outbox.put, entry, MAX_WAITING
                )
                kept.add_done_callback(lambda done, url=target.url: self._kept(url, done))  # type: ignore[misc]

    def _kind(self, event: Event) -> tuple[str, dict[str, Any]] | None:
        """The kind of news and its content; None for an event that is not sent."""
        match event:
            case Swapped() if event.previous is not None:
                return "served", {
                    "model": event.model, "alias": event.alias, "version": event.version,
                    "previous": event.previous, "moved_by": event.moved_by,
                }  # fmt: skip
            case SwapRefused():
                version, evidence = self._refused.pop((event.model, event.alias), ("", {}))
                evidence = evidence if version == event.version else {}
                return "refused", _about(event, reason=event.reason, evidence=evidence or None)
            case RolloutChanged(phase="refused") if event.evidence:
                # The refusal itself follows, with the same reason and without the evidence.
                self._refused[event.model, event.alias] = event.version, event.evidence
                return None
            case RolloutChanged(phase="rolled_back" | "held" as kind):
                about = _about(event, reason=event.reason, evidence=event.evidence)
                return kind, {**about, "previous": event.previous}
            case _:
                return None

    def _kept(self, url: str, done: asyncio.Future[int]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            log.error("a notification for %s is lost: %s", shown(url), error)
            self._counted("dropped", 1)
            return
        if done.result():
            log.warning("%d old notifications for %s are dropped: too many wait", done.result(), shown(url))
            self._counted("dropped", done.result())
        self._news[url].set()

    async def run(self) -> None:
        """Delivers until it is cancelled: each URL by itself, so that one that hangs holds up no other."""
        try:
            await self._blocking(self._outbox.forget_others, [target.url for target in self._targets])
        except Exception as error:  # noqa: BLE001 - tried again at the next start
            log.error("cannot delete notifications for URLs that are not configured any more: %s", error)
        if not self._targets:
            return
        async with (
            httpx.AsyncClient(
                timeout=TIMEOUT, follow_redirects=False, transport=self._transport, trust_env=True
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for target in self._targets:
                group.create_task(self._deliver_all(client, target))

    async def _deliver_all(self, client: httpx.AsyncClient, target: Notify) -> None:
        news = self._news[target.url]
        while True:
            news.clear()
            now = self._wall()
            try:
                entry, due = await self._blocking(self._outbox.next, target.url, now, now + 3 * TIMEOUT)
                if entry is not None:
                    await self._deliver(client, target, entry)
                    continue
            except Exception as error:  # noqa: BLE001 - the state is tried again
                log.error("cannot read or record the notifications for %s: %s", shown(target.url), error)
                due = now + LONGEST_PAUSE
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - now)):
                    await news.wait()
            except TimeoutError:
                pass

    async def _deliver(self, client: httpx.AsyncClient, target: Notify, entry: Undelivered) -> None:
        """Posts one and records the result in the outbox. Raises sqlite3.Error."""
        if entry.id in self._over:
            await self._end(entry, self._over[entry.id])
            return
        problem, alone = await self._post(client, target, entry)
        now = self._wall()
        if problem is None:
            if target.url in self._failing:
                self._failing.discard(target.url)
                log.info("notifications reach %s again", shown(target.url))
            await self._end(entry, "delivered")
        elif now - entry.created >= GIVEN_UP_AFTER:
            log.error("a notification for %s is given up: %s", shown(target.url), problem)
            await self._end(entry, "dropped")
        else:
            self._counted("failed", 1)
            if target.url not in self._failing:
                self._failing.add(target.url)
                log.warning(
                    "a notification does not reach %s, and is tried again: %s", shown(target.url), problem
                )
            pause = backoff.pause(entry.attempts + 1, longest=LONGEST_PAUSE)
            failed = partial(self._outbox.failed, entry, now + pause, alone=alone)
            await self._blocking(failed)

    async def _end(self, entry: Undelivered, result: str) -> None:
        """Removes one from the outbox, then counts it. While that fails, it is remembered, and not posted
        again."""
        self._over[entry.id] = result
        await self._blocking(self._outbox.delivered, entry.id)
        del self._over[entry.id]
        self._counted(result, 1)

    async def _post(
        self, client: httpx.AsyncClient, target: Notify, entry: Undelivered
    ) -> tuple[str | None, bool]:
        """Why it was not delivered, without secrets, None if it was; and whether only this one is refused."""
        try:
            loop = asyncio.get_running_loop()
            key = await loop.run_in_executor(self._files, read_secret, target.secret_file)
        except OSError as error:
            return f"cannot read the secret_file: {error.strerror or type(error).__name__}", False
        except ValueError as error:
            return str(error), False
        headers = signed(key, entry.id, int(self._wall()), entry.body)
        try:
            async with (
                asyncio.timeout(2 * TIMEOUT),
                client.stream("POST", target.url, content=entry.body, headers=headers) as answer,
            ):  # only the status counts: the body may be of any length
                if answer.is_success:
                    return None, False
                refused = answer.is_client_error and answer.status_code not in _LATER
                return f"it answered {answer.status_code}", refused
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            return type(error).__name__, False

    async def _blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._io, function, *arguments)


def _written(kind: str, at: str, data: dict[str, Any]) -> bytes:
    return orjson.dumps({"type": kind, "timestamp": at, "data": data}, default=str)


def _about(event: SwapRefused | RolloutChanged, **more: Any) -> dict[str, Any]:
    about = {"model": event.model, "alias": event.alias, "version": event.version, **more}
    return {name: value for name, value in about.items() if value is not None}


def signed(key: bytes, identity: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a delivery. Pure."""
    content = f"{identity}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "content-type": "application/json",
        "user-agent": "model-gateway",
        "webhook-id": identity,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def read_secret(file: Path) -> bytes:
    """The key in the file: the text, or after `whsec_` base64 as the libraries have it. Raises OSError, and
    ValueError for a file without a key."""
    if not file.is_file():  # a pipe would block
        raise FileNotFoundError(2, "it is not a file")
    text = file.read_bytes().strip()
    if text.startswith(_SECRET_PREFIX.encode()):
        try:
            text = base64.b64decode(text[len(_SECRET_PREFIX) :], validate=True)
        except binascii.Error:
            raise ValueError("the secret_file has no base64 after whsec_") from None
    if not text:
        raise ValueError("the secret_file is empty")
    return text


def shown(url: str) -> str:
    """The URL without its path, query and credentials, which may be secrets."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"
