"""Assigns callers to a canary, only by the caller's key, the model and the version.

So a caller who is in the canary at 5 % stays in it at 25 %, several gateways agree without communication, and
another version gets other callers. Pure. Must not know requests or rollouts.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

_RANGE: Final = 1 << 64


def position(key: str, model: str, version: str) -> float:
    """The caller's position for this version: a number in [0, 100), the same at every gateway and at any
    time.

    `key` is the value of the policy's header, the caller's name, or the request id. The parts are separated
    by a character that names and versions cannot contain, so `("a", "b1")` and `("ab", "1")` differ.
    """
    digest = blake2b(f"{model}/{version}/{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") * 100 / _RANGE


def assigned(key: str, model: str, version: str, percent: float) -> bool:
    """Whether the canary answers this caller while it gets `percent` of the callers."""
    return position(key, model, version) < percent
