"""A gateway with credentials, and callers who hold them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gateway.credentials import AccessSettings
from tests.support.served import KEY, Served, settings

TOKENS: dict[str, dict[str, Any]] = {
    "alice": {"predict": ["iris"]},
    "bob": {"predict": ["echo"], "control": ["echo"]},
    "op": {"control": ["iris"]},
    "blue": {"predict": ["iris"], "team": "blue"},
    "boss": {"predict": ["*"], "control": ["*"]},
    "champ": {"predict": ["iris@champion"], "control": ["iris@challenger"]},
}


def token(name: str) -> str:
    return f"mgw_{name}-secret"


def bearer(name: str | None) -> dict[str, str]:
    return {} if name is None else {"authorization": f"Bearer {KEY if name == 'admin' else token(name)}"}


def entries(*names: str) -> str:
    found = [
        {"name": name, "sha256": hashlib.sha256(token(name).encode()).hexdigest(), **TOKENS[name]}
        for name in names
    ]
    return json.dumps(found)


def guarded(registry_file: str, directory: Path, grpc_port: int | None = None, **access: Any) -> Served:
    """A gateway with these tokens and the admin key."""
    (directory / "tokens.json").write_text(entries(*TOKENS))
    (directory / "key").write_text(KEY)
    limits, capture = access.pop("limits", {}), access.pop("capture", {})
    known = AccessSettings(tokens_file=directory / "tokens.json", **access)
    chosen = settings(
        directory,
        access=known,
        limits=limits,
        capture=capture,
        admin_key_file=directory / "key",
        default_model="models:/iris",
        grpc_port=grpc_port,
    )
    return Served(chosen, registry_file)
