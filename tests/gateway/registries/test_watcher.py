"""The registry looked at again and again: which names of a large one are followed, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.errors import Problem
from gateway.events import Event, RegistryFailed, RegistryRead
from gateway.names import Reference
from gateway.registries.base import (
    LONGEST_PAUSE,
    Alias,
    Model,
    RegistryInvalid,
    RegistryUnavailable,
    Snapshot,
    Version,
)
from gateway.registries.halves import ReadOnly
from gateway.registries.watcher import FORGET_UNUSED, SILENT_AFTER, Watch
from tests.support.controlled import Clock


class Names(ReadOnly):
    """A registry that has every requested name."""

    identity = target = "names"
    poll_interval = 5.0
    longest_pause = LONGEST_PAUSE
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


@pytest.mark.anyio
async def test_unused_names_are_not_polled_until_they_are_requested_again() -> None:
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


class Failing(Names):
    """A registry that fails as long as it is told to, and may ask to be left alone."""

    def __init__(self, retry_after: float | None = None) -> None:
        super().__init__()
        self.failing = True
        self.retry_after = retry_after

    def read(self) -> Snapshot:
        if self.failing:
            self.asked.append("read")
            raise RegistryUnavailable("429", self.retry_after)
        return super().read()


@pytest.mark.parametrize(("retry_after", "failures"), [(30.0, 1), (None, SILENT_AFTER)])
@pytest.mark.anyio
async def test_a_registry_that_fails_is_left_alone_and_its_recovery_is_said(
    retry_after: float | None, failures: int
) -> None:
    registry, clock = Failing(retry_after), Clock()
    said: list[Event] = []
    with ThreadPoolExecutor(1) as io:
        watch = Watch(
            registry, io, interval=5.0, clock=clock, emit=said.append,
            apply=lambda snapshot, moved_by: None, remember=lambda snapshot: None,
        )  # fmt: skip
        for _ in range(failures):
            with pytest.raises(Problem) as error:
                await watch.look()
        assert error.value.retry_after is not None
        assert error.value.retry_after >= (retry_after or 5.0)
        with pytest.raises(Problem) as left:
            await watch.find(Reference("new"))
        assert left.value.code == "REGISTRY_UNAVAILABLE"
        assert registry.asked == ["read"] * failures
        registry.failing = False
        await watch.ask(Reference("new"))  # an operator's verb asks all the same
        await watch.look()
        assert await watch.find(Reference("another"))
    failed = [event for event in said if isinstance(event, RegistryFailed)]
    assert [event.repeated for event in failed] == [n > 0 for n in range(failures)]
    assert any(isinstance(event, RegistryRead) and event.recovered for event in said)


class Wrong(Names):
    """A registry that answers, with a document that is not valid."""

    def read(self) -> Snapshot:
        raise RegistryInvalid("names", [("models", "a typo")])


@pytest.mark.parametrize(("registry", "pause"), [(Wrong(), 5.0), (Failing(), LONGEST_PAUSE)])
@pytest.mark.anyio
async def test_only_a_registry_that_does_not_answer_is_read_more_rarely(
    registry: Names, pause: float
) -> None:
    with ThreadPoolExecutor(1) as io:
        watch = Watch(
            registry, io, interval=5.0, clock=Clock(),
            apply=lambda snapshot, moved_by: None, remember=lambda snapshot: None,
        )  # fmt: skip
        for _ in range(10):
            with pytest.raises(Problem) as error:
                await watch.look()
    assert error.value.retry_after is not None
    assert 0.8 * pause <= error.value.retry_after <= pause
    assert ("correct the registry" in (error.value.hint or "")) == isinstance(registry, Wrong)


@pytest.mark.anyio
async def test_a_read_that_succeeds_ends_the_pause_that_the_server_requested() -> None:
    registry = Failing(retry_after=600.0)
    registry.models["iris"] = Model("iris", {}, {})
    with ThreadPoolExecutor(1) as io:
        watch = Watch(
            registry, io, interval=0.01,
            apply=lambda snapshot, moved_by: None, remember=lambda snapshot: None,
        )  # fmt: skip
        polling = asyncio.ensure_future(watch.run())
        async with asyncio.timeout(90):
            while registry.asked != ["read"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            registry.failing = False
            await watch.look()  # an operator asks
            while registry.asked.count("iris") < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        polling.cancel()
        await asyncio.wait({polling})


class Broken(Names):
    """A registry with a bug in what it reads about one name."""

    def find(self, reference: Reference) -> Snapshot:
        raise RecursionError


@pytest.mark.anyio
async def test_an_answer_that_cannot_be_read_is_the_registrys_fault() -> None:
    said: list[Event] = []
    with ThreadPoolExecutor(1) as io:
        watch = Watch(
            Broken(), io, interval=5.0, clock=Clock(), emit=said.append,
            apply=lambda snapshot, moved_by: None, remember=lambda snapshot: None,
        )  # fmt: skip
        with pytest.raises(Problem) as error:
            await watch.find(Reference("iris"))
    assert error.value.code == "REGISTRY_UNAVAILABLE"
    assert [type(event) for event in said] == [RegistryFailed]
