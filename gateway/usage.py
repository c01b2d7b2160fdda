"""Who used what: requests, rows, CPU-seconds and byte-seconds of memory, by team and model.

Every few seconds the kernel's figures of all processes are read. What a model's processes used goes to the
teams that asked it meanwhile, by their rows; without a request it is idle. In a pack, the time of its calls
divides the process. All else is shared: the gateway's own process, and the others (zygotes, parsers, what a
process used at its very end). So the parts add up to the total. The sums outlive the gateway: every minute
and at its end they are added to those in the state. Knows processes and numbers, and no route.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

from gateway.usagememory import Used

if TYPE_CHECKING:
    from gateway.metrics import Metrics
    from gateway.record import RequestRecord
    from gateway.registries.base import Version
    from gateway.serving.manager import Manager

#: How often the kernel's figures are read, in seconds.
INTERVAL: Final = 5.0
#: Saves the sums once in this many intervals: a gateway that is killed loses at most a minute of them.
SAVED_EVERY: Final = 12
MAX_TEAMS: Final = 100
#: The number of sums that are added or shown in one step of the event loop.
AT_ONCE: Final = 200
BY: Final = ("team", "model")

_TICK: Final = 1.0 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")

T = TypeVar("T")
Key: TypeAlias = tuple[str, str]
"""A team, empty for callers without one, and a model."""
Part: TypeAlias = tuple[str, str, str]
"""The purpose (such as `ASKED`), a team and a model."""
ASKED, IDLE, GATEWAY, OTHERS, TIME = "asked", "idle", "gateway", "others", "time"


class Kept(Protocol):
    """The sums of this gateway and of those before it. `add` returns at once."""

    def read(self) -> tuple[Sequence[Used], float | None]: ...
    def add(self, since: float, used: list[Used]) -> None: ...


@dataclass(slots=True)
class Spent:
    """What was used. `cpu`: seconds; `memory`: byte-seconds."""

    requests: int = 0
    rows: int = 0
    cpu: float = 0.0
    memory: float = 0.0

    def but(self, other: Spent) -> Spent:
        """Returns the difference from the other."""
        return Spent(
            self.requests - other.requests,
            self.rows - other.rows,
            self.cpu - other.cpu,
            self.memory - other.memory,
        )

    def add(self, other: Spent, share: float = 1.0) -> None:
        self.requests += other.requests
        self.rows += other.rows
        self.cpu += other.cpu * share
        self.memory += other.memory * share

    def to_json(self) -> dict[str, Any]:
        used = {"cpu_seconds": round(self.cpu, 3), "memory_byte_seconds": round(self.memory)}
        return {"requests": self.requests, "rows": self.rows, **used}


@dataclass(frozen=True, slots=True)
class Process:
    """`seconds`: the CPU time that it and its ended children have used."""

    parent: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Held:
    """A loaded version: its processes, the time of its calls so far, and its bytes."""

    version: Version
    pids: tuple[int, ...]
    busy: float
    bytes: int


class Usage:
    """Counts since it was made, on top of the sums in `kept`. Only the event loop uses it; the kernel is read
    in a thread."""

    def __init__(self, manager: Manager, metrics: Metrics, kept: Kept | None = None) -> None:
        self._manager = manager
        self._kept = kept
        earlier, began = ([], None) if kept is None else kept.read()
        self._earlier = {(one.kind, one.team, one.model): Spent(*one[3:]) for one in earlier}
        self._since = time.time() if began is None else began
        self._began = self._looked = time.monotonic()
        self._saved: dict[Part, Spent] = {}
        self._looking = asyncio.Lock()
        self._teams: set[str] = set()
        self._asked: dict[Key, Spent] = defaultdict(Spent)
        self._idle: dict[str, Spent] = defaultdict(Spent)
        self._own = Spent()
        self._others = Spent()
        #: The rows that each team has sent to each version since the last look.
        self._rows: dict[Version, dict[str, int]] = {}
        self._before: dict[int, float] = {}
        self._busy: dict[Version, float] = {}
        metrics.usage = self.request

    def request(self, record: RequestRecord) -> None:
        """A prediction has ended."""
        version = record.version
        if version is None:
            return
        team = "" if record.principal is None else record.principal.team
        if team not in self._teams:
            if len(self._teams) >= MAX_TEAMS:
                team = "other"
            self._teams.add(team)
        spent = self._asked[team, version.name]
        spent.requests += 1
        spent.rows += record.rows
        rows = self._rows.get(version)
        if rows is None:
            rows = self._rows[version] = defaultdict(int)
        rows[team] += record.rows or 1

    async def run(self) -> None:
        """Looks at the kernel's figures until it is cancelled."""
        while True:
            for _ in range(SAVED_EVERY):
                await self.look()
                await asyncio.sleep(INTERVAL)
            self.save()

    async def close(self) -> None:
        """Saves the last sums."""
        await self.look()
        self.save()

    def save(self) -> None:
        """Adds what was used since the last save to the sums in the state."""
        if self._kept is None:
            return
        parts = self._parts()
        more = [(part, spent.but(self._saved.get(part, Spent()))) for part, spent in parts.items()]
        self._kept.add(
            self._since, [Used(*part, *astuple(spent)) for part, spent in more if spent != Spent()]
        )
        self._saved = {part: replace(spent) for part, spent in parts.items()}

    def _parts(self) -> dict[Part, Spent]:
        """Returns the use since the start."""
        parts: dict[Part, Spent] = {(ASKED, *key): spent for key, spent in self._asked.items()}
        parts |= {(IDLE, "", model): spent for model, spent in self._idle.items()}
        own = {GATEWAY: self._own, OTHERS: self._others, TIME: Spent(cpu=time.monotonic() - self._began)}
        return parts | {(kind, "", ""): spent for kind, spent in own.items()}

    async def look(self) -> None:
        """Divides what was used since the last look."""
        async with self._looking:
            held = [self._of(servable) for servable in self._manager if servable in self._manager.ledger]
            own, ended, processes, memory = await asyncio.to_thread(_read)
            now = time.monotonic()
            passed, self._looked = now - self._looked, now
            self._divide_cpu(held, own, ended, processes)
            shared = self._manager.ledger.shared
            for one in held:
                self._give(one.version, Spent(memory=one.bytes * passed))
            self._own.memory += memory * passed
            self._others.memory += shared * passed
            self._rows.clear()

    def _of(self, servable: Any) -> Held:
        runner = servable.runner
        pids = () if runner is None else tuple(runner.pids)
        busy = 0.0 if runner is None else runner.busy_seconds
        return Held(servable.version, pids, busy, self._manager.ledger[servable].bytes)

    def _divide_cpu(
        self, held: Iterable[Held], own: float, ended: float, processes: Mapping[int, Process]
    ) -> None:
        trees = _trees(processes, {pid for one in held for pid in one.pids})
        users: dict[int, list[tuple[Held, float]]] = defaultdict(list)
        for one in held:
            calls = one.busy - self._busy.get(one.version, 0.0)
            for pid in one.pids:
                users[pid].append((one, max(0.0, calls)))
        for pid, sharing in users.items():
            seconds = trees.get(pid, 0.0) - self._before.get(pid, 0.0)
            calls = sum(share for _, share in sharing)
            if len(sharing) == 1:
                sharing, calls = [(sharing[0][0], 1.0)], 1.0
            for one, share in sharing if seconds > 0 else ():
                if share:
                    self._give(one.version, Spent(cpu=seconds * share / calls))
        self._before = {pid: max(seconds, self._before.get(pid, 0.0)) for pid, seconds in trees.items()}
        self._busy = {one.version: one.busy for one in held}
        total = own + ended + sum(process.seconds for process in processes.values())
        self._own.cpu = own
        given = sum(spent.cpu for part in (self._asked, self._idle) for spent in part.values())
        self._others.cpu = max(0.0, total - own - given)

    def _give(self, version: Version, spent: Spent) -> None:
        """What a version used, to the teams that asked it; without any, it was idle."""
        rows = self._rows.get(version)
        if not rows:
            self._idle[version.name].add(spent)
            return
        total = sum(rows.values())
        for team, count in rows.items():
            self._asked[team, version.name].add(spent, count / total)

    async def view(self, by: tuple[str, ...] = BY) -> dict[str, Any]:
        """What was used so far, by these of `BY`. `seconds`: for how long that was counted. Each sum is read
        once, and the event loop does other work in between."""
        asked: dict[Key, Spent] = defaultdict(Spent)
        idle: dict[str, Spent] = defaultdict(Spent)
        own: dict[str, Spent] = {GATEWAY: Spent(), OTHERS: Spent(), TIME: Spent()}
        total = Spent()
        async for (kind, team, model), spent in _in_turns([*self._earlier.items(), *self._parts().items()]):
            if kind == ASKED:
                asked[team if "team" in by else "", model if "model" in by else ""].add(spent)
            elif kind == IDLE:
                idle[model if "model" in by else ""].add(spent)
            elif kind in own:
                own[kind].add(spent)
            if kind != TIME:
                total.add(spent)
        named = [name for name in BY if name in by]
        return {
            "since": self._since,
            "seconds": round(own[TIME].cpu, 3),
            "by": named,
            "usage": [
                {**_named(key, named), **spent.to_json()}
                async for key, spent in _in_turns(sorted(asked.items()))
            ],
            "idle": [
                {**({"model": model} if "model" in by else {}), **_used(spent)}
                async for model, spent in _in_turns(sorted(idle.items()))
            ],
            "shared": {"gateway": _used(own[GATEWAY]), "others": _used(own[OTHERS])},
            "total": total.to_json(),
        }


async def _in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    for start in range(0, len(items), AT_ONCE):
        for item in items[start : start + AT_ONCE]:
            yield item
        await asyncio.sleep(0)


def _named(key: Key, names: Sequence[str]) -> dict[str, str]:
    return {name: part for name, part in zip(BY, key, strict=True) if name in names}


def _used(spent: Spent) -> dict[str, Any]:
    """Returns the usage that belongs to no request."""
    return {name: value for name, value in spent.to_json().items() if name not in ("requests", "rows")}


def _read() -> tuple[float, float, dict[int, Process], int]:
    """The CPU seconds of this process and of its ended children, its living descendants, and its bytes."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found: dict[int, Process] = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            with suppress(OSError, ValueError, IndexError):
                text = (_PROC / entry / "stat").read_text(errors="replace")
                fields = text.rpartition(")")[2].split()
                seconds = sum(map(int, fields[11:15])) * _TICK
                found[int(entry)] = Process(int(fields[1]), seconds)
    here = os.getpid()
    below = {pid: one for pid, one in found.items() if pid != here and _is_below(pid, here, found)}
    return own.ru_utime + own.ru_stime, ended.ru_utime + ended.ru_stime, below, _bytes()


def _is_below(pid: int, top: int, processes: Mapping[int, Process]) -> bool:
    for _ in range(64):
        process = processes.get(pid)
        if process is None:
            return False
        pid = process.parent
        if pid == top:
            return True
    return False


def _bytes() -> int:
    """This process's memory, with its part of what it shares."""
    with suppress(OSError, ValueError):
        for line in (_PROC / "self" / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _trees(processes: Mapping[int, Process], tops: set[int]) -> dict[int, float]:
    """The CPU seconds of each of these processes with all below it."""
    found: dict[int, float] = dict.fromkeys(tops & processes.keys(), 0.0)
    for pid, process in processes.items():
        above = pid
        for _ in range(64):
            if above in found:
                found[above] += process.seconds
                break
            if above not in processes:
                break
            above = processes[above].parent
    return found
