"""Deliveries of webhooks: verified over the raw body, taken once, and only while they are fresh."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.names import Reference
from gateway.registries.webhooks import STALE_AFTER, Deliveries, concerned

NOW = 1_795_300_000.0
BODY = json.dumps(
    {
        "entity": "model_version_alias",
        "action": "created",
        "timestamp": "2026-11-22T00:00:00+00:00",
        "data": {"name": "iris", "alias": "champion", "version": "2"},
    }
).encode()


def signature(body: bytes, delivery: str = "d1", timestamp: str = str(int(NOW)), secret: bytes = b"s") -> str:
    """As MLflow signs: base64 of the HMAC over id, timestamp and body."""
    signed = f"{delivery}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


@pytest.fixture
def deliveries(tmp_path: Path) -> Deliveries:
    (tmp_path / "secret").write_text("s\n")
    return Deliveries(tmp_path / "secret", wall=lambda: NOW)


def test_a_delivery_is_taken_once(deliveries: Deliveries) -> None:
    told = ("d1", str(int(NOW)), signature(BODY), BODY)
    assert deliveries.accept(*told)
    assert not deliveries.accept(*told)
    assert deliveries.accept("d2", str(int(NOW)), signature(BODY, "d2"), BODY)


@pytest.mark.parametrize(
    "told",
    [
        ("d1", str(int(NOW)), signature(BODY, secret=b"other"), BODY),
        ("d1", str(int(NOW)), signature(BODY), BODY + b" "),
        ("d2", str(int(NOW)), signature(BODY), BODY),
        ("d1", str(int(NOW) + 1), signature(BODY), BODY),
        ("d1", str(int(NOW)), signature(BODY).removeprefix("v1,"), BODY),
        ("d1", str(int(NOW)), "v1,ü", BODY),
        ("d1", str(int(NOW)), None, BODY),
        (None, str(int(NOW)), signature(BODY), BODY),
        ("d1", None, signature(BODY), BODY),
    ],
)
def test_a_forged_delivery_is_refused(deliveries: Deliveries, told: Any) -> None:
    with pytest.raises(Problem) as error:
        deliveries.accept(*told)
    assert error.value.code == "UNAUTHENTICATED"


@pytest.mark.parametrize("timestamp", [NOW - STALE_AFTER - 1, NOW + STALE_AFTER + 1, "nan", "soon"])
def test_a_stale_delivery_is_refused(deliveries: Deliveries, timestamp: object) -> None:
    text = str(timestamp)
    with pytest.raises(Problem, match="stale"):
        deliveries.accept("d1", text, signature(BODY, timestamp=text), BODY)


def test_without_a_secret_nothing_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for file in (None, tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(Problem) as error:
            Deliveries(file, wall=lambda: NOW).accept("d1", str(int(NOW)), signature(BODY, secret=b""), BODY)
        assert error.value.code == "FORBIDDEN"


def test_what_a_delivery_is_about() -> None:
    assert concerned(BODY) == Reference("iris")
    for body in (b"", b"[]", b"{}", b'{"entity": "prompt", "data": {"name": "iris"}}', b"\xff", b'"x"'):
        assert concerned(body) is None
    assert concerned(b'{"entity": "model_version_alias", "data": {"name": "a/b"}}') is None
    assert concerned(b'{"entity": "model_version_alias", "data": null}') is None
