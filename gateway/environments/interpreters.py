"""The Python interpreters of this machine: from the settings, PATH, pyenv and uv's own directory.

An interpreter is started once, in isolated mode, when its minor version is needed. Its answer is kept while
its file does not change; one that gave no answer is started again later. Nothing is ever downloaded. Must not
know packages or models.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SUPPORTED: Final = ((3, 8), (3, 13))
"""The first and the last minor version that a model process supports."""

_ASK: Final = (
    "import json, sys, sysconfig; "
    "print(json.dumps([list(sys.version_info[:3]), sys.implementation.name, sysconfig.get_platform(), "
    "getattr(sys, '_base_executable', sys.executable) or sys.executable]))"
)
_TIMEOUT: Final = 20.0
_ASK_AGAIN: Final = 60.0
_IN_NAME: Final = re.compile(r"(?:^|[^0-9])3\.(\d{1,2})(?:\.\d+)?")

Minor = tuple[int, int]


class NoInterpreter(Exception):
    """This machine has no interpreter of a version; the message names the commands that install one."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """`path`: its executable, outside of any virtual environment. `version`: all three numbers. `platform`:
    as sysconfig names it."""

    path: str
    version: str
    platform: str

    @property
    def minor(self) -> Minor:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)


def minor_of(version: str | None) -> Minor | None:
    """(3, 9) for `3.9.18`; None if the text is not a version."""
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})(?![0-9])", version or "")
    return None if match is None else (int(match[1]), int(match[2]))


def named(minor: Minor) -> str:
    """`3.9` of (3, 9)."""
    return f"{minor[0]}.{minor[1]}"


def supported(minor: Minor) -> bool:
    """Returns True if model processes support this version."""
    return SUPPORTED[0] <= minor <= SUPPORTED[1]


class Interpreters:
    """`paths`: the operator's executables by minor version (`3.9`). `environ`: as os.environ. `clock`: as
    time.monotonic."""

    def __init__(
        self,
        paths: Mapping[str, Path | str] | None = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = dict(paths or {})
        self._environ = environ
        self._clock = clock
        self._known: dict[tuple[str, int], Interpreter | None] = {}
        #: Those that gave no answer, and when they may be asked again.
        self._silent: dict[tuple[str, int], float] = {}
        self._lock = threading.Lock()

    def find(self, minor: Minor) -> Interpreter | None:
        """The interpreter of that version: the operator's, else the gateway's own, else the newest one on
        PATH, in pyenv or in uv's directory. Blocks when it starts one for the first time."""
        if (chosen := self._paths.get(named(minor))) is not None:
            return self._look(Path(chosen))
        if minor == sys.version_info[:2]:
            own = self._look(Path(getattr(sys, "_base_executable", "") or sys.executable))
            if own is not None and own.minor == minor:
                return own
        for candidate in self._candidates(minor):
            found = self._look(candidate)
            if found is not None and found.minor == minor:
                return found
        return None

    def need(self, minor: Minor) -> Interpreter:
        """As `find`, but raises NoInterpreter, which says what to do."""
        found = self.find(minor)
        if found is None:
            raise NoInterpreter(missing(minor))
        return found

    def nearest(self, minor: Minor) -> list[Interpreter]:
        """All supported interpreters of this machine, the nearest to a version first, an older one before a
        newer one at the same distance."""
        low, high = SUPPORTED[0][1], SUPPORTED[1][1]
        order = sorted(range(low, high + 1), key=lambda m: (abs(m - minor[1]), m))
        return [found for m in order if (found := self.find((3, m))) is not None]

    def _candidates(self, minor: Minor) -> Iterator[Path]:
        name = f"python{named(minor)}"
        for directory in self._environ.get("PATH", "").split(os.pathsep):
            if directory and (file := Path(directory, name)).is_file() and "shims" not in file.parts:
                yield file
        for root in self._versions():
            fitting = [d for d in _listed(root) if _minor_in(d.name) == minor]
            for version in sorted(fitting, key=_numbers, reverse=True):
                file = version / "bin" / "python3"
                if file.is_file():
                    yield file
        for directory in self._environ.get("PATH", "").split(os.pathsep):
            if directory and (file := Path(directory, "python3")).is_file() and "shims" not in file.parts:
                yield file

    def _versions(self) -> Sequence[Path]:
        home = Path(self._environ.get("HOME", "/nonexistent"))
        data = Path(self._environ.get("XDG_DATA_HOME") or home / ".local" / "share")
        pyenv = Path(self._environ.get("PYENV_ROOT") or home / ".pyenv")
        uv = Path(self._environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
        return (pyenv / "versions", uv)

    def _look(self, file: Path) -> Interpreter | None:
        try:
            key = (str(file), file.stat().st_mtime_ns)
        except OSError:
            return None
        with self._lock:
            if key in self._known:
                return self._known[key]
            if self._clock() < self._silent.get(key, 0.0):
                return None
            try:
                self._known[key] = found = _asked(file)
            except (OSError, subprocess.SubprocessError, ValueError):
                # A busy machine, or a file system that is away: this may pass.
                self._silent[key] = self._clock() + _ASK_AGAIN
                return None
            return found


def missing(minor: Minor) -> str:
    """The message for a missing interpreter, with what to do."""
    version = named(minor)
    return (
        f"this machine has no Python {version}; install it (uv python install {version}, or"
        f" pyenv install {version}), or give its path in the setting environments.python"
    )


def _asked(file: Path) -> Interpreter | None:
    """Asks an executable what it is; None if it is not a CPython. Raises OSError, SubprocessError and
    ValueError if it does not answer."""
    answer = subprocess.run(  # `-I`: the caller's variables and directories have no effect
        [str(file), "-I", "-S", "-c", _ASK], capture_output=True, timeout=_TIMEOUT, check=True, env={}
    )
    version, implementation, platform, base = json.loads(answer.stdout)
    if implementation != "cpython":
        return None
    # For a virtual environment, the Python that it was made from.
    path = base if Path(base).is_file() else str(file)
    return Interpreter(path, ".".join(map(str, version)), platform)


def _listed(directory: Path) -> list[Path]:
    try:
        return [entry for entry in directory.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _minor_in(name: str) -> Minor | None:
    match = _IN_NAME.search(name)
    return None if match is None else (3, int(match[1]))


def _numbers(directory: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", directory.name)[:3])
