"""One process of a pack, and the places that models have in it.

A process does one thing at a time, in order. What unloading does not give back is measured. Knows a model as
a `Member`; which process takes it in, and when one ends, is decided by `packs`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.runners.base import RunnerCrashed, RunnerTimeout
from gateway.runners.worker import NotReached, Worker, model_error
from loaders.worker import wire

if TYPE_CHECKING:
    from gateway.runners.confinement import Confinement
    from gateway.runners.environments import Environment
    from gateway.runners.zygote import Zygotes

#: A model in a pack counts with at least so many bytes.
LEAST: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class Conditions:
    """What models of one pack have in common. `group`: the operator's name for it, empty where the gateway
    decides."""

    group: str
    environment: Environment
    threads: int
    variables: tuple[tuple[str, str], ...]
    confinement: Confinement
    max_answer: int

    def __str__(self) -> str:
        return self.group or "small models"


class Member(Protocol):
    """A model of a pack, as its pack sees it. `last_asked`: the loop's time of its last call."""

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
        """A call of it took so many seconds of the process."""

    def move_out(self, reason: str, *, back: float | None = None) -> None:
        """It gets a process of its own; after `back` seconds it may come back."""

    async def take_place_again(self, old: Place) -> None:
        """It takes a place in the pack's next process."""


class Place:
    """A model's place in a pack's process, until it leaves or the process ends."""

    __slots__ = ("_for", "bytes", "calls", "directory", "loaded", "number", "process", "runner", "seconds")

    def __init__(self, runner: Member, process: Process, number: int, directory: str) -> None:
        self.runner = runner
        self.process = process
        self.number = number
        self.directory = directory
        self.loaded: dict[str, Any] = {}
        self.bytes = 0
        #: What its calls took of the process since it was last asked about, and how many they were.
        self.seconds = 0.0
        self.calls = 0
        self._for = b"".join(wire.encode({"op": "for", "model": number}))

    def ask(self, pieces: deque[wire.Segment], timeout: float | None) -> asyncio.Future[dict[str, Any]]:
        """The answer, or RunnerCrashed, RunnerTimeout, NotReached. Raises NotReached."""
        worker = self.process.worker
        if worker.gone or self.process.left:
            raise NotReached
        pieces.appendleft(self._for)
        return worker.ask(pieces, timeout, self)


class Process:
    """One process of a pack and the places in it. Ends with a directory of the files that it may read.
    `ended` hears why its process ended."""

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
        self.directory = directory
        self.places: dict[int, Place] = {}
        #: Who was answered last.
        self.last: Place | None = None
        #: Its end says nothing against the models in it.
        self.expected = False
        #: Let go: no place in it is good any more.
        self.left = False
        #: Its models are moving to another process.
        self.retiring = False
        self.rest = 0
        self.unloads = 0
        self.private = 0
        self.worker = Worker(
            zygotes,
            conditions.environment,
            sink,
            idle=lambda worker: None,
            ended=self._ended,
            max_answer=conditions.max_answer,
            queues=True,
            worked=self._worked,
        )

    def __repr__(self) -> str:
        return f"<Process {self.worker.pid} of {self.conditions}: {len(self.places)} models>"

    @property
    def models(self) -> int:
        """What its models count with, in bytes."""
        return sum(place.bytes for place in self.places.values())

    async def start(self) -> None:
        """Raises RunnerCrashed, RunnerTimeout, ModelError."""
        conditions = self.conditions
        try:
            await self.worker.start(
                {
                    "op": "open",
                    "path": self.directory,
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
        directory = os.path.join(self.directory, str(number))
        link(runner.package_path, directory)
        place = Place(runner, self, number, directory)
        try:
            reply = await place.ask(
                wire.encode(
                    {
                        "op": "load",
                        "package": runner.package_json,
                        "path": directory,
                        "config": runner.config,
                        "threads": self.conditions.threads,
                    }
                ),
                runner.load_timeout,
            )
            if reply["op"] != "loaded":
                raise model_error(reply)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                with suppress(NotReached):  # nobody waits for it any more, but it will be loaded
                    place.ask(wire.encode({"op": "unload"}), None)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        place.loaded = reply
        place.bytes = max(LEAST, int(reply["grown"]))
        self.places[number] = place
        return place

    async def unload(self, place: Place) -> None:
        """Gives a place up, after the calls that were asked of it; its memory is free when this returns."""
        if self.places.pop(place.number, None) is None or self.left or self.worker.gone:
            return
        self.unloads += 1
        with suppress(NotReached, RunnerCrashed, RunnerTimeout):
            await place.ask(wire.encode({"op": "unload"}), self._start_timeout)
        shutil.rmtree(place.directory, ignore_errors=True)

    def measure(self) -> None:
        """Asks the kernel. What grows while nothing is unloaded is not what unloading left behind."""
        if self.worker.gone:
            return
        self.private = self.worker.memory().private
        rest = self.private - self.models
        if not self.unloads or rest < self.rest:
            self.rest = rest

    @property
    def waste(self) -> int:
        """What unloading has left behind, in bytes, as of the last measurement."""
        return max(0, self.private - self.models - self.rest) if self.unloads else 0

    def let_go(self) -> None:
        """No place in it is good any more; it ends when it has answered what it works on."""
        self.left = True
        self.worker.let_go()

    async def end(self) -> None:
        self.left = True
        await self.worker.close()
        shutil.rmtree(self.directory, ignore_errors=True)

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


def link(package: str, directory: str) -> None:
    """The package's files once more, in a directory that a pack may read: as links, copied where that cannot
    be. Raises OSError."""
    for folder, _, files in os.walk(package):
        made = os.path.normpath(os.path.join(directory, os.path.relpath(folder, package)))
        os.makedirs(made, 0o755)
        for name in files:
            source, target = os.path.join(folder, name), os.path.join(made, name)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
                os.chmod(target, 0o644)
