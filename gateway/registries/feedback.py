"""Writes back to the registry: observations that every gateway should know, and the status of versions for
their owners. Runs in the I/O pool. A registry that cannot be written never stops serving. Must not know the
rules of promotions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context

from gateway import backoff, events
from gateway.registries.base import Observation, Registry, RegistryError, RegistryReadOnly, Snapshot

log = logging.getLogger("gateway")


class Feedback:
    """`take` receives the snapshot that a write returns; `status`: whether refusals are written back."""

    def __init__(
        self, registry: Registry, io: Executor, *, take: Callable[[Snapshot], object], status: bool
    ) -> None:
        self._registry = registry
        self._io = io
        self._take = take
        self._status = status
        self._refusals: dict[tuple[str, str], tuple[str, str]] = {}
        #: The last verdict on each alias that the registry does not have yet.
        self._verdicts: dict[tuple[str, str], Observation] = {}

    def record(self, observation: Observation) -> None:
        """Writes an observation. If the registry does not accept it, logs a warning; a verdict is then
        written again later, until the registry has it or a newer verdict follows."""
        if observation.verdict is not None:
            self._verdicts[observation.name, observation.alias] = observation
        self._submit(observation, 0)

    def _submit(self, observation: Observation, failures: int) -> None:
        loop = asyncio.get_running_loop()

        def record() -> None:
            try:
                snapshot = self._registry.record(observation)
            except RegistryError as error:
                if not failures:
                    log.warning(
                        "%s@%s: cannot write to the registry: %s",
                        observation.name, observation.alias, error,
                    )  # fmt: skip
                again = not isinstance(error, RegistryReadOnly)
                loop.call_soon_threadsafe(self._ended, observation, failures + 1 if again else None)
            else:
                loop.call_soon_threadsafe(self._ended, observation, None)
                if snapshot is not None:
                    loop.call_soon_threadsafe(self._take, snapshot)

        with suppress(RuntimeError):  # the gateway stops
            self._io.submit(copy_context().run, record)

    def _ended(self, observation: Observation, failures: int | None) -> None:
        """A write is over. `failures`: so many in a row; None: it is not tried again."""
        key = observation.name, observation.alias
        if self._verdicts.get(key) is not observation:
            return  # no verdict, or a newer one
        if failures is None:
            del self._verdicts[key]
            return
        loop = asyncio.get_running_loop()
        loop.call_later(backoff.pause(failures), self._again, observation, failures)

    def _again(self, observation: Observation, failures: int) -> None:
        if self._verdicts.get((observation.name, observation.alias)) is observation:
            self._submit(observation, failures)

    def notice(self, event: events.Event) -> None:
        """Writes that a version was refused, and later that it serves after all. Writes each refusal once,
        because a refused version is retried repeatedly."""
        if not self._status:
            return
        record = self._registry.record_status
        match event:
            case events.SwapRefused(name, alias, version, reason):
                if self._refusals.get((name, alias)) != (version, reason):
                    self._refusals[name, alias] = (version, reason)
                    self._io.submit(record, name, alias, version, f"refused: {reason}")
            case events.RolloutChanged(name, alias, version, _, phase, why) if phase in (
                "rolled_back",
                "aborted",
            ):
                self._refusals[name, alias] = (version, why or "")
                self._io.submit(record, name, alias, version, f"rolled back: {why}")
            case events.Swapped(name, alias, version):
                refused = self._refusals.pop((name, alias), None)
                if refused is not None and refused[0] == version:
                    self._io.submit(record, name, alias, version, "serving")
            case _:
                pass

    def forget(self, names: set[str]) -> None:
        """Forgets what was written about these models."""
        self._refusals = {key: refused for key, refused in self._refusals.items() if key[0] not in names}
