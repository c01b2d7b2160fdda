"""Loaders that block or fail on command, and a clock that stands still until it is moved.

The only stand-ins of the core's tests: everything else in them is the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from gateway.artifacts.packages import Prepared
from gateway.errors import Problem
from gateway.events import Event
from gateway.registries.base import Version
from gateway.runners.base import ModelError, Then
from gateway.serving.ledger import Ledger
from gateway.serving.manager import Manager
from gateway.serving.servable import Servable
from loaders import bare
from loaders.batch import Batch, Tensors
from loaders.package import Package, read
from loaders.signature import Signature

MB = 1_000_000


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Behaviour:
    """What one version does. `hold` blocks its load until it is set."""

    hold: asyncio.Event | None = None
    hold_predict: asyncio.Event | None = None
    fails: str | None = None
    fails_predict: str | None = None
    #: What a call ends with instead of an answer.
    ends_predict: Exception | None = None
    unavailable: str | None = None
    bug: bool = False
    size: int = 10 * MB
    measured: int | None = None
    merges: bool = True
    signature: Signature | None = None
    #: What the loaded model says that it accepts; its package is then a bare model file.
    accepts: Signature | None = None
    #: What it answers for every row; None: the number of its version.
    answers: int | None = None
    starts: int = 0
    closes: int = 0
    stops: int = 0
    tended: int = 0
    calls: list[int] = field(default_factory=list)


class ControlledRunner:
    """Answers the number of its version for every row."""

    slots = 1
    isolation = "controlled"
    alike = None
    placement = "a test says so"

    def __init__(self, version: Version, behaviour: Behaviour) -> None:
        self._version = version
        self._behaviour = behaviour
        self.merges = behaviour.merges
        self.measured_bytes = behaviour.measured
        self.load_peak = 0
        self.accepted = behaviour.accepts
        self.stuck: str | None = None
        self.spare: bool | None = None

    def recent_bytes(self) -> int | None:
        return self.measured_bytes

    def start_spare(self) -> None:
        self.spare = True

    async def drop_spare(self) -> None:
        self.spare = False

    def tend(self) -> None:
        self._behaviour.tended += 1

    def stop(self, reason: str) -> None:
        self._behaviour.stops += 1

    def status(self) -> dict[str, Any]:
        return {}

    async def start(self) -> None:
        self._behaviour.starts += 1
        if self._behaviour.hold is not None:
            await self._behaviour.hold.wait()
        if self._behaviour.fails is not None:
            raise ModelError(self._behaviour.fails)

    async def predict(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        answer = self._answer(batch.rows or 1)
        if self._behaviour.hold_predict is not None:
            await self._behaviour.hold_predict.wait()
        if self._behaviour.ends_predict is not None:
            raise self._behaviour.ends_predict
        if self._behaviour.fails_predict is not None:
            raise ModelError(self._behaviour.fails_predict)
        return answer

    def _answer(self, rows: int) -> Tensors:
        self._behaviour.calls.append(rows)
        answers = self._behaviour.answers
        said = int(self._version.version) if answers is None else answers
        return Tensors({"": np.full(rows, said)}, rows)

    def begin(self, batch: Any, params: Mapping[str, Any], then: Then) -> bool:
        behaviour = self._behaviour
        if behaviour.hold_predict or behaviour.ends_predict or behaviour.fails_predict:
            return False
        asyncio.get_running_loop().call_soon(then, self._answer(batch.rows or 1), None)
        return True

    async def prewarm(self, batch: Batch, params: Mapping[str, Any]) -> Batch:
        return await self.predict(batch, params)

    async def finish_prewarm(self) -> None:
        return None

    async def close(self) -> None:
        self._behaviour.closes += 1


class AtOnce(ThreadPoolExecutor):
    """Runs what is given to a thread at once, here: so that turns of the loop suffice for it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - the caller's, as from a thread
            done.set_exception(error)
        return done


class Bench:
    """A manager over controlled loaders. `on[version]` is what that version does."""

    def __init__(self, directory: Path, *, limit: int = 100 * MB, **manager: Any) -> None:
        with contextlib.suppress(RuntimeError):  # made outside of a loop, in a test without one
            asyncio.get_running_loop().set_default_executor(AtOnce())
        self.clock = Clock()
        self.events: list[Event] = []
        self.on: dict[Version, Behaviour] = {}
        self.prepared: dict[Version, int] = {}
        self.ledger: Ledger[Servable] = Ledger(limit)
        self._package = bare_package(directory)
        self.manager = Manager(
            self.ledger,
            prepare=self.prepare,
            open_runner=lambda prepared: ControlledRunner(prepared.version, self.behaviour(prepared.version)),
            emit=self.events.append,
            clock=self.clock,
            **manager,
        )

    def behaviour(self, version: Version) -> Behaviour:
        return self.on.setdefault(version, Behaviour())

    async def prepare(self, version: Version) -> Prepared:
        self.prepared[version] = self.prepared.get(version, 0) + 1
        behaviour = self.behaviour(version)
        if behaviour.bug:
            raise RuntimeError("a bug")
        if behaviour.unavailable is not None:
            raise Problem("MODEL_UNAVAILABLE", behaviour.unavailable)
        package = (
            self._package
            if behaviour.signature is None
            else with_signature(self._package, behaviour.signature)
        )
        if behaviour.accepts is not None:
            package = replace(package, raw={**package.raw, bare.KEY: "model.onnx"})
        local = cast(Any, None)  # nothing here reads its files
        return Prepared(
            version, package, local, "python", "sha256:0", behaviour.size, behaviour.size, None, ()
        )

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def bare_package(directory: Path) -> Package:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: its_own\n")
    return read(directory)


def with_signature(package: Package, signature: Signature) -> Package:
    return replace(package, signature=signature)


def version(number: int = 1, name: str = "iris") -> Version:
    return Version(name, str(number), source=f"/models/{name}/{number}")


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Bounds an async test: a test that hangs fails after 90 seconds."""

    @functools.wraps(test)
    async def within(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(90):
            await test(*args, **kwargs)

    return within


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Runs a test on a fresh event loop, bounded: a test that hangs fails."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(bounded())


async def turns(count: int = 20) -> None:
    """Lets what is ready run; nothing waits for the clock."""
    for _ in range(count):
        await asyncio.sleep(0)
