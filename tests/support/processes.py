"""Model processes for tests: zygotes and runners that must leave nothing behind when they are closed."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gateway.runners.environments import Environment
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from loaders.batch import Tensors
from loaders.package import Package
from tests.support.hostile import descendants, eventually

START: list[Literal["fork", "spawn"]] = ["fork", "spawn"]
ONE = Tensors({"": np.array([1.5, 2.5])}, 2)


class Processes:
    """Zygotes, and runners made over them; remembers what was printed and what was observed."""

    def __init__(self, scratch: Path, start: Literal["fork", "spawn"] = "fork") -> None:
        self.zygotes = Zygotes(scratch=scratch, sink=lambda line: self.zygote_lines.append(line))
        self.start = start
        self.zygote_lines: list[str] = []
        self.lines: list[str] = []
        self.observed: list[tuple[str, str]] = []
        self.runners: list[ProcessRunner] = []

    def runner(self, package: Package, **options: Any) -> ProcessRunner:
        options.setdefault("environment", Environment(start=self.start))
        made = ProcessRunner(
            package, {}, zygotes=self.zygotes, name="m", version="1", sink=self.lines.append,
            observe=lambda what, reason: self.observed.append((what, reason)), **options,
        )  # fmt: skip
        self.runners.append(made)
        return made

    async def started(self, package: Package, **options: Any) -> ProcessRunner:
        runner = self.runner(package, **options)
        await runner.start()
        return runner

    async def close(self) -> None:
        await asyncio.gather(*(runner.close() for runner in self.runners))
        await self.zygotes.close()


def descriptors() -> Counter[str]:
    """What this process holds open, by what it is: a path, `socket:[inode]`, `anon_inode:[pidfd]`."""
    held: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            held[os.readlink(f"/proc/self/fd/{number}")] += 1
        except FileNotFoundError:  # the listing's own, and what others closed meanwhile
            continue
    return held


@asynccontextmanager
async def processes(scratch: Path, start: Literal["fork", "spawn"] = "fork") -> AsyncIterator[Processes]:
    os.makedirs(scratch, exist_ok=True)
    before = set(descendants())
    opened = descriptors()
    made = Processes(scratch, start)
    try:
        yield made
    finally:
        await made.close()
    assert eventually(lambda: not set(descendants()) - before), "processes were left"
    if descriptors() - opened:
        gc.collect()  # closes unreferenced objects; too slow to run every time
    assert eventually(lambda: not descriptors() - opened), f"left open: {descriptors() - opened}"
    assert os.listdir(scratch) == [], "temporary directories were left"


def run(
    scratch: Path, work: Callable[[Processes], Awaitable[None]], start: Literal["fork", "spawn"] = "fork"
) -> None:
    async def main() -> None:
        async with processes(scratch, start) as made:
            await work(made)

    asyncio.run(asyncio.wait_for(main(), 180))


async def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Lets the loop turn until something has happened in another process."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not happen"
        await asyncio.sleep(0.005)
