"""Webhook deliveries of an MLflow server: verifies them, and uses them as hints to read the registry again.

A delivery proves nothing about the registry: it may be late, lost, repeated or forged. A verified delivery
makes the gateway query at once what the next poll would query. Knows signatures and events; must not know an
HTTP library.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cachetools import TTLCache

from gateway.errors import Problem
from gateway.names import InvalidReference, Reference, check_name

log = logging.getLogger("gateway.webhooks")

#: A delivery older (or newer) than this, in seconds, is refused; ids are remembered for longer.
STALE_AFTER: Final = 300.0
_REMEMBERED: Final = 10_000
_ALIAS_EVENTS: Final = ("model_version_alias", "registered_model", "model_version", "model_version_tag")


class Deliveries:
    """`secret_file` holds the secret with which the webhook was registered; surrounding whitespace is
    ignored. It is read for each delivery, so that it can be changed. `wall` is unix time."""

    def __init__(self, secret_file: Path | None, *, wall: Callable[[], float] = time.time) -> None:
        self._file = secret_file
        self._wall = wall
        self._seen: TTLCache[str, None] = TTLCache(_REMEMBERED, 2 * STALE_AFTER, wall)

    def accept(self, delivery: str | None, timestamp: str | None, signature: str | None, body: bytes) -> bool:
        """Whether this delivery is new. Raises UNAUTHENTICATED for one that is stale or not signed with this
        gateway's secret, and FORBIDDEN if no secret is set."""
        secret = self._secret()
        if not (delivery and timestamp and signature):
            raise Problem("UNAUTHENTICATED", "the delivery is not signed", hint="give the webhook a secret")
        signed = f"{delivery}.{timestamp}.".encode() + body
        expected = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256))
        offered = [part.strip() for part in signature.split(" ")]
        if not any(hmac.compare_digest(b"v1," + expected, part.encode()) for part in offered):
            raise Problem("UNAUTHENTICATED", "the delivery's signature is wrong")
        try:
            age = self._wall() - float(timestamp)
        except ValueError:
            age = float("inf")
        if not -STALE_AFTER <= age <= STALE_AFTER:
            raise Problem("UNAUTHENTICATED", "the delivery is stale: its timestamp is not within 5 minutes")
        if delivery in self._seen:
            return False
        self._seen[delivery] = None
        return True

    def _secret(self) -> bytes:
        if self._file is None:
            hint = "set webhook_secret_file to a file with the webhook's secret"
            raise Problem("FORBIDDEN", "this gateway does not accept webhooks", hint=hint)
        try:
            if not self._file.is_file():  # a pipe would stop the event loop
                raise FileNotFoundError(f"{self._file} is not a file")
            secret = self._file.read_bytes().strip()
        except OSError as error:
            log.error("cannot read the webhook secret: %s", error)
            secret = b""
        if not secret:
            raise Problem("FORBIDDEN", "the webhook's secret cannot be read here")
        return secret


def concerned(body: bytes) -> Reference | None:
    """The model that a delivery is about; None if it is about none or cannot be read."""
    try:
        event = json.loads(body)
        if event.get("entity") not in _ALIAS_EVENTS:
            return None
        return Reference(check_name(event["data"]["name"]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, InvalidReference):
        return None
