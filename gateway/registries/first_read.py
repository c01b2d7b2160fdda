"""The first read of a registry: how a gateway starts when the registry answers, is slow, or is unavailable.
Knows the remembered content; must not know models or HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from gateway.registries.base import (
    Entries,
    Registry,
    RegistryMissing,
    RegistryUnavailable,
    Snapshot,
)
from gateway.registries.watcher import Watch
from gateway.state import LastSnapshot

log = logging.getLogger("gateway")

#: Seconds that the start waits for the registry's first answer.
FIRST_READ = 2.0


async def first_read(
    registry: Registry, watch: Watch, remembered: Callable[[], Awaitable[LastSnapshot | None]]
) -> None:
    """Reads the registry, or continues with its remembered content. The watcher keeps retrying a registry
    that does not answer; the gateway is not ready until it does. Raises RegistryError for a registry that
    cannot be used: a file that does not exist, a document that is not valid."""
    last = None
    if registry.partial:
        last = await remembered()
        if last is not None:
            registry.resume(Snapshot(Entries(last.entries), last.stamp))
    looking = watch.looking(quiet=True)
    await asyncio.wait({looking}, timeout=FIRST_READ)
    if watch.seen:
        return
    if last is None:
        last = await remembered()
    failure = watch.failure
    why = failure or f"no answer within {FIRST_READ:.0f} s"
    hint = RegistryUnavailable.hint if failure is None else failure.hint
    told = f". Hint: {hint}" if hint else ""
    if last is not None:
        age = time.time() - last.seen
        log.warning("cannot read the registry (%s): using its content of %.0f s ago%s", why, age, told)
        watch.take(Snapshot(Entries(last.entries), last.stamp), "registry", age=age)
    elif failure is not None and (
        isinstance(failure, RegistryMissing) or not isinstance(failure, RegistryUnavailable)
    ):
        raise failure
    else:
        log.error("cannot read the registry (%s): not ready until a read succeeds; trying again%s", why, told)
