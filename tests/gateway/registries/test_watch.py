"""The registry looked at again and again: which names of a large one are followed, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from gateway.names import Reference
from gateway.registries.base import Alias, Model, ReadOnly, Snapshot, Version
from gateway.registries.watcher import FORGET_UNUSED, Watch
from tests.support.controlled import Clock


class Names(ReadOnly):
    """A registry that has whatever name it is asked for."""

    identity = target = "names"
    poll_interval = 5.0
    partial = True
    lasting = True
    why_not = "nothing is written here"

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.changes = 0
        self.asked: list[str] = []

    def read(self) -> Snapshot:
        self.asked += self.models
        return self.known()

    def find(self, reference: Reference) -> Snapshot:
        name = reference.name
        self.asked.append(name)
        self.models[name] = Model(name, {"1": Version(name, "1", "/1")}, {"champion": Alias("1")})
        self.changes += 1
        return self.known()

    def known(self) -> Snapshot:
        return Snapshot(dict(self.models), str(self.changes))

    def resume(self, snapshot: Snapshot) -> None:
        self.models.update(snapshot.models)

    def forget(self, names: Collection[str]) -> None:
        self.models = {name: model for name, model in self.models.items() if name not in names}
        self.changes += 1

    def listing(self, name: str | None = None) -> Snapshot:
        return self.known()

    def record_digest(self, version: Version, digest: str) -> None: ...

    def record_status(self, name: str, alias: str, version: str, status: str) -> None: ...

    def close(self) -> None: ...


def test_names_nobody_uses_are_polled_no_more_until_they_are_asked_for_again() -> None:
    async def main() -> None:
        registry, clock = Names(), Clock()
        loaded = {"loaded"}
        applied: list[set[str]] = []
        forgotten: list[set[str]] = []
        saved: list[set[str]] = []
        with ThreadPoolExecutor(1) as io:
            watch = Watch(
                registry, io, interval=5.0, clock=clock,
                apply=lambda snapshot, moved_by: applied.append(set(snapshot.models)),
                remember=lambda snapshot: saved.append(set(snapshot.models)),
                in_use=lambda: loaded, forget=forgotten.append,
            )  # fmt: skip
            for name in ("loaded", "asked", "idle"):
                assert await watch.find(Reference(name))
            await watch.look()
            clock.now += FORGET_UNUSED - 1
            await watch.ask(Reference("asked"))
            await watch.look()
            assert forgotten == []

            clock.now += 2
            await watch.look()
            assert forgotten == [{"idle"}]
            assert applied[-1] == saved[-1] == {"loaded", "asked"}
            registry.asked.clear()
            await watch.look()
            assert registry.asked == ["loaded", "asked"]

            assert await watch.find(Reference("idle"))
            assert applied[-1] == {"loaded", "asked", "idle"}
            loaded.clear()
            clock.now += FORGET_UNUSED + 1
            await watch.look()
            assert forgotten[1:] == [{"loaded", "asked", "idle"}]

    asyncio.run(main())
