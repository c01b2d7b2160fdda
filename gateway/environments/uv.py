"""uv, run as a program: with the index settings of this machine, without the gateway's secrets, with what it
says turned into sentences. Blocks; knows no package and no lock.
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
    """uv failed. `kind` says how; the message may be shown: it holds no credentials and no path."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


#: What uv says, in a few words of it -> (kind, our sentence). The first that is found counts.
_SAID: Final = (
    (r"no space left on device|disk quota exceeded|os error 28", "disk full", "the disk is full"),
    (
        r"hash mismatch|hashes? (?:do(?:es)? not|didn't) match",
        "wrong hash",
        "a file that the index gave does not have the hash that the lock names",
    ),
    (
        r"upload.(?:date|time)",
        "no upload times",
        "the index does not say when its files were uploaded",
    ),
    (
        r"network connectivity is disabled|needed data was not found|not found in the cache|--offline",
        "offline",
        "what it needs is not in the cache, and the index was not asked",
    ),
    (
        r"no usable wheels|has no wheels|no `?wheels|no wheels are usable|building .* is disabled"
        r"|source distributions? .*disabled|only-binary",
        "no wheels",
        "there are no usable wheels for this Python and machine, and nothing is compiled",
    ),
    (
        r"failed to (?:read|unzip|extract)|invalid (?:zip|wheel)|corrupt|not a valid (?:zip|wheel)|deflate|"
        r"missing .*\.dist-info|bad.*(?:zip|crc)|metadata field .* not found",
        "broken wheel",
        "a file that the index gave is no wheel that can be installed",
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
        "its requirements cannot be met from the configured index",
    ),
)


def binary() -> str:
    """The path of uv: the one that came as a dependency, else one on PATH. Raises UvError."""
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        raise UvError("no uv", "the program uv is not installed: pip install uv") from None


class Uv:
    """`cache`: its cache directory; `scratch`: an empty directory that it is started in, so that no project's
    settings take part; `environ`: as os.environ; `timeout`: seconds that one run may take."""

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
        """What it printed. `indexed`: it may ask indexes. Raises UvError."""
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
            raise UvError("no uv", f"uv could not be started: {error.strerror}") from None
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
    """What uv said, on one line, without places of this machine and credentials."""
    lines: Sequence[str] = [
        re.sub(r"^[\s×╰─▶├│]+|^(error|Caused by):\s*", "", line).strip()
        for line in output.splitlines()
        if not re.match(r"\s*(warning|Using|Resolved|Creating|hint)\b", line)
    ]
    text = indexes.hidden(" ".join(line for line in lines if line))
    text = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"`]+/)+", "…/", text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
