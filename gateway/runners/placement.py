"""Where a version runs, and why: in processes of its own or in this one, with which limits.

`auto` runs every model outside this process. A file that executes nothing can still crash a library, hang or
take memory, and only a process can be ended. `inline` is the operator's choice: its models are not contained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway import cgroup
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment, elsewhere, preload_for
from gateway.runners.inline import InlineRunner
from gateway.runners.process import ProcessRunner
from gateway.runners.zygote import Zygotes
from gateway.settings import Settings, SettingsError
from loaders.model import environment_config

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.runners.base import Runner

#: Told what happened to a version's processes: (version, what, reason).
Observe = Callable[["Prepared", str, str], None]


_NOT_CONTAINED = "it runs in the gateway's process and is not contained: a crash of it ends the gateway"


@dataclass(frozen=True, slots=True)
class Place:
    """A decision: `isolation` is inline or process, `reason` says why, for an operator."""

    isolation: str
    reason: str


class Placement:
    """Opens runners. `cpus` is what this process may use, as its control group says."""

    def __init__(
        self, settings: Settings, zygotes: Zygotes, observe: Observe, *, cpus: int | None = None
    ) -> None:
        self._settings = settings
        self._zygotes = zygotes
        self._observe = observe
        self._cpus = cpus or cgroup.cpus()
        try:
            self._config = environment_config(os.environ)
        except ValueError as error:
            raise SettingsError([("environment", str(error))]) from None

    def open(self, prepared: Prepared) -> Runner:
        """A runner that has not started."""
        version = prepared.version
        own = self._settings.for_model(version.name)
        config = {**self._config, **own.config}
        place = self.place(version.name)
        elsewhere_ = prepared.runtime is not None and prepared.runtime.python is not None
        if place.isolation == "inline" and not elsewhere_:  # another interpreter is another process
            return InlineRunner(
                prepared.package,
                config,
                threads=own.threads or self._cpus,
                timeout=own.timeout,
                max_answer=self._settings.max_answer_bytes,
                placement=place.reason,
            )
        processes = self._cpus if own.processes == "auto" else own.processes
        return ProcessRunner(
            prepared.package,
            config,
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
            confinement=Confinement(
                user=self._settings.model_user, network=own.network, readable=tuple(own.readable)
            ),
            observe=lambda what, reason: self._observe(prepared, what, reason),
            environ=os.environ,
            placement=place.reason,
        )

    def place(self, name: str) -> Place:
        """Where the versions of a model run."""
        chosen = self._settings.for_model(name).isolation or "auto"
        if chosen == "inline":
            return Place("inline", f"isolation: inline; {_NOT_CONTAINED}")
        if chosen == "process":
            return Place("process", "isolation: process")
        if sys.platform != "linux":
            return Place("inline", f"isolation: auto, and model processes need Linux; {_NOT_CONTAINED}")
        return Place("process", "isolation: auto runs every model outside the gateway's process")

    def _environment(self, prepared: Prepared) -> Environment:
        start, runtime = self._settings.start, prepared.runtime
        if runtime is None or runtime.python is None:
            return Environment(preload=preload_for(prepared.package.loader_module), start=start)
        return elsewhere(runtime.python, runtime.distributions, start)
