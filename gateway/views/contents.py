"""Reads facts from the verified files of a version: flavor, signature, environment and example.

Knows packages. An example may be real data, so it is read only for callers that may see it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from loaders import recorded
from loaders.example import MOST_SERVED
from loaders.package import Package, PackageError

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.registries.base import Version
    from loaders.signature import Signature


class Described(NamedTuple):
    """A version, the alias that named it, and its verified files."""

    version: Version
    alias: str | None
    prepared: Prepared


def example(package: Package) -> dict[str, Any] | None:
    try:
        given, params = package.example_input(MOST_SERVED)
    except PackageError:
        return None  # the version's warnings report it after loading
    return None if given is None else {given.form: given.data, "params": params}


def example_answer(package: Package) -> Any | None:
    try:
        return recorded.read(package)
    except recorded.Unreadable:
        return None  # the version's warnings report it after loading


def signature(known: Signature | None) -> dict[str, Any] | None:
    """Returns a signature as JSON. MLflow stores its parts as JSON inside JSON strings; here they are
    parsed."""
    if known is None:
        return None
    document = known.to_json()
    return {key: json.loads(part) if isinstance(part, str) else part for key, part in document.items()}
