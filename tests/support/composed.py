"""Aliases, promotions, views and the service over a real registry file, with controlled loaders below."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gateway.aliasmemory import AliasMemory
from gateway.names import Reference
from gateway.registries.base import Version
from gateway.registries.file import FileRegistry
from gateway.registries.watcher import Watch
from gateway.rollouts.aliases import Aliases
from gateway.rollouts.gates import Gates
from gateway.rollouts.preload import Preload
from gateway.rollouts.promotions import Promotions
from gateway.rollouts.residency import Residency
from gateway.service import Answer, Inference, Service
from gateway.state import State
from gateway.views import Views
from loaders.enforcement import RawInput
from tests.support.controlled import Behaviour, Bench

CHAMPION = Reference("iris", alias="champion")

_DOCUMENT = """\
version: 1
models:
  iris:
    versions:
      1: {source: models/1}
      2: {source: models/2}
      3: {source: models/3}
    aliases: {champion: 1}
"""


class Composed:
    """The parts of a gateway that move and show aliases. iris has the versions 1 to 3, 1 is the champion."""

    def __init__(
        self, directory: Path, io: ThreadPoolExecutor, preload: tuple[str, ...] = (), **service: Any
    ) -> None:
        self.file = directory / "registry.yaml"
        self.file.write_text(_DOCUMENT)
        self.bench = Bench(directory / "package")
        manager = self.bench.manager
        self.registry = FileRegistry(str(self.file))
        self.state = State(directory / "state")
        self.aliases = Aliases(
            manager,
            Gates(manager, prepare=self.bench.prepare),
            memory=AliasMemory(self.state, "test", lambda write: write()),
            emit=self.bench.events.append,
        )
        self.watch = Watch(
            self.registry, io, interval=3600, apply=self.aliases.apply, remember=lambda snapshot: None
        )
        self.promotions = Promotions(
            self.aliases,
            manager,
            self.registry,
            io,
            ask=self.watch.ask,
            take=self.watch.take,
            quiet=self.bench.prepare,
        )
        self.preload = Preload.parsed(preload)
        self.residency = Residency(self.aliases, manager, self.watch, self.registry, io, pending=self.preload)
        self.views = Views(
            self.aliases,
            manager,
            self.watch,
            self.registry,
            io,
            trials=self.promotions.trials,
            prepare=self.bench.prepare,
            fetching={},
            preload=self.preload,
            clock=self.bench.clock,
        )
        self.service = Service(self.aliases, manager, emit=self.bench.events.append, **service)

    def version(self, number: int) -> Version:
        return self.aliases.snapshot.models["iris"].versions[str(number)]

    def of(self, number: int) -> Behaviour:
        return self.bench.behaviour(self.version(number))

    async def ask(self, reference: Reference | None = CHAMPION, **more: Any) -> tuple[Answer, Inference]:
        """One request with one row. Raises Problem."""
        inference = Inference(reference, RawInput("tensors", {"x": np.zeros(1)}), **more)
        return await self.service.predict(inference), inference

    async def answers(self) -> str:
        """The number of the version that answers for the champion."""
        _, inference = await self.ask()
        assert inference.record.version is not None
        return inference.record.version.version

    def written(self) -> str:
        """Returns the version that the registry file names as champion."""
        return self.registry.read().models["iris"].aliases["champion"].version


@asynccontextmanager
async def composed(directory: Path, **more: Any) -> AsyncIterator[Composed]:
    """The parts, with the registry read once."""
    with ThreadPoolExecutor(2) as io:
        parts = Composed(directory, io, **more)
        try:
            await parts.watch.look()
            yield parts
        finally:
            await parts.aliases.close()
            await parts.bench.manager.close()
            parts.state.close()
            parts.registry.close()
