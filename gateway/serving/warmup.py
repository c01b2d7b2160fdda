"""Warm-up: a loaded model answers its own saved example before it serves.

The answer shows that the model works, whether it is what the package says, and whether rows of several
requests may be merged. Knows packages and runners; must not know servables, memory or aliases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cachetools import LRUCache

from gateway.runners.base import ModelError
from gateway.serving.batching import agree, repeated
from loaders import madeup
from loaders.enforcement import Enforced, InvalidInput, RawInput, Rules, enforce
from loaders.example import MOST_SERVED
from loaders.package import Package, PackageError

if TYPE_CHECKING:
    from gateway.artifacts.packages import Prepared
    from gateway.runners.base import Runner
    from loaders.batch import Batch

#: Warnings about a version in `status`, until its owner or the operator changes it.
NO_SIGNATURE: Final = "it has no signature: the model gets inputs unchecked"
BARE: Final = (
    "it is a model file without an MLmodel: its signature is what the file itself states, and it runs in "
    "this interpreter, whatever wrote it"
)
NOTHING_STATED: Final = (
    "its file states no names and types of inputs, so it has no signature: the model gets inputs unchecked"
)
NO_WARM_UP: Final = "warm_up is off: the model serves without having answered its own example"
#: Of a framework that does not fit the model, whatever the row.
_NEVER: Final = ("AttributeError", "ImportError", "ModuleNotFoundError")
#: The results of so many packages are kept.
_KEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class Warmed:
    """What a warm-up showed about a model. `merges`: its requests may be merged. `misfits`: how the answer to
    its example differs from its output schema; None if it has not answered one."""

    merges: bool
    warnings: tuple[str, ...]
    misfits: tuple[str, ...] | None = None


class WarmUps:
    """Warms up models. `disk`: the executor that reads files."""

    def __init__(self, disk: Executor | None = None) -> None:
        self._disk = disk
        self._known: LRUCache[tuple[object, ...], Warmed] = LRUCache(_KEPT)

    def __repr__(self) -> str:
        return f"<WarmUps {len(self._known)} known>"

    async def run(self, runner: Runner, prepared: Prepared, rules: Rules, *, wanted: bool = True) -> Warmed:
        """`wanted`: False loads a model without a warm-up. A model that raises on its example is refused
        (ModelError). An example that does not fit the model's own signature shows nothing about the model: it
        is skipped with a warning.

        A model whose runner says what else decides its answers (`Runner.alike`), and that executes only
        framework classes, is warmed up once: the answer would be the same, and the frameworks are warm.
        """
        alike = runner.alike if prepared.verdict.harmless else None
        if alike is None:
            return await self._run(runner, prepared, rules, wanted)
        key = (prepared.digest, alike, rules[1:], prepared.warnings, wanted)
        warmed = self._known.get(key)
        if warmed is None:
            warmed = await self._run(runner, prepared, rules, wanted)
            if runner.alike == alike:  # else it has moved meanwhile
                self._known[key] = warmed
        return warmed

    async def _run(self, runner: Runner, prepared: Prepared, rules: Rules, wanted: bool) -> Warmed:
        warnings = list(prepared.warnings)
        if prepared.package.bare is not None:
            warnings.append(BARE)
        elif prepared.accepted is not None:
            inputs = ", ".join(map(str, prepared.accepted.inputs or ()))
            warnings.append(f"the model takes more than its signature says: {inputs}")
        if prepared.signature is None:
            warnings.append(NO_SIGNATURE if prepared.package.bare is None else NOTHING_STATED)
        if not wanted:
            return Warmed(runner.merges, (*warnings, NO_WARM_UP))
        try:
            enforced = await self._on_disk(_example, prepared.package, rules)
        except PackageError as error:
            warnings.append(f"the saved input example cannot be read: {error}")
            enforced = None
        except InvalidInput:
            warnings.append("the saved input example does not fit the model's signature: no warm-up")
            return Warmed(runner.merges, tuple(warnings))
        if enforced is None:
            warnings += await self._made_up(runner, prepared, rules)
            return Warmed(runner.merges, tuple(warnings))
        try:
            answer = await runner.prewarm(enforced.batch, enforced.params)
        except ModelError as error:
            if not error.unsuitable:
                raise
            warnings.append(f"the saved input example does not suit the model: no warm-up ({error.shown})")
            return Warmed(runner.merges, tuple(warnings))
        differing = prepared.check_answer(answer)
        runtime = prepared.runtime
        if differing and runtime is not None and runtime.warning is not None:
            raise ModelError(f"in this environment, which is not its own, {differing[0]}")
        misfits = tuple(prepared.check_output(answer))
        warnings += [*misfits, *differing]
        merges = runner.merges and await _merging_is_safe(runner, enforced.batch, enforced.params)
        if runner.merges and not merges:
            warnings.append("answers change when rows are merged: requests are run one by one")
        return Warmed(merges, tuple(warnings), misfits)

    async def _made_up(self, runner: Runner, prepared: Prepared, rules: Rules) -> list[str]:
        """For a model without an example: predicts a made-up row, which shows whether the framework can
        answer. The row may not suit the model, so a failure is a warning. If the framework itself does not
        match (AttributeError, ImportError), no row can work: raises ModelError. Only frameworks get such a
        row: a package's own code may do anything with it."""
        if prepared.needs is None or prepared.needs.facts.custom:
            return []
        try:
            enforced = await self._on_disk(_row, runner.known, rules)
        except InvalidInput:
            return []
        if enforced is None:
            return []
        try:
            await runner.prewarm(enforced.batch, enforced.params)
        except ModelError as error:
            if str(error).startswith(_NEVER):
                raise
            return [f"it has no input example, and a made-up row does not suit it ({error.shown})"]
        return []

    async def _on_disk(self, function: Callable[..., Enforced | None], *arguments: object) -> Enforced | None:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)


def _example(package: Package, rules: Rules) -> Enforced | None:
    """The saved example, enforced; None without one. Blocks. Raises PackageError and InvalidInput."""
    example, params = package.example_input(MOST_SERVED)
    return None if example is None else _enforced(example, params, rules)


def _row(known: Mapping[str, Any], rules: Rules) -> Enforced | None:
    """A made-up row, enforced; None where there can be none. Blocks. Raises InvalidInput."""
    made = madeup.row(rules[0], known)
    return None if made is None else _enforced(made, None, rules)


def _enforced(example: RawInput, params: Any, rules: Rules) -> Enforced:
    signature, mode, type_hints, _ = rules
    return enforce(signature, example, params, mode, type_hints=type_hints)


async def _merging_is_safe(runner: Runner, batch: Batch, params: Mapping[str, Any]) -> bool:
    """Whether the first row gets the same answer alone, twice and eight times."""
    one, *many = (repeated(batch, times) for times in (1, 2, 8))
    if one is None:
        return True
    rows = [batch for batch in many if batch is not None]
    if len(rows) < len(many):
        return False
    # Together, because each wait for the process takes longer than an answer.
    asked = [asyncio.ensure_future(runner.prewarm(batch, params)) for batch in (one, *rows)]
    try:
        single = await asked[0]
        for batch, future in zip(rows, asked[1:], strict=True):
            try:
                answer = await future
            except ModelError:
                return False
            if not agree(single, answer, batch.rows or 0):
                return False
        return True
    finally:
        for future in asked:
            future.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
