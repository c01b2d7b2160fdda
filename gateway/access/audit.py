"""The audit log: who controlled what, how it stood before and after, and with which result.

One JSON line per control call, in a file and in the log; the last calls of each alias stay in memory for
`/rollouts`, at the start those at the file's end. Holds no secret: callers are named, credentials never. Must
not know a route.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from gateway.errors import Problem
from gateway.logs import Bursts
from gateway.names import Reference, parse_uri

#: The file is renamed to `.1` when it has this many bytes; so at most twice as many are kept.
MAX_FILE: Final = 16 << 20
#: So many calls of each alias, and so many aliases, stay in memory.
SHOWN: Final = 20
MAX_ALIASES: Final = 1000
#: So many bytes at the file's end are read at the start.
RECALLED: Final = 1 << 20

DONE: Final = "done"

log = logging.getLogger("gateway.audit")


@dataclass(frozen=True, slots=True)
class Audited:
    """A control call. `who`: `admin`, `token:NAME` or `jwt:SUBJECT`. `call`: method and path, or the name of
    a gRPC call; `asked`: its query and body. `before`, `after`: the version of an alias, the phase of a
    rollout or the state of a version. `result`: `done`, or the error code. `note`: how many like it were left
    out."""

    at: str
    who: str
    team: str
    call: str
    reference: str | None
    asked: Mapping[str, Any] = field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    result: str = DONE
    request_id: str = ""
    note: str = ""

    def __str__(self) -> str:
        asked = f" {json.dumps(dict(self.asked))}" if self.asked else ""
        change = f": {self.before or '-'} → {self.after or '-'}" if self.before or self.after else ""
        return f"{self.who} {self.call}{asked}{change} ({self.result}){self.note}"


class Audit:
    """Writes to `file`. Only the event loop calls it; a thread writes, in order."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._calls: dict[tuple[str, str], deque[Audited]] = {}
        self._told = False
        self._refusals = Bursts(clock)
        for audited, reference in _recalled(file):
            self._remember(audited, reference)

    def record(self, audited: Audited, reference: Reference | None) -> None:
        """Keeps a call that has ended. Of the calls of one caller that are not allowed, only some are kept,
        and none for `/rollouts`: else a caller without rights could replace all others."""
        if audited.result == "FORBIDDEN":
            ending = self._refusals.ending(audited.who)
            if ending is None:
                return
            audited, reference = replace(audited, note=ending), None
        log.info("%s", audited, extra={"event": audited})
        if reference is not None:
            self._remember(audited, reference)
        self._writer.submit(self._write, json.dumps(asdict(audited), ensure_ascii=False))

    def calls(self, name: str, alias: str) -> list[dict[str, Any]]:
        """The last calls about an alias, oldest first."""
        return [asdict(audited) for audited in self._calls.get((name, alias), ())]

    def _remember(self, audited: Audited, reference: Reference) -> None:
        if reference.alias is None:
            return
        key = (reference.name, reference.alias)
        if key not in self._calls and len(self._calls) >= MAX_ALIASES:
            del self._calls[next(iter(self._calls))]
        self._calls.setdefault(key, deque(maxlen=SHOWN)).append(audited)

    def close(self) -> None:
        """Completes all pending writes."""
        self._writer.shutdown()

    def _write(self, line: str) -> None:
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line.encode("utf-8", "replace") + b"\n")
                if os.fstat(descriptor).st_size >= MAX_FILE:
                    self._rename(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._told:
                log.error("cannot write the audit log %s: %s", self._file, error.strerror)
            self._told = True
        else:
            self._told = False

    def _rename(self, descriptor: int) -> None:
        """Renames the open file, unless another gateway with this `state_dir` has done so."""
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
        with suppress(FileNotFoundError):
            if os.path.samestat(self._file.stat(), os.fstat(descriptor)):
                os.replace(self._file, self._file.with_name(self._file.name + ".1"))


def _recalled(file: Path) -> list[tuple[Audited, Reference]]:
    """The calls about models at the end of a file; empty without one. A line that is not whole, or of another
    form, is left out."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return []
        with file.open("rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - RECALLED))
            text = lines.read(RECALLED)
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError, TypeError, Problem):
            audited = Audited(**json.loads(line))
            if isinstance(audited.reference, str) and audited.result != "FORBIDDEN":
                found.append((audited, parse_uri(audited.reference)))
    return found
