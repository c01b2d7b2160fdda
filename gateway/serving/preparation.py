"""Finds where a version runs, the last step before it may be loaded.

Gates and views need only the facts about a package's environment. Only a load needs the environment itself:
then the interpreter is chosen, and the package's own environment is built if necessary. Must not know
aliases, and must not load anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.environments.choose import NoEnvironment
from gateway.errors import Problem, pathless
from loaders.spelling import few

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.environments.choose import Chooser
    from gateway.registries.base import Version

_MOST_NAMED = 5
_UNDATED = "its environment was resolved without its day: the index does not say when its files came"


class Preparation:
    """`served`: whether a version was served here before, or is a last good version in the registry.
    `reference`: the name of a version in commands; default: its `models:/` URI."""

    def __init__(
        self,
        chooser: Chooser,
        served: Callable[[Version], bool] = lambda version: False,
        reference: Callable[[Version], str] | None = None,
    ) -> None:
        self._chooser = chooser
        self._served = served
        self._reference = reference or _in_registry

    async def with_runtime(
        self, prepared: Prepared, say: Callable[[str], None] = lambda step: None
    ) -> Prepared:
        """The same package with its runtime; `say` is told each step of a build, by the thread that builds.
        Raises Problem MODEL_UNAVAILABLE with both versions and the commands that help; trying again is no
        help, and the problem says so."""
        version, needs = prepared.version, prepared.needs
        if needs is None or prepared.runtime is not None:
            return prepared
        try:
            runtime = await self._chooser.runtime(
                version.name,
                self._reference(version),
                needs,
                served=self._served(version),
                forced=prepared.forced,
                say=say,
            )
        except NoEnvironment as refused:
            message = f"{version} cannot be loaded: {pathless(str(refused))}"
            raise Problem("MODEL_UNAVAILABLE", message, hint=refused.hint, retryable=False) from None
        warnings: tuple[str, ...] = () if runtime.warning is None else (runtime.warning,)
        warnings += () if runtime.dated else (_UNDATED,)
        warnings += (_unchecked(runtime.unchecked),) if runtime.unchecked else ()
        return replace(prepared, runtime=runtime, warnings=warnings)


def _unchecked(names: Sequence[str]) -> str:
    named = few(names, _MOST_NAMED)
    return f"its uv.lock has no hash of {named}: whatever file the index has of that version was accepted"


def _in_registry(version: Version) -> str:
    return f"models:/{version.name}/{version.version}"
