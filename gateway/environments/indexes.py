"""The package indexes: the index settings of this machine's pip and uv, as arguments for uv.

uv reads its own variables and files, but not pip's. If uv has no index, it gets pip's settings. uv searches
several indexes in order, and takes the first that has a matching version; pip itself would take the highest
version of any. Credentials stay in the child's environment and in URLs; `hidden` removes them from any text
that is shown. Must not know packages.
"""

from __future__ import annotations

import configparser
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_LOGIN: Final = re.compile(r"(?<=://)[^\s/@'\"]+@")
_SECRET: Final = re.compile(r"(?i)\b(token|password|passwd|secret|api[-_]?key)([=:]\s*)[^\s&'\"]+")
OF_UV: Final = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
_PASSED: Final = re.compile(
    r"(UV_.*|HOME|PATH|TMPDIR|LANG|LC_.*|NETRC|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|https?_proxy|no_proxy|all_proxy|XDG_CONFIG_HOME|XDG_CONFIG_DIRS|XDG_DATA_HOME)\Z",
    re.IGNORECASE,
)


def hidden(text: str) -> str:
    """The text without user names, passwords and tokens."""
    return _SECRET.sub(r"\1\2…", _LOGIN.sub("…@", text))


def variables(environ: Mapping[str, str], cache: Path) -> dict[str, str]:
    """The environment variables for uv: indexes and connections, but none of the gateway's own. `cache` is
    uv's cache directory."""
    given = {name: value for name, value in environ.items() if _PASSED.match(name)}
    bundle = (
        given.pop("REQUESTS_CA_BUNDLE", None)
        or given.pop("CURL_CA_BUNDLE", None)
        or _pip(environ).get("cert")
    )
    if bundle and not (given.get("SSL_CERT_FILE") or given.get("SSL_CERT_DIR")):
        given["SSL_CERT_FILE"] = bundle
    given.update(UV_CACHE_DIR=str(cache), UV_PYTHON_DOWNLOADS="never", UV_NO_PROGRESS="1", NO_COLOR="1")
    for name in (
        "UV_PYTHON",
        "UV_PROJECT_ENVIRONMENT",
        "UV_SYSTEM_PYTHON",
        "UV_EXCLUDE_NEWER",
        "UV_LINK_MODE",
    ):
        given.pop(name, None)
    return given


def arguments(environ: Mapping[str, str]) -> list[str]:
    """pip's index settings as arguments of uv; empty if uv has its own."""
    if any(environ.get(name) for name in OF_UV) or _in_uv_files(environ):
        return []
    pip = _pip(environ)
    found: list[str] = []
    if url := pip.get("index-url"):
        found += ["--default-index", url]
    extra = pip.get("extra-index-url", "").split()
    for url in extra:
        found += ["--index", url]
    if extra:
        found += ["--index-strategy", "unsafe-first-match"]
    for place in pip.get("find-links", "").split():
        found += ["--find-links", place]
    for host in pip.get("trusted-host", "").split():
        found += ["--allow-insecure-host", host]
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        found.append("--no-index")
    return found


def _pip(environ: Mapping[str, str]) -> dict[str, str]:
    """pip's settings by their long names: from files, the most general first, then from variables."""
    merged: dict[str, str] = {}
    for file in _pip_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        for section in ("global", "install"):
            if parser.has_section(section):
                merged |= {key.replace("_", "-"): value for key, value in parser.items(section)}
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            merged[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return merged


def _pip_files(environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("PIP_CONFIG_FILE") == os.devnull:
        return
    home = Path(environ.get("HOME", "/nonexistent"))
    for directory in reversed((environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)):
        yield Path(directory, "pip", "pip.conf")
    yield Path("/etc/pip.conf")
    yield home / ".pip" / "pip.conf"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "pip", "pip.conf")
    yield Path(sys.prefix, "pip.conf")
    if file := environ.get("PIP_CONFIG_FILE"):
        yield Path(file)


def _in_uv_files(environ: Mapping[str, str]) -> bool:
    """Returns True if uv's own configuration names an index."""
    home = Path(environ.get("HOME", "/nonexistent"))
    places = [
        Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "uv", "uv.toml"),
        Path("/etc/uv/uv.toml"),
    ]
    if file := environ.get("UV_CONFIG_FILE"):
        places.insert(0, Path(file))
    names = {"index", "index-url", "default-index", "extra-index-url", "find-links", "no-index"}
    for place in places:
        try:
            content: dict[str, Any] = tomllib.loads(place.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            continue
        if names & content.keys() or names & content.get("pip", {}).keys():
            return True
    return False
