"""Runs the program uv: with the index settings of this machine, without the gateway's secrets. Turns its
error output into sentences. Blocks. Must not know packages or locks.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from gateway.environments import indexes

_TIMEOUT: Final = 1800.0
_LONGEST: Final = 600


class UvError(Exception):
    """uv failed. `kind` says how. The message is safe to show: it holds no credentials and no path."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


#: Pattern of uv's error output -> (kind, our sentence). The first pattern that matches counts.
_SAID: Final = (
    (r"no space left on device|disk quota exceeded|os error 28", "disk full", "the disk is full"),
    (
        r"hash mismatch|hashes? (?:do(?:es)? not|didn't) match",
        "wrong hash",
        "a file from the index does not have the hash in the lock",
    ),
    (
        r"upload.(?:date|time)",
        "no upload times",
        "the index does not say when its files were uploaded",
    ),
    (
        r"network connectivity is disabled|needed data was not found|not found in the cache|--offline",
        "offline",
        "files that it needs are not in the cache, and the index was not queried",
    ),
    (
        r"no usable wheels|has no wheels|no `?wheels|no wheels are usable|building .* is disabled"
        r"|source distributions? .*disabled|only-binary",
        "no wheels",
        "the index has no wheels for this Python and machine, and the gateway does not compile packages",
    ),
    (
        r"failed to (?:read|unzip|extract)|invalid (?:zip|wheel)|corrupt|not a valid (?:zip|wheel)|deflate|"
        r"missing .*\.dist-info|bad.*(?:zip|crc)|metadata field .* not found",
        "broken wheel",
        "a file from the index is not a valid wheel",
    ),
    (
        r"error sending request|connection (?:refused|reset)|timed? ?out|dns error|failed to fetch|"
        r"could not connect|network unreachable|tcp connect",
        "index away",
        "the package index does not answer",
    ),
    (
        r"no solution found|unsatisfiable|not found in the package registry|no version of|was not found",
        "unsatisfiable",
        "the configured index cannot satisfy its requirements",
    ),
)


def binary() -> str:
    """The path of uv: the one installed as a dependency, else the one on PATH. Raises UvError."""
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        raise UvError("no uv", "the program uv is not installed: run pip install uv") from None


class Uv:
    """`cache`: its cache directory. `scratch`: an empty directory to start it in, so that it reads no
    project's settings. `environ`: as os.environ. `timeout`: the seconds that one run may take."""

    def __init__(
        self,
        cache: Path,
        scratch: Path,
        environ: Mapping[str, str] = os.environ,
        timeout: float = _TIMEOUT,
    ) -> None:
        self._cache = cache
        self._scratch = scratch
        self._environ = environ
        self._timeout = timeout

    def run(self, *arguments: str, indexed: bool = True) -> str:
        """Runs uv and returns its output. `indexed`: it may query indexes. Raises UvError."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        command = [binary(), *arguments]
        variables = indexes.variables(self._environ, self._cache)
        if indexed:
            command += indexes.arguments(self._environ)
        else:
            variables = {name: value for name, value in variables.items() if name not in indexes.OF_UV}
        try:
            done = subprocess.run(
                command,
                cwd=self._scratch,
                env=variables,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UvError("index away", f"the package index took longer than {self._timeout:g} s") from None
        except OSError as error:
            raise UvError("no uv", f"cannot start uv: {error.strerror}") from None
        if done.returncode != 0:
            raise _told(done.stderr or done.stdout)
        return done.stdout


def _told(output: str) -> UvError:
    said = _detail(output)
    for pattern, kind, sentence in _SAID:
        if re.search(pattern, output, re.IGNORECASE):
            return UvError(kind, f"{sentence} ({said})")
    return UvError("failed", f"uv failed ({said})")


def _detail(output: str) -> str:
    """uv's message on one line, without paths of this machine and credentials."""
    lines: Sequence[str] = [
        re.sub(r"^[\s×╰─▶├│]+|^(error|Caused by):\s*", "", line).strip()
        for line in output.splitlines()
        if not re.match(r"\s*(warning|Using|Resolved|Creating|hint)\b", line)
    ]
    text = indexes.hidden(" ".join(line for line in lines if line))
    text = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"`]+/)+", "…/", text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
