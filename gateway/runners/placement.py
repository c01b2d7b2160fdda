"""Where a version runs: in this process or in processes of its own, with which limits. Made from settings.

`auto` runs ONNX here, because loading it executes nothing that its package brought, and everything else in
processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway import cgroup
from gateway.runners.confinement import Confinement
from gateway.runners.environments import Environment, preload_for
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
        if self.isolation(prepared) == "inline":
            return InlineRunner(
                prepared.package,
                config,
                threads=own.threads or self._cpus,
                timeout=own.timeout,
                max_answer=self._settings.max_answer_bytes,
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
            environment=Environment(
                preload=preload_for(prepared.package.loader_module), start=self._settings.start
            ),
            memory_limit=own.memory,
            max_answer=self._settings.max_answer_bytes,
            env_allow=own.env,
            confinement=Confinement(
                user=self._settings.model_user, network=own.network, readable=tuple(own.readable)
            ),
            observe=lambda what, reason: self._observe(prepared, what, reason),
            environ=os.environ,
        )

    def isolation(self, prepared: Prepared) -> str:
        """`inline` or `process`."""
        chosen = self._settings.for_model(prepared.version.name).isolation or "auto"
        if chosen != "auto":
            return chosen
        # Model processes are made with Linux's means; elsewhere everything runs here.
        return "inline" if prepared.flavor == "onnx" or sys.platform != "linux" else "process"
