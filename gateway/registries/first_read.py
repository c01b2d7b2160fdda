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
from loaders.spelling import few

log = logging.getLogger("gateway")

#: Seconds that the start waits for the registry's first answer.
FIRST_READ = 2.0
_SHOWN = 10


async def first_read(
    registry: Registry, watch: Watch, remembered: Callable[[], Awaitable[LastSnapshot | None]]
) -> None:
    """Reads the registry, or continues with its remembered content. The watcher keeps retrying a registry
    that does not answer; the gateway is not ready until it does. Raises RegistryError for a registry that
    cannot be used: a file that does not exist, a document that is not valid."""
    last = await remembered()  # first: what is read takes its place
    if registry.partial and last is not None:
        registry.resume(Snapshot(Entries(last.entries), last.stamp))
    looking = watch.looking(quiet=True)
    await asyncio.wait({looking}, timeout=FIRST_READ)
    if watch.content is not None:
        if last is not None and not registry.partial:
            _warn_of_missing(last, watch.content)
        return
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


def _warn_of_missing(last: LastSnapshot, now: Snapshot) -> None:
    """Logs which models were there at the last read of the gateway before, and are not now: nothing else says
    so, because they were never served here."""
    missing = sorted(last.entries.keys() - now.models.keys())
    if missing:
        log.warning(
            "the registry no longer has %d of the %d models that it had %.0f s ago: %s",
            len(missing), len(last.entries), time.time() - last.seen, few(missing, _SHOWN),
        )  # fmt: skip
