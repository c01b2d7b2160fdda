"""The gates of a promotion, run here: would a version load and answer in this place, and may it take over.

For commands that change a registry without a gateway beside it. The same parts decide as in a running
gateway: `packages` accepts the files, `rollout` compares the signatures, a `servable` loads and warms up.
Knows no command line and writes nothing.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gateway.artifacts.cache import Artifacts
from gateway.artifacts.packages import Packages
from gateway.artifacts.sources import sources_for
from gateway.errors import Problem
from gateway.registries.base import Model, NotInRegistry, RegistryError
from gateway.rollouts import policies
from gateway.rollouts.gates import refusals
from gateway.runners.base import FAILURES
from gateway.runners.placement import Placement
from gateway.runners.zygote import Zygotes
from gateway.serving.servable import Servable

if TYPE_CHECKING:
    from gateway.registries.base import Version
    from gateway.settings import Settings
    from loaders.signature import Signature


def gates(model: Model, alias: str, version: str, settings: Settings, *, back: bool = False) -> list[str]:
    """Takes a version through the gates of an alias. Returns why present callers would not be understood by
    it, which an operator may overrule; `back`: that is not asked, for it has served before.

    Raises Problem where it cannot be loaded or does not answer its example (nobody may overrule that), and
    NotInRegistry for a version that is not there.
    """
    if version not in model.versions:
        known = ", ".join(sorted(model.versions, key=int)) or "none"
        message = f"{model.name} has no version {version}"
        raise NotInRegistry("VERSION_NOT_FOUND", message, f"versions of {model.name}: {known}")
    standing = model.aliases.get(alias)
    old = None if standing is None else model.versions.get(standing.version)
    if standing is not None and version in standing.previous:
        back = True
    return asyncio.run(_gates(model.versions[version], None if back else old, model, settings))


async def _gates(new: Version, old: Version | None, model: Model, settings: Settings) -> list[str]:
    with ThreadPoolExecutor(2) as io:
        registry = settings.registry or ""
        sources = sources_for(registry, settings.artifact_sources)
        artifacts = Artifacts(settings.cache_dir, settings.disk_limit, sources)
        packages = Packages(artifacts, io, io, policy=policies.formats(settings))
        prepared = await packages.get(new)
        reasons: list[str] = []
        if old is not None and old != new:
            policy, wrong = policies.rollout(settings, model)
            if wrong is not None:
                raise RegistryError(wrong)
            reasons = refusals(policy, await _signature(old, packages), prepared.package.signature)
        await _load(new, packages, settings)
        return reasons


async def _signature(old: Version, packages: Packages) -> Signature | None:
    """What the version in place takes; None where its files are gone: there is nothing to compare with."""
    try:
        return (await packages.get(old)).package.signature
    except Problem:
        return None


async def _load(new: Version, packages: Packages, settings: Settings) -> None:
    """Loads it where a gateway would, has it answer its saved example, and lets it go."""

    async def reserve(size: int) -> None:
        """There is nothing else here to share memory with."""

    zygotes = Zygotes()
    placement = Placement(settings, zygotes, lambda prepared, what, reason: None)
    servable = Servable(new, policies.options(settings, new.name))
    try:
        await servable.prepare(packages.get)
        await servable.load(reserve, placement.open, lambda rows, requests: None)
        await servable.close()
    except FAILURES as error:
        raise Problem("MODEL_UNAVAILABLE", f"{new} cannot be loaded: {error}") from None
    finally:
        await zygotes.close()
