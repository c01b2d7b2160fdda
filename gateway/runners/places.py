"""One process of a pack, and the places of models in it.

A process does one thing at a time, in order. It measures the memory that unloading does not free. Knows a
model as a `Member`; `packs` decides which process takes it in, and when a process ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.runners.base import RunnerCrashed, RunnerTimeout, loaded_of
from gateway.runners.linked import Linked, Links
from gateway.runners.pending import Call, Direct, NotReached, Reply
from gateway.runners.worker import Worker
from loaders.worker import wire

if TYPE_CHECKING:
    from gateway.runners.confinement import Confinement
    from gateway.runners.environments import Environment
    from gateway.runners.zygote import Zygotes

_UNLOAD: Final = tuple(wire.encode({"op": "unload"}))
#: If models come and go all the time, what is measured so many times in a row belongs to none of them.
RESTLESS: Final = 10
#: A model in a pack counts with at least this many bytes.
LEAST: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions that are equal for all models of a pack. `group`: the operator's name for it, empty if
    the gateway decides. `teams`: whose models they are, where callers belong to teams."""

    group: str
    environment: Environment
    threads: int
    variables: tuple[tuple[str, str], ...]
    confinement: Confinement
    max_answer: int
    teams: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.group or "small models"


class Member(Protocol):
    """The pack's view of a model. `last_asked`: the loop's time of its last call."""

    @property
    def package_path(self) -> str: ...
    @property
    def package_json(self) -> dict[str, Any]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def load_timeout(self) -> float | None: ...
    @property
    def last_asked(self) -> float: ...

    def worked(self, seconds: float) -> None:
        """One of its calls has taken `seconds` of the process's time."""

    def move_out(self, reason: str, *, back: float | None = None) -> None:
        """Moves it to its own process; after `back` seconds it may return."""

    async def take_place_again(self, old: Place) -> None:
        """Moves it to the pack's next process."""


class Place:
    """A model's place in a pack's process, until it leaves or the process ends."""

    __slots__ = (
        "_for",
        "bytes",
        "calls",
        "grown",
        "links",
        "loaded",
        "number",
        "process",
        "runner",
        "seconds",
    )

    def __init__(self, runner: Member, process: Process, number: int, links: Links) -> None:
        self.runner = runner
        self.process = process
        self.number = number
        self.links = links
        self.loaded: dict[str, Any] = {}
        #: Its counted bytes, and by how much its load made the process grow.
        self.bytes = 0
        self.grown = 0
        #: The time and the number of its calls since they were last read.
        self.seconds = 0.0
        self.calls = 0
        self._for = wire.address(number)

    @property
    def directory(self) -> str:
        """The directory in which the process finds the model's files."""
        return self.links.directory

    def ask(self, pieces: deque[wire.Segment], timeout: float | None) -> asyncio.Future[Reply]:
        """Sends a call. The future gets the answer, or RunnerCrashed, RunnerTimeout or NotReached. Raises
        NotReached."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.send(pieces, timeout, future)
        return future

    def send(
        self, pieces: deque[wire.Segment], timeout: float | None, answer: asyncio.Future[Reply] | Direct
    ) -> None:
        """The same; `answer` gets what the future gets. Raises NotReached."""
        worker = self.process.worker
        if worker.gone or self.process.left:
            raise NotReached
        pieces.appendleft(self._for)
        worker.send(pieces, Call(answer, timeout, self))


class Process:
    """One process of a pack with its places. It has a directory with the files that it may read. `ended` is
    called with the reason when the process has ended."""

    def __init__(
        self,
        zygotes: Zygotes,
        conditions: Conditions,
        directory: str,
        *,
        start_timeout: float,
        sink: Callable[[str], None],
        ended: Callable[[Process, str], None],
    ) -> None:
        self.conditions = conditions
        self._start_timeout = start_timeout
        self._ended_because = ended
        self.linked = Linked(directory)
        self.places: dict[int, Place] = {}
        #: The model that was answered last.
        self.last: Place | None = None
        #: Its end is not the fault of its models.
        self.expected = False
        #: Let go: its places are no longer valid.
        self.left = False
        #: Its models are moving to another process.
        self.retiring = False
        self.rest = 0
        self.unloads = 0
        self.private = 0
        #: The bytes that unloading did not free, as of the last measurement.
        self.waste = 0
        #: How many models come or go now, and when one last did.
        self._moves = 0
        self._moved_at = float("-inf")
        #: The memory without a place, in the measurements since the last one without such a model.
        self._restless: list[int] = []
        self.worker = Worker(
            zygotes,
            conditions.environment,
            sink,
            ended=self._ended,
            max_answer=conditions.max_answer,
            queues=True,
            worked=self._worked,
        )

    def __repr__(self) -> str:
        return f"<Process {self.worker.pid} of {self.conditions}: {len(self.places)} models>"

    @property
    def loading(self) -> bool:
        """Returns whether its current call loads a model."""
        place = self.worker.first
        return isinstance(place, Place) and not place.loaded

    @property
    def models(self) -> int:
        """The counted bytes of its models."""
        return sum(place.bytes for place in self.places.values())

    async def start(self) -> None:
        """Raises RunnerCrashed, RunnerTimeout, ModelError."""
        conditions = self.conditions
        try:
            await self.worker.start(
                {
                    "op": "open",
                    "path": self.linked.directory,
                    "threads": conditions.threads,
                    "environment": dict(conditions.variables),
                    "confinement": conditions.confinement,
                    "max_answer": conditions.max_answer,
                },
                self._start_timeout,
            )
        except BaseException:
            await self.end()
            raise
        self.private = self.rest = self.worker.memory().private

    async def load(self, runner: Member, number: int) -> Place:
        """A place for a model. Raises ModelError, RunnerCrashed, RunnerTimeout, NotReached."""
        with self._moving():
            return await self._load(runner, number)

    async def _load(self, runner: Member, number: int) -> Place:
        try:
            links = await self.linked.take(runner.package_path)
        except OSError:
            if self.left or self.worker.gone:
                raise NotReached from None
            raise
        place = Place(runner, self, number, links)
        try:
            reply = await place.ask(self._load_message(runner, links), runner.load_timeout)
            try:
                loaded_of(reply)
            except RunnerCrashed as broken:
                self.worker.kill(broken)
                raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                with suppress(NotReached):  # no caller waits for it, but it may be loaded
                    place.ask(deque(_UNLOAD), None)
            self.linked.give(links)
            raise
        place.loaded = reply
        grown = reply.get("grown")
        place.grown = max(0, grown) if isinstance(grown, int) else 0
        if place.grown > LEAST:
            # Never more than the process has, whatever it says. This reading takes milliseconds.
            place.grown = min(place.grown, self.worker.memory().private)
        place.bytes = max(LEAST, place.grown)
        self.places[number] = place
        return place

    def _load_message(self, runner: Member, links: Links) -> deque[wire.Segment]:
        """The call that loads a model. The same files are often loaded again with the same configuration."""
        if links.load is None or links.load[:2] != (runner.package_json, runner.config):
            message = {
                "op": "load",
                "package": runner.package_json,
                "path": links.directory,
                "config": runner.config,
                "threads": self.conditions.threads,
            }
            links.load = runner.package_json, runner.config, tuple(wire.encode(message))
        return deque(links.load[2])

    async def unload(self, place: Place) -> None:
        """Gives a place up after its pending calls; its memory is free when this returns."""
        if self.places.pop(place.number, None) is None or self.left or self.worker.gone:
            return
        self.unloads += 1
        try:
            with self._moving():
                await place.ask(deque(_UNLOAD), self._start_timeout)
        except (NotReached, RunnerCrashed, RunnerTimeout):
            return  # its links go with the process
        except asyncio.CancelledError:
            self.linked.give(place.links)
            raise
        self.linked.give(place.links)

    def measure(self) -> None:
        """Measures the process. Growth while nothing is unloaded is not memory that unloading left."""
        if self.worker.gone:
            return
        self.private = self.worker.recent_memory(self._moved_at).private
        rest = self.private - self._grown
        if self._moves:
            self._measure_restless(rest)
            return
        self._restless.clear()
        if not self.unloads or rest < self.rest:
            self.rest = rest
        self.waste = rest - self.rest

    def _measure_restless(self, rest: int) -> None:
        """Measures while a model comes or goes, which has memory without a place: one as large as the
        largest, at any time."""
        self._restless.append(rest)
        if len(self._restless) == RESTLESS:
            if self.unloads:
                largest = max((place.grown for place in self.places.values()), default=0)
                self.waste = max(0, min(self._restless) - largest - self.rest)
            self._restless.clear()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        self._moves += 1
        try:
            yield
        finally:
            self._moves -= 1
            self._moved_at = time.monotonic()

    @property
    def _grown(self) -> int:
        """What its models take by their measurement. Their counted bytes would make waste of the difference
        when they leave."""
        return sum(place.grown for place in self.places.values())

    def let_go(self) -> None:
        """Makes its places invalid; the process ends after its current call."""
        self.left = True
        self.worker.let_go()

    async def end(self) -> None:
        self.left = True
        try:
            await self.worker.close()
        finally:
            await self.linked.close()

    def _worked(self, asker: object, seconds: float) -> None:
        if isinstance(asker, Place):
            self.last = asker
            asker.seconds += seconds
            asker.calls += 1
            asker.runner.worked(seconds)
        if self.left and not self.worker.busy:
            asyncio.get_running_loop().call_soon(self.worker.kill, RunnerCrashed("it was let go"))

    def _ended(self, worker: Worker, reason: str) -> None:
        self.left = True
        self._ended_because(self, reason)
