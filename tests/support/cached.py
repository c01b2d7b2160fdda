"""Small packages for the artifact cache, and what a cache's directory holds."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.registries.base import Version
from gateway.staging import PREFIX
from loaders.package import digest

MB = 10**6


def make_package(directory: Path, content: bytes = b"one") -> Path:
    (directory / "data").mkdir(parents=True, exist_ok=True)
    (directory / "MLmodel").write_text("flavors: {python_function: {loader_module: mine}}\n")
    (directory / "data" / "weights").write_bytes(content)
    return directory


def version(source: Path | str, number: str = "1", *, digested: bool = True) -> Version:
    return Version("iris", number, str(source), digest(source) if digested else None)


def entries(cache_dir: Path) -> list[str]:
    return sorted(
        name for name in os.listdir(cache_dir) if not name.startswith(".") and not name.endswith(".lock")
    )


def under_way(cache_dir: Path) -> list[str]:
    return [name for name in os.listdir(cache_dir) if name.startswith(PREFIX)]


def name_of(wanted: Version) -> str:
    """The name of its entry."""
    assert wanted.digest is not None
    return wanted.digest.replace(":", "-")
