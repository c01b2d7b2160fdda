"""What an MLflow server says unasked: deliveries, verified and taken as hints to look again.

A delivery proves nothing about the registry: it may be late, lost, doubled or forged. Verified, it makes the
gateway ask at once what polling would ask a little later. Knows signatures and events, and no HTTP library.
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

#: A delivery older (or newer) than this is refused, in seconds; ids are remembered for longer.
STALE_AFTER: Final = 300.0
_REMEMBERED: Final = 10_000
_ALIAS_EVENTS: Final = ("model_version_alias", "registered_model", "model_version", "model_version_tag")


class Deliveries:
    """`secret_file` holds the secret that the webhook was registered with (surrounding whitespace does not
    count); it is read for each delivery, so that it may be changed. `wall` is unix time."""

    def __init__(self, secret_file: Path | None, *, wall: Callable[[], float] = time.time) -> None:
        self._file = secret_file
        self._wall = wall
        self._seen: TTLCache[str, None] = TTLCache(_REMEMBERED, 2 * STALE_AFTER, wall)

    def accept(self, delivery: str | None, timestamp: str | None, signature: str | None, body: bytes) -> bool:
        """Whether this is a delivery that was not seen before. Raises UNAUTHENTICATED for one that this
        gateway's secret did not sign, or that is stale, and FORBIDDEN where no secret is set."""
        secret = self._secret()
        if not (delivery and timestamp and signature):
            raise Problem("UNAUTHENTICATED", "the delivery is not signed", hint="give the webhook a secret")
        signed = f"{delivery}.{timestamp}.".encode() + body
        expected = base64.b64encode(hmac.digest(secret, signed, hashlib.sha256))
        offered = [part.strip() for part in signature.split(" ")]
        if not any(hmac.compare_digest(b"v1," + expected, part.encode()) for part in offered):
            raise Problem("UNAUTHENTICATED", "the delivery's signature does not fit it")
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
            raise Problem("FORBIDDEN", "this gateway takes no webhooks", hint=hint)
        try:
            secret = self._file.read_bytes().strip()
        except OSError as error:
            log.error("the webhook secret cannot be read: %s", error)
            secret = b""
        if not secret:
            raise Problem("FORBIDDEN", "the webhook's secret cannot be read here")
        return secret


def concerned(body: bytes) -> Reference | None:
    """The model that a delivery is about; None where it is about none, or is not understood."""
    try:
        event = json.loads(body)
        if event.get("entity") not in _ALIAS_EVENTS:
            return None
        return Reference(check_name(event["data"]["name"]))
    except (ValueError, KeyError, TypeError, AttributeError, InvalidReference):
        return None
