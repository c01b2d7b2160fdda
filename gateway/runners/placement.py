"""Decides where a version runs, and why: in a pack, in its own processes or in this process, with which
limits.

`auto` runs every model outside this process, because a file that executes nothing can still crash a library,
hang or take memory, and only a process can be ended. Small models whose files execute only framework classes
share a pack. `inline` is the operator's choice: such models are not contained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetools import LRUCache

from gateway import cgroup
from gateway.runners import files
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment, allowed, elsewhere, preload_for
from gateway.runners.inline import InlineRunner
from gateway.runners.packed import PackedRunner, Record
from gateway.runners.packs import Packs
from gateway.runners.places import Conditions
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from gateway.settings import Settings, SettingsError
from loaders.model import environment_config

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.runners.base import Runner

#: Called for events of a version's processes: (version, what, reason).
Observe = Callable[["Prepared", str, str], None]


_NOT_CONTAINED = "it runs in the gateway's process and is not contained: a crash of it ends the gateway"


#: For this many packages it is remembered why they may not share a process.
RECORDS = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """A decision. `isolation`: inline, process or pack. `reason`: for operators. `group`: the operator's name
    of the pack, or empty."""

    isolation: str
    reason: str
    group: str = ""


class Placement:
    """Opens runners. `packs`: None runs every model alone, for cases where each is loaded only once. `cpus`:
    the processors that this process may use. `teams`: whose a model is."""

    def __init__(
        self,
        settings: Settings,
        zygotes: Zygotes,
        observe: Observe,
        *,
        packs: Packs | None = None,
        cpus: int | None = None,
        teams: Callable[[str], frozenset[str]] = lambda model: frozenset(),
    ) -> None:
        self._settings = settings
        self._zygotes = zygotes
        self._observe = observe
        self._packs = packs
        self._teams = teams
        self._cpus = cpus or cgroup.cpus()
        self._records: LRUCache[str, Record] = LRUCache(RECORDS)
        try:
            self._config = environment_config(os.environ)
        except ValueError as error:
            raise SettingsError([("environment", str(error))]) from None

    def open(self, prepared: Prepared) -> Runner:
        """Creates a runner that has not started."""
        own = self._settings.for_model(prepared.version.name)
        config = {**self._config, **own.config}
        place = self.place(prepared)
        elsewhere_ = prepared.runtime is not None and prepared.runtime.python is not None
        if place.isolation == "inline" and not elsewhere_:  # another interpreter is another process
            return InlineRunner(
                prepared.package,
                config,
                threads=own.threads or self._cpus,
                timeout=own.timeout,
                max_answer=self._settings.max_answer_bytes,
                placement=place.reason,
                harmless=prepared.verdict.harmless,
            )
        if place.isolation != "pack" or self._packs is None:
            return self._alone(prepared, place.reason)
        record = self._records.setdefault(prepared.digest, Record())
        return PackedRunner(
            prepared.package,
            config,
            packs=self._packs,
            conditions=self.conditions(prepared, place.group),
            alone=lambda reason: self._alone(prepared, reason),
            record=record,
            timeout=own.timeout,
            load_timeout=own.load_timeout,
            observe=lambda what, reason: self._observe(prepared, what, reason),
            placement=place.reason,
        )

    def conditions(self, prepared: Prepared, group: str) -> Conditions:
        """What is equal for all models of its pack. `group`: the operator's name of the pack, or empty."""
        own = self._settings.for_model(prepared.version.name)
        return Conditions(
            group=group,
            environment=self._environment(prepared),
            threads=own.threads or self._cpus,
            variables=tuple(sorted(allowed(os.environ, own.env).items())),
            confinement=self._confinement(prepared),
            max_answer=self._settings.max_answer_bytes,
            teams=self._teams(prepared.version.name),
        )

    def _alone(self, prepared: Prepared, reason: str) -> ProcessRunner:
        version = prepared.version
        own = self._settings.for_model(version.name)
        processes = self._cpus if own.processes == "auto" else own.processes
        return ProcessRunner(
            prepared.package,
            {**self._config, **own.config},
            zygotes=self._zygotes,
            name=version.name,
            version=version.version,
            processes=processes,
            threads=own.threads or max(1, self._cpus // processes),
            timeout=own.timeout,
            load_timeout=own.load_timeout,
            environment=self._environment(prepared),
            memory_limit=own.memory,
            max_answer=self._settings.max_answer_bytes,
            env_allow=own.env,
            confinement=self._confinement(prepared),
            observe=lambda what, why: self._observe(prepared, what, why),
            environ=os.environ,
            placement=reason,
        )

    def _environment(self, prepared: Prepared) -> Environment:
        start, runtime = self._settings.start, prepared.runtime
        if runtime is None or runtime.python is None:
            return Environment(preload=preload_for(prepared.package.loader_module), start=start)
        return elsewhere(runtime.python, runtime.distributions, start)

    def _confinement(self, prepared: Prepared) -> Confinement:
        own = self._settings.for_model(prepared.version.name)
        return Confinement(
            user=self._settings.model_user,
            network=own.network,
            readable=tuple(own.readable),
            disk=own.disk or files.default_limit(),
        )

    def place(self, prepared: Prepared) -> Place:
        """Decides where a version runs."""
        own = self._settings.for_model(prepared.version.name)
        chosen = own.isolation or "auto"
        if chosen == "inline":
            return Place("inline", f"isolation: inline; {_NOT_CONTAINED}")
        if chosen == "process":
            return Place("process", "isolation: process")
        if sys.platform != "linux":
            return Place("inline", f"isolation: auto, and model processes need Linux; {_NOT_CONTAINED}")
        if own.processes != 1:
            return Place("process", f"isolation: auto, with processes: {own.processes}")
        if own.memory is not None:
            return Place("process", "isolation: auto, with a memory limit of its own")
        if own.pack is not None:
            return Place("pack", f"pack: {own.pack}", own.pack)
        verdict = prepared.verdict
        if not verdict.harmless:
            return Place("process", f"isolation: auto; {verdict.reason}")
        most = self._settings.pack_bytes
        for size, what in ((prepared.size, "its files take"), (prepared.estimate, "it takes about")):
            if size > most:
                return Place(
                    "process", f"isolation: auto; {what} {size} bytes, more than pack_bytes ({most})"
                )
        return Place("pack", f"isolation: auto; {verdict.reason}, and it is small")
