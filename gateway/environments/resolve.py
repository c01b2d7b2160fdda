"""Resolves the requirements of a package to a lock: chooses the interpreter and the versions.

Packages pin only their direct requirements. The others are resolved as of the day when the package was
written, within the bounds of the mlflow that wrote it, because the package was tested with those versions.
For an index without upload times the day is left out, and the lock says so. Must not know models or policies.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

from gateway.environments import lock as locks
from gateway.environments.interpreters import Interpreter, Interpreters, Minor, missing, named
from gateway.environments.lock import Lock, LockError, Wanted
from gateway.environments.uv import Uv, UvError

Progress = Callable[[str], None]

_EXCLUDED: Final = ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
"""XGBoost and LightGBM install these (up to a gigabyte) for training on several accelerators."""
_TRIES: Final = 4
_NEXT: Final = frozenset({"no wheels", "unsatisfiable"})
"""The kinds of failure that another interpreter may avoid."""


class Resolver:
    """`wheels_only`: nothing is compiled. `gpu`: builds for accelerators may be installed."""

    def __init__(
        self, uv: Uv, interpreters: Interpreters, *, wheels_only: bool = True, gpu: bool | None = None
    ) -> None:
        self._uv = uv
        self._interpreters = interpreters
        self._wheels_only = wheels_only
        self._gpu = Path("/dev/nvidiactl").exists() if gpu is None else gpu

    def resolve(self, wanted: Wanted, progress: Progress = lambda step: None) -> Lock:
        """Blocks. Raises LockError, which says what can be done, and UvError if uv or the index failed."""
        failures: list[tuple[Interpreter, UvError]] = []
        for interpreter in self.interpreters(wanted)[:_TRIES]:
            progress(f"resolving for Python {named(interpreter.minor)}")
            try:
                lock = self._resolved(wanted, interpreter)
            except UvError as error:
                if error.kind not in _NEXT:
                    raise
                failures.append((interpreter, error))
                continue
            self._check_builds(lock)
            return locks.restricted(lock, wanted.hashes)
        tried = ", ".join(named(interpreter.minor) for interpreter, _ in failures)
        raise LockError(f"its requirements cannot be installed for Python {tried}: {failures[0][1]}")

    def interpreters(self, wanted: Wanted) -> Sequence[Interpreter]:
        """The interpreters that it may run on, the best first. Raises LockError if there is none."""
        if wanted.exact:
            if wanted.python is None:
                raise LockError("it holds byte code, but does not record the Python version that wrote it")
            found = self._interpreters.find(wanted.python)
            if found is None:
                raise LockError(
                    f"it holds byte code of Python {named(wanted.python)}; {missing(wanted.python)}"
                )
            return [found]
        near = self._interpreters.nearest(wanted.python or _here())
        if not near:
            raise LockError(missing(wanted.python or _here()))
        return near

    def _resolved(self, wanted: Wanted, interpreter: Interpreter) -> Lock:
        try:
            return self._as_of(wanted, interpreter, wanted.created)
        except UvError as error:
            # The index gives no upload times, or has no files from before that day.
            if wanted.created is None or error.kind not in ("no upload times", "unsatisfiable", "no wheels"):
                raise
            try:
                lock = self._as_of(wanted, interpreter, None)
            except UvError:
                raise error from None
            return replace(lock, dated=False)

    def _as_of(self, wanted: Wanted, interpreter: Interpreter, day: datetime | None) -> Lock:
        with tempfile.TemporaryDirectory(prefix="lock-") as temporary:
            scratch = Path(temporary)
            common = ["--python", interpreter.path, "--quiet", "--no-header", "--no-annotate"]
            if self._wheels_only:
                common += ["--only-binary", ":all:"]
            if day is not None:
                common += ["--exclude-newer", day.isoformat().replace("+00:00", "Z")]
            bounds = list(wanted.constraints)
            if wanted.mlflow is not None and not wanted.keeps_mlflow:
                bounds = self._bounds(wanted, common, scratch) or bounds
            asked = _written(scratch / "requirements.in", wanted.requirements)
            excluded = _written(scratch / "excluded.in", _EXCLUDED)
            target = scratch / "pylock.toml"
            arguments = ["pip", "compile", asked, *common, "--excludes", excluded]
            arguments += ["--format", "pylock.toml", "--output-file", str(target)]
            if bounds:
                arguments += ["--constraints", _written(scratch / "constraints.in", bounds)]
            self._uv.run(*arguments)
            text = target.read_text(encoding="utf-8")
        return locks.parsed(text, interpreter.minor, interpreter.platform, dated=day is not None)

    def _bounds(self, wanted: Wanted, common: list[str], scratch: Path) -> list[str]:
        """The versions of a resolution that includes the mlflow that wrote the package: it bounds what mlflow
        and the model share. Empty if that resolution fails."""
        asked = [*wanted.requirements, f"mlflow=={wanted.mlflow}"]
        direct = locks.pins(wanted.requirements)
        excluded = [name for name in (*locks.MLFLOW_ONLY, *_EXCLUDED) if name not in direct]
        arguments = ["pip", "compile", _written(scratch / "with.in", asked), *common]
        arguments += ["--excludes", _written(scratch / "without.in", excluded)]
        if wanted.constraints:
            arguments += ["--constraints", _written(scratch / "own.in", wanted.constraints)]
        try:
            pinned = self._uv.run(*arguments).splitlines()
        except UvError as error:
            if error.kind not in _NEXT:
                raise
            return []
        return [line for line in pinned if "==" in line and not locks.MLFLOW & locks.pins([line]).keys()]

    def _check_builds(self, lock: Lock) -> None:
        """Raises LockError for builds that this machine cannot use."""
        heavy = [name for name in lock.packages if name.startswith("nvidia-c")]
        if heavy and not self._gpu:
            torch = lock.packages.get("torch", "")
            raise LockError(
                f"the configured index has torch {torch} only as a build for accelerators, and this machine"
                " has none; configure an index with CPU builds (UV_INDEX), or name an environment"
                " (environments.named)"
            )


def _here() -> Minor:
    return sys.version_info[:2]


def _written(file: Path, lines: Sequence[str]) -> str:
    """Raises LockError for a line that could be anything but a requirement."""
    file.write_text("".join(f"{locks.checked(line)}\n" for line in lines), encoding="utf-8")
    return str(file)
